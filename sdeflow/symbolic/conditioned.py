r"""The drift of an SDE conditioned on its end x_T = y (Doob's h-transform), as a SymPy expression.

    f + g gᵀ h,      h = ∇_x log p(x_T = y | x_t = x).

If SymPy would need too long, h is an undefined function h(x, t), one for each component. If the moments are integrals,
the horizon is the symbol T (T_end if a parameter or component is called T), because SymPy would evaluate an integral up
to a number in order to print a sum.
"""

from __future__ import annotations

import sympy as sp

from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.lamperti import Map
from sdeflow.symbolic.moments import Moments
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.pearson import Pearson
from sdeflow.symbolic.symbols import t, unused, x

__all__ = [
    "bridge_drift", "end_symbols", "horizon", "named_drift", "reducible_bridge_drift", "square_root_bridge_drift",
]  # fmt: skip

_SECONDS = 2.0


def horizon(declaration: Declaration) -> sp.Symbol:
    """The symbol of the horizon in a drift: T, or T_end, T_end_end, ... if the declaration uses that name."""
    taken, name = {symbol.name for symbol in (*declaration.parameters, *declaration.state)}, "T"
    while name in taken:
        name += "_end"
    return sp.Symbol(name, positive=True)


def end_symbols(declaration: Declaration) -> tuple[sp.Symbol, ...]:
    """The components at t = T, where a bridge ends: x_T, or x_T_1, ... if the declaration uses that name."""
    taken = (*declaration.parameters, *declaration.state)
    return tuple(sp.Symbol(unused(f"{component.name}_T", taken), real=True) for component in declaration.state)


def bridge_drift(declaration: Declaration, moments: Moments) -> sp.Expr | sp.ImmutableMatrix:
    """f + g gᵀ Φ_Ttᵀ P_T|t⁻¹ (y - m_Tt - Φ_Tt x), with y the symbols x_T (v_T, ...).

    Args:
        declaration: an affine declaration.
        moments: the moments of its kernel.
    """
    parts = declaration, moments.alpha, moments.offset, moments.var
    return patiently(_linear, *parts, otherwise=named_drift(declaration), seconds=_SECONDS)


def reducible_bridge_drift(declaration: Declaration, change: Map, moments: Moments) -> sp.Expr:
    """The drift of a bridge of an SDE that the map ``change`` makes affine; ``moments`` are those of the new state."""
    parts = declaration, change, moments.alpha, moments.offset, moments.var
    return patiently(_reducible, *parts, otherwise=named_drift(declaration), seconds=_SECONDS)


def square_root_bridge_drift(declaration: Declaration, form: Pearson, moments: Moments) -> sp.Expr:
    """f + g² ∂/∂x log p(x_T | x_t = x) of a square-root process.

    With u = (x - origin) / scale, a = alpha_T / alpha_t, v = sigma_T² - a² sigma_t² and r = a sqrt(u u_T) / v,

        ∂/∂u log p = a / (2 v) (sqrt(u_T / u) I_{nu+1}(r) / I_nu(r) - a),     nu = delta / 2 - 1.

    Args:
        declaration: the process.
        form: its standard form.
        moments: the moments of the affine SDE behind it.
    """
    parts = declaration, form, moments.alpha, moments.var
    return patiently(_square_root, *parts, otherwise=named_drift(declaration), seconds=_SECONDS)


def named_drift(declaration: Declaration) -> sp.Expr | sp.ImmutableMatrix:
    """f + g gᵀ h with h as an undefined function."""
    state = declaration.state
    names = [f"h_{component.name}" for component in state] if declaration.coupled else ["h"]
    h = sp.Matrix([sp.Function(name, real=True)(*state, t) for name in names])
    drift = sp.Matrix(declaration.drifts) + declaration.gram * h
    return sp.ImmutableMatrix(drift) if declaration.coupled else drift[0]


def _end(declaration: Declaration, moments: tuple) -> sp.Expr:
    """The horizon as it appears in a formula."""
    return (
        horizon(declaration) if any(e.has(sp.Integral) for e in moments) else sp.nsimplify(declaration.T, rational=True)
    )


def _linear(declaration: Declaration, *moments: sp.Expr | sp.MatrixBase) -> sp.Expr | sp.ImmutableMatrix:
    phi, m, P = (e if declaration.coupled else sp.ImmutableMatrix([[e]]) for e in moments)
    T = _end(declaration, moments)
    phi_T, m_T, P_T = (e.subs(t, T) for e in (phi, m, P))
    across = phi_T * phi.adjugate() / phi.det()
    rest = P_T - across * P * across.T
    inverse = rest.adjugate() / rest.det()
    y = sp.Matrix(end_symbols(declaration))
    surprise = y - m_T - across * (sp.Matrix(declaration.state) - m)
    drift = sp.Matrix(declaration.drifts) + declaration.gram * across.T * inverse * surprise
    return sp.ImmutableMatrix(drift) if declaration.coupled else drift[0]


def _reducible(declaration: Declaration, change: Map, alpha: sp.Expr, offset: sp.Expr, var: sp.Expr) -> sp.Expr:
    T = _end(declaration, (alpha, offset, var))
    across = alpha.subs(t, T) / alpha
    mean = offset.subs(t, T) + across * (change.to_line - offset)
    rest = var.subs(t, T) - across**2 * var
    end = change.to_line.subs({x: end_symbols(declaration)[0], t: T})
    if change.fold:
        end = end * sp.tanh(end * mean / rest)
    return declaration.f + declaration.g**2 * sp.diff(change.to_line, x) * across * (end - mean) / rest


def _square_root(declaration: Declaration, form: Pearson, alpha: sp.Expr, var: sp.Expr) -> sp.Expr:
    T = _end(declaration, (alpha, var))
    across = alpha.subs(t, T) / alpha
    rest = var.subs(t, T) - across**2 * var
    u, end = ((state - form.origin) / form.scale for state in (x, end_symbols(declaration)[0]))
    order, argument = form.shape[0] / 2 - 1, across * sp.sqrt(u * end) / rest
    ratio = sp.besseli(order + 1, argument) / sp.besseli(order, argument)
    h = across / (2 * rest) * (sp.sqrt(end / u) * ratio - across) / form.scale
    return declaration.f + declaration.g**2 * h
