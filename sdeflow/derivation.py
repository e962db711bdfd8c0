r"""The derivation of everything from f and g, step by step, to read, to print and to hand to students.

:func:`derive` collects the steps (``sdeflow.symbolic.steps``), each with a check by substitution that does not know
how the result was found. A :class:`Derivation` prints them as text, LaTeX, or a page of HTML whose formulas are MathML
and need no network. :func:`explain` says in a few lines which way an SDE is served:

    closed form -> quadrature -> Lamperti -> Pearson -> local linearisation -> simulation
"""

from __future__ import annotations

import html
import os
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import sympy as sp
import torch
from sympy.core.function import AppliedUndef

from sdeflow.kernel import Kernel
from sdeflow.scores import DeclaredSDE
from sdeflow.symbolic.declaration import Declaration
from sdeflow.symbolic.lamperti import Reduction, reduce
from sdeflow.symbolic.mathml import mathml
from sdeflow.symbolic.moments import Moments, derive_moments, rationalised
from sdeflow.symbolic.pearson import Pearson, classify
from sdeflow.symbolic.steps import (
    Notation,
    Step,
    check_times,
    equation_steps,
    general_steps,
    is_smooth,
    judged,
    linear_steps,
    pearson_steps,
    reducible_steps,
)
from sdeflow.symbolic.symbols import x

__all__ = ["Derivation", "derive", "explain"]

_WIDTH = 100
_FIRST_NOISE = 2e-3  # sigma / alpha at the default cutoff


