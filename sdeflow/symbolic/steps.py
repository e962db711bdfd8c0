r"""The steps from f and g to all that follows from them, each re-checked by substituting its result.

A step states equations and a list of identities, pairs of expressions that must be equal. :func:`verify` first
expands their difference, and where that is not 0 evaluates both sides in 30 digits at five times and points. There,
integrals, schedules and undefined functions stand for arbitrary numbers: after derivatives are taken and constants
pulled out of integrals, what is left must hold whatever their values. A derivation is only as good as these checks,
which know nothing of the rules by which a formula was found.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from xml.dom.minidom import Element

import sympy as sp
from sympy.core.function import AppliedUndef
from sympy.printing.pretty.stringpict import prettyForm

from sdeflow.symbolic.affine import kink_in_state
from sdeflow.symbolic.coupled import stationary_covariance, symbolic_cholesky
from sdeflow.symbolic.declaration import Declaration, stratonovich_correction
from sdeflow.symbolic.equations import Equation, forward, probability_flow, reverse_time
from sdeflow.symbolic.lamperti import Reduction, line_mean, line_var
from sdeflow.symbolic.lamperti import y as line
from sdeflow.symbolic.moments import Moments, rationalised
from sdeflow.symbolic.pearson import Pearson, decay, spread
from sdeflow.symbolic.schedule import Schedule
from sdeflow.symbolic.symbols import data_symbols, score_symbols, t, x, x_0

__all__ = ["Notation", "Step", "general_steps", "linear_steps", "pearson_steps", "reducible_steps", "verify"]

Identity = tuple[sp.Expr | sp.MatrixBase, sp.Expr | sp.MatrixBase]
Numbers = Mapping[sp.Symbol, float]

_TIMES = tuple(sp.Rational(k, 97) for k in (7, 29, 47, 71, 96))  # of the horizon
_STANDING = (sp.Integral, sp.Derivative, AppliedUndef, Schedule)
_TOLERANCE = 1e-10
_FLOOR = 1e-29  # what 30 digits can tell
_EXPANDABLE = 400  # operations


@dataclass(frozen=True)
class Step:
    """One step of a derivation.

    Attributes:
        title: what is derived.
        text: how, in a sentence or two.
        equations: the results.
        rule: the rule that gave them; empty where there is no choice.
        check: what substituting the result gave; empty where there is nothing to substitute.
        holds: whether the check was passed.
    """

    title: str
    text: str
    equations: tuple[sp.Basic, ...] = ()
    rule: str = ""
    check: str = ""
    holds: bool = True


class Notation(sp.Symbol):
    """A symbol with a LaTeX of its own, for what is no expression, such as dσ²/dt; products keep their order."""

    __slots__ = ("tex",)

    def __new__(cls, text: str, tex: str | None = None) -> Notation:
        symbol = sp.Symbol.__xnew__(cls, text, commutative=False)
        symbol.tex = text if tex is None else tex
        return symbol

    def _latex(self, printer: object) -> str:
        return self.tex

    def _pretty(self, printer: object) -> prettyForm:
        return prettyForm(self.name)

    def _mathml_presentation(self, printer: object) -> Element:
        parts = [printer.dom.createElement("mi") for _ in self.name.split("/")]
        for part, name in zip(parts, self.name.split("/"), strict=True):
            part.appendChild(printer.dom.createTextNode(name))
        if len(parts) != 2:
            parts[0].firstChild.data = self.name
            return parts[0]
        fraction = printer.dom.createElement("mfrac")
        for part in parts:
            fraction.appendChild(part)
        return fraction


def verify(identities: Iterable[Identity], numbers: Numbers, T: float) -> tuple[str, bool]:
    """How well both sides of each identity agree, in words, and whether they do.

    Args:
        identities: pairs of expressions or matrices; symbols without a number are arbitrary.
        numbers: values of the parameters.
        T: the horizon.
    """
    pairs = [pair for sides in identities for pair in zip(*map(_entries, sides), strict=True)]
    pairs = [tuple(_settled(rationalised(side)) for side in pair) for pair in pairs]
    differences = [left - right for left, right in pairs]
    if all(d == 0 or (d.count_ops() < _EXPANDABLE and sp.expand(d) == 0) for d in differences):
        return "0, by substitution", True
    try:
        return judged(
            max(_defect(at(left), at(right)) for at in _evaluators(pairs, numbers, T) for left, right in pairs)
        )
    except (TypeError, ValueError, ArithmeticError):  # no number, so no proof
        return "FAILED: it could not be evaluated", False


def judged(worst: float, tolerance: float = _TOLERANCE) -> tuple[str, bool]:
    """The check of a step whose largest relative residual is ``worst``."""
    if worst <= tolerance:
        worst = max(worst, _FLOOR)
        return f"≤ {worst:.0e} at {len(_TIMES)} times", True
    return f"FAILED: off by {worst:.1g} of its size", False


def check_times(T: float) -> list[float]:
    """The times at which identities are evaluated."""
    return [float(fraction * T) for fraction in _TIMES]


def _entries(side: sp.Expr | sp.MatrixBase) -> list[sp.Expr]:
    return list(side) if isinstance(side, sp.MatrixBase) else [sp.S(side)]


def _settled(expr: sp.Expr) -> sp.Expr:
    """``expr`` with constant factors before its integrals, and without integrals over nothing."""

    def pull(function: sp.Expr, *limits: sp.Tuple) -> sp.Expr:
        variable, *ends = limits[0]
        if len(ends) == 2 and ends[0] == ends[1]:
            return sp.Integer(0)
        if isinstance(function, sp.Piecewise) and function.args[0][0] != 0:  # the first branch sets the scale
            parts = [value.as_independent(variable, as_Add=False) for value, _ in function.args]
            constant, standing = parts[0][0], {}
            for node, _ in parts:  # SymPy inverts a Piecewise branch by branch, and so cancels none
                standing |= {atom: sp.Dummy() for atom in node.atoms(sp.Piecewise) if atom not in standing}
            back = {dummy: atom for atom, dummy in standing.items()}
            scales = [(own.xreplace(standing) / constant.xreplace(standing)).xreplace(back) for own, _ in parts]
            branches = [(k * rest, cond) for k, (_, rest), (_, cond) in zip(scales, parts, function.args, strict=True)]
            return constant * sp.Integral(sp.Piecewise(*branches), *limits)
        constant, rest = function.as_independent(variable, as_Add=False)
        return constant * sp.Integral(rest, *limits)

    return expr.replace(sp.Integral, pull) if expr.has(sp.Integral) else expr


def _evaluators(
    pairs: Sequence[tuple[sp.Expr, sp.Expr]], numbers: Numbers, T: float
) -> Iterator[Callable[[sp.Expr], sp.Expr]]:
    """Functions that put numbers into an expression, one for each time."""
    atoms = {atom for pair in pairs for side in pair for atom in _outermost(side)}
    dummies = {atom: sp.Dummy(f"c{i}") for i, atom in enumerate(sorted(atoms, key=sp.default_sort_key))}
    known = {symbol: sp.Rational(str(value)) for symbol, value in numbers.items()}
    symbols = {s for pair in pairs for side in pair for s in side.free_symbols} - {t, *known}
    free = [*sorted(symbols, key=lambda symbol: (symbol.name, sp.default_sort_key(symbol))), *dummies.values()]
    for j, fraction in enumerate(_TIMES):
        generator = random.Random(j)
        drawn = {symbol: sp.Float(0.3 + 0.6 * generator.random(), 40) for symbol in free}
        at = {**drawn, **known, t: sp.Float(fraction * sp.Rational(str(T)), 40)}
        yield lambda expr, at=at: expr.xreplace(dummies).subs(at).evalf(30)


def _outermost(expr: sp.Basic) -> set[sp.Basic]:
    """The integrals, derivatives and undefined functions in ``expr`` that stand in no other."""
    if isinstance(expr, _STANDING):
        return {expr}
    return {atom for part in expr.args for atom in _outermost(part)}


def _defect(left: sp.Expr, right: sp.Expr) -> float:
    """The difference of two numbers, relative to their size."""
    size = float(abs(left) + abs(right))
    if not math.isfinite(size):
        raise ValueError(f"{left} and {right} are no numbers")
    return float(abs(left - right)) / size if size > 1e-25 else 0.0


# -------------------------------------------------------------------- what the steps are written in

_dt, _dw = Notation("dt"), Notation("dw")
_m0, _c = sp.Symbol("m_0", real=True), sp.Symbol("c", positive=True)


def _is(left: sp.Basic, right: object) -> sp.Basic:
    return sp.Eq(left, right, evaluate=False)


def _normal(mean: object, var: object) -> sp.Expr:
    return sp.Function("N")(mean, var)


def _matrix(value: sp.Expr | sp.MatrixBase) -> sp.ImmutableMatrix:
    return sp.ImmutableMatrix(value) if isinstance(value, sp.MatrixBase) else sp.ImmutableMatrix([[value]])


def differential(equation: Equation) -> tuple[sp.Basic, ...]:
    """dx = f dt + g dw, or dx/dt = f, one equation for each component."""
    matrix, lines = equation.noise_matrix, []
    noise, tex = ("w", "w") if equation.noise == "w" else ("w̄", r"\bar{w}")
    for i, (component, drift) in enumerate(zip(equation.state, equation.drifts, strict=True)):
        name = component.name
        if equation.diffusion == 0:
            lines.append(_is(Notation(f"d{name}/dt", rf"\frac{{d{sp.latex(component)}}}{{dt}}"), drift))
            continue
        noises = [f"_{j + 1}" if matrix.shape[1] > 1 else "" for j in range(matrix.shape[1])]
        symbols = [Notation(f"d{noise}{n}", f"d{tex}{n}") for n in noises]
        terms = [sp.Mul(g, dw) for g, dw in zip(matrix.row(i), symbols, strict=True)]
        lines.append(_is(Notation(f"d{name}", f"d{sp.latex(component)}"), sp.Add(sp.Mul(drift, _dt), *terms)))
    return tuple(lines)


# -------------------------------------------------------------------- affine SDEs


def linear_steps(
    declaration: Declaration, moments: Moments, numbers: Numbers, measured: Mapping[str, float] | None = None
) -> list[Step]:
    """From f and g to the Gaussian kernel, its score and the prior.

    Args:
        declaration: an affine declaration.
        moments: of its kernel, as they are to be shown and checked.
        numbers: values of the parameters.
        measured: relative residuals of the moments' numbers, for a coupled state where Φ has no formula.
    """
    F, b = (_matrix(side) for side in declaration.affine)
    state = sp.Matrix(declaration.state)
    check, holds = verify([(sp.Matrix(declaration.drifts), F * state + b)], numbers, declaration.T)
    if declaration.coupled:
        u, f = Notation("u", r"\mathbf{u}"), Notation("f", r"\mathbf{f}")
        names = [_is(f, Notation("F") * u + Notation("b", r"\mathbf{b}")), _is(u, sp.ImmutableMatrix(state))]
        names += [_is(Notation("F"), F), _is(Notation("b", r"\mathbf{b}"), b), _is(Notation("G"), declaration.g)]
    else:
        names = [_is(Notation("f"), Notation("a") * Notation("x") + Notation("b"))]
        names += [_is(Notation("a"), F[0]), _is(Notation("b"), b[0]), _is(Notation("g"), declaration.g)]
    classified = Step(
        "Classification",
        "The drift is affine in the state and the diffusion does not hold it, so that the state given its start is "
        "Gaussian: a mean and a variance tell everything.",
        tuple(names),
        "f affine in the state, g a function of t alone",
        check,
        holds,
    )
    steps = [declared(declaration), classified, *moment_steps(declaration, moments, numbers, measured)]
    return steps + kernel_steps(declaration, moments, numbers)


def declared(declaration: Declaration) -> Step:
    """The SDE itself, in the sense of Itô; in that of Stratonovich as well, where the two differ."""
    text = f"Data at t = 0 become noise at t = T = {declaration.T:g}. The equation is read in the sense of Itô."
    equations = differential(forward(declaration))
    if declaration.state_dependent_noise:
        g = declaration.g if declaration.coupled else sp.ImmutableMatrix([[declaration.g]])
        correction = stratonovich_correction(g, declaration.state)
        f = sp.Matrix(declaration.drifts) - correction
        text += " In the sense of Stratonovich the drift is lower by half of g ∂g/∂x."
        stratonovich = Notation("f (Stratonovich)", r"f_{\mathrm{Stratonovich}}")
        equations += (_is(stratonovich, sp.ImmutableMatrix(f) if declaration.coupled else f[0]),)
    return Step("The declaration", text, equations)


def moment_steps(
    declaration: Declaration, moments: Moments, numbers: Numbers, measured: Mapping[str, float] | None = None
) -> list[Step]:
    """alpha, the mean and the variance (Φ and P of a coupled state) by their differential equations."""
    coupled = declaration.coupled
    F, b = (_matrix(side) for side in declaration.affine)
    Q, P0 = declaration.gram, _matrix(sp.S(declaration.P0))
    alpha, offset, var = (_matrix(m) for m in (moments.alpha, moments.offset, moments.var))
    one, rules = sp.eye(len(declaration.state)), [_bare(rule) for rule in moments.rules]
    start = sp.Matrix(data_symbols(declaration.state))
    mean = alpha * start + offset
    identities = {
        "alpha": [(sp.diff(alpha, t), F * alpha), (_at_start(alpha), one)],
        "mean": [(sp.diff(mean, t), F * mean + b), (_at_start(mean), start)],
        "var": [(sp.diff(var, t), F * var + var * F.T + Q), (_at_start(var), P0)],
    }
    checks = {}
    for name, pairs in identities.items():
        checks[name] = verify(pairs, numbers, declaration.T) if measured is None else judged(measured[name], 1e-8)
    if coupled:
        return _matrix_moments(alpha, offset, var, rules, checks, declaration, numbers, measured is None)
    a_n, q_n = Notation("a"), Notation("g²", "g^2")
    a, m, v = sp.Symbol("alpha"), Notation("m"), _variance(declaration)
    v_t = Notation("dσ²/dt", r"\frac{d\sigma^2}{dt}") if v.is_Pow else Notation("dv/dt", r"\frac{dv}{dt}")
    r = sp.Symbol("r", nonnegative=True)
    (a_t,), (q_t,) = F, Q
    growth = sp.exp(sp.Integral(a_t.subs(t, r), (r, 0, t)))
    past = sp.Function("alpha")(r)
    pushed = [_is(Notation("offset", r"\mathrm{offset}"), offset[0])] if offset[0] != 0 else []
    return [
        Step(
            "The integrating factor",
            "The homogeneous equation dα/dt = a α, α(0) = 1, is solved by the exponential of the integral of a.",
            (_is(a, growth), *([] if alpha[0] == growth else [_is(a, alpha[0])])),
            rules[0],
            *checks["alpha"],
        ),
        Step(
            "The mean",
            "Taking the expectation removes the noise: dm/dt = a m + b, m(0) = x_0. By variation of constants "
            "m = α x_0 + offset with offset = α ∫ b/α.",
            (
                _is(Notation("dm/dt", r"\frac{dm}{dt}"), a_n * m + Notation("b")),
                *pushed,
                _is(m, mean[0]),
            ),
            rules[1],
            *checks["mean"],
        ),
        Step(
            "The variance",
            "Itô's formula for (x - m)² gives a linear equation for its expectation, of which the integral of g²/α² "
            "is the solution" + (f", from P0 = {declaration.P0:g}." if declaration.P0 else "."),
            (
                _is(v_t, 2 * a_n * v + q_n),
                _is(v, a**2 * (P0[0] + sp.Integral(rationalised(q_t).subs(t, r) / past**2, (r, 0, t)))),
                _is(v, var[0]),
            ),
            rules[2],
            *checks["var"],
        ),
    ]


def _variance(declaration: Declaration) -> sp.Expr:
    """The symbol of the variance: sigma², or v beside a parameter sigma."""
    taken = any(parameter.name == "sigma" for parameter in declaration.parameters)
    return sp.Symbol("v", positive=True) if taken else sp.Symbol("sigma", positive=True) ** 2


def _bare(rule: str) -> str:
    """A rule without the name of the moment; empty for a moment that is 0."""
    name, _, text = rule.partition(": ")
    return "" if text == "none" else text or name


def _at_start(matrix: sp.MatrixBase) -> sp.Matrix:
    return matrix.subs(t, 0)


def _matrix_moments(
    phi: sp.ImmutableMatrix,
    offset: sp.ImmutableMatrix,
    P: sp.ImmutableMatrix,
    rules: Sequence[str],
    checks: Mapping[str, tuple[str, bool]],
    declaration: Declaration,
    numbers: Numbers,
    closed: bool,
) -> list[Step]:
    F, Phi, S = Notation("F"), Notation("Φ", r"\Phi"), Notation("P")
    gram = Notation("GGᵀ", r"GG^\top")
    m, b = Notation("m", r"\mathbf{m}"), Notation("b", r"\mathbf{b}")
    start, level = Notation("u₀", r"\mathbf{u}_0"), Notation("offset", r"\mathrm{offset}")
    moved = [_is(level, offset)] if any(entry != 0 for entry in offset) else []
    L, L_T = Notation("L"), Notation("Lᵀ", r"L^\top")
    steps = [
        Step(
            "The fundamental matrix",
            "The homogeneous equation carries a start to Φ times it"
            + (
                ", the matrix exponential where F commutes with itself at all times."
                if closed
                else "; F does not commute with itself by any rule here, so that Φ is defined by its equation, and its "
                "numbers come by quadrature."
            ),
            (
                _is(Notation("dΦ/dt", r"\frac{d\Phi}{dt}"), F * Phi),
                _is(Notation("Φ(0)", r"\Phi(0)"), sp.Integer(1)),
                *([_is(Phi, phi)] if closed else []),
            ),
            rules[0],
            *checks["alpha"],
        ),
        Step(
            "The mean",
            "The expectation follows the drift; by variation of constants it is Φ u₀ + offset with offset = Φ ∫ Φ⁻¹ b.",
            (_is(Notation("dm/dt", r"\frac{d\mathbf{m}}{dt}"), F * m + b), _is(m, Phi * start + level), *moved),
            rules[1],
            *checks["mean"],
        ),
        Step(
            "The covariance",
            "Itô's formula for (u - m)(u - m)ᵀ gives the Lyapunov equation, from P(0) = P0.",
            (
                _is(Notation("dP/dt", r"\frac{dP}{dt}"), F * S + S * Notation("Fᵀ", r"F^\top") + gram),
                _is(Notation("P(0)"), rationalised(declaration.P0)),
                *([_is(S, P)] if closed else []),
            ),
            rules[2],
            *checks["var"],
        ),
    ]
    steps += _stationary(declaration, numbers)
    factor = symbolic_cholesky(P) if closed else None
    check = verify([(factor * factor.T, P)], numbers, declaration.T) if closed else ("", True)
    text = "x_t = m + L ε with standard normal ε draws from the kernel" + (
        "." if closed else "; L comes by quadrature."
    )
    lower = [(i, j) for i in range(P.shape[0]) for j in range(i + 1)] if closed else []
    equations = (_is(L * L_T, S), *(_is(sp.Symbol(f"L_{i + 1}{j + 1}"), factor[i, j]) for i, j in lower))
    return [*steps, Step("The Cholesky factor", text, equations, "entry by entry", *check)]


def _stationary(declaration: Declaration, numbers: Numbers) -> list[Step]:
    """The stationary covariance, where it is one at all times and positive."""
    F, Q = rationalised_matrix(declaration.affine[0]), rationalised_matrix(declaration.gram)
    S = stationary_covariance(F, Q)
    if S is None or S.has(t):
        return []
    values = S.subs({symbol: sp.Rational(str(value)) for symbol, value in numbers.items()})
    if not all(values[:n, :n].det().evalf().is_positive for n in range(1, len(declaration.state) + 1)):
        return []
    check = verify([(F * S + S * F.T + Q, sp.zeros(*S.shape))], numbers, declaration.T)
    n, Fn, FT = Notation("S"), Notation("F"), Notation("Fᵀ", r"F^\top")
    text = "Where P does not change any more, it solves the algebraic Lyapunov equation."
    equations = (_is(Fn * n + n * FT + Notation("GGᵀ", r"GG^\top"), sp.Integer(0)), _is(n, S))
    return [Step("The stationary covariance", text, equations, "a linear system for S", *check)]


def rationalised_matrix(matrix: sp.ImmutableMatrix) -> sp.ImmutableMatrix:
    """``matrix`` with exact numbers."""
    return matrix.applyfunc(rationalised)


def kernel_steps(declaration: Declaration, moments: Moments, numbers: Numbers) -> list[Step]:
    """The Gaussian kernel, its score, the weighting, the log-SNR and the prior.

    The checks are in general symbols, whose derivatives are those that the steps before have checked.
    """
    k, coupled, T = len(declaration.state), declaration.coupled, declaration.T
    proof = _Gaussian(k)
    u, m, P = Notation("u", r"\mathbf{u}"), Notation("m", r"\mathbf{m}"), Notation("P")
    inverse = Notation("P⁻¹", "P^{-1}")
    if coupled:
        law = [_is(Notation("p(u | u₀)", r"p(\mathbf{u} \mid \mathbf{u}_0)"), _normal(m, P))]
        score = (_is(Notation("∇ log p", r"\nabla \log p"), -inverse * (u - m)), _is(Notation("λ", r"\lambda"), P))
        snr, rate = (
            Notation("Φᵀ P⁻¹ Φ", r"\Phi^\top P^{-1} \Phi"),
            Notation("Φᵀ P⁻¹ GGᵀ P⁻¹ Φ", r"\Phi^\top P^{-1} GG^\top P^{-1} \Phi"),
        )
        snrs = (_is(Notation("J"), snr), _is(Notation("dJ/dt", r"\frac{dJ}{dt}"), -rate))
        prior = Notation("Φ C Φᵀ + P", r"\Phi C \Phi^\top + P")
        priors = (_is(Notation("p(u(T))", r"p(\mathbf{u}_T)"), _normal(m, prior)),)
        snr_check = verify(proof.information, numbers, T)
    else:
        centre, v = moments.alpha * x_0 + moments.offset, _variance(declaration)
        p, q, a = Notation("p(x | x₀)", r"p(x \mid x_0)"), Notation("g²", "g^2"), sp.Symbol("alpha", positive=True)
        law = [_is(p, _normal(centre, moments.var))]
        score = (
            _is(Notation("∇ log p", r"\nabla \log p"), -(x - sp.Symbol("m")) / v),
            _is(Notation("λ = 1/E|∇ log p|²", r"\lambda = 1 / \mathbb{E}|\nabla \log p|^2"), v),
            _is(v, moments.var),
        )
        snr = 2 * moments.log_alpha - sp.log(moments.var)
        name = Notation("log α²/σ²", r"\log \frac{\alpha^2}{\sigma^2}")
        snrs = (
            _is(name, snr),
            _is(Notation("d(log α²/σ²)/dt", r"\frac{d}{dt} \log \frac{\alpha^2}{\sigma^2}"), -q / v),
        )
        wide = a**2 * _c**2 + v
        priors = (
            _is(Notation("p(x(T) | x₀ = 0)", r"p(x_T \mid x_0 = 0)"), _normal(moments.offset, v)),
            _is(Notation("p(x(T))", "p(x_T)"), _normal(a * _m0 + moments.offset, wide)),
        )
        snr_check = verify([(sp.diff(snr, t), -rationalised(declaration.gram[0]) / moments.var)], numbers, T)
    rate_text = ", at the rate -g²/σ²; half of it is minus the rate of half_log_snr" if not coupled else ""
    return [
        Step(
            "The perturbation kernel",
            "The noise enters linearly, so that the kernel is the normal law with this mean "
            "and variance. It solves the Fokker-Planck equation.",
            tuple(law),
            "",
            *verify(proof.fokker_planck, numbers, T),
        ),
        Step(
            "Its score and the weighting",
            "The score of the kernel is linear in the state. E|∇ log p|² = -E[∇·∇ log p] is "
            "the inverse variance (per coordinate), so that λ(t), which makes every time count alike, is the variance.",
            score,
            "",
            *verify(proof.score, numbers, T),
        ),
        Step(
            "The log-SNR",
            "The "
            + ("Fisher information of the start" if coupled else "signal-to-noise ratio")
            + f" falls{rate_text}.",
            snrs,
            "",
            *snr_check,
        ),
        Step(
            "The prior",
            f"At T = {T:g} data with "
            + ("covariance C (P0 is in P)" if coupled else "mean m_0 and standard deviation c")
            + " have become this Gaussian, which the reverse equations start from.",
            priors,
            "",
            *verify(proof.prior, numbers, T),
        ),
    ]


class _Gaussian:
    """Identities of the k-dimensional normal law N(m, P) with m' = F m + b, P' = F P + P Fᵀ + Q and Φ' = F Φ.

    They are in bare symbols for k = 1, and in arbitrary rational numbers above, where symbols would take seconds.
    """

    def __init__(self, k: int) -> None:
        generator = random.Random(k)

        def entry(name: str) -> sp.Expr:
            return sp.Dummy(name) if k == 1 else sp.Rational(generator.randint(1, 99), 97)

        def square(name: str, symmetric: bool = False) -> sp.Matrix:
            matrix = sp.Matrix(k, k, lambda i, j: entry(f"{name}{i}{j}"))
            return matrix + matrix.T if symmetric else matrix

        F, phi, Q, C = square("F"), square("Phi"), square("Q", True), square("C", True)
        P = square("P", True) + 2 * k * sp.eye(k)  # far from singular
        m, b = (sp.Matrix(k, 1, lambda i, _, n=n: entry(f"{n}{i}")) for n in "mb")
        u = sp.Matrix(k, 1, lambda i, _: sp.Dummy(f"u{i}"))
        inverse, rest = P.inv(), u - m
        P_t, m_t, phi_t = F * P + P * F.T + Q, F * m + b, F * phi
        score = -inverse * rest
        curved = rest.T * inverse * P_t * inverse * rest / 2
        flow = score.T * Q * score / 2
        log_p = -(rest.T * inverse * rest)[0] / 2
        self.fokker_planck: list[Identity] = [
            (
                (-score.T * m_t + curved)[0] - (inverse * P_t).trace() / 2,
                -F.trace() - ((F * u + b).T * score)[0] + flow[0] - (Q * inverse).trace() / 2,
            )
        ]
        self.score: list[Identity] = [
            (score, sp.Matrix([sp.diff(log_p, entry) for entry in u])),
            (-score.jacobian(u), inverse),
        ]
        moved = phi_t.T * inverse * phi + phi.T * inverse * phi_t - phi.T * inverse * P_t * inverse * phi
        self.information: list[Identity] = [(moved, -phi.T * inverse * Q * inverse * phi)]
        total = phi * C * phi.T + P
        self.prior: list[Identity] = [(phi_t * C * phi.T + phi * C * phi_t.T + P_t, F * total + total * F.T + Q)]


# -------------------------------------------------------------------- reducible and Pearson SDEs


def log_fokker_planck(declaration: Declaration, log_p: sp.Expr, place: Mapping[sp.Symbol, sp.Expr]) -> list[Identity]:
    """∂p/∂t = -∂(f p)/∂x + ½ ∂²(g² p)/∂x² for p = exp(log_p), divided by p, with symbols put in their place."""
    f, q = rationalised(declaration.f), rationalised(declaration.gram[0])
    slope, curve = sp.diff(log_p, x), sp.diff(log_p, x, 2)
    q_x, q_xx = sp.diff(q, x), sp.diff(q, x, 2)
    right = -sp.diff(f, x) - f * slope + (q_xx + 2 * q_x * slope + q * (curve + slope**2)) / 2
    return [(sp.diff(log_p, t).subs(place), right.subs(place))]


def reducible_steps(
    declaration: Declaration, reduction: Reduction, inner: Declaration, moments: Moments, numbers: Numbers
) -> list[Step]:
    """The change of state, Itô's formula, the affine SDE of y, and the push-forward of its kernel.

    Args:
        declaration: dx = f dt + g dw.
        reduction: its change of state.
        inner: the affine SDE of y, its state written x.
        moments: of ``inner``.
        numbers: values of the parameters.
    """
    check = partial(verify, numbers=numbers, T=declaration.T)
    change, f, g = reduction.map, rationalised(declaration.f), rationalised(declaration.g)
    here, there = sp.Symbol("y", positive=True), sp.Symbol("y_0", positive=True)
    H, X = change.to_line, change.to_state.subs(line, here)
    place = {x: X, x_0: change.to_state.subs({line: there, t: 0})}
    drift = sp.diff(H, t) + f * sp.diff(H, x) + g**2 * sp.diff(H, x, 2) / 2
    branches = [(change.to_state.subs(line, -here), X)] if change.fold else []
    found = (H.subs(x, X), here), (g.subs(x, X), change.c * sp.diff(X, here)), *branches
    y, m, v = Notation("y"), sp.Symbol("m"), sp.Symbol("v", positive=True)
    affine = sp.Mul(reduction.a * here + reduction.b, _dt) + sp.Mul(change.c, _dw)
    mean, start = sp.Symbol("m"), H.subs({x: x_0, t: 0})
    exact_mean = moments.alpha * start + moments.offset
    exponents = [-((sign * H - m) ** 2) / (2 * v) for sign in ((1, -1) if change.fold else (1,))]
    density = sum(sp.exp(e) for e in exponents) / sp.sqrt(2 * sp.pi * v) * sp.diff(H, x)
    log_p = sp.log(sum(sp.exp(e) for e in exponents)) - sp.log(v) / 2 + sp.log(sp.diff(H, x))
    log_p = log_p.subs({m: exact_mean, v: moments.var})
    both = "Both y and -y are sent to x, and both branches are summed." if change.fold else "y covers the whole line."
    domain = f" Here x lies in ({change.lower}, {change.upper})."
    shown = [
        _is(Notation(name, tex), moment.subs({line_mean: m, line_var: v}))
        for name, tex, moment in (
            ("E[x | x₀]", r"\mathbb{E}[x \mid x_0]", change.mean),
            ("Var[x | x₀]", r"\mathrm{Var}[x \mid x_0]", change.var),
        )
        if moment is not None
    ]
    inner_steps = moment_steps(inner, moments, numbers)
    return [
        declared(declaration),
        Step(
            "The change of state (Lamperti)",
            "y = ∫ dx / h with g = c(t) h(x, t) takes the state out of the noise. " + both + domain,
            (
                _is(y, H),
                _is(Notation("x"), X),
            ),
            f"the map {change.name!r}",
            *check(found),
        ),
        Step(
            "Itô's formula",
            "dy = [∂y/∂t + f ∂y/∂x + ½ g² ∂²y/∂x²] dt + g ∂y/∂x dw, and the bracket is affine in y.",
            (_is(Notation("dy"), affine),),
            "the drift of y is a(t) y + b(t)",
            *check([(drift.subs(x, X), reduction.a * here + reduction.b), (g * sp.diff(H, x), change.c)]),
        ),
        *(
            Step(
                f"{step.title} of y",
                step.text.replace("x_0", "y_0").replace("(x - m)", "(y - m)"),
                tuple(equation.subs(x_0, sp.Symbol("y_0")) for equation in step.equations),
                step.rule,
                step.check,
                step.holds,
            )
            for step in inner_steps
        ),
        Step(
            "The kernel, pushed forward",
            "The density of x is that of y times |∂y/∂x|, with m and v the mean and the variance "
            "of y given x_0. " + both,
            (_is(mean, exact_mean), _is(Notation("p(x | x₀)", r"p(x \mid x_0)"), density), *shown),
            "change of variables",
            *check(log_fokker_planck(declaration, log_p, place)),
        ),
    ]


def pearson_steps(
    declaration: Declaration, pearson: Pearson, inner: Declaration, moments: Moments, numbers: Numbers
) -> list[Step]:
    """The standard form of a Pearson diffusion, the affine SDE behind it, its mean, variance and kernel."""
    check = partial(verify, numbers=numbers, T=declaration.T)
    f, q = rationalised(declaration.f), rationalised(declaration.gram[0])
    u, u_0 = sp.Symbol("u", positive=True), sp.Symbol("u_0", positive=True)
    place = {x: pearson.origin + pearson.scale * u, x_0: pearson.origin + pearson.scale * u_0}
    root = pearson.kind == "square root"
    if root:
        (delta,) = pearson.shape
        drift, gram = 2 * pearson.a * u + delta * pearson.c**2, 4 * pearson.c**2 * u
        shape = [_is(sp.Symbol("delta"), delta)]
    else:
        A, B = pearson.shape
        drift, gram = pearson.c**2 * (A * (1 - u) - B * u) / 2, pearson.c**2 * u * (1 - u)
        shape = [_is(sp.Symbol("A"), A), _is(sp.Symbol("B"), B)]
    standard = [(f.subs(place), pearson.scale * drift), (q.subs(place), pearson.scale**2 * gram)]
    mean, var = (e.subs({decay: moments.alpha, spread: moments.var}) for e in (pearson.mean, pearson.var))
    f_mean = f.subs(x, mean)
    noise = q.subs(x, mean) + sp.diff(q, x, 2) * var / 2
    odes = [(sp.diff(mean, t), f_mean), (sp.diff(var, t), 2 * sp.diff(f, x) * var + noise)]
    odes += [(mean.subs(t, 0), x_0), (var.subs(t, 0), sp.Integer(0))]
    law = _is(Notation("du"), sp.Mul(drift, _dt) + sp.Mul(sp.sqrt(gram), _dw))
    return [
        declared(declaration),
        Step(
            "Classification (Pearson)",
            f"f is affine and g² quadratic in x: a {pearson.kind} diffusion in u, with constant "
            "shape and, in u, the domain " + ("u >= 0." if root else "0 <= u <= 1."),
            (_is(Notation("x"), place[x]), *shape, law),
            f"Pearson, {pearson.kind}",
            *check(standard),
        ),
        *(
            Step(
                f"{step.title} of the affine SDE behind it",
                step.text,
                step.equations,
                step.rule,
                step.check,
                step.holds,
            )
            for step in moment_steps(inner, moments, numbers)
            if step.title != "The mean"
        ),
        Step(
            "The true mean and variance",
            "The moment equations of a Pearson diffusion are closed: m' = f(m), "
            "v' = 2 f' v + E[g²], E[g²] = g²(m) + ½ (g²)'' v.",
            (
                _is(Notation("E[x | x₀]", r"\mathbb{E}[x \mid x_0]"), mean),
                _is(Notation("Var[x | x₀]", r"\mathrm{Var}[x \mid x_0]"), var),
            ),
            "triangular moment equations",
            *check(odes),
        ),
        (_noncentral if root else _jacobi)(declaration, pearson, moments, place, check),
    ]


def _noncentral(
    declaration: Declaration, pearson: Pearson, moments: Moments, place: dict, check: Callable[..., tuple[str, bool]]
) -> Step:
    """The noncentral chi² kernel, in u = (x - origin) / scale."""
    nu, v, a = pearson.shape[0] / 2 - 1, sp.Symbol("v", positive=True), sp.Symbol("alpha", positive=True)
    u, u_0 = sp.Symbol("u", positive=True), sp.Symbol("u_0", positive=True)
    bessel = sp.besseli(nu, a * sp.sqrt(u * u_0) / v)
    front = (u / (a**2 * u_0)) ** (nu / 2) / (2 * v)
    exponent = -(u + a**2 * u_0) / (2 * v)
    back = {u: (x - pearson.origin) / pearson.scale, u_0: (x_0 - pearson.origin) / pearson.scale}
    log_p = nu / 2 * sp.log(u / (a**2 * u_0)) - sp.log(v) + exponent + sp.log(bessel)
    log_p = log_p.subs({a: moments.alpha, v: moments.var}).subs(back)
    return Step(
        "The kernel",
        "u / σ² follows the noncentral χ² law of δ degrees of freedom and noncentrality α² u₀ / σ²; v is σ².",
        (_is(Notation("p(u | u₀)", r"p(u \mid u_0)"), front * sp.exp(exponent) * bessel),),
        "Feller 1951",
        *check(log_fokker_planck(declaration, log_p, place)),
    )


def _jacobi(
    declaration: Declaration, pearson: Pearson, moments: Moments, place: dict, check: Callable[..., tuple[str, bool]]
) -> Step:
    """The expansion of the kernel in Jacobi polynomials, which are eigenfunctions of its generator."""
    A, B = pearson.shape
    u, u_0, tau = sp.Symbol("u", positive=True), sp.Symbol("u_0", positive=True), sp.Symbol("tau", positive=True)
    n, h = sp.Symbol("n", integer=True, nonnegative=True), sp.Function("h")

    def polynomial(degree: object, at: sp.Expr) -> sp.Expr:
        return sp.jacobi(degree, B - 1, A - 1, 2 * at - 1)

    def rate(degree: object) -> sp.Expr:
        return degree * (degree - 1 + A + B) / 2

    eigen = []
    for degree in range(5):
        p = polynomial(degree, u)
        generated = u * (1 - u) * sp.diff(p, u, 2) / 2 + (A * (1 - u) - B * u) * sp.diff(p, u) / 2
        eigen.append((generated, -rate(degree) * p))
    terms = polynomial(n, u) * polynomial(n, u_0) * sp.exp(-rate(n) * tau) / h(n)
    weight = u ** (A - 1) * (1 - u) ** (B - 1) / sp.Function("B")(A, B)
    return Step(
        "The kernel",
        "The stationary law Beta(A, B) times a sum over its orthogonal polynomials, each an eigenfunction of "
        "the generator, of squared norm h(n); τ is the clock ∫ c². The check is the "
        "eigenvalue equation for n = 0 to 4.",
        (
            _is(sp.Symbol("tau"), moments.var),
            _is(Notation("p(u | u₀)", r"p(u \mid u_0)"), sp.Mul(weight, sp.Sum(terms, (n, 0, sp.oo)), evaluate=False)),
        ),
        "eigenfunction expansion",
        *check(eigen),
    )


# -------------------------------------------------------------------- every SDE


def general_steps(declaration: Declaration, numbers: Numbers) -> list[Step]:
    """What can be said of an SDE without a kernel of its own."""
    text = f"There is no Gaussian kernel, for {declaration.obstacle}; nor does a table of maps or kernels serve it."
    steps = [declared(declaration), Step("Classification", text, (), "general")]
    if is_smooth(declaration):
        steps.append(_local(declaration, numbers))
    if not declaration.coupled and not (declaration.f.has(t) or declaration.g.has(t)):
        steps.append(_stationary_law(declaration, numbers))
    return steps


def is_smooth(declaration: Declaration) -> bool:
    """Whether the drift has a Jacobian everywhere, and the noise does not hold the state."""
    smooth = all(kink_in_state(f, declaration.state) is None for f in declaration.drifts)
    return smooth and not declaration.state_dependent_noise


def _local(declaration: Declaration, numbers: Numbers) -> Step:
    """The Gaussian step of the drift linearised at x (Ozaki), exact to the order of the step."""
    J, h, f, q = sp.symbols("J h f q", real=True)
    mean, var = f * (sp.exp(J * h) - 1) / J, q * (sp.exp(2 * J * h) - 1) / (2 * J)
    pairs = [(sp.diff(mean, h), f + J * mean), (sp.diff(var, h), 2 * J * var + q)]
    pairs += [(mean.subs(h, 0), sp.Integer(0)), (var.subs(h, 0), sp.Integer(0))]
    jacobian = sp.Matrix(declaration.drifts).jacobian(declaration.state)
    jacobian = sp.ImmutableMatrix(jacobian) if declaration.coupled else jacobian[0]
    if declaration.coupled:
        step, noise = (
            Notation("∫ exp(Jr) dr f", r"\int_0^h e^{Jr} dr\, \mathbf{f}"),
            Notation("∫ exp(Jr) GGᵀ exp(Jᵀr) dr", r"\int_0^h e^{Jr} GG^\top e^{J^\top r} dr"),
        )
        law = _normal(Notation("u", r"\mathbf{u}") + step, noise)
    else:
        law = _normal(x + mean, var.subs(q, sp.Symbol("g") ** 2))
    name = Notation("p(x(t+h) | x(t))", "p(x_{t+h} \\mid x_t)")
    return Step(
        "Local linearisation",
        "Over a short time h the drift is f + J (x - x(t)), with J = ∂f/∂x at the start, and the "
        "kernel Gaussian; the integrals run from 0 to h. Its score, averaged given x(t+h), is that of the marginal.",
        (_is(sp.Symbol("J"), jacobian), _is(name, law)),
        "Ozaki's linearisation",
        *verify(pairs, numbers, declaration.T),
    )


def _stationary_law(declaration: Declaration, numbers: Numbers) -> Step:
    """exp(∫ 2f/g²) / g², which carries no flux; normalisable or not."""
    r = sp.Symbol("r", real=True)
    f, q = rationalised(declaration.f), rationalised(declaration.gram[0])
    law = sp.exp(sp.Integral((2 * f / q).subs(x, r), (r, 0, x))) / q
    log_slope = 2 * f / q - sp.diff(q, x) / q
    return Step(
        "The stationary law",
        "Where this can be normalised, by Z, it carries no flux: f p = ½ ∂(g² p)/∂x.",
        (_is(Notation("Z p(x)"), law),),
        "zero flux",
        *verify([(f, (sp.diff(q, x) + q * log_slope) / 2)], numbers, declaration.T),
    )


def equation_steps(declaration: Declaration, numbers: Numbers) -> list[Step]:
    """Fokker-Planck, the reverse SDE, the flow and the likelihood: for any density p, and so for any SDE."""
    check = partial(verify, numbers=numbers, T=declaration.T)
    state, gram, f = declaration.state, declaration.gram, declaration.drifts
    k, p = len(state), sp.Function("p", positive=True)(*declaration.state, t)
    spread_out = [[sp.diff(gram[i, j] * p, state[j]) for j in range(k)] for i in range(k)]
    flux = [sum(row) for row in spread_out]
    scores = dict(zip(score_symbols(state), [sp.diff(p, component) / p for component in state], strict=True))
    reverse, flow = reverse_time(declaration), probability_flow(declaration)
    bound = [[drift.subs(scores) * p for drift in equation.drifts] for equation in (reverse, flow)]
    reversed_flux = [(side, f[i] * p - flux[i]) for i, side in enumerate(bound[0])]
    flow_flux = [(side, f[i] * p - flux[i] / 2) for i, side in enumerate(bound[1])]
    derivative = partial(sp.Derivative, evaluate=False)
    terms = [-derivative(f[i] * p, state[i]) for i in range(k)]
    terms += [derivative(gram[i, j] * p, state[i], state[j]) / 2 for i in range(k) for j in range(k) if gram[i, j] != 0]
    velocity = [sp.Function(f"F_{i}")(*state, t) for i in range(k)]
    divergence = sum(sp.diff(v, component) for v, component in zip(velocity, state, strict=True))
    change = -sum(sp.diff(v * p, c) for v, c in zip(velocity, state, strict=True))
    change += sum(v * sp.diff(p, c) for v, c in zip(velocity, state, strict=True))
    trace = sum(sp.diff(drift, component) for drift, component in zip(flow.drifts, state, strict=True))
    rate = Notation("d log p(x(t), t)/dt".replace("/", "∕"), r"\frac{d}{dt} \log p(x_t, t)")
    final = Notation("log p(x(0), 0) - log p(x(T), T)", r"\log p(x_0, 0) - \log p(x_T, T)")
    return [
        Step(
            "The Fokker-Planck equation",
            "It says how the density p of all states at once moves: carried by f, spread by g.",
            (_is(derivative(p, t), sp.Add(*terms)),),
        ),
        Step(
            "The reverse-time SDE",
            "With s = ∇ log p the bracket is f - ∇·(g gᵀ) - g gᵀ s (Anderson 1982); dt < 0 and w̄ is a "
            "Brownian motion backwards in time. Its density is p again: the flux of its drift is f p less the whole "
            "∇·(g gᵀ p), for any p.",
            differential(reverse),
            "Anderson",
            *check(reversed_flux),
        ),
        Step(
            "The probability-flow ODE",
            "With half of that correction no noise is needed: its flux is f p - ½ ∇·(g gᵀ p), the "
            "right-hand side of Fokker-Planck, for any p.",
            differential(flow),
            "arXiv:2011.13456, eq. 13",
            *check(flow_flux),
        ),
        Step(
            "The log-likelihood",
            "Along the flow dx/dt = F the density changes by -∇·F (the instantaneous change of variables), "
            "so that integrating the divergence from data to prior gives log p of the data.",
            (_is(rate, -trace), _is(final, sp.Integral(trace, (t, 0, rationalised(sp.Float(declaration.T)))))),
            "arXiv:1810.01367",
            *check([(change / p, -divergence)]),
        ),
    ]
