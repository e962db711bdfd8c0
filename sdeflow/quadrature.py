r"""The moments of an affine SDE by quadrature: every schedule, a few milliseconds, 1e-12 relative.

On panels small enough that alpha changes by no more than a factor of a few, each moment is carried
from panel to panel by the exact recursion

    sigma^2(t) = e^{2 (A(t) - A(s))} sigma^2(s) + ∫_s^t g(u)^2 e^{2 (A(t) - A(u))} du,    A = ∫ a,

whose terms are all positive, so that nothing cancels however small sigma is.
"""

from __future__ import annotations

import math

import numpy as np

from sdeflow.chebyshev import Function, PiecewiseChebyshev, fit_values, geometric_edges, running_integral
from sdeflow.errors import ScheduleError

__all__ = ["integrate_moments"]

_LARGEST_ALPHA = 1e4
_LARGEST_CHANGE = 1.5  # of log alpha over one panel


def integrate_moments(coefficients: Function, T: float, P0: float) -> PiecewiseChebyshev:
    """log alpha, variance and offset of the kernel on [0, T], as one interpolant with three rows.

    Args:
        coefficients: maps times (n,) to (a, b, g^2), (3, n).
        T: the horizon.
        P0: the variance at t = 0.

    Raises:
        ScheduleError: for a coefficient that is not finite or not integrable, and for an explosive drift.
    """

    def drift_changes_too_much(values: np.ndarray, width: np.ndarray) -> np.ndarray:
        return np.abs(values[0]).mean(-1) * width > _LARGEST_CHANGE

    fitted = PiecewiseChebyshev.fit(
        coefficients, geometric_edges(0.0, T), halve=drift_changes_too_much, name="a coefficient of the SDE"
    )
    edges, width = fitted.edges, np.diff(fitted.edges)
    a, b, q = coefficients(fitted.nodes.reshape(-1)).reshape(3, *fitted.nodes.shape)
    change, change_total = running_integral(a, width)
    forced, forced_total = running_integral(np.stack([b * np.exp(-change), q * np.exp(-2.0 * change)]), width)

    log_alpha, offset, var = 0.0, 0.0, P0
    out = np.empty((3, *a.shape))
    for panel in range(width.size):
        growth = np.exp(change[panel])
        out[0, panel] = log_alpha + change[panel]
        out[1, panel] = growth**2 * (var + forced[1, panel])
        out[2, panel] = growth * (offset + forced[0, panel])
        total = math.exp(change_total[panel])
        log_alpha += change_total[panel]
        var = total**2 * (var + forced_total[1, panel])
        offset = total * (offset + forced_total[0, panel])
        if log_alpha > math.log(_LARGEST_ALPHA):
            raise ScheduleError(
                f"the drift is explosive: alpha = exp(∫ a dt) passes {_LARGEST_ALPHA:g} at t = {edges[panel + 1]:.4g}. "
                "Choose a smaller T, or a drift that contracts."
            )
    return PiecewiseChebyshev(edges, fit_values(out))
