"""What a certificate says: each check with its residual and tolerance, and what was not checked."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

__all__ = ["Certificate", "Check"]


@dataclass(frozen=True)
class Check:
    """One identity.

    Attributes:
        name: the derived object.
        identity: what it must satisfy.
        method: "symbolic" where SymPy reduced the residual to 0, else "numeric".
        residual: the largest one found, relative unless the identity says otherwise.
        tolerance: what rounding and conditioning explain.
        where: the point of the largest residual.
    """

    name: str
    identity: str
    method: str
    residual: float
    tolerance: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Whether the residual is within the tolerance."""
        return self.residual <= self.tolerance


def _excess(check: Check) -> float:
    """A residual in units of its tolerance."""
    if check.tolerance:
        return check.residual / check.tolerance
    return math.inf if check.residual else 0.0


@dataclass(frozen=True)
class Certificate:
    """What was checked of an SDE, and what was not.

    Attributes:
        subject: the SDE, as it prints.
        checks: one for each identity.
        unchecked: what could not be checked, and why.
        missing: what was not checked though a verdict needs it, such as the moments of a Gaussian kernel.
    """

    subject: str
    checks: tuple[Check, ...]
    unchecked: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check holds, and none that a verdict needs is missing."""
        return not self.missing and all(check.holds for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.holds)

    @property
    def largest(self) -> Check:
        """The check whose residual is largest for its tolerance."""
        return max(self.checks, key=_excess)

    @property
    def largest_residual(self) -> float:
        """The largest residual of all checks, whatever their tolerances; infinite where one could not be computed."""
        return max(check.residual for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def _verdict(self) -> str:
        if self.failures:
            return f"{len(self.failures)} of {len(self.checks)} identities FAIL"
        if self.missing:
            return f"NO VERDICT, for {' and '.join(self.missing)} could not be checked; what was checked holds"
        return "every identity holds"

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                "ok" if check.holds else "FAILS",
                check.name,
                check.identity,
                "symbolic" if check.method == "symbolic" else f"{check.residual:.1e} <= {check.tolerance:.0e}",
                check.where,
            )
            for check in self.checks
        ]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        rest = [f"not checked: {why}" for why in self.unchecked or ("nothing",)]
        return "\n".join([f"{self.subject}: {self._verdict}", *lines, *rest])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in self._rows())
        rest = "".join(f"<p>not checked: {html.escape(why)}</p>" for why in self.unchecked or ("nothing",))
        return f"<p>{html.escape(str(self).splitlines()[0])}</p><table>{rows}</table>{rest}"
