r"""The moments of a coupled linear SDE du = (F(t) u + b(t)) dt + G(t) dw, in closed form if a rule gives one.

With Φ' = F Φ, Φ(0) = 1, the kernel is N(Φ u_0 + m, P),

    m = Φ ∫_0^t Φ(s)⁻¹ b ds,      P' = F P + P Fᵀ + G Gᵀ,  P(0) = P0.

If F(t) = beta(t) F0, which commutes with itself, then Φ = exp(F0 B) with B = ∫ beta. If also G Gᵀ = beta Q0, and
F0 S + S F0ᵀ + Q0 = 0 has a solution, then P = S - Φ (S - P0) Φᵀ. These formulas are for reading and for the derivation.
Numbers always come from quadrature, which has no cancellation near t = 0.
"""

from __future__ import annotations

import sympy as sp

from sdeflow.symbolic.antiderivative import definite
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.display import exponential_within
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.moments import Moments, constant_ratio
from sdeflow.symbolic.patience import patiently
from sdeflow.symbolic.symbols import t, unused

__all__ = ["derive_coupled", "information", "rank", "stationary_covariance", "symbolic_cholesky"]

_SECONDS = 2.0  # the formulas of a coupled state are for display


def derive_coupled(declaration: Declaration, rules: bool = True) -> Moments:
    """Φ, the covariance and the offset; undefined functions and integrals if no rule applies."""
    given: tuple[sp.ImmutableMatrix, ...] = (*declaration.require_affine("moments"), declaration.gram, declaration.P0)
    F, b, Q, P0 = (matrix.applyfunc(rationalised) for matrix in given)
    fallback = _unsolved(F, b, Q, P0)
    if not rules:
        return fallback
    return patiently(_by_rules, F, b, Q, P0, declaration.T, otherwise=fallback, seconds=_SECONDS)


def _by_rules(
    F: sp.ImmutableMatrix, b: sp.ImmutableMatrix, Q: sp.ImmutableMatrix, P0: sp.ImmutableMatrix, T: float
) -> Moments:
    midpoint = {t: T / 2}
    split = _time_change(F)
    if split is None:
        return _unsolved(F, b, Q, P0)
    beta, F0 = split
    B = definite(beta, t, midpoint)
    phi = None if B is None else _exponential(F0, B)
    if phi is None:
        return _unsolved(F, b, Q, P0)
    commuting = "alpha: F = beta(t) F0 commutes with itself, alpha = exp(F0 ∫ beta)"
    offset, offset_rule = _offset(F, b, phi, midpoint)
    var, var_rule = _covariance(F0, beta, Q, P0, phi, midpoint)
    return Moments(B, phi, offset, var, (commuting, offset_rule, var_rule))


def stationary_covariance(F0: sp.ImmutableMatrix, Q0: sp.ImmutableMatrix) -> sp.ImmutableMatrix | None:
    """The symmetric S with F0 S + S F0ᵀ + Q0 = 0; None if there is not exactly one, or it takes too long."""
    return patiently(_stationary_covariance, F0, Q0)


def _stationary_covariance(F0: sp.ImmutableMatrix, Q0: sp.ImmutableMatrix) -> sp.ImmutableMatrix | None:
    k = F0.shape[0]
    unknown = {(i, j): sp.Dummy(f"S{i}{j}") for i in range(k) for j in range(i, k)}
    S = sp.Matrix(k, k, lambda i, j: unknown[min(i, j), max(i, j)])
    residual = F0 * S + S * F0.T + Q0
    equations = [residual[i, j] for i in range(k) for j in range(i, k)]
    symbols = list(unknown.values())
    matrix, right = sp.linear_eq_to_matrix(equations, symbols)
    if matrix.det() == 0:
        return None
    solution = dict(zip(symbols, matrix.LUsolve(right), strict=True))
    return sp.ImmutableMatrix(S.subs(solution).applyfunc(sp.cancel))


def rank(matrix: sp.ImmutableMatrix) -> int:
    """The rank of a matrix; full rank is assumed if SymPy needs too long."""
    return patiently(_rank, matrix, otherwise=min(matrix.shape))


def _rank(matrix: sp.ImmutableMatrix) -> int:
    return matrix.rank()


