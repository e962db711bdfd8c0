"""No false alarm: the certificate of a right declaration holds, or says what it left out, within 10 s of CPU time.

``SDEFLOW_CERTIFICATES=200`` draws as many; the default is a few. Smooth declarations with and without a closed form,
and those of ``declarations.py`` with narrow features, tables, P0, tensors and parameters.
"""

import os

import numpy as np
import pytest
import sympy as sp
import torch
from declarations import coupled, elementwise
from problems import cpu_seconds

from sdeflow import SDE, t, x
from sdeflow.errors import ScheduleError

COUNT = int(os.environ.get("SDEFLOW_CERTIFICATES", "2"))
FIRST = int(os.environ.get("SDEFLOW_FIRST_CERTIFICATE", "0"))
LIMIT = 10.0


def smooth(seed):
    """An affine SDE of smooth coefficients, of one component or two, some with P0, an offset and parameters."""
    rng = np.random.default_rng(seed)
    p = sp.Symbol("p", positive=True)
    size = [(), (3,), (2, 1)][rng.integers(3)] if rng.random() < 0.5 else None
    values = {} if size is None else {p: torch.tensor(rng.uniform(0.5, 2.0, size))}
    rate, noise, push = (smooth_term(rng, p if values else sp.Integer(1)) for _ in range(3))
    T, P0 = float(10 ** rng.uniform(-1, 1)), float(rng.choice([0.0, 0.3]))
    if rng.random() < 0.25:
        a, c = sp.Rational(int(rng.integers(1, 9)), 4), sp.Rational(int(rng.integers(1, 9)), 4)
        return SDE(lambda u, v, t: [a * v, -a * u - c * v], [0, sp.sqrt(c)], T=T, state=("u", "v"), P0=[P0, 0.1])
    offset = push if rng.random() < 0.4 else 0
    return SDE(-rate * x / T + offset, sp.sqrt(noise / T), T=T, P0=P0, params=values)


def smooth_term(rng, p):
    """A positive function of t."""
    c, w = sp.Rational(int(rng.integers(1, 20)), 10), sp.Rational(int(rng.integers(1, 9)), 2)
    terms = [
        c * p, c + w * p * t, c * sp.exp(-w * t), 1 + c * p * t**2, 1 / (1 + c * t), 2 + sp.sin(w * t),
        sp.sqrt(1 + w * t), 1 + sp.tanh(w * t) ** 2, 2 + sp.cos(w * t) * sp.exp(-p * t), sp.log(2 + w * t),
    ]  # fmt: skip
    return terms[rng.integers(len(terms))]


FAMILIES = (smooth, lambda seed: elementwise(seed)[1](), smooth, lambda seed: coupled(seed)[1]())


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_a_right_declaration_is_certified_in_time(seed):
    try:
        sde = FAMILIES[seed % 4](seed)
    except ScheduleError:  # a feature that is too narrow
        return
    before = cpu_seconds()
    certificate = sde.verify()
    assert cpu_seconds() - before < LIMIT
    assert certificate, certificate.failures
    assert certificate.checks or certificate.unchecked