@dataclass(frozen=True)
class Derivation:
    """The steps from f and g to the kernel, the prior, the reverse SDE, the flow and the likelihood.

    Attributes:
        title: the SDE.
        steps: in order, each with its equations, rule and check.
    """

    title: str
    steps: tuple[Step, ...]

    @property
    def holds(self) -> bool:
        """Whether every check was passed."""
        return all(step.holds for step in self.steps)

    @property
    def verdict(self) -> str:
        """How many steps were checked, or which failed."""
        failed = [f"{i} ({step.title})" for i, step in enumerate(self.steps, 1) if not step.holds]
        if failed:
            return f"FAILED: step {', '.join(failed)}"
        return f"{len(self.steps)} steps, {sum(bool(step.check) for step in self.steps)} checked by substitution"

    def __repr__(self) -> str:
        return f"Derivation({self.title}: {self.verdict})"

    def __str__(self) -> str:
        parts = [_wrapped(f"Derivation of {self.title}"), self.verdict]
        for i, step in enumerate(self.steps, 1):
            lines = [f"{i}. {step.title}", *textwrap.wrap(step.text, _WIDTH - 3), ""]
            lines += [line for equation in step.equations for line in (*_pretty(equation).splitlines(), "")]
            lines += textwrap.wrap(f"Rule: {step.rule}", _WIDTH - 3) if step.rule else []
            lines += [f"{'Check' if step.holds else '!!! Check'}: {step.check}"] if step.check else []
            parts.append("\n   ".join(lines).replace("\n   \n", "\n\n").rstrip())
        return "\n\n".join(parts) + "\n"

    def latex(self) -> str:
        """A fragment for a document with amsmath."""
        parts = []
        for i, step in enumerate(self.steps, 1):
            lines = [rf"\paragraph{{{i}. {_tex(step.title)}.}} {_tex(step.text)}"]
            if step.equations:
                rows = " \\\\\n".join(_aligned(equation) for equation in step.equations)
                lines.append(f"\\begin{{align*}}\n{rows}\n\\end{{align*}}")
            notes = [f"Rule: {_tex(step.rule)}."] if step.rule else []
            if step.check:
                check = f"Check: {_tex(step.check)}."
                notes.append(check if step.holds else rf"\textbf{{{check}}}")
            lines += [rf"\noindent\emph{{{' '.join(notes)}}}"] if notes else []
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def _repr_latex_(self) -> str:
        return self.latex()

    def _repr_html_(self) -> str:
        """The steps as HTML with MathML, without the page around them."""
        escape = html.escape
        parts = []
        for i, step in enumerate(self.steps, 1):
            kind, mark = ("ok", "✓") if step.holds else ("failed", "✗")
            check = f'<p class="check {kind}">{mark} {escape(step.check)}</p>'
            rule = f'<p class="rule">Rule: {escape(step.rule)}</p>' if step.rule else ""
            body = "".join(f'<div class="equation">{mathml(equation)}</div>' for equation in step.equations)
            parts.append(
                f'<section id="step-{i}"><h2>{i}. {escape(step.title)}</h2><p>{escape(step.text)}</p>{body}{rule}'
                f"{check if step.check else ''}</section>"
            )
        return "\n".join(parts)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a page (.html) that needs no network, or a LaTeX document (.tex).

        Raises:
            ValueError: for another suffix.
        """
        path = Path(path)
        writers = {".html": self._page, ".tex": self._document}
        if path.suffix not in writers:
            raise ValueError(f"a derivation is saved as {' or '.join(writers)}, not as {path.name!r}.")
        path.write_text(writers[path.suffix](), encoding="utf-8")

    def _page(self) -> str:
        title, steps = html.escape(self.title), enumerate(self.steps, 1)
        contents = "".join(f'<li><a href="#step-{i}">{html.escape(step.title)}</a></li>' for i, step in steps)
        return _PAGE.format(title=title, verdict=html.escape(self.verdict), contents=contents, steps=self._repr_html_())

    def _document(self) -> str:
        return _DOCUMENT % (_tex(self.title), _tex(self.verdict), self.latex())


def derive(sde: DeclaredSDE) -> Derivation:
    """The derivation of all that follows from an SDE."""
    declaration, numbers = sde.declaration, sde.values.numbers
    if declaration.affine is not None:
        kernel = sde.kernel
        moments = _moments_of(kernel)
        steps = linear_steps(declaration, moments, numbers, _measured(kernel) if _is_open(moments) else None)
        steps.insert(-1, _cutoff(kernel))
    else:
        change, diffusion = _reduction(declaration, numbers), _pearson(declaration, numbers)
        if change is not None:
            inner = _inner(declaration, change.a * x + change.b, change.map.c)
            steps = reducible_steps(declaration, change, inner, _moments(inner, numbers), numbers)
        elif diffusion is not None:
            inner = _inner(declaration, diffusion.a * x, diffusion.c)
            steps = pearson_steps(declaration, diffusion, inner, _moments(inner, numbers), numbers)
        else:
            steps = general_steps(declaration, numbers)
    return Derivation(repr(sde), tuple(steps + equation_steps(declaration, numbers)))


def explain(sde: DeclaredSDE) -> str:
    """Which way serves this SDE, why no better one does, and what is available."""
    declaration, numbers = sde.declaration, sde.values.numbers
    if declaration.affine is not None:
        way, why = _affine_way(declaration, sde.kernel, numbers)
        return _told(way, why, "exact kernel (numbers to 1e-10), training, solvers, likelihood, priors matched to the data.")
    obstacle = f"no Gaussian kernel, for {declaration.obstacle}"
    change = _reduction(declaration, numbers)
    if change is not None:
        branches = ", both branches summed" if change.map.fold else ""
        drift = change.a * sp.Symbol("y") + change.b
        why = f"{obstacle}; but y = {change.map.to_line} has the drift {drift}, affine in y, and noise free of it"
        return _told(
            "Lamperti", why, f"exact kernel (pushed forward{branches}), training on its score, solvers, likelihood."
        )
    diffusion = _pearson(declaration, numbers)
    if diffusion is not None:
        shape = ", ".join(map(str, diffusion.shape))
        why = f"{obstacle}, and no change of state makes it affine; but f is affine and g² quadratic in x: a "
        why += f"{diffusion.kind} diffusion of shape {shape}"
        return _told("Pearson", why, "exact kernel, moments and draws, training on its score, solvers, likelihood.")
    why = f"{obstacle}; {_unreduced(declaration)}"
    rest = "simulate(), and with a score solvers and likelihood, from a prior that is stationary, fitted or given."
    if is_smooth(declaration):
        return _told("local linearisation", why, f"training on simulated paths, by a Gaussian law over short times; {rest}")
    needs = "noise free of the state" if declaration.state_dependent_noise else "a drift with a Jacobian everywhere"
    return _told("simulation", f"{why}; local linearisation needs {needs}", f"training on simulated paths; {rest}")


def _told(way: str, why: str, available: str) -> str:
    return "\n".join(_wrapped(line) for line in (f"{way}: {why}.", f"Available: {available}"))


def _affine_way(declaration: Declaration, kernel: Kernel, numbers: dict[sp.Symbol, float]) -> tuple[str, str]:
    """The rung of an affine SDE, with the integral that keeps it from a closed form."""
    if kernel.form == "closed":
        return "closed form", "f is affine in the state, g free of it, and rules integrate every moment"
    if declaration.coupled:
        return "quadrature", "the kernel is Gaussian, but no rule gives Φ, the offset and the covariance in closed form"
    (a, b), q, moments = declaration.affine, declaration.g**2, _moments(declaration, numbers)
    if moments.closed:
        return (
            "quadrature",
            "the kernel is Gaussian and has a closed form, whose digits cancel in float64 on this horizon",
        )
    if moments.log_alpha.has(sp.Integral):
        integrand = a
    elif moments.offset.has(sp.Integral):
        integrand = b / moments.alpha
    else:
        integrand = q / moments.alpha**2
    return "quadrature", f"the kernel is Gaussian, but no rule integrates {sp.powsimp(integrand)}"


def _unreduced(declaration: Declaration) -> str:
    """Why neither Lamperti nor Pearson serves."""
    if declaration.coupled:
        return "a change of state is only looked for in one dimension"
    if declaration.P0:
        return "with P0 > 0 a change of state has no Gaussian start"
    if not declaration.state_dependent_noise:
        return "g is free of x, so that the Lamperti coordinate is x itself, with the same drift"
    return "no Lamperti coordinate y = ∫ dx/g has an affine drift on the whole line, and it is no Pearson diffusion"


# -------------------------------------------------------------------- what the steps are made from


def _reduction(declaration: Declaration, numbers: dict[sp.Symbol, float]) -> Reduction | None:
    if declaration.coupled or declaration.P0:
        return None
    return reduce(declaration.f, declaration.g, numbers)


def _pearson(declaration: Declaration, numbers: dict[sp.Symbol, float]) -> Pearson | None:
    if declaration.coupled or declaration.P0:
        return None
    return classify(declaration.f, declaration.g, numbers)


def _inner(declaration: Declaration, f: sp.Expr, g: sp.Expr) -> Declaration:
    """An affine SDE behind another one."""
    return Declaration(f, g, declaration.T, declaration.cutoff, parameters=declaration.parameters)


def _moments(declaration: Declaration, numbers: dict[sp.Symbol, float]) -> Moments:
    return derive_moments(declaration.affine, declaration.g, declaration.P0, declaration.T, numbers)


def _moments_of(kernel: Kernel) -> Moments:
    """The kernel's moments as it shows them, in exact numbers."""

    def exact(value: sp.Expr | sp.ImmutableMatrix) -> sp.Expr | sp.ImmutableMatrix:
        return value.applyfunc(rationalised) if isinstance(value, sp.MatrixBase) else rationalised(value)

    alpha, offset, var = (exact(value) for value in (kernel.alpha, kernel.offset, kernel.var))
    log_alpha = sp.Integer(0) if kernel.coupled else (exact(kernel.log_snr) + sp.log(var)) / 2
    return Moments(log_alpha, alpha, offset, var, kernel.rules)


