"""A network bound to an SDE as its score, in every parametrisation; see :mod:`sdeflow.scores`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from sdeflow.errors import DataError, HiddenParametersWarning, ScoreError, warn
from sdeflow.kernels.gaussian import Path
from sdeflow.numerics.checks import checked_choice, checked_finite, checked_numbers
from sdeflow.numerics.conditions import (
    Condition,
    checked_condition,
    from_named_leaves,
    leaves,
    mapped,
    of_samples,
    read_condition,
)
from sdeflow.scores.conditional import Conditional, Guided, Held
from sdeflow.scores.function import (
    DeclaredSDE,
    ScoreFunction,
    checked,
    network_time,
    network_times,
    on_states,
)
from sdeflow.scores.readout import GridScore, Readout
from sdeflow.symbolic.coupled import rank

__all__ = ["PREDICTIONS", "Conditional", "Score"]

HIDDEN = "pass an nn.Module whose forward(x, time) does what the function does, and holds the module that it calls"
_MEANING = "meaning"
PREDICTIONS = ("score", "noise", "data", "v", "velocity", "edm")


class Score(ScoreFunction):
    """A network bound to an SDE as its score.

    Args:
        net: called as ``net(x, time)`` or ``net(x, time, y)``, with x (batch, *event), time (batch,) and
            a condition y: a tensor (batch, ...), or a tuple or dict of such. It returns a tensor shaped as x. A plain
            function serves too, but the parameters of a module that it calls are not the score's: ``fit``,
            ``score.to()`` and ``score.parameters()`` do not find them, and a warning says so.
        sde: the declaration it belongs to (an ``SDE``).
        predicts: what the network's output means; see the table above.
        data_mean: the data's mean, a number or a tensor that broadcasts to an event. ``fit`` measures
            it where it is None, and data_std likewise.
        data_std: the data's standard deviation, likewise; with a basis, of the coefficients.
        time: what the network gets as its time: "log_snr" (log alpha²/sigma²), "t", or a function of t.

    Raises:
        ScoreError: at a call, where the network returns something else than a tensor like x.
        ValueError: for an unknown ``predicts`` or ``time``.
        NotAffineError: where ``predicts`` or ``time`` needs a kernel that the SDE does not have.
    """

    data_mean: Tensor
    data_std: Tensor
    moments_known: Tensor
    null: Held | None

    def __init__(
        self,
        net: Callable[..., Tensor],
        sde: DeclaredSDE,
        predicts: str = "edm",
        data_mean: Tensor | float | None = None,
        data_std: Tensor | float | None = None,
        time: str | Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(sde)
        if not callable(net):
            raise ScoreError(f"net must be callable as net(x, time), not {net!r}.")
        checked_choice(predicts, "predicts", PREDICTIONS)
        if time is None:
            time = "t" if self.gaussian is None else "log_snr"
        if not callable(time):
            checked_choice(time, "time", ("log_snr", "t"), "a function of t")
        if predicts != "score":
            self._require_kernel(f"predicts={predicts!r}")
        if time == "log_snr":
            self._require_kernel('time="log_snr"')
        self.net = net
        self._warn_of_hidden_modules()
        self.predicts = predicts
        self.time = time
        for name, moment, usual in (("data_mean", data_mean, 0.0), ("data_std", data_std, 1.0)):
            # a number keeps all its digits
            self.register_buffer(name, checked_finite(checked_numbers(usual if moment is None else moment, name), name))
        if self.declaration.coupled and self.gaussian is not None:
            for name in ("data_mean", "data_std"):
                moment = getattr(self, name)
                setattr(self, name, self.gaussian.of_state(moment) if moment.ndim else moment)
        self._declared = (data_mean is not None, data_std is not None)
        self.register_module("null", None)
        self._unconditional, self._without = True, False
        self.register_buffer("moments_known", torch.tensor(data_mean is not None and data_std is not None))
        coupled = self.declaration.coupled and self.data_std.ndim > 0  # auxiliary components have no data: 0
        positive = bool(
            (self.data_std >= 0).all() & (self.data_std > 0).any() if coupled else (self.data_std > 0).all()
        )
        if not positive:
            raise ValueError(f"data_std must be positive and finite, not {data_std}.")
        if self.declaration.coupled and predicts == "v":
            raise ValueError('predicts="v" is of elementwise SDEs; a coupled one takes the others.')
        if predicts == "velocity" and rank(self.declaration.gram) < len(self.declaration.state):
            raise ValueError('predicts="velocity": g gᵀ is singular, so the flow does not determine the score.')

    @property
    def is_function(self) -> bool:
        """Whether the network is a plain function, which holds no parameters."""
        return not isinstance(self.net, nn.Module)

    def _warn_of_hidden_modules(self) -> None:
        """A warning for a function that calls a module with parameters: the score does not find them."""
        if not self.is_function or not inspect.isfunction(self.net):
            return
        try:
            known = inspect.getclosurevars(self.net)
        except ValueError:  # a cell that is still empty
            return
        hidden = [
            name
            for name, value in (*known.nonlocals.items(), *known.globals.items())
            if isinstance(value, nn.Module) and any(True for _ in value.parameters())
        ]
        if hidden:
            warn(
                f"net is a function that calls {', '.join(hidden)}, whose parameters the score does not hold: fit, "
                f"parameters() and to() will not find them. To have them found, {HIDDEN}.",
                HiddenParametersWarning,
            )

    def set_data_moments(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Sets the data's mean and standard deviation, also where they were declared before."""
        mean, std = (checked_finite(checked_numbers(v, name), name) for v, name in ((mean, "mean"), (std, "std")))
        self.data_mean, self.data_std = mean.to(self.data_mean.device), std.to(self.data_std.device)
        self.moments_known = torch.ones_like(self.moments_known)

    def measure(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Sets those moments of the data that were not declared to the ones given, measured on the training data."""
        if not bool(self.moments_known):
            declared = zip(self._declared, (self.data_mean, self.data_std), (mean, std), strict=True)
            self.set_data_moments(*(given if stays else measured for stays, given, measured in declared))

    def data_moments(self) -> tuple[Tensor, Tensor] | None:
        return (self.data_mean, self.data_std) if bool(self.moments_known) else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Score:
        """Moves and casts the network; the data's moments move, but keep their digits."""
        mean, std = self.data_mean, self.data_std
        super()._apply(fn, recurse)
        self.data_mean, self.data_std = mean.to(self.data_mean.device), std.to(self.data_std.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Adds what the weights mean, so that they are not loaded as something else."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _MEANING] = torch.tensor(list(self._meaning().encode()), dtype=torch.uint8)

    def _meaning(self) -> str:
        """The SDE, whatever its cutoff, and the parametrisation, as text."""
        declaration, time = self.declaration, "a function" if callable(self.time) else repr(self.time)
        fixed = "".join(
            f", {name} = {v if not isinstance(v, list) else '...'}" for name, v in self.values.fixed.items()
        )
        sde = f"dx = ({declaration.f}) dt + ({declaration.g}) dw with T = {declaration.T:g}{fixed}"
        return f"{sde}, predicts={self.predicts!r}, time={time}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the moments' shapes, and whether there are conditions, from what is loaded.

        Raises:
            ScoreError: for the state of a score of another SDE or parametrisation.
        """
        theirs, ours = state_dict.pop(prefix + _MEANING, None), self._meaning()
        if theirs is not None and bytes(theirs.tolist()).decode(errors="replace") != ours:
            raise ScoreError(
                f"this state is of a score of {bytes(theirs.tolist()).decode(errors='replace')}, and would be loaded "
                f"into one of {ours}."
            )
        self._require_weights(state_dict, prefix)
        for name in ("data_mean", "data_std"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=getattr(self, name).device))
        held = {k.removeprefix(f"{prefix}null."): v for k, v in state_dict.items() if k.startswith(f"{prefix}null.")}
        trained = held.pop("trained", None)
        if trained is not None:
            device = self.data_mean.device
            self.null = Held(from_named_leaves({k: torch.empty_like(v, device=device) for k, v in held.items()}))
            self.null.register_buffer("trained", torch.empty_like(trained, device=device))
            self._unconditional = bool(trained)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _require_weights(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """A ScoreError where what is loaded has none of the network's weights, or integers for them."""
        ours = {f"{prefix}{name}": value for name, value in self.state_dict().items() if name.startswith("net.")}
        theirs = ours.keys() & state_dict.keys()
        if ours and not theirs:
            raise ScoreError(
                f"this state holds no weight of the network: there are {', '.join([*state_dict][:3])}, ... where "
                f"{', '.join([*ours][:2])}, ... belong. A compiled or wrapped module adds a prefix to its names "
                '("_orig_mod.", "module."): save the state of the module inside it, or remove the prefix.'
            )
        for name in theirs:
            here, there = ours[name], state_dict[name]  # a module's extra state may be anything
            tensors = isinstance(here, Tensor) and isinstance(there, Tensor)
            if tensors and here.is_floating_point() != there.is_floating_point():
                raise ScoreError(f"{name} is {there.dtype} in this state, and {here.dtype} here.")

    def forward(self, x: Tensor, t: Tensor | float, y: Condition | None = None) -> Tensor:
        """∇ log p_t(x), shaped as x; with a condition ``y``, the score of x given y.

        ``y`` is as :meth:`given` takes it. Without one, a network that was trained with conditions gives the
        unconditional score, or raises a ScoreError where it never learned it.
        """
        x, time = self._entered(x, t)
        y = self._condition(y, x)
        if self.predicts == "score":
            return self._network(x, time, y)
        eps, path = self._noise(x, time, y)
        return self.kernel.from_basis(-path.sigma.T.inverse(eps))

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, t: Tensor | float, y: Condition | None = None) -> Tensor:
            """:meth:`forward`, by way of the module's hooks."""

    def noise(self, x: Tensor, t: Tensor | float, y: Condition | None = None) -> Tensor:
        """E[eps | x_t], shaped as x."""
        x, time = self._entered(x, t)
        return self.kernel.from_basis(self._noise(x, time, self._condition(y, x))[0])

    def denoise(self, x: Tensor, t: Tensor | float, y: Condition | None = None) -> Tensor:
        """E[x_0 | x_t], shaped as x."""
        x, time = self._entered(x, t)
        y = self._condition(y, x)
        if self.predicts == "data":
            return self._network(x, time, y)
        eps, path = self._noise(x, time, y)
        kernel = self.kernel
        centred = kernel.to_basis(x) - path.offset.to(x.dtype)
        return kernel.from_basis(path.alpha.inverse(centred - path.sigma(eps)))

    @overload
    def given(self, y: None) -> Score: ...

    @overload
    def given(self, y: Condition | float) -> Conditional: ...

    def given(self, y: Condition | float | None) -> Score | Conditional:
        """The score of x given ``y``, itself a score; with None the unconditional one.

        Args:
            y: a tensor, or a tuple or dict of such, as the network takes it. What has the batch's length is one
                condition for each sample; a number, or what has length 1, holds for all. Of a network that was trained
                with conditions, the condition of one sample without the dimension of the batch does too.

        Raises:
            DataError: for conditions that are no tensors, not finite, or not shaped as those it was trained with.
            ScoreError: with None, where the network was trained with conditions and without label dropout.
        """
        if y is None:
            self.require_unconditional()
            return self
        if self._without:
            raise ScoreError(
                "this network was trained without conditions, and never learned what to make of one: train it by "
                "fit(score, (x, y), ...), or take the score as it is."
            )
        return Conditional(self, self._as_trained(checked_condition(y)))

    def guided(
        self, y: Condition | float, strength: float = 2.0, interval: tuple[float, float] | None = None
    ) -> Guided:
        """Classifier-free guidance towards ``y``: see :class:`~sdeflow.scores.conditional.Guided`.

        Args:
            y: as :meth:`given` takes it.
            strength: 1 is the score given y.
            interval: (low, high), the times at which there is guidance; None is all times.
        """
        return Guided(self.given(y), strength, interval)

    @property
    def conditional(self) -> bool:
        """Whether the network was trained with conditions."""
        return self.null is not None

    def learns(self, y: Condition | None, dropout: float) -> None:
        """Says with which conditions the network is trained from now on.

        Args:
            y: conditions of some samples; None where there are none.
            dropout: the share of samples whose condition is dropped.

        Raises:
            ScoreError: where conditions are dropped, and the network does not say what stands for none.
        """
        self._without = y is None and self.null is None
        if y is None:
            self._unconditional = True
        else:
            self.null = Held(self._nothing(_of_first_sample(y), dropout > 0))
            self._unconditional = dropout > 0
        if self.null is not None:
            self.null.register_buffer("trained", torch.tensor(self._unconditional))
            self.null.to(self.data_mean.device)

    def _as_trained(self, y: Condition) -> Condition:
        """``y`` with the dimensions of the conditions that the network was trained with."""
        if self.null is None:
            return y

        def checked_leaf(theirs: Tensor, ours: Tensor) -> Tensor:
            if theirs.ndim == ours.ndim - 1:  # of one sample
                theirs = theirs[None]
            if theirs.ndim != ours.ndim:
                shape = ", ".join(["batch", *map(str, ours.shape[1:])])
                raise DataError(f"a condition of shape {tuple(theirs.shape)} was given, and ({shape}) trained with.")
            return theirs

        return mapped(checked_leaf, y, self.null.value)

    def _nothing(self, y: Condition, needed: bool) -> Condition:
        """What stands for no condition in the place of ``y``."""
        null = getattr(self.net, "null", None)
        if callable(null):
            return null(y)
        classes = getattr(self.net, "classes", None)
        whole = any(not leaf.is_floating_point() for leaf in leaves(y))
        if needed and whole and not isinstance(classes, int):
            raise ScoreError(
                "label_dropout needs a label that means none: give the network an integer attribute `classes`, the "
                "number of that label, or a method null(y) that returns what stands for no condition."
            )
        return mapped(
            lambda leaf: torch.zeros_like(leaf) if leaf.is_floating_point() else torch.full_like(leaf, classes or 0), y
        )

    def no_condition(self) -> Condition:
        """What stands for no condition, for one sample."""
        self.require_unconditional()
        if self.null is None:
            raise ScoreError("the network was not trained with conditions: use the score as it is.")
        return self.null.value

    def require_unconditional(self) -> None:
        """Raises a ScoreError where the network was trained with conditions, and never without one."""
        if not self._unconditional:
            raise ScoreError(
                "this network was trained with conditions, and never without one: pass score.given(y), or train it "
                "with fit(label_dropout=0.1) to have the unconditional score too."
            )

    def of_batch(self, samples: int) -> Score:
        self.require_unconditional()
        return self

    def readout(self, path: Path, like: Tensor, time: Tensor) -> Readout:
        """How eps follows from the network's output at ``time``: the one place where it is interpreted."""
        alpha, sigma, offset = path
        if self.predicts == "noise":
            return Readout(None)
        if self.predicts == "score":
            return super().readout(path, like, time)
        if self.predicts == "data":
            inverse = sigma.inverse
            return Readout((inverse @ alpha).scaled(-1.0), inverse)
        if self.predicts == "v":
            total = 1.0 / (alpha.values.square() + sigma.values.square())
            return Readout(alpha.scaled(total), sigma.scaled(total))
        if self.predicts == "velocity":
            kernel = self._require_kernel("the conversion of a score")
            a, b, q = kernel.equation(like, time)
            output = (sigma.T @ q.inverse).scaled(2.0)
            state = output @ a
            level = output(b + a(offset)) if kernel.has_offset else None
            return Readout(output, state.scaled(-1.0), None if level is None else -level)
        return self._preconditioning(path, like)

    def _preconditioning(self, path: Path, like: Tensor) -> Readout:
        """ "edm": the network sees a whitened state and adds what Gaussian data would leave over."""
        kernel = self._require_kernel("the conversion of a score")
        mean = kernel.data_level(self.data_mean, like)
        M = path.sigma.inverse @ path.alpha @ kernel.scale(self.data_std, like)
        K = M.root_of_one_plus_gram
        L = K if M.T is M else M.T.root_of_one_plus_gram
        whitening = (path.sigma @ K).inverse
        shift = None if mean is None else path.alpha(mean)
        return Readout((M @ L.T.inverse).scaled(-1.0), K.T.inverse @ whitening, None, shift, whitening)

    def on_grid(self, times: Tensor, like: Tensor, dtype: torch.dtype, y: Condition | None = None) -> GridScore:
        kernel = self._require_kernel("a score on a grid")
        path = kernel.path(like, times)
        readout = self.readout(path, like, times)
        clock = network_times(self._times_of(times), like.to(dtype)).unbind()
        y = self._condition(y, like)

        def evaluate(x: Tensor, i: int, kept: bool) -> Tensor:
            return self._called(x, clock[i].expand(len(x)).clone(), y, kept)

        return GridScore(readout, on_states(kernel, path, like, dtype, evaluate, readout))

    def _noise(self, x: Tensor, time: Tensor, y: Condition | None) -> tuple[Tensor, Path]:
        """E[eps | x_t] in the kernel's basis, and the path."""
        kernel = self._require_kernel("the conversion of a score")
        path = kernel.path(x, time)
        readout = self.readout(path, x, time)
        centred = seen = x
        if readout.state is not None:
            centred = kernel.to_basis(x)
            centred = centred - path.offset.to(x.dtype) if kernel.has_offset else centred
        if readout.input is not None:
            seen = kernel.from_basis(readout.input(readout.shifted(centred)))
        output = self._called(seen, network_time(self._times_of(time), x), y, seen is x)
        return readout.noise(kernel.to_basis(output), centred), path

    def _network(self, x: Tensor, t: Tensor, y: Condition | None) -> Tensor:
        """The network's output for the state itself."""
        return self._called(x, network_time(self._times_of(t), x), y, True)

    def _times_of(self, t: Tensor) -> Tensor:
        """The time in the variable that the network knows, shaped as t."""
        if callable(self.time):
            return torch.as_tensor(self.time(t), device=t.device)
        if self.time == "t":
            return t
        return 2.0 * self._require_kernel('time="log_snr"').numbers.half_log_snr(t)  # of times that are checked

    def _condition(self, y: Condition | None, x: Tensor) -> Condition | None:
        """The condition of each sample of x as the network takes it: on its device, floating ones in its dtype.

        Raises:
            DataError: for conditions of another number of samples.
            ScoreError: where there is none, and the network never learned what to do then.
        """
        if y is None:
            self.require_unconditional()
            if self.null is None:
                return None
            y = self.null.value
        else:
            y = read_condition(y)
        ours = self.dtype

        def ready(leaf: Tensor) -> Tensor:
            return leaf.to(device=x.device, dtype=ours if ours is not None and leaf.is_floating_point() else leaf.dtype)

        return of_samples(mapped(ready, y), len(x))

    def _called(self, x: Tensor, time: Tensor, y: Condition | None, copy: bool) -> Tensor:
        """The network's output, checked. It sees components as channels, and a copy where others need ``x``."""
        folded = x.flatten(1, 2) if self.declaration.coupled and x.ndim > 2 else x
        folded = folded.clone() if copy and folded.data_ptr() == x.data_ptr() else folded
        try:
            output = self.net(folded, time) if y is None else self.net(folded, time, y)
        except RuntimeError as error:
            self._require_dtype(folded, error)
            raise
        return checked(output, folded, "the network").reshape(x.shape)

    def _require_dtype(self, x: Tensor, error: RuntimeError) -> None:
        """A DataError for what a network said of states in another dtype than its own."""
        ours = self.dtype
        if ours is not None and ours != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise DataError(
                f"x is {x.dtype} and the network {ours}: pass x.to({ours}), or convert the score with "
                f"score.to({x.dtype})."
            ) from error

    def extra_repr(self) -> str:
        """predicts, time and the data's scale."""
        return f"predicts={self.predicts!r}, time={self.time!r}, data_std={self.data_std.mean():.4g}"


def _of_first_sample(y: Condition) -> Condition:
    """The condition of the first sample, as of a batch of one."""
    return mapped(lambda leaf: leaf[:1].detach().clone().cpu(), y)
