r"""The derivation of everything from f and g, step by step, to read, to print and to hand to students.

:func:`derive` collects the steps (``sdeflow.symbolic.derivation``), each with a check by substitution that does not
know how the result was found. A :class:`Derivation` prints them as text, LaTeX, or a page of HTML whose formulas are
MathML and need no network.
"""

from __future__ import annotations

import html
import os
import re
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import sympy as sp
import torch
from sympy.core.function import AppliedUndef
from typing_extensions import assert_never

from sdeflow.kernels.gaussian import Kernel
from sdeflow.kernels.local import LocalKernel
from sdeflow.kernels.pearson import PearsonKernel
from sdeflow.kernels.reducible import ReducibleKernel
from sdeflow.scores import DeclaredSDE
from sdeflow.symbolic.derivation import (
    SIGNS,
    Notation,
    Step,
    check_times,
    declared,
    equals,
    equation_steps,
    general_steps,
    judged,
    linear_steps,
    pearson_steps,
    reducible_steps,
)
from sdeflow.symbolic.exact import rationalised
from sdeflow.symbolic.mathml import mathml
from sdeflow.symbolic.moments import Moments
from sdeflow.symbolic.patience import rehearsed, small
from sdeflow.symbolic.schedule import Schedule

__all__ = ["Derivation", "derive"]

_WIDTH = 100
_SECONDS = 2.5  # for the steps of a large declaration: those of a Piecewise of four constants take 1.1
_ROUNDING = 4 * float(torch.finfo(torch.float64).eps)
_FIRST_NOISE = 2e-3  # sigma / alpha at the default cutoff


@dataclass(frozen=True)
class Derivation:
    """The steps from f and g to the kernel, the prior, the reverse SDE, the flow and the likelihood.

    Attributes:
        title: the SDE.
        steps: in order, each with its equations, rule and check.
        complete: whether all steps are there. Where SymPy would need too long, the last step says that those from there
            on are left out, and does not hold.
    """

    title: str
    steps: tuple[Step, ...]
    complete: bool = True

    @property
    def holds(self) -> bool:
        """Whether every step is there and has passed its check."""
        return self.complete and all(step.holds for step in self.steps)

    @property
    def verdict(self) -> str:
        """How many steps were checked, or which failed."""
        if not self.complete:
            return f"NO VERDICT: the steps from {len(self.steps)} on are left out, and were not checked"
        failed = [f"{i} ({step.title})" for i, step in enumerate(self.steps, 1) if not step.holds]
        if failed:
            return f"FAILED: step {', '.join(failed)}"
        return f"{len(self.steps)} steps, {sum(bool(step.check) for step in self.steps)} checked by substitution"

    def __repr__(self) -> str:
        return f"Derivation({self.title}: {self.verdict})"

    def __str__(self) -> str:
        parts = [textwrap.fill(f"Derivation of {self.title}", _WIDTH, subsequent_indent="    "), self.verdict]
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
                rows = " \\\\\n".join(map(_aligned, step.equations))
                lines.append(f"\\begin{{align*}}\n{rows}\n\\end{{align*}}")
            check = f"Check: {_tex(step.check)}." if step.check else ""
            notes = [f"Rule: {_tex(step.rule)}." if step.rule else "", check if step.holds else rf"\textbf{{{check}}}"]
            lines += [rf"\noindent\emph{{{' '.join(filter(None, notes))}}}"] if any(notes) else []
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
        title, verdict, steps = html.escape(self.title), html.escape(self.verdict), enumerate(self.steps, 1)
        contents = "".join(f'<li><a href="#step-{i}">{html.escape(step.title)}</a></li>' for i, step in steps)
        return _PAGE.format(title=title, verdict=verdict, contents=contents, steps=self._repr_html_())

    def _document(self) -> str:
        return _DOCUMENT % (_tex(self.title), _tex(self.verdict), self.latex())


def derive(sde: DeclaredSDE) -> Derivation:
    """The derivation of all that follows from an SDE; without the steps that SymPy would take too long to write."""
    declaration = sde.declaration
    # A kernel's formulas are found once, in bounded time; those of a small SDE may be large.
    gaussian = sde.kernel.gaussian
    formulas = (declaration,) if gaussian is None else (declaration, gaussian.shown)
    if not _only_named(gaussian) and (small(*formulas) or rehearsed(_SECONDS, _written, sde)):
        return Derivation(repr(sde), tuple(_steps(sde)))
    text = "f and g are too large for SymPy to write down, and to check, what follows; the numbers do not need it"
    rest = Step("The steps from here on are left out", f"{text}.", check="not made", holds=False)
    return Derivation(repr(sde), (declared(declaration), rest), complete=False)


def _only_named(gaussian: Kernel | None) -> bool:
    """Whether the moments of one component are functions such as A(t): no formula to show, and none to check."""
    if gaussian is None or gaussian.coupled:
        return False
    return any(not isinstance(call, Schedule) for call in gaussian.shown.log_alpha.atoms(AppliedUndef))