def _is_open(moments: Moments) -> bool:
    """Whether alpha is the matrix of undefined functions that stand for the solution of Φ' = F Φ."""
    return bool(moments.alpha.atoms(AppliedUndef))


def _measured(kernel: Kernel) -> dict[str, float]:
    """How well the numbers of a coupled kernel solve its equations, by differentiating them in t."""
    times = torch.tensor(check_times(kernel.T), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        values = kernel.coefficients(times)
        entries = torch.cat([value.flatten(1) for value in values], dim=1)
        rates = [torch.autograd.grad(column.sum(), times, retain_graph=True)[0] for column in entries.unbind(1)]
    sizes = [value[0].numel() for value in values]
    rates = torch.stack(rates, dim=1).split(sizes, dim=1)
    phi_t, root_t, offset_t = (rate.reshape(value.shape) for rate, value in zip(rates, values, strict=True))
    phi, root, offset = (value.detach() for value in values)
    times = times.detach()
    F, b, Q = kernel.sde_coefficients(times)
    P, half = root @ root.mT, root_t @ root.mT
    pairs = {
        "alpha": (phi_t, F @ phi),
        "mean": (phi_t + offset_t[..., None], F @ phi + (F @ offset[..., None]) + b[..., None]),
        "var": (half + half.mT, F @ P + P @ F.mT + Q),
    }
    return {name: float((left - right).abs().max() / right.abs().max()) for name, (left, right) in pairs.items()}


def _cutoff(kernel: Kernel) -> Step:
    """Where training and solvers start."""
    name = Notation("t (cutoff)", r"t_{\mathrm{cutoff}}")
    at = sp.Eq(name, sp.Float(kernel.cutoff, 6), evaluate=False)
    if kernel.declaration.cutoff is not None:
        return Step("The cutoff", "The first time that training and solvers visit was declared.", (at,), "declared")
    if all(kernel.declaration.initial_variances):
        return Step(
            "The cutoff", "The kernel has variance P0 > 0 at t = 0, so that training and solvers start there.", (at,)
        )
    ratio = sp.Eq(Notation("σ/α", r"\frac{\sigma}{\alpha}"), sp.Rational(str(_FIRST_NOISE)), evaluate=False)
    alpha, sigma, _ = kernel.coefficients(torch.tensor(kernel.cutoff, dtype=torch.float64))
    text = "σ = 0 at t = 0, where the kernel is a point. Training and solvers start where σ/α = 1/500"
    check: tuple = ("", True)
    if not kernel.coupled and not alpha.ndim:
        check = judged(max(abs(float(sigma / alpha) / _FIRST_NOISE - 1), 1e-16))
        check = (check[0].replace(" at 5 times", ""), check[1])
    return Step("The cutoff", f"{text}{' of the data component' if kernel.coupled else ''}.", (ratio, at), "", *check)


# -------------------------------------------------------------------- how they are written


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH, subsequent_indent="    "))


