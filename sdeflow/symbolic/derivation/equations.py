"""The steps that hold for any SDE and any density p, and the steps of an SDE without an exact kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import sympy as sp

from sdeflow.symbolic.affine import kink_in_state
from sdeflow.symbolic.declaration import Declaration, stratonovich_correction
from sdeflow.symbolic.derivation.step import N, Notation, Step, dt, equals, own, vector
from sdeflow.symbolic.derivation.substitution import Identity, Numbers, initial_value, verify
from sdeflow.symbolic.equations import Equation, forward, probability_flow, reverse_time
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.symbols import score_symbols, t, x

__all__ = ["declared", "equation_steps", "general_steps", "is_smooth", "log_fokker_planck"]


def declared(declaration: Declaration) -> Step:
    """The SDE in the sense of Itô, and also in the sense of Stratonovich if the two differ."""
    text = f"Data at t = 0 become noise at t = T = {declaration.T:g}. The equation is read in the sense of Itô."
    equation = forward(declaration)
    equations = _differential(equation)
    if declaration.state_dependent_noise:
        f = sp.ImmutableMatrix(equation.drifts) - stratonovich_correction(equation.noise_matrix, equation.state)
        text += " In the sense of Stratonovich the drift is lower by half of g ∂g/∂x."
        name = Notation("f (Stratonovich)", r"f_{\mathrm{Stratonovich}}")
        equations += (equals(name, f if declaration.coupled else f[0]),)
    return Step("The declaration", text, equations)


def equation_steps(declaration: Declaration, numbers: Numbers) -> list[Step]:
    """Fokker-Planck equation, reverse SDE, flow and likelihood, for any density p and any SDE."""
    check = partial(verify, numbers=numbers, T=declaration.T)
    derivative = partial(sp.Derivative, evaluate=False)
    state, gram, f = declaration.state, declaration.gram, declaration.drifts
    places = range(len(state))
    p = sp.Function("p", positive=True)(*state, t)
    terms = [-derivative(f[i] * p, state[i]) for i in places]
    terms += [derivative(gram[i, j] * p, state[i], state[j]) / 2 for i in places for j in places if gram[i, j] != 0]

    scores = dict(zip(score_symbols(state), [sp.diff(p, component) / p for component in state], strict=True))
    spread = [sum(sp.diff(gram[i, j] * p, state[j]) for j in places) for i in places]  # ∇·(g gᵀ p)

    def fluxes(equation: Equation, share: sp.Expr) -> list[Identity]:
        return [(equation.drifts[i].subs(scores) * p, f[i] * p - share * spread[i]) for i in places]

    reverse, flow = reverse_time(declaration), probability_flow(declaration)
    velocity = [sp.Function(f"F_{i}")(*state, t) for i in places]
    change = sum(F * sp.diff(p, c) - sp.diff(F * p, c) for F, c in zip(velocity, state, strict=True))
    trace = _divergence(flow.drifts, state)
    rate = Notation("d log p(x(t), t)/dt", r"\frac{d}{dt} \log p(x_t, t)")
    final = Notation("log p(x(0), 0) - log p(x(T), T)", r"\log p(x_0, 0) - \log p(x_T, T)")
    return [
        Step(
            "The Fokker-Planck equation",
            "It is the equation of the density p, which f transports and g spreads.",
            (equals(derivative(p, t), sp.Add(*terms)),),
        ),
        Step(
            "The reverse-time SDE",
            "With s = ∇ log p the bracket is f - ∇·(g gᵀ) - g gᵀ s (Anderson 1982); dt < 0 and w̄ is a "
            "Brownian motion backwards in time. Its density is p again: the flux of its drift is f p less the whole "
            "∇·(g gᵀ p), for any p.",
            _differential(reverse),
            "Anderson",
            *check(fluxes(reverse, sp.Integer(1))),
        ),
        Step(
            "The probability-flow ODE",
            "With half of that correction no noise is needed: the flux is f p - ½ ∇·(g gᵀ p), the "
            "right-hand side of Fokker-Planck, for any p.",
            _differential(flow),
            "arXiv:2011.13456, eq. 13",
            *check(fluxes(flow, sp.Rational(1, 2))),
        ),
        Step(
            "The log-likelihood",
            "Along the flow dx/dt = F the density changes by -∇·F (the instantaneous change of variables), "
            "so that integrating the divergence from data to prior gives log p of the data.",
            (equals(rate, -trace), equals(final, sp.Integral(trace, (t, 0, rationalised(sp.Float(declaration.T)))))),
            "arXiv:1810.01367",
            *check([(change / p, -_divergence(velocity, state))]),
        ),
    ]


def is_smooth(declaration: Declaration) -> bool:
    """Whether the drift has a Jacobian everywhere."""
    return all(kink_in_state(f, declaration.state) is None for f in declaration.drifts)


def general_steps(declaration: Declaration, numbers: Numbers, why: str) -> list[Step]:
    """The steps of an SDE without an exact kernel; ``why`` is a clause that says why it has none."""
    text = f"There is no Gaussian kernel, because {declaration.obstacle}, and no other exact kernel, because {why}."
    steps = [declared(declaration), Step("Classification", text, (), "general")]
    if is_smooth(declaration):
        steps.append(_local(declaration, numbers))
    if not declaration.coupled and not (declaration.f.has(t) or declaration.g.has(t)):
        steps.append(_stationary_law(declaration, numbers))
    return steps


def _local(declaration: Declaration, numbers: Numbers) -> Step:
    """The Gaussian step of the drift linearised at x (Ozaki), exact to the order of the step."""
    J, h, f, q, g = (own(declaration, name, real=True) for name in ("J", "h", "f", "q", "g"))
    mean, var = f * (sp.exp(J * h) - 1) / J, q * (sp.exp(2 * J * h) - 1) / (2 * J)
    zero = sp.Integer(0)
    identities = initial_value(mean, f + J * mean, zero, h) + initial_value(var, 2 * J * var + q, zero, h)
    jacobian = sp.ImmutableMatrix(declaration.drifts).jacobian(declaration.state)
    if declaration.coupled:
        moved = Notation("∫ exp(Jr) dr f", r"\int_0^h e^{Jr} dr\, \mathbf{f}")
        noise = Notation("∫ exp(Jr) GGᵀ exp(Jᵀr) dr", r"\int_0^h e^{Jr} GG^\top e^{J^\top r} dr")
        law = N(vector("u") + moved, noise)
    else:
        jacobian, law = jacobian[0], N(x + mean, var.subs(q, g**2))
    return Step(
        "Local linearisation",
        "Over a short time h the drift is f + J (x - x(t)), with J = ∂f/∂x at the start, and the "
        "kernel Gaussian; the integrals run from 0 to h. Its score, averaged given x(t+h), is that of the marginal.",
        (equals(J, jacobian), equals(Notation("p(x(t+h) | x(t))", r"p(x_{t+h} \mid x_t)"), law)),
        "Ozaki's linearisation",
        *verify(identities, numbers, declaration.T),
    )


def _stationary_law(declaration: Declaration, numbers: Numbers) -> Step:
    """exp(∫ 2f/g²) / g², whose flux is 0; it may not be normalisable."""
    r = own(declaration, "r", real=True)
    f, q = rationalised(declaration.f), rationalised(declaration.gram[0])
    law = sp.exp(sp.Integral((2 * f / q).subs(x, r), (r, 0, x))) / q
    log_slope = 2 * f / q - sp.diff(q, x) / q
    return Step(
        "The stationary law",
        "If this can be normalised, by Z, its flux is 0: f p = ½ ∂(g² p)/∂x.",
        (equals("Z p(x)", law),),
        "zero flux",
        *verify([(f, (sp.diff(q, x) + q * log_slope) / 2)], numbers, declaration.T),
    )


def log_fokker_planck(
    declaration: Declaration,
    log_p: sp.Expr,
    rates: Mapping[sp.Symbol, sp.Expr],
    place: Mapping[sp.Symbol, sp.Expr],
) -> list[Identity]:
    """∂p/∂t = -∂(f p)/∂x + ½ ∂²(g² p)/∂x² for p = exp(log_p), divided by p.

    Args:
        declaration: the SDE of x.
        log_p: in x, t, x_0 and moments, which are symbols.
        rates: of each moment its derivative in t, which a step before has checked.
        place: what is put in the place of symbols at the end.
    """
    f, q = rationalised(declaration.f), rationalised(declaration.gram[0])
    slope, curve = sp.diff(log_p, x), sp.diff(log_p, x, 2)
    right = -sp.diff(f, x) - f * slope + (sp.diff(q, x, 2) + 2 * sp.diff(q, x) * slope + q * (curve + slope**2)) / 2
    left = sp.diff(log_p, t) + sum(sp.diff(log_p, moment) * rate for moment, rate in rates.items())
    return [(left.subs(place), right.subs(place))]


def _divergence(field: Sequence[sp.Expr], state: Sequence[sp.Symbol]) -> sp.Expr:
    return sum(sp.diff(F, component) for F, component in zip(field, state, strict=True))


def _differential(equation: Equation) -> tuple[sp.Basic, ...]:
    """dx = f dt + g dw, or dx/dt = f, one equation for each component."""
    names = [(f"d{component.name}", f"d{sp.latex(component)}") for component in equation.state]
    if equation.diffusion == 0:
        rates = [Notation(f"{name}/dt", rf"\frac{{{tex}}}{{dt}}") for name, tex in names]
        return tuple(map(equals, rates, equation.drifts))
    matrix = equation.noise_matrix
    noises = [Notation(f"d{equation.noise}" + (f"_{j + 1}" if matrix.cols > 1 else "")) for j in range(matrix.cols)]
    brackets = [sp.Mul(drift, dt) for drift in equation.drifts]
    sides = [sp.Add(bracket, *map(sp.Mul, row, noises)) for bracket, row in zip(brackets, matrix.tolist(), strict=True)]
    return tuple(equals(Notation(*name), side) for name, side in zip(names, sides, strict=True))
