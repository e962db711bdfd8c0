"""Declares SDEs of the literature, derives and certifies each, and writes the table of docs/zoo.rst.

python docs/zoo.py            writes docs/zoo.rst
python docs/zoo.py --check    fails where a certificate does not hold
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import sympy as sp
import torch

import sdeflow
from sdeflow import SDE, catalog, state, t, x

x1, x2, x3 = state("x1 x2 x3")
p, v = state("p v")
X, Y = state("x y")
q = sp.Rational
beta = q(1, 10) + q(199, 10) * t
warm = sdeflow.schedule(([0, 0.2, 0.6, 1], [0.1, 1, 15, 20]), name="warm")

# Each entry is one line: its text is shown beside what follows from it.
# fmt: off
ZOO: list[tuple[str, str, Callable[[], SDE]]] = [
    ("Variance preserving", "arXiv:2011.13456", lambda: SDE(f=-beta*x/2, g=sp.sqrt(beta))),
    ("Sub-variance preserving", "arXiv:2011.13456", lambda: SDE(f=-beta*x/2, g=sp.sqrt(beta*(1 - sp.exp(-q(1,5)*t - q(199,10)*t**2))))),
    ("Variance exploding", "arXiv:2011.13456", lambda: SDE.from_kernel(alpha=1, sigma=q(1,100)*5000**t)),
    ("EDM", "arXiv:2206.00364", lambda: SDE(f=0, g=sp.sqrt(2*t), T=80)),
    ("Cosine schedule", "arXiv:2102.09672", lambda: SDE.from_kernel(alpha=sp.cos(sp.pi*t/2), sigma=sp.sin(sp.pi*t/2), T=0.995)),
    ("Flow matching", "arXiv:2210.02747", lambda: SDE.from_kernel(alpha=1 - t, sigma=t, T=0.999)),
    ("Sigmoid schedule", "arXiv:2203.02923", lambda: SDE(f="-(1/10 + 20/(1 + exp(6 - 12*t)))*x/2", g="sqrt(1/10 + 20/(1 + exp(6 - 12*t)))")),
    ("Tabulated schedule", "monotone cubic", lambda: SDE(f=-warm(t)*x/2, g=sp.sqrt(warm(t)))),
    ("Simple diffusion, shifted", "arXiv:2301.11093", lambda: SDE.from_kernel(alpha=1/sp.sqrt(1 + (2*sp.tan(sp.pi*t/2))**2), sigma=2*sp.tan(sp.pi*t/2)/sp.sqrt(1 + (2*sp.tan(sp.pi*t/2))**2), T=0.99)),
    ("Ornstein-Uhlenbeck", "Uhlenbeck, Ornstein 1930", lambda: SDE(f=-x, g=sp.sqrt(2), T=5)),
    ("Vasicek", "Vasicek 1977", lambda: SDE(f=2*(q(1,20) - x), g=q(1,50), T=3)),
    ("Hull-White, seasonal mean", "Hull, White 1990", lambda: SDE(f=sp.sin(2*sp.pi*t)/10 - x, g=q(1,10)*sp.exp(-t), T=2)),
    ("Blurring diffusion, 8 x 8", "arXiv:2209.05557", lambda: catalog.Blurring((8, 8))),
    ("Integrated noise", "constant-velocity tracking", lambda: SDE(f=[v, 0], g=[0, 1], state=("p", "v"))),
    ("Singer acceleration", "Singer 1970", lambda: SDE(f=[x2, x3, -x3/2], g=[0, 0, 1], P0=[0, 1, 1])),
    ("Langevin, underdamped", "Langevin 1908", lambda: SDE(f=[v, -4*p - v], g=[0, sp.sqrt(2)], P0=[0, 1], T=4)),
    ("Critically damped Langevin", "arXiv:2112.07068", lambda: catalog.CriticallyDampedLangevin()),
    ("PSLD, by the complete recipe", "arXiv:2303.01748", lambda: catalog.from_recipe([[q(2,25), 0], [0, 32]], [[0, -32], [32, 0]], [[1, 0], [0, q(1,4)]], P0=[0, q(1,100)])),
    ("Rotating Langevin, F(t) not commuting", "arXiv:1506.04696", lambda: catalog.from_recipe([[2, 1], [1, 1]], [[0, -3*t], [3*t, 0]])),
    ("Third-order Langevin", "arXiv:1908.10859", lambda: catalog.from_recipe(sp.diag(0, 0, 6), [[0, -2, 0], [2, 0, -4], [0, 4, 0]], P0=[0, 1, 1])),
    ("Geometric Brownian motion", "Black, Scholes 1973", lambda: SDE(f=x/10, g=3*x/10)),
    ("GBM, Stratonovich", "Stratonovich 1966", lambda: SDE(f=x/10, g=3*x/10, calculus="stratonovich")),
    ("Black-Karasinski", "Black, Karasinski 1991", lambda: SDE(f=x*(q(1,2) - 2*sp.log(x)), g=x/2)),
    ("Gompertz growth", "Gompertz 1825", lambda: SDE(f=x*(1 - sp.log(x)), g=x*sp.sqrt(t + 1)/5)),
    ("Hyperbolic diffusion", "sinh of Brownian motion", lambda: SDE(f=x/2, g=sp.sqrt(1 + x**2))),
    ("CIR at 4 kappa theta = sigma²", "Rogers 1995", lambda: SDE(f=2*(q(1,8) - x), g=sp.sqrt(x))),
    ("CIR", "Cox, Ingersoll, Ross 1985", lambda: SDE(f=2*(1 - x), g=sp.sqrt(x)/2)),
    ("Squared Bessel, delta = 3", "Revuz, Yor 1999", lambda: SDE(f=3, g=2*sp.sqrt(x))),
    ("Jacobi (Wright-Fisher)", "Wright 1931", lambda: SDE(f=(2*(1 - x) - 3*x)/2, g=sp.sqrt(x*(1 - x)))),
    ("Double well", "Kramers 1940", lambda: SDE(f=x - x**3, g=1, T=4)),
    ("Stochastic logistic", "Verhulst 1838", lambda: SDE(f=x*(1 - x), g=x/5)),
    ("Duffing oscillator", "Duffing 1918", lambda: SDE(f=[v, p - p**3 - v/2], g=[0, q(1,2)], P0=[0, q(1,10)], state=("p", "v"))),
    ("FitzHugh-Nagumo", "FitzHugh 1961", lambda: SDE(f=[X - X**3/3 - Y, (X - Y/2)/10], g=[q(1,5), q(1,10)])),
    ("Lotka-Volterra with noise", "Lotka 1925", lambda: SDE(f=[X*(1 - Y), Y*(X - 1)], g=[X/10, Y/10])),
    ("Lorenz 63 with noise", "Lorenz 1963", lambda: SDE(f=[10*(x2 - x1), x1*(28 - x3) - x2, x1*x2 - 8*x3/3], g=[1, 1, 1])),
    ("Heston", "Heston 1993", lambda: SDE(f=[X/20, 2*(q(1,25) - Y)], g=[[X*sp.sqrt(Y), 0], [-sp.sqrt(Y)/5, sp.sqrt(Y)/5]])),
]
# fmt: on


def measured(make: Callable[[], SDE]) -> tuple[SDE, str, float, object]:
    """The SDE, the form of its kernel, the seconds to declare and derive it, and its certificate."""
    began = time.perf_counter()
    sde = make()
    form = sde.kernel.form
    repr(sde.kernel)
    seconds = time.perf_counter() - began
    return sde, form, seconds, sde.verify()


def source(make: Callable[[], SDE]) -> str:
    """The text of an entry's declaration, as it stands above."""
    line = inspect.getsource(make).strip()
    return re.fullmatch(r".*?lambda: (.*)\),", line, flags=re.DOTALL).group(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail where a certificate does not hold"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    catalog.VP().verify()  # imports and caches are not what is measured
    rows, failed = [], []
    for name, reference, make in ZOO:
        sde, form, seconds, certificate = measured(make)
        print(f"{name:38s} {sde.kind:10s} {form:11s} {seconds:6.2f} s  {certificate.largest_residual:.1e}", flush=True)
        if not certificate.ok:
            failed.append(name)
            print(certificate)
        rows.append((name, reference, source(make), sde.kind, form, f"{seconds:.2f}", certificate))
    if not arguments.check:
        path = Path(__file__).with_name("zoo.rst")
        path.write_text(page(rows))
        print(f"wrote {path.name}: {len(rows)} SDEs")
    return 1 if failed else 0


def page(rows: list[tuple]) -> str:
    """The page of the documentation."""
    lines = [
        ".. This page is written by `make zoo`.",
        "",
        f"{len(rows)} SDEs, one line each",
        "=" * 40,
        "",
        'Each line of the table is one declaration; everything else is derived from it. ``kind`` is "affine" if the state is',
        'Gaussian given its start, "reducible" if a change of the state makes it Gaussian, "pearson" if the kernel is known in',
        'special functions, and "general" for all others. ``form`` says whether the moments of the kernel are closed or come from',
        "quadrature (none: there is no kernel, but simulation and local linearisation). The time is that to declare the SDE and",
        "to derive and print its kernel. The last column is the largest residual of ``sde.verify()``, which tests every derived",
        "object by its identities. ``make zoo`` writes this page.",
        "",
        "The names are those of the script ``docs/zoo.py``: ``q = sp.Rational``, ``beta = q(1,10) + q(199,10)*t``,",
        '``p, v = state("p v")`` and so on.',
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "   :widths: 22 44 9 9 6 10",
        "",
        "   * - SDE",
        "     - declaration",
        "     - kind",
        "     - form",
        "     - s",
        "     - residual",
    ]
    for name, reference, text, kind, form, seconds, certificate in rows:
        shown = f"{certificate.largest_residual:.0e}" if certificate.ok else "fails"
        lines += [f"   * - {name} ({reference})", f"     - ``{text}``"]
        lines += [f"     - {cell}" for cell in (kind, form, seconds, shown)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
