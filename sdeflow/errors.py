"""Every error and warning of sdeflow.

Each error derives from :class:`SdeflowError` and from the built-in error that fits, so that both
``except SdeflowError`` and ``except ValueError`` catch it.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointVersionError",
    "DataError",
    "DataScaleWarning",
    "DeclarationError",
    "HiddenParametersWarning",
    "LeakageWarning",
    "LongSolveWarning",
    "MaxStepsError",
    "MissingPriorError",
    "NonFiniteStateError",
    "NotAffineError",
    "OptionError",
    "PriorMismatchWarning",
    "ScheduleError",
    "ScoreError",
    "SdeflowError",
    "SolverError",
    "StepUnderflowError",
    "ToleranceWarning",
    "TooLargeError",
    "TraceErrorWarning",
    "TrainingDivergedError",
    "UnsafeExpressionError",
    "WeightingError",
]

_OURS = str(Path(__file__).parent) + os.sep
_BETWEEN = ("torch", "torchsde", "torchdiffeq", "accelerate", "scipy", "sympy", "contextlib", "functools", "tqdm")


class SdeflowError(Exception):
    """The root of all errors raised by sdeflow."""


class DeclarationError(SdeflowError, ValueError):
    """The declaration is not an SDE that sdeflow can read."""


class UnsafeExpressionError(DeclarationError):
    """A declaration holds something that must not be interpreted, such as text or a hostile name."""


class NotAffineError(DeclarationError):
    """A Gaussian perturbation kernel was requested for an SDE that has none."""


class ScheduleError(DeclarationError):
    """A coefficient is singular or complex on [0, T], or the moments explode, or there is no noise."""


class MissingPriorError(SdeflowError, ValueError):
    """No prior p(x_T) follows from the declaration, and none was given."""


class ScoreError(SdeflowError, ValueError):
    """A score or its network returned something of the wrong kind, shape, dtype or device."""


class DataError(SdeflowError, ValueError):
    """Data or a state has the wrong kind, shape or values."""


class OptionError(SdeflowError, TypeError):
    """A function was called with an option that it does not have."""


class WeightingError(SdeflowError, ValueError):
    """A weighting or a density of times has values that make no sense."""


class TooLargeError(SdeflowError, ValueError):
    """A requested size is too large to be meant; it is refused before any work."""


class SolverError(SdeflowError, RuntimeError):
    """A solve failed.

    Attributes:
        t: the time of the failure, in the SDE's t (not in the solver's variable), or None.
        nfe: the number of calls of the score until then.
        bad_rows: the indices of the samples that failed.
        partial: the state at that time, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        t: float | None = None,
        nfe: int | None = None,
        bad_rows: list[int] | None = None,
        partial: Tensor | None = None,
    ) -> None:
        super().__init__(message)
        self.t, self.nfe, self.bad_rows, self.partial = t, nfe, bad_rows, partial


class MaxStepsError(SolverError):
    """The budget of calls was used up before the end time."""


class StepUnderflowError(SolverError):
    """The step of an adaptive method became too small."""


class NonFiniteStateError(SolverError):
    """The state or the output of the score became NaN, infinite or very large."""


class TrainingDivergedError(SdeflowError, RuntimeError):
    """The loss was not finite for several steps in a row."""


class CheckpointError(SdeflowError, RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointCorrupt(CheckpointError):
    """The bytes of a checkpoint have changed since it was written."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint belongs to another model, SDE or training run."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint has a newer format than this version can read."""


class PriorMismatchWarning(UserWarning):
    """The prior is far from p(x_T)."""


class DataScaleWarning(UserWarning):
    """The scale of the data is so unusual that it may be a mistake."""


class LeakageWarning(UserWarning):
    """Some samples lie outside the support that was given."""


class TraceErrorWarning(UserWarning):
    """The trace estimate of a log-likelihood has a large standard error."""


class ToleranceWarning(UserWarning):
    """A tolerance could not be reached; the result holds the error that was reached."""


class LongSolveWarning(UserWarning):
    """A solve takes many calls of a large network, and no progress bar is shown."""


class CoarseStepsWarning(UserWarning):
    """The drift changes much within a step of a solve, and the method does not use the kernel."""


class UnusedParameterWarning(UserWarning):
    """A parameter of an SDE changes nothing: neither f nor g holds it."""


class HiddenParametersWarning(UserWarning):
    """A score's network is a function that calls a module, so the score does not hold the module's parameters."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns, and points at the line of the user's code that led to the warning.

    This line is in the innermost frame that belongs neither to this package nor to a library that its calls pass
    through.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _passes_through(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _passes_through(filename: str, module: str) -> bool:
    return filename.startswith(_OURS) or module.split(".")[0] in _BETWEEN
