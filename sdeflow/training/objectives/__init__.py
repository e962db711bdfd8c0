"""What a score is trained on: objectives, each an object that can be given to ``fit`` and evaluated on its own.

==========================  ==========================================================================================
:class:`Denoising`          the score of a Gaussian kernel p(x_t | x_0)
:class:`KernelMatching`     the score of another exact kernel
:class:`LocalMatching`      the score of the last step of a simulated path, where no kernel is known
==========================  ==========================================================================================

``docs/architecture.rst`` says how to add one.
"""

from __future__ import annotations

from sdeflow.numerics.checks import checked_choice
from sdeflow.scores import ScoreFunction
from sdeflow.training.objectives.base import Batch, Objective
from sdeflow.training.objectives.denoising import Denoising
from sdeflow.training.objectives.matching import KernelMatching, LocalMatching
from sdeflow.training.times import Times
from sdeflow.training.weightings import Weighting

__all__ = ["Batch", "Denoising", "KernelMatching", "LocalMatching", "Objective", "chosen", "names"]

_NAMED: dict[str, type[Objective]] = {
    "denoising": Denoising,
    "kernel_matching": KernelMatching,
    "local_matching": LocalMatching,
}


def names() -> tuple[str, ...]:
    """The names that ``fit(objective=...)`` takes."""
    return tuple(_NAMED)


def chosen(
    score: ScoreFunction,
    objective: Objective | str | None,
    weighting: Weighting | None,
    times: Times | None,
    gap: int | None,
    simulation_steps: int | None,
) -> Objective:
    """The objective that the options of ``fit`` mean for this score.

    Raises:
        ValueError: for an unknown name, and for options that the objective does not have.
        NotAffineError: for an objective that this SDE cannot serve.
    """
    if isinstance(objective, Objective):
        options = {"weighting": weighting, "times": times, "gap": gap, "simulation_steps": simulation_steps}
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"{' and '.join(given)} belong to the objective: give them to {type(objective).__name__}.")
        objective.require(score)
        return objective
    if objective is None:
        kind = _of(score)
    else:
        kind = _NAMED[checked_choice(objective, "objective", _NAMED, "an sdeflow.objectives.Objective")]
    if weighting is None:
        weighting = "likelihood" if kind is Denoising else "score"
    of_paths = {"gap": gap, "simulation_steps": simulation_steps}
    counts = {name: value for name, value in of_paths.items() if value is not None}
    if kind is LocalMatching:
        made: Objective = LocalMatching(weighting, times, **counts)
    elif counts:
        raise ValueError("gap and simulation_steps are of SDEs without a kernel, which are trained on simulated paths.")
    else:
        made = kind(weighting, times)
    made.require(score)
    return made


def _of(score: ScoreFunction) -> type[Objective]:
    """The objective of this score's SDE where none is named."""
    if score.gaussian is not None:
        return Denoising
    return KernelMatching if score.kernel.exact else LocalMatching
