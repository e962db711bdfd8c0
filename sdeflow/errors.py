"""Every error and warning of sdeflow.

Errors derive from :class:`SdeflowError` and from the built-in that fits, so that both
``except SdeflowError`` and ``except ValueError`` catch what their reader expects.
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
    "LongSolveWarning",
    "MaxStepsError",
    "MissingPriorError",
    "NonFiniteStateError",
    "NotAffineError",
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
    """What was declared is not an SDE that sdeflow can read."""


class UnsafeExpressionError(DeclarationError):
    """A declaration holds something that must not be interpreted, such as text or a hostile name."""


class NotAffineError(DeclarationError):
    """A Gaussian perturbation kernel was asked of an SDE that has none."""


class ScheduleError(DeclarationError):
    """A coefficient is singular, complex, explosive or without noise on the horizon."""


class MissingPriorError(SdeflowError, ValueError):
    """No prior p(x_T) follows from the declaration, and none was given."""


class ScoreError(SdeflowError, ValueError):
    """A score or its network returned something of the wrong kind, shape, dtype or device."""


class DataError(SdeflowError, ValueError):
    """Data or a state has the wrong kind, shape or values."""


class WeightingError(SdeflowError, ValueError):
    """A weighting or a density of times has values that make no sense."""


class TooLargeError(SdeflowError, ValueError):
    """What was asked for has a size that cannot be meant: it is refused before any work."""


class SolverError(SdeflowError, RuntimeError):
    """A solve did not end well.

    Attributes:
        t: the time of the SDE (not of the solver's variable) where it went wrong, or None.
        nfe: calls of the score until then.
        bad_rows: indices of the samples concerned.
        partial: the state at that time, where there is one.
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
    """An adaptive method shrank its step to nothing."""


class NonFiniteStateError(SolverError):
    """The state, or what the score returned, became NaN, infinite or enormous."""


class TrainingDivergedError(SdeflowError, RuntimeError):
    """The loss was not finite for several steps in a row."""


class CheckpointError(SdeflowError, RuntimeError):
    """A checkpoint could not be written or read."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint's bytes are not those that were written."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint belongs to another model, SDE or training run."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint was written by a newer format."""


class PriorMismatchWarning(UserWarning):
    """The prior in use is far from p(x_T)."""


class DataScaleWarning(UserWarning):
    """The data's scale is unusual enough to be a mistake."""


class TraceErrorWarning(UserWarning):
    """A log-likelihood's stochastic trace is noisier than its reader would expect."""


class ToleranceWarning(UserWarning):
    """A tolerance that was asked for could not be reached; the result says what was."""


class LongSolveWarning(UserWarning):
    """A solve takes many calls of a large network, and no progress bar shows it."""


class CoarseStepsWarning(UserWarning):
    """The steps of a solve are long against what the drift does in them, and the method does not know the kernel."""


class HiddenParametersWarning(UserWarning):
    """A score's network is a function that calls a module: the score does not hold its parameters."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points at the line of the user's which led to it, however deep in the package it arises.

    That is the first frame, going outwards, which is neither of this package nor of the libraries through which its
    calls may pass.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _passes_through(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _passes_through(filename: str, module: str) -> bool:
    return filename.startswith(_OURS) or module.split(".")[0] in _BETWEEN
