"""The steps of a reducible SDE: the change of state, the affine SDE behind it, and the push-forward of its kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.derivation.equations import declared, log_fokker_planck
from sdeflow.symbolic.derivation.linear import moment_steps
from sdeflow.symbolic.derivation.step import Step, dt, dw, equals, own
from sdeflow.symbolic.derivation.substitution import Numbers, verify
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.lamperti import Reduction, line_mean, line_var
from sdeflow.symbolic.lamperti import y as line
from sdeflow.symbolic.moments import moments_of
from sdeflow.symbolic.symbols import t, x, x_0

__all__ = ["reducible_steps"]


def reducible_steps(declaration: Declaration, reduction: Reduction, numbers: Numbers) -> list[Step]:
    """The change of state, Itô's formula, the affine SDE of y, and the push-forward of its kernel."""
    check = partial(verify, numbers=numbers, T=declaration.T)
    change, f, g = reduction.map, rationalised(declaration.f), rationalised(declaration.g)
    here, there = (own(declaration, name, positive=True) for name in ("y", "y_0"))
    H, X = change.to_line, change.to_state.subs(line, here)
    found = [(H.subs(x, X), here), (g.subs(x, X), change.c * sp.diff(X, here))]
    found += [(change.to_state.subs(line, -here), X)] if change.fold else []
    drift = sp.diff(H, t) + f * sp.diff(H, x) + g**2 * sp.diff(H, x, 2) / 2
    affine = reduction.a * here + reduction.b
    both = "Both y and -y are sent to x, and both branches are summed." if change.fold else "y covers the whole line."

    inner = reduction.inner(declaration)
    moments = moments_of(inner, numbers)
    m, v = own(declaration, "m"), own(declaration, "v", positive=True)
    exact_mean = moments.alpha * H.subs({x: x_0, t: 0}) + moments.offset
    branches = sum(sp.exp(-((sign * H - m) ** 2) / (2 * v)) for sign in ((1, -1) if change.fold else (1,)))
    density = branches / sp.sqrt(2 * sp.pi * v) * sp.diff(H, x)
    log_p = sp.log(branches) - sp.log(v) / 2 + sp.log(sp.diff(H, x))
    place = {x: X, x_0: change.to_state.subs({line: there, t: 0})}
    rates = {m: reduction.a * m + reduction.b, v: 2 * reduction.a * v + change.c**2}
    shown = {"E[x | x₀]": change.mean, "Var[x | x₀]": change.var}
    return [
        declared(declaration),
        Step(
            "The change of state (Lamperti)",
            f"y = ∫ dx / h with g = c(t) h(x, t) makes the noise independent of the state. {both} "
            f"Here x lies in ({change.lower}, {change.upper}).",
            (equals("y", H), equals("x", X)),
            f"the map {change.name!r}",
            *check(found),
        ),
        Step(
            "Itô's formula",
            "dy = [∂y/∂t + f ∂y/∂x + ½ g² ∂²y/∂x²] dt + g ∂y/∂x dw, and the bracket is affine in y.",
            (equals("dy", sp.Mul(affine, dt) + sp.Mul(change.c, dw)),),
            "the drift of y is a(t) y + b(t)",
            *check([(drift.subs(x, X), affine), (g * sp.diff(H, x), change.c)]),
        ),
        *map(_of_line, moment_steps(inner, moments, numbers)),
        Step(
            "The kernel, pushed forward",
            "The density of x is that of y times |∂y/∂x|, with m and v the mean and the variance "
            f"of y given x_0. {both}",
            (
                equals(m, exact_mean),
                equals("p(x | x₀)", density),
                *(equals(name, e.subs({line_mean: m, line_var: v})) for name, e in shown.items() if e is not None),
            ),
            "change of variables",
            *check(log_fokker_planck(declaration, log_p, rates, place)),
        ),
    ]


def _of_line(step: Step) -> Step:
    """A step of the affine SDE of y, with the symbol y for its state."""
    return replace(
        step,
        title=f"{step.title} of y",
        text=step.text.replace("x_0", "y_0").replace("(x - m)", "(y - m)"),
        equations=tuple(equation.subs(x_0, sp.Symbol("y_0")) for equation in step.equations),
    )