def symbolic_cholesky(covariance: sp.ImmutableMatrix) -> sp.ImmutableMatrix:
    """The lower triangular L with L Lᵀ = covariance, entry by entry; functions L_ij(t) if that is too long."""
    k = covariance.shape[0]
    named = sp.Matrix(k, k, lambda i, j: sp.Function(f"L_{i + 1}{j + 1}", real=True)(t) if j <= i else 0)
    return patiently(_cholesky, covariance, otherwise=sp.ImmutableMatrix(named))


def information(phi: sp.ImmutableMatrix, covariance: sp.ImmutableMatrix, i: int) -> sp.Expr:
    """(Φᵀ P⁻¹ Φ)_ii, the information that the state has on component i of its start; a function J(t) if too long.

    Symbols replace the entries until the end, because SymPy's determinant expands its entries, exponents included. In
    doubles, an expanded exp(-(10⁶ t - 10⁵)²), a narrow feature, would have no correct digit.
    """
    names: dict[sp.Expr, sp.Dummy] = {}

    def named(matrix: sp.MatrixBase) -> sp.ImmutableMatrix:
        return sp.ImmutableMatrix(matrix.applyfunc(lambda e: e if e.is_number else names.setdefault(e, sp.Dummy())))

    found = patiently(_information, named(phi[:, i]), named(covariance))
    if found is None:
        return sp.Function("J", positive=True)(t)
    return found.xreplace({name: entry for entry, name in names.items()})


def _information(column: sp.MatrixBase, covariance: sp.ImmutableMatrix) -> sp.Expr:
    return (column.T * covariance.adjugate() * column)[0] / covariance.det()


def _cholesky(covariance: sp.ImmutableMatrix) -> sp.ImmutableMatrix:
    k = covariance.shape[0]
    L = sp.zeros(k, k)
    for i in range(k):
        for j in range(i + 1):
            rest = covariance[i, j] - sum(L[i, n] * L[j, n] for n in range(j))
            L[i, j] = sp.sqrt(rest) if i == j else rest / L[j, j]
    return sp.ImmutableMatrix(L)


def _time_change(F: sp.ImmutableMatrix) -> tuple[sp.Expr, sp.ImmutableMatrix] | None:
    """``(beta, F0)`` with F = beta(t) F0 and F0 constant, or None."""
    reference = next((entry for entry in F if entry != 0), None)
    if reference is None or not F.has(t):
        return sp.Integer(1), F
    constants = [constant_ratio(entry / reference) if entry != 0 else sp.Integer(0) for entry in F]
    if None in constants:
        return None
    number, beta = reference.as_independent(t, as_Add=False)
    return beta, sp.ImmutableMatrix(*F.shape, [number * constant for constant in constants])


def _exponential(F0: sp.ImmutableMatrix, B: sp.Expr) -> sp.ImmutableMatrix | None:
    """exp(F0 B): for k = 2 by Cayley and Hamilton, for diagonal and nilpotent F0 directly, else by SymPy."""
    k = F0.shape[0]
    one = sp.eye(k)
    if F0.is_diagonal():
        return sp.ImmutableMatrix(sp.diag(*(sp.exp(F0[i, i] * B) for i in range(k))))
    if (F0**k).applyfunc(sp.expand).is_zero_matrix:
        return sp.ImmutableMatrix(sum((F0**n * B**n / sp.factorial(n) for n in range(1, k)), one))
    if k > 2:
        return exponential_within(F0, B)
    middle = F0.trace() / 2
    rest = F0 - middle * one
    square = sp.expand(-rest.det())  # (F0 - middle)² = square
    if square == 0:
        c, s = sp.Integer(1), B
    elif square.is_negative:
        c, s = sp.cos(sp.sqrt(-square) * B), sp.sin(sp.sqrt(-square) * B) / sp.sqrt(-square)
    elif square.is_positive:
        root = sp.sqrt(square)
        grow, decay = sp.exp((middle + root) * B), sp.exp((middle - root) * B)
        return sp.ImmutableMatrix((grow + decay) / 2 * one + (grow - decay) / (2 * root) * rest)
    else:
        return None  # its sign decides between cosh and cos, and depends on parameters
    return sp.ImmutableMatrix((sp.exp(middle * B) * (c * one + s * rest)).applyfunc(sp.expand_mul))


