"""Which kernel an SDE has: one table of ways, refusals that are said, and what is known of short steps alone."""

import copy
import math
import pickle

import pytest
import sympy as sp
import torch

import sdeflow
from sdeflow import SDE, NotAffineError, Score, t, x
from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.kinds import WAYS, find_kernel
from sdeflow.kernels.local import UNKNOWN, LocalKernel
from sdeflow.kernels.pearson import PearsonKernel
from sdeflow.kernels.reducible import ReducibleKernel

n = sp.Symbol("n", positive=True)
p, v = sdeflow.state("p v")
KINDS = {
    "affine": (lambda: SDE(-x, 1), Kernel),
    "reducible": (lambda: SDE(-x, x / 2), ReducibleKernel),
    "pearson": (lambda: SDE(2 * (1 - x), sp.sqrt(x) / 2), PearsonKernel),
    "general": (lambda: SDE(x - x**3, x / 2), LocalKernel),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_a_kernel_that_scores_and_equations_share(kind):
    make, of_class = KINDS[kind]
    sde = make()
    score = Score(torch.nn.Identity(), sde, predicts="score", time="t")
    assert sde.kind == sde.kernel.kind == kind and isinstance(sde.kernel, of_class)
    assert score.kernel is sde.kernel and sde.reverse().model.kernel is sde.kernel
    assert (sde.kernel.gaussian is sde.kernel) == (kind == "affine") == (score.gaussian is not None)
    assert sde.cutoff == sde.kernel.cutoff > 0
    copied = pickle.loads(pickle.dumps(sde.kernel))
    assert isinstance(copied, of_class) and copy.deepcopy(sde.kernel) is sde.kernel


def public(kernel):
    """The names of a kernel that do not start with an underscore."""
    return {name for name in {*dir(type(kernel)), *vars(kernel)} if not name.startswith("_")}


def test_a_local_kernel_refuses_all_that_exact_kernels_tell():
    local = KINDS["general"][0]().kernel
    told = set().union(*(public(KINDS[kind][0]().kernel) for kind in ("affine", "reducible", "pearson")))
    assert told - public(local) == UNKNOWN
    for name in UNKNOWN:
        with pytest.raises(NotAffineError, match=rf"kernel\.{name}: .*the drift of y = log\(x\) is not affine in y"):
            getattr(local, name)
    assert not hasattr(local, "_repr_html_")
    with pytest.raises(AttributeError, match="no attribute 'alfa'"):
        local.alfa  # noqa: B018


@pytest.mark.parametrize("kind", ["reducible", "pearson", "general"])
def test_what_gaussian_kernels_alone_tell_is_refused_with_the_reason(kind):
    kernel = KINDS[kind][0]().kernel
    for name in ("alpha", "offset", "log_snr", "half_log_snr", "half_log_snr_rate", "time_of", "coefficients"):
        with pytest.raises(NotAffineError, match=rf"kernel\.{name}: .*no Gaussian perturbation kernel") as caught:
            getattr(kernel, name)
        assert ("its kernel is exact" in str(caught.value)) == (kind != "general")


def test_a_local_kernel_knows_short_steps():
    """Of dx = -sin(x) dt + dw the law of a step is that of the SDE linearised there, by hand."""
    kernel = SDE(-sp.sin(x), 1).kernel
    at, h = torch.tensor([[0.4]], dtype=torch.float64), 1e-2
    mean, root = kernel.law(at, torch.zeros(1, dtype=torch.float64), torch.tensor([h], dtype=torch.float64))
    J, f = -math.cos(0.4), -math.sin(0.4) + h / 4 * math.sin(0.4)
    assert float(mean) == pytest.approx(0.4 + math.expm1(J * h) / J * f, abs=1e-14)
    assert float(root.values) == pytest.approx(math.sqrt(math.expm1(2 * J * h) / (2 * J)), abs=1e-14)


@pytest.mark.parametrize(
    ("sde", "refusals"),
    [
        (lambda: SDE(x - x**3, 1), ["is not affine in x", "g is free of x"]),
        (lambda: SDE(x - x**3, x), ["depends on the state", "no change of state", "no square root or Jacobi"]),
        (lambda: SDE([v, -sp.sin(p)], [0, 1], state=("p", "v")), ["is not affine in p, v", "in one dimension"]),
        (lambda: SDE(-x, x, P0=0.1), ["depends on the state", "P0 > 0"]),
    ],
    ids=["free noise", "noise of the state", "coupled", "P0"],
)
def test_the_refusals_of_the_ways_are_what_is_said(sde, refusals):
    sde = sde()
    assert len(sde.kernel.refusals) == len(refusals) <= len(WAYS)
    explained, shown = " ".join(sde.explain().split()), str(sde.derivation())
    for refusal, text in zip(sde.kernel.refusals, refusals, strict=True):
        assert text in refusal
        assert refusal in explained and refusal in repr(sde.kernel)
        assert refusal in " ".join(shown.split())
        with pytest.raises(NotAffineError) as caught:
            sde.kernel.sample(torch.zeros(1, 1), 0.5)
        assert refusal in str(caught.value)


def test_the_first_way_that_serves_is_taken():
    """At 4 kappa theta = sigma² a change of the state serves a square-root process, and is asked for first."""
    declaration = SDE(2 * (sp.Rational(1, 8) - x), sp.sqrt(x)).declaration
    assert [way.__name__ for way in WAYS] == ["_gaussian", "_reducible", "_pearson"]
    assert isinstance(find_kernel(declaration, sdeflow.SDE(-x, 1).values), ReducibleKernel)
    assert isinstance(WAYS[2](declaration, sdeflow.SDE(-x, 1).values, None), PearsonKernel)


def test_other_values_of_parameters_may_be_of_another_kind():
    cubic = SDE(-(x**n), 1, params={n: 3.0})
    assert [cubic.kind, cubic.with_params(n=1.0).kind, cubic.with_params(n=2.0).kind] == [
        "general", "reducible", "general",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_another_cutoff_keeps_the_kernel_derived(kind, monkeypatch):
    sde = KINDS[kind][0]()
    assert sde.kernel.kind == kind
    monkeypatch.setattr("sdeflow.sde.find_kernel", lambda *_: pytest.fail("searched anew"))
    later = sde.with_cutoff(0.25)
    assert later.kind == kind and later.cutoff == later.kernel.cutoff == 0.25
    assert later.kernel.declaration is later.declaration
    assert kind != "general" or later.kernel.refusals == sde.kernel.refusals != ()


def test_a_score_of_a_general_sde_is_defined_from_zero_on():
    sde = SDE(x - x**3, x / 2)
    score = sdeflow.scores.as_score(lambda x, t: -x, sde)
    assert torch.equal(score(torch.ones(2, 1), 0.0), -torch.ones(2, 1)) and sde.cutoff == 1e-3
    assert SDE(x - x**3, 1, P0=0.1).cutoff == 0 and SDE(x - x**3, t + 1, cutoff=0.2).cutoff == 0.2
