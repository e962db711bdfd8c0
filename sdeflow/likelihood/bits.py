"""Bits per dimension of integer data under the flow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.likelihood.dequantisation import Dequantisation, Uniform, bits_from
from sdeflow.likelihood.measure import of_data, of_states, warn_if_noisy
from sdeflow.likelihood.options import LogProbOptions, Options
from sdeflow.likelihood.result import LogProb
from sdeflow.numerics.checks import checked_count, checked_flag, checked_images, checked_methods
from sdeflow.numerics.options import takes
from sdeflow.solving.model import Model
from sdeflow.symbolic.equations import Equation

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["bits_per_dim"]

_NOISY_BITS = 0.01  # bits per dimension


@takes(LogProbOptions, Options)
def bits_per_dim(
    model: Model, equation: Equation, images: Tensor, *, levels: int, low: float, high: float, full: bool = False,
    dequantise: Dequantisation | None = None, draws: int = 1, importance: bool | None = None, samples: int = 16,
    **options: Unpack[LogProbOptions],
) -> Tensor | LogProb:  # fmt: skip
    """Bits per dimension of integer images by dequantisation, an upper bound on the discrete code length.

    Of a coupled SDE with auxiliary components it is that of :func:`~sdeflow.likelihood.data_log_prob`, again an upper
    bound. Integer k in 0 .. levels - 1 stands for x = low + (high - low) (k + u) / levels, and with u ~ q

        bits = -((log p(x) - log q(u | k)) / d + log((high - low) / levels)) / log 2;

    several draws of u are averaged as weights p / q, which tightens the bound, or as logarithms.

    Args:
        model, equation: as :func:`~sdeflow.likelihood.log_prob`.
        images: (batch, *event), of an integer dtype.
        levels: how many grey levels there are.
        low, high: the range of x that the model was trained on.
        full: whether to return a :class:`LogProb` in bits per dimension instead, ``value`` with the error budget of the
            mean over draws; ``stderr`` is that of the draws and the trace together, and of the trace alone where one
            draw leaves the spread of u unknown.
        dequantise: q, of :mod:`sdeflow.likelihood.dequantisation`; uniform by default.
        draws: of u, for each image.
        importance: whether draws are averaged as weights; by default where log p is no estimate itself, since noise in
            it would be taken for probability.
        samples: draws of the auxiliary components.
        options: as :func:`~sdeflow.likelihood.log_prob`, in nats; ``seed`` is of the dequantisation too, and a standard
            error of the trace above 0.01 bits per dimension warns by default.

    Raises:
        DataError: for images that are not integers in 0 .. levels - 1.
        ValueError: for levels < 2, low >= high, or importance weights of an estimate.
    """
    images = checked_images(images)
    auxiliary, d = model.declaration.auxiliary, math.prod(images.shape[1:])
    nats = d * math.log(2.0)
    options.setdefault("warn_above", _NOISY_BITS * nats)
    asked = Options(full=full, **options).seeded()
    dtype = model.state_dtype
    if dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"bits_per_dim needs a network in float32 or float64: {dtype} cannot hold k + u.")
    scheme = Uniform() if dequantise is None else dequantise
    checked_methods(scheme, "dequantise", ("sample",), "sdeflow.likelihood.dequantisation.Uniform()")
    importance = checked_flag(importance, "importance", optional=True)
    draws, samples = checked_count(draws, "draws"), checked_count(samples, "samples")
    part = {"first_row": asked.first_row} if asked.first_row else {}
    drawn = scheme.sample(images, levels=levels, low=low, high=high, seed=asked.key, draws=draws, dtype=dtype, **part)
    x = drawn.x.transpose(0, 1).flatten(0, 1)  # the draws of an image in a row
    asked = replace(asked, first_row=asked.first_row * draws)
    of_draw = model.of_batch(len(images)).rows(torch.arange(len(images)).repeat_interleave(draws))
    if auxiliary:
        found = of_data(of_draw, equation, x, samples, asked)
    else:
        found = of_states(of_draw, equation, x, asked)

    def of_draws(values: Tensor) -> Tensor:
        return values.reshape(-1, draws).mT

    stderr = of_draws(found.stderr)
    noisy = bool(auxiliary) or bool((stderr > 0).any() | stderr.isnan().any())
    if importance and noisy and draws > 1:
        raise ValueError("importance=True needs the exact trace, and an SDE without auxiliary components.")
    bits = bits_from(drawn, of_draws(found.value), stderr, not noisy if importance is None else importance)
    if not full:
        warn_if_noisy(found.stderr / math.sqrt(draws), asked.warn_above)
        return bits.value

    def mean(part: Tensor) -> Tensor:
        return of_draws(part).mean(0) / nats

    return LogProb(
        bits.value, bits.stderr, mean(found.solver_error), mean(found.truncation), mean(found.prior_mismatch),
        found.nfe, mean(found.prior_error), "bits per dimension",
    )  # fmt: skip