def _offset(
    F: sp.ImmutableMatrix, b: sp.ImmutableMatrix, phi: sp.ImmutableMatrix, midpoint: dict
) -> tuple[sp.ImmutableMatrix, str]:
    if b.is_zero_matrix:
        return b, "offset: none"
    if F.det() != 0:
        level = [constant_ratio(entry) for entry in -(F.inv() * b)]
        if None not in level:
            return sp.ImmutableMatrix(
                (sp.eye(len(b)) - phi) * sp.Matrix(level)
            ), "offset: mean reversion to mu with F mu = -b"
    integrals = [definite(entry, t, midpoint) for entry in (phi.inv() * b).applyfunc(sp.expand)]
    if None not in integrals:
        return sp.ImmutableMatrix((phi * sp.Matrix(integrals)).applyfunc(tidy)), "offset: antiderivative of Φ⁻¹ b"
    u = sp.Symbol(unused("u", (phi, b)), nonnegative=True)
    integrand = (phi.inv() * b).subs(t, u)
    column = integrand.applyfunc(lambda entry: sp.Integral(entry, (u, 0, t)))
    return sp.ImmutableMatrix(phi * column), "offset: by quadrature"


def _covariance(
    F0: sp.ImmutableMatrix, beta: sp.Expr, Q: sp.ImmutableMatrix, P0: sp.ImmutableMatrix, phi: sp.ImmutableMatrix,
    midpoint: dict,
) -> tuple[sp.ImmutableMatrix, str]:  # fmt: skip
    Q0 = [constant_ratio(entry / beta) if entry != 0 else sp.Integer(0) for entry in Q]
    if None not in Q0:
        S = stationary_covariance(F0, sp.ImmutableMatrix(*Q.shape, Q0))
        if S is not None:
            var = (S - phi * (S - P0) * phi.T).applyfunc(tidy)
            return sp.ImmutableMatrix(var), "covariance: S - alpha (S - P0) alphaᵀ with F0 S + S F0ᵀ + Q0 = 0"
    integrand = (phi.inv() * Q * phi.inv().T).applyfunc(lambda entry: sp.expand(sp.simplify(entry)))
    integrals = [definite(entry, t, midpoint) for entry in integrand]
    if None not in integrals:
        var = phi * (P0 + sp.Matrix(*Q.shape, integrals)) * phi.T
        return sp.ImmutableMatrix(var.applyfunc(tidy)), "covariance: antiderivative of Φ⁻¹ g gᵀ Φ⁻ᵀ"
    u = sp.Symbol(unused("u", (integrand,)), nonnegative=True)
    inner = integrand.subs(t, u).applyfunc(lambda entry: sp.Integral(entry, (u, 0, t)) if entry != 0 else entry)
    return sp.ImmutableMatrix(phi * (P0 + inner) * phi.T), "covariance: by quadrature"


def _unsolved(F: sp.ImmutableMatrix, b: sp.ImmutableMatrix, Q: sp.ImmutableMatrix, P0: sp.ImmutableMatrix) -> Moments:
    """The moments with undefined functions for Φ, the solution of Φ' = F Φ."""
    k = F.shape[0]
    u = sp.Symbol(unused("u", (F, b, Q)), nonnegative=True)

    def fundamental(*arguments: sp.Symbol) -> sp.ImmutableMatrix:
        entries = [[sp.Function(f"Phi_{i + 1}{j + 1}")(*arguments) for j in range(k)] for i in range(k)]
        return sp.ImmutableMatrix(entries)

    phi, since = fundamental(t), fundamental(t, u)
    noise = (since * Q.subs(t, u) * since.T).applyfunc(lambda entry: sp.Integral(entry, (u, 0, t)))
    push = (since * b.subs(t, u)).applyfunc(lambda e: sp.Integral(e, (u, 0, t)) if e != 0 else e)
    var = sp.ImmutableMatrix(phi * P0 * phi.T + noise)
    rule = "alpha: Φ' = F(t) Φ, by quadrature (Φ(t, u) is the solution from u)"
    return Moments(
        sp.Integer(0), phi, sp.ImmutableMatrix(push), var, (rule, "offset: by quadrature", "covariance: by quadrature")
    )


def tidy(expr: sp.Expr) -> sp.Expr:
    """``expr`` expanded, with its exponentials merged and collected."""
    merged = sp.powsimp(sp.expand(expr))
    powers = sorted(merged.atoms(sp.exp), key=sp.default_sort_key)
    return sp.collect(merged, powers) if powers else sp.factor_terms(merged)
