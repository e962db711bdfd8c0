"""The folders of the design: each imports folders below it only, without circles, and back-ends stay in adapters."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "sdeflow"

# A folder, or a module of the root, imports those below it. Two on one line do not know of each other.
FLOORS = (
    ("errors", "_version"),
    ("symbolic", "nets"),
    ("numerics",),
    ("storage",),
    ("laws",),
    ("kernels",),
    ("scores",),
    ("solvers",),
    ("solving",),
    ("likelihood", "training"),
    ("proof",),
    ("dynamics",),
    ("sde",),
    ("catalog",),
    ("__init__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FAMILIES = (
    "adapters.torchsde",
    "adapters.torchdiffeq",
    "exponential.solver",
    "exponential.singlestep",
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


def room(module):
    return module.split(".")[0]


def ours(module, top=False):
    """Modules of the package that ``module`` imports; with ``top``, those at its top level alone."""
    for name, at_top in imported(module):
        if name.startswith("sdeflow.") and (at_top or not top):
            yield name.removeprefix("sdeflow.")


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_folders_below_it(module):
    for name in ours(module):
        if room(name) in FLOOR and room(name) != room(module):
            assert FLOOR[room(name)] < FLOOR[room(module)], f"{module} imports {name}"


def test_there_are_no_circles_of_modules():
    graph = {module: {name for name in ours(module, top=True) if name in MODULES} - {module} for module in MODULES}
    while graph:
        free = [module for module, needs in graph.items() if not needs & graph.keys()]
        assert free, f"circles among {sorted(graph)}"
        for module in free:
            del graph[module]


def test_the_root_is_small():
    modules = [module for module in MODULES if "." not in module]
    assert len(modules) <= 9
    assert {room(module) for module in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_walls(module):
    names = {room(name) for name, _ in imported(module)}
    if room(module) == "symbolic":
        assert "torch" not in names
    if room(module) == "nets":
        assert not any(room(name) != "nets" for name in ours(module))
    if module != "solvers.adapters.torchsde":
        assert "torchsde" not in names
    if module != "solvers.adapters.torchdiffeq":
        assert "torchdiffeq" not in names
    if not module.startswith(SYMBOLIC):
        assert "sympy" not in names


# Where SymPy is known: the mathematics, what compiles it, and what hands expressions on, prints or checks them.
SYMBOLIC = (
    "symbolic", "numerics.parameters", "numerics.breakpoints", "numerics.compile", "kernels", "laws.stationary",
    "solving.fields", "solving.boundary", "proof", "storage", "dynamics", "sde", "catalog",
)  # fmt: skip


NO_KERNEL = re.compile(r"\.kernel is (not )?None|except NotAffineError")


@pytest.mark.parametrize("module", MODULES)
def test_every_sde_has_a_kernel(module):
    """Whether it is Gaussian is asked of ``gaussian``: no kernel is None, and none is found by failing."""
    if room(module) != "solvers":  # whose problems of any equation know no kernel
        assert not NO_KERNEL.search((ROOT / (module.replace(".", "/") + ".py")).read_text())


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
    assert "pickle" not in {room(name) for name, _ in imported(module)}


@pytest.mark.parametrize("module", MODULES)
def test_python_3_10_has_what_is_imported_of_typing(module):
    later = {"assert_never", "Never", "Self", "Unpack", "Required", "NotRequired", "LiteralString", "override"}
    assert not {f"typing.{name}" for name in later}.intersection(name for name, _ in imported(module))


def test_heavy_back_ends_are_imported_when_first_used():
    script = "import sys, sdeflow; print([m for m in ('accelerate', 'torchsde', 'torchdiffeq') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