def _written(sde: DeclaredSDE) -> str:
    """The steps as text, whose layout may take SymPy longer than the steps."""
    return str(Derivation("", tuple(_steps(sde))))


def _steps(sde: DeclaredSDE) -> list[Step]:
    declaration, kernel, numbers = sde.declaration, sde.kernel, sde.values.numbers
    match kernel:
        case Kernel():
            steps = _affine_steps(kernel, numbers)
        case ReducibleKernel():
            steps = reducible_steps(declaration, kernel.reduction, numbers)
        case PearsonKernel():
            steps = pearson_steps(declaration, kernel.pearson, numbers)
        case LocalKernel():
            steps = general_steps(declaration, numbers, kernel.also)
        case _:
            assert_never(kernel)
    return steps + equation_steps(declaration, numbers)


def _affine_steps(kernel: Kernel, numbers: dict[sp.Symbol, float]) -> list[Step]:
    """The steps of an affine SDE from the moments as its kernel shows them, in exact numbers."""
    alpha, offset, var = map(rationalised, (kernel.alpha, kernel.offset, kernel.var))
    log_alpha = sp.Integer(0) if kernel.coupled else (rationalised(kernel.log_snr) + sp.log(var)) / 2
    solved = not alpha.atoms(AppliedUndef)  # or the functions stand for the solution of Φ' = F Φ
    moments = Moments(log_alpha, alpha, offset, var, kernel.rules)
    steps = linear_steps(kernel.declaration, moments, numbers, None if solved else _measured(kernel))
    return [*steps[:-1], _cutoff(kernel), steps[-1]]


def _measured(kernel: Kernel) -> dict[str, float]:
    """How well the numbers of a coupled kernel solve its equations, by differentiating them in t."""
    times = torch.tensor(check_times(kernel.T), dtype=torch.float64)
    values, rates = torch.autograd.functional.jvp(kernel.coefficients, times, torch.ones_like(times))
    (phi, root, offset), (phi_t, root_t, offset_t) = values, rates
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
    at = equals(Notation("t (cutoff)", r"t_{\mathrm{cutoff}}"), sp.Float(kernel.cutoff, 6))
    if kernel.declaration.cutoff is not None:
        text = (
            "The first time that training and solvers visit is that of the declaration: cutoff=, or the table's first."
        )
        return Step("The cutoff", text, (at,), "declared")
    if all(kernel.declaration.initial_variances):
        text = "The kernel has variance P0 > 0 at t = 0, so that training and solvers start there."
        return Step("The cutoff", text, (at,))
    text = "σ = 0 at t = 0, where the kernel is a point. Training and solvers start where σ/α = 1/500"
    text += " of the data component." if kernel.coupled else "."
    with torch.no_grad():
        alpha, sigma, _ = kernel.coefficients(torch.tensor(kernel.cutoff, dtype=torch.float64))
    check, holds = "", True
    if not kernel.coupled and not alpha.ndim:
        moved = abs(kernel.cutoff * float(kernel.half_log_snr_rate(kernel.cutoff).detach()))  # by the rounding of t
        check, holds = judged(max(abs(float(sigma / alpha) / _FIRST_NOISE - 1), 1e-16), 1e-10 + _ROUNDING * moved)
    ratio = equals("σ/α", sp.Rational(str(_FIRST_NOISE)))
    return Step("The cutoff", text, (ratio, at), "", check.replace(" at 5 times", ""), holds)


# -------------------------------------------------------------------- how they are written


def _pretty(equation: sp.Basic) -> str:
    """An equation in two dimensions where it is narrow enough, else in lines."""
    try:
        text = sp.pretty(equation, use_unicode=True, wrap_line=False)
    except Exception:  # some nodes have no such printing
        text = ""
    if text and max(map(len, text.splitlines())) <= _WIDTH - 3:
        return text
    sides = f"{equation.lhs} = {equation.rhs}" if isinstance(equation, sp.Eq) else str(equation)
    return textwrap.fill(sides, _WIDTH - 3, subsequent_indent="    ")


def _aligned(equation: sp.Basic) -> str:
    sides = equation.args if isinstance(equation, sp.Eq) else [equation]
    return " &= ".join(map(sp.latex, sides))


_TEX = {
    **{sign: f"${tex}$" for sign, tex in SIGNS.items()}, "ô": r"\^o", "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": "$<$", ">": "$>$", "|": "$|$",
    **{char: f"\\{char}" for char in "{}$&#%_"},
}  # fmt: skip
_SPECIAL = re.compile("|".join(map(re.escape, _TEX)))


def _tex(text: str) -> str:
    """Plain text for LaTeX: everything special escaped, mathematical letters in math mode, nothing beyond ASCII."""
    text = _SPECIAL.sub(lambda found: _TEX[found[0]], text)
    return unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode()


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
