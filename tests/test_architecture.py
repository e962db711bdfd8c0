"""The layers of the design: each imports only from those above it, and back-ends stay in their adapters."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "sdeflow"

# A module's layer is that of the longest prefix listed.
LAYERS = {
    "errors": 0, "_version": 0, "checks": 0, "noise": 0, "brownian": 0, "symbolic": 0, "nets": 0,
    "basis": 1, "linear": 1, "parameters": 1, "chebyshev": 1, "quadrature": 1, "breakpoints": 1, "compile": 1,
    "gaussian": 2, "coefficients": 2, "kernel": 2, "reducible": 2, "pearson": 2,
    "noncentral": 2, "square_root": 2, "jacobi": 2, "ancestral": 2,
    "scores": 3, "thresholding": 3,
    "solvers": 4, "weightings": 4, "times": 4, "losses": 4, "batches": 4, "checkpoint": 4, "traces": 4,
    "model": 5, "gradients": 5, "plan": 5, "reference": 5, "pilot": 5, "bridge": 5, "boundary": 5, "boltzmann": 5,
    "simulation": 5, "priors": 5, "likelihood": 5, "sampling": 5, "bounds": 5, "dequantisation": 5, "latents": 5,
    "dynamics": 5, "training": 5, "storage": 5, "derivation": 5, "explanation": 5, "certificate": 5,
    "sde": 6, "catalog": 6,
    "__init__": 7,
}  # fmt: skip
FAMILIES = (
    "torchsde",
    "torchdiffeq",
    "exponential",
    "singlestep",
    "euler",
    "edm",
    "langevin",
    "restart",
    "gotta_go_fast",
)
SIBLINGS = {f"solvers.{family}" for family in FAMILIES}
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py"))


def imported(module):
    """Names imported anywhere in ``module``, with whether the import stands at its top level."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, id(node) in top
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def layer(module):
    return LAYERS[module.split(".")[0]]


def ours(module):
    for name, _ in imported(module):
        if name.startswith("sdeflow."):
            yield name.removeprefix("sdeflow.")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_upwards_only(module):
    for name in ours(module):
        if name.split(".")[0] in LAYERS:
            assert layer(name) <= layer(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_walls(module):
    names = {name.split(".")[0] for name, _ in imported(module)}
    if module.startswith("symbolic"):
        assert "torch" not in names
    if module.startswith("nets"):
        assert not any(not name.startswith("nets") for name in ours(module))
    if module != "solvers.torchsde":
        assert "torchsde" not in names
    if module != "solvers.torchdiffeq":
        assert "torchdiffeq" not in names
    if layer(module) < 6:
        assert not any(name in ("sde", "sde.SDE") for name in ours(module))
    symbolic_users = (
        "symbolic", "parameters", "breakpoints", "compile", "coefficients", "kernel", "reducible", "pearson", "bridge",
        "boundary",
        "storage", "model", "simulation", "dynamics", "derivation", "explanation", "certificate", "sde", "catalog",
    )  # fmt: skip
    if not module.startswith(symbolic_users):
        assert "sympy" not in names


def test_solvers_do_not_import_each_other():
    for module in SIBLINGS:
        assert not SIBLINGS.intersection(ours(module))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_evaluates_text_or_unpickles(module):
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in {module}:{node.lineno}"
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            plain = isinstance(node.func, ast.Name)
            assert name not in ("sympify", "parse_expr", "lambdify"), f"{name} in {module}:{node.lineno}"
            assert not (plain and name in ("eval", "exec", "compile")), f"{name} in {module}:{node.lineno}"
    assert "pickle" not in {name.split(".")[0] for name, _ in imported(module)}


def test_heavy_back_ends_are_imported_when_first_used():
    script = "import sys, sdeflow; print([m for m in ('accelerate', 'torchsde', 'torchdiffeq') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
