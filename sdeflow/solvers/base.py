"""What a solver is: an abstract base class whose attributes say what it solves and what it needs.

:data:`DEMANDS` holds every question that is asked of a solver before a solve, with the words of the refusal. What lists
solvers and what refuses them read this one table, and the table reads the attributes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from sdeflow.solvers.problem import Problem

__all__ = ["DEMANDS", "Demand", "Solver", "unmet"]

_KINDS = ("sde", "ode")


if TYPE_CHECKING:
    _usual = property
else:

    class _usual:
        """An attribute's usual value, which data of a subclass or of an object replaces."""

        def __init__(self, value: Callable[[Solver], object]) -> None:
            self.value, self.__doc__ = value, value.__doc__

        def __get__(self, solver: Solver | None, kind: type[Solver]) -> object:
            return self if solver is None else self.value(solver)


class Solver(ABC):
    """A method for the reverse-time SDE or the probability flow.

    A subclass has to give ``kinds``, ``needs_kernel``, ``adaptive``, ``calls_per_step`` and :meth:`solve`: without one
    of them no object can be made. An attribute that is the same for all objects stands in the class as plain data; one
    that depends on options is a property.

    Attributes:
        kinds: the equations it solves, of "sde" (the reverse-time SDE) and "ode" (the probability flow).
        needs_kernel: whether it needs the SDE's Gaussian kernel.
        adaptive: whether it chooses its steps, to rtol and atol.
        calls_per_step: calls of the score in a step of fixed size.
        default_grid: the time variable it takes its steps in, where it prefers one; None for the angle.
        default_tolerances: rtol and atol where the user gives none.
        observable: whether it calls ``problem.observe`` after each step, for trajectories and callbacks.
        per_sample: whether each sample has steps of its own.
        elementwise: whether coupled states are beyond it.
        diagonal: whether noise that depends on the state must be one for each component.
        follows_path: whether it takes its noise from ``problem.motion`` or ``problem.motion_in``, and so follows a
            given path of Brownian motion.
        iterates: whether its fixed steps are found by iteration, to rtol and atol.
        integrates_divergence: whether log p may be one more component of the state (b, n + 1) that it solves.
        differentiable: whether gradients flow through a solve.

    Raises:
        TypeError: for a subclass that leaves out what it has to give, when an object of it is made.
        ValueError: for ``kinds`` other than a tuple of "sde" and "ode", when the subclass is defined.
    """

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        kinds: object = cls.kinds
        if not (hasattr(type(kinds), "__get__") or (isinstance(kinds, tuple) and kinds and set(kinds) <= set(_KINDS))):
            raise ValueError(
                f'{cls.__name__}.kinds must be a tuple of "sde" and "ode", such as ("ode",), not {kinds!r}.'
            )

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """The equations it solves, of "sde" and "ode"."""

    @property
    @abstractmethod
    def needs_kernel(self) -> bool:
        """Whether it needs the SDE's Gaussian kernel."""

    @property
    @abstractmethod
    def adaptive(self) -> bool:
        """Whether it chooses its steps."""

    @property
    @abstractmethod
    def calls_per_step(self) -> int:
        """Calls of the score in a step of fixed size."""

    @_usual
    def default_grid(self) -> str | None:
        """The time variable it prefers."""
        return None

    @_usual
    def default_tolerances(self) -> tuple[float, float]:
        """rtol and atol where none are given."""
        return 1e-5, 1e-5

    @_usual
    def observable(self) -> bool:
        """Whether it says when a step ends."""
        return True

    @_usual
    def per_sample(self) -> bool:
        """Whether each sample has steps of its own."""
        return False

    @_usual
    def elementwise(self) -> bool:
        """Whether coupled states are beyond it."""
        return False

    @_usual
    def diagonal(self) -> bool:
        """Whether noise that depends on the state must be one for each component."""
        return False

    @_usual
    def follows_path(self) -> bool:
        """Whether it follows a given path of Brownian motion."""
        return False

    @_usual
    def iterates(self) -> bool:
        """Whether its fixed steps are found by iteration."""
        return False

    @_usual
    def integrates_divergence(self) -> bool:
        """Whether log p may be one more component of its state."""
        return False

    @_usual
    def differentiable(self) -> bool:
        """Whether gradients flow through a solve."""
        return True

    @abstractmethod
    def solve(self, problem: Problem, y: Tensor, steps: int | None, rtol: float, atol: float) -> Tensor:
        """The state at the end of ``problem`` from ``y`` (batch, n)."""

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise: what does not solves the flow too, or nothing else."""
        return "ode" not in self.kinds

    @property
    def of_whole_batch(self) -> bool:
        """Whether its steps depend on all samples together."""
        return self.adaptive and not self.per_sample

    def calls(self, steps: int) -> int:
        """Calls of the score in a solve of fixed steps."""
        return steps * self.calls_per_step

    def with_own_steps(self) -> Solver:
        """The same method with steps that it chooses, where it can; else itself."""
        return self


class Demand(NamedTuple):
    """Something that is asked of a solver.

    Attributes:
        met: whether a solver can do it.
        words: what is said of one that cannot; {solver} is the solver, {names} are the names of those that can;
            {chunk} is the user's.
    """

    met: Callable[[Solver], bool]
    words: str


DEMANDS: dict[str, Demand] = {
    "sde": Demand(
        lambda solver: "sde" in solver.kinds, "{solver!r} does not solve a reverse-time SDE; those that do: {names}."
    ),
    "ode": Demand(
        lambda solver: "ode" in solver.kinds,
        "{solver!r} does not solve the probability-flow ODE; those that do: {names}.",
    ),
    "forward": Demand(
        lambda solver: "sde" in solver.kinds and not solver.needs_kernel,
        'solver={solver!r} does not simulate the forward SDE; those that do: {names}, and "exact" where there is a '
        "kernel.",
    ),
    "divergence": Demand(
        lambda solver: solver.integrates_divergence,
        "{solver} does not integrate the divergence; those that do: {names}.",
    ),
    "no kernel": Demand(
        lambda solver: not solver.needs_kernel,
        "{solver} needs a Gaussian kernel, which this SDE has not; those that do not: {names}.",
    ),
    "coupled": Demand(
        lambda solver: not solver.elementwise,
        "{solver} is of elementwise SDEs, not of coupled states; those of both: {names}.",
    ),
    "shared noise": Demand(
        lambda solver: not solver.diagonal,
        "{solver} needs each component to have a noise of its own; those that do not: {names}.",
    ),
    "path": Demand(
        lambda solver: solver.follows_path, "noise=: {solver} does not follow a given path; those that do: {names}."
    ),
    "path of components": Demand(
        lambda solver: solver.follows_path and not solver.needs_kernel,
        "noise=: {solver} does not follow a path of coupled states; those that do: {names}.",
    ),
    "callback": Demand(
        lambda solver: solver.observable,
        "callback=: {solver} does not say when a step ends; those that do, by name: {names}.",
    ),
    "trajectory": Demand(
        lambda solver: solver.observable,
        "trajectory=True: {solver} does not say when a step ends; those that do, by name: {names}.",
    ),
    "common times": Demand(
        lambda solver: not solver.per_sample,
        "trajectory=True: {solver} takes each sample through times of its own; use callback=, or one of {names}.",
    ),
    "chunk": Demand(
        lambda solver: not solver.of_whole_batch,
        "chunk={chunk}: {solver} chooses its steps for the whole batch, so samples would depend on the chunks; take a "
        "solver of fixed steps, or call once for each chunk.",
    ),
    "gradient": Demand(
        lambda solver: solver.differentiable,
        "gradient=: no gradient flows through {solver}; it does through {names}.",
    ),
}
"""By name. "sde" and "ode" are the equations, "forward" is :meth:`sdeflow.SDE.simulate`'s."""


def unmet(solver: Solver, demands: Iterable[str]) -> Demand | None:
    """The first of ``demands`` that the solver does not meet, or None."""
    return next((DEMANDS[demand] for demand in demands if not DEMANDS[demand].met(solver)), None)
