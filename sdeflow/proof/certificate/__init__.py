r"""The certificate: which identities the derived objects satisfy, each checked, and to which residual.

What solvers, scores and likelihoods *use* is tested: the compiled coefficients, kernel, drifts and draws; and what is
*shown*: every formula and equation. What they are tested *with* shares no code with them: an oracle that integrates f
and g, as declared, on panels of its own (:mod:`sdeflow.proof.certificate.oracle`), distribution functions, SymPy's own
arithmetic in 30 digits, and central differences of eighth order.

    oracle        coefficients, moments, transition, marginal, prior, log-SNR, weightings, cutoff, bridge
    formulas      alpha, offset, var, std, mean, log_snr, weighting, drifts of bridge, reverse SDE and flow
    transport     Fokker-Planck, flow and reverse SDE for a kernel and a mixture
    draws         seeded draws of kernel, prior, lift and bridge by their distribution function
    of a state    mass, moment equations, the change of state, Bessel functions, bridges, where it is not Gaussian

A certificate is of the SDE with its present parameter values, at the points visited: a proof only where it says
"symbolic". Solvers, likelihoods and training are no part of it: their own tests measure them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sdeflow.proof.certificate import bridge, changes, density, draws, formulas, moments, transport
from sdeflow.proof.certificate.report import Certificate, Check
from sdeflow.proof.certificate.subject import CertifiedSDE, Subject
from sdeflow.symbolic.evaluate import require_time
from sdeflow.symbolic.patience import deadline

__all__ = ["CHECKS", "Certificate", "Check", "certify"]

_SECONDS = 8.0  # of processor time; what has begun then may take a little longer

_EQUATIONS = (
    ("the drifts", transport.drifts),
    ("the equations shown", transport.shown_equations),
)
_LAWS = ("the laws", transport.laws)
_OF_STATE = (
    ("the moments", density.moment_equations),
    ("the kernel's mass and moments", density.mass),
    ("the kernel's draws", draws.jacobian),
    ("the kernel's seeded draws", draws.other_draws),
)

CHECKS: dict[str, tuple[tuple[str, Callable[[Subject], None]], ...]] = {
    "affine": (
        ("f and g", moments.coefficients),
        ("the moments", moments.moments),
        ("the declared path", formulas.path),
        ("the kernel's density", density.gaussian),
        ("the transitions", moments.transitions),
        ("the log-SNR", moments.log_snr),
        ("the cutoff", moments.cutoff_rule),
        ("the priors", moments.marginals),
        ("the formulas shown", formulas.shown),
        ("the formulas' equations", formulas.identities),
        ("the weightings", formulas.weightings),
        ("the bridge's moments", bridge.bridge_moments),
        ("the bridge's paths", bridge.bridge_paths),
        ("the bridge's drift", bridge.bridge_drift),
        ("the seeded draws", draws.gaussian_draws),
        ("the lift", draws.lifted),
        ("the basis", moments.basis),
        *_EQUATIONS,
        _LAWS,
    ),
    "reducible": (
        *_OF_STATE,
        ("the change of state", changes.line),
        ("the bridge", changes.bridge),
        *_EQUATIONS,
        _LAWS,
    ),
    "pearson": (
        *_OF_STATE,
        ("the Bessel functions", changes.bessel),
        ("the bridge", changes.square_root_bridge),
        ("the cutoff", changes.clock),
        *_EQUATIONS,
        _LAWS,
    ),
    "general": (*_EQUATIONS, ("the laws", transport.no_law)),
}
"""What is checked of each kind of kernel, in order."""


ESSENTIAL = {
    "affine": ("f and g", "the moments"),
    "reducible": ("the change of state",),
    "pearson": ("the moments",),
    "general": ("the drifts",),
}
"""Without these checks a certificate of the kind is not true: what solvers compute with was not seen."""


def certify(sde: CertifiedSDE) -> Certificate:
    """Checks every identity that applies to ``sde``, mostly in about a second; what takes longer than ten is unchecked.

    Args:
        sde: an SDE; its ``kernel``, ``weighting``, ``prior`` and ``bridge`` are tested with its compiled equations.
    """
    with torch.no_grad(), deadline(_SECONDS):
        subject = Subject(sde)
        if subject.kind in ("reducible", "pearson") and sde.values.shape:
            return _by_entries(sde, subject)
        missing = []
        for name, check in CHECKS[subject.kind]:
            before = len(subject.unchecked)
            with subject.allowing(name):
                require_time()
                check(subject)
            unknown = any(w.startswith(f"{name}: ") for w in subject.unchecked[before:])
            if name in subject.broken or (unknown and name in ESSENTIAL[subject.kind]):
                missing.append(name)
    return Certificate(repr(sde), tuple(subject.checks), tuple(subject.unchecked), tuple(missing))


def _by_entries(sde: CertifiedSDE, subject: Subject) -> Certificate:
    """Of a kernel that is not Gaussian some entries of tensor parameters, each as an SDE of its own."""
    parts = []
    for entry in subject.some_entries:
        numbers = {symbol.name: value for symbol, value in subject.numbers_of(entry).items()}
        parts.append(certify(sde.with_params(**numbers)))
    rest = math.prod(sde.values.shape) - len(parts)
    reasons = dict.fromkeys([why for part in parts for why in part.unchecked])
    unchecked = [*reasons, *([f"{rest} of the entries of params"] if rest else [])]
    missing = dict.fromkeys(name for part in parts for name in part.missing)
    return Certificate(
        repr(sde), tuple(check for part in parts for check in part.checks), tuple(unchecked), tuple(missing)
    )