def _pretty(equation: sp.Basic) -> str:
    """An equation in two dimensions where it is narrow enough, else in lines."""
    try:
        text = sp.pretty(equation, use_unicode=True, wrap_line=False)
    except Exception:  # some nodes have no such printing
        text = ""
    if text and max(map(len, text.splitlines())) <= _WIDTH - 3:
        return text
    sides = f"{equation.lhs} = {equation.rhs}" if isinstance(equation, sp.Eq) else str(equation)
    return "\n".join(textwrap.wrap(sides, _WIDTH - 3, subsequent_indent="    "))


def _aligned(equation: sp.Basic) -> str:
    if isinstance(equation, sp.Eq):
        return f"{sp.latex(equation.lhs)} &= {sp.latex(equation.rhs)}"
    return sp.latex(equation)


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "α": r"$\alpha$", "β": r"$\beta$", "δ": r"$\delta$", "ε": r"$\varepsilon$", "λ": r"$\lambda$", "σ": r"$\sigma$",
    "τ": r"$\tau$", "χ": r"$\chi$", "Φ": r"$\Phi$", "∂": r"$\partial$", "∇": r"$\nabla$", "∫": r"$\int$",
    "·": r"$\cdot$", "≤": r"$\le$", "½": r"$\frac12$", "²": "$^2$", "⁻": "$^{-}$", "¹": "$^1$", "ᵀ": r"$^\top$",
    "₀": "$_0$", "w̄": r"$\bar{w}$", "ô": r"\^o", "π": r"$\pi$",
    "√": r"$\sqrt{\ }$", "→": r"$\to$", "≥": r"$\ge$", "Σ": r"$\Sigma$",
}  # fmt: skip


def _tex(text: str) -> str:
    """Plain text for LaTeX: everything special escaped, mathematical letters in math mode, nothing beyond ASCII."""
    text = text.replace("w̄", "\0")
    pieces = (_TEX["w̄"] if char == "\0" else _TEX.get(char, char) for char in text)
    return "".join(
        p if p.isascii() else unicodedata.normalize("NFKD", p).encode("ascii", "replace").decode() for p in pieces
    )


_DOCUMENT = r"""\documentclass{article}
\usepackage{amsmath,amssymb}
\usepackage[margin=2.5cm]{geometry}
\allowdisplaybreaks
\begin{document}
\section*{Derivation of %s}
\noindent %s.

%s
\end{document}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>
body {{ font-family: Georgia, serif; line-height: 1.5; max-width: 54rem; margin: 2rem auto;
  padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2.2rem; }}
code {{ overflow-wrap: anywhere; }}
.equation {{ overflow-x: auto; padding: .35rem 0; }}
.rule {{ color: #555; font-style: italic; margin: .3rem 0; }}
.check {{ display: inline-block; margin: .2rem 0; padding: .1rem .6rem; border-radius: .8rem;
  font: .85rem sans-serif; }}
.ok {{ background: #e2f3e5; color: #1b5e2a; }}
.failed {{ background: #b00020; color: #fff; font-weight: bold; }}
nav ol {{ columns: 2; font-size: .9rem; }}
</style>
</head>
<body>
<h1>Derivation of <code>{title}</code></h1>
<p>{verdict}</p>
<nav><ol>{contents}</ol></nav>
{steps}
</body>
</html>
"""
