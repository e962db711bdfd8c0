"""Random declarations of the whole grammar: each declared or refused within 3 s of processor time, its numbers finite.

``SDEFLOW_EXPRESSIONS=2000`` draws as many, to greater depth; the default is a dozen.
"""

import os
import signal
import traceback

import pytest
import torch
from expressions import Grammar
from problems import cpu_seconds

from sdeflow.errors import SdeflowError

COUNT = int(os.environ.get("SDEFLOW_EXPRESSIONS", "12"))
FIRST = int(os.environ.get("SDEFLOW_FIRST_EXPRESSION", "0"))
DEEPEST = 3 if COUNT <= 24 else 6
LIMIT = 3.0
SHOWN = 6.0  # of all formulas of an SDE together; integrals that SymPy tries for 2 s among them


class Hanging(BaseException):
    """No exception that the library catches."""


@pytest.fixture
def alarm():
    """Ends what has used twice its processor time, with the place where it was."""

    def ring(*_):
        raise Hanging("".join(line for line in traceback.format_stack() if "sdeflow" in line)[-2000:])

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT + 3.0)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def allowed(function, limit, shown):
    """What ``function`` returns, None where it refuses, in ``limit`` seconds."""
    before = cpu_seconds()
    try:
        found = function()
    except SdeflowError:
        found = None
    used = cpu_seconds() - before
    assert used < limit, f"{used:.2f} s for {shown}"
    return found


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers of processor time")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_what_the_grammar_allows_is_declared_or_refused_in_time(seed, alarm):
    grammar = Grammar(seed)
    try:
        make, shown = grammar.declaration(1 + seed % DEEPEST)
    except SdeflowError:  # the text of an expression that is handed over as SymPy is refused
        return
    sde = allowed(make, LIMIT, shown)
    if sde is None:
        return
    allowed(lambda: check_numbers(sde), LIMIT, shown)
    if seed % 8 == 0 or COUNT > 24:
        allowed(lambda: formulas(sde), SHOWN, shown)


def check_numbers(sde):
    """The kernel's numbers at a few times, finite."""
    times = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64) * sde.T
    if sde.kind == "affine":
        for values in sde.kernel.coefficients(times.clamp_min(sde.cutoff)):
            assert values.isfinite().all()
    else:
        x = torch.full((2, *(sde.values.shape or (1,))), 0.3)
        if not sde.declaration.coupled:
            sde.simulate(x, [sde.T], steps=2, seed=0)


def formulas(sde):
    """All that is shown of an SDE."""
    shown = [repr(sde), sde._repr_latex_(), repr(sde.reverse()), repr(sde.flow_ode()), sde.explain()]
    if sde.kind == "affine":
        kernel = sde.kernel
        shown += [repr(kernel), kernel._repr_latex_(), str(kernel.std), str(kernel.log_snr)]
        shown += [str(sde.bridge(0.0).drift)]
    assert all(shown)
