r"""Bounds on the likelihood of the reverse-time SDE: the ELBO of a sample, and the KL divergence to the data's law.

With Q = g gᵀ, q_t = p(x_t | x) and the prior π, of what ``reverse.sample`` draws in the limit of small steps:

    -E_q log p_cutoff(x_cutoff)  <=  E_q[-log π(x_T)] + ½ ∫ E_q ‖s(x_t, t) - ∇ log q_t‖²_Q dt + H(q_cutoff) - H(q_T),
    KL(data at cutoff ‖ model)   <=  ½ ∫ E ‖∇ log p_t - s‖²_Q dt + KL(p_T ‖ π)

(arXiv:2101.09258, theorems 3 and 1). For the data itself a Gaussian decoder x | x_cutoff is added. The page
:doc:`theory_bounds` says of which law these are, derives them, and has the density of the times and what is subtracted
from each draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from sdeflow.errors import DataError
from sdeflow.kernels.gaussian import Kernel, Path
from sdeflow.likelihood.result import shown
from sdeflow.numerics.checks import checked_choice, checked_count, checked_flag, checked_real
from sdeflow.numerics.linear import Blocks, Diagonal, Linear
from sdeflow.numerics.noise import NoiseStream, resolve_seed
from sdeflow.numerics.traces import heavy_tails, total_variance, widening
from sdeflow.scores import ScoreFunction, as_score, evaluating
from sdeflow.solving.model import Model
from sdeflow.solving.prior_of import Prior

__all__ = ["BoundOptions", "Elbo", "ElboOptions", "KLBound", "elbo", "kl_bound"]

_NODES = 1025  # of the map from uniform numbers to times
_ROWS = 1024  # states in one call of the score, unless the batch itself is larger
_LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True, repr=False)
class Elbo:
    """A lower bound on the log-likelihood of each sample, (batch,) in nats, and its parts.

    value = -(prior + diffusion + entropy + reconstruction).

    Attributes:
        value: an unbiased estimate of a lower bound on log p^θ(x), the model being the reverse-time SDE.
        stderr: its standard error over the draws, an estimate whose square is unbiased.
        prior: E_q[-log π(x_T)].
        diffusion: ½ ∫ E_q ‖s - ∇ log q_t‖²_Q dt; elementwise ∫ E‖eps - eps̃‖² dλ.
        entropy: log|sigma_cutoff| - log|sigma_T|, one number.
        reconstruction: E_q[-log r(x | x_cutoff)] - H(q_cutoff); 0 for the bound at the cutoff.
        nfe: evaluations of the score for each sample.
        error: the error bar: ``stderr`` widened by its degrees of freedom, which a few strata may determine, and by
            3.3 for 4 draws to 1.25 for 64 for their heavy tails, so that two of it cover about 95 %.
    """

    value: Tensor
    stderr: Tensor
    prior: Tensor
    diffusion: Tensor
    entropy: float
    reconstruction: Tensor
    nfe: int
    error: Tensor

    def __repr__(self) -> str:
        """The first values of each part; ``value.tolist()`` has all."""
        names = ("value", "error", "stderr", "prior", "diffusion", "reconstruction")
        rows = [f"    {name:<14} {shown(getattr(self, name))}" for name in names]
        first = f"Elbo(shape={tuple(self.value.shape)}, entropy={self.entropy:.5g}, nfe={self.nfe},"
        return "\n".join([first, *rows]) + ")"


@dataclass(frozen=True)
class KLBound:
    """An upper bound on KL(p_cutoff ‖ p^θ_cutoff), or on the cross-entropy E[-log p^θ_cutoff], in nats.

    Attributes:
        value: an unbiased estimate of the bound, a number.
        stderr: its standard error over the data, seen as independent draws of p_0; NaN for one sample.
        score: the part of the score's error.
        prior: that of the prior: KL(p_T ‖ π), or what is left of the cross-entropy.
        kind: "kl" or "cross_entropy".
        nfe: evaluations of the model's score for each sample.
        error: the error bar: ``stderr`` widened by its degrees of freedom and for heavy tails, as in :class:`Elbo`.
    """

    value: float
    stderr: float
    score: float
    prior: float
    kind: str
    nfe: int
    error: float


class BoundOptions(TypedDict, total=False):
    """Options of :func:`kl_bound`, with their meaning there."""

    draws: int
    times: str
    seed: int | torch.Generator | None
    progress: bool | None


class ElboOptions(BoundOptions, total=False):
    """Options of :func:`elbo`, with their meaning there."""

    at: str


def elbo(
    model: Model,
    x: Tensor,
    *,
    at: str = "data",
    draws: int = 64,
    times: str = "log_snr",
    seed: int | torch.Generator | None = None,
    progress: bool | None = None,
) -> Elbo:
    r"""A lower bound on log p^θ(x) under the reverse-time SDE (not under the flow), with its parts.

        -log p^θ(x) <= E[-log π(x_T)] + ∫ E‖eps - eps̃‖² dλ + d log(sigma_cutoff / sigma_T) + reconstruction

    and the matrix form of :mod:`sdeflow.likelihood.bounds` for a coupled SDE, where the bound is on the data component
    alone. arXiv:2101.09258, arXiv:2107.00630. Sample i does not depend on the rest of its batch.

    Args:
        model: the SDE with its score and prior, as ``sde.reverse(score).model``.
        x: data (batch, *event); states (batch, k, *event) of a coupled SDE all of whose components are data.
        at: "data" bounds log p^θ_0(x), the decoder included. "cutoff" bounds E[log p^θ_cutoff(x_cutoff)] over
            x_cutoff ~ p(x_cutoff | x), joint for a coupled state: an equality for exact scores.
        draws: of (t, eps) for each sample, even: two in each of draws / 2 strata of time. A quarter as many,
            and at least two, are drawn at the cutoff, and ``draws`` (without the score) at T.
        times: "log_snr" draws t by importance, ∝ tr(P⁻¹ Q); "t" half of the draws so, and half uniformly. The
            bound is the same.
        seed: of the draws.
        progress: a progress bar; None shows it on a terminal only.

    Returns:
        An :class:`Elbo`, in nats, (batch,) in float64.

    Raises:
        DataError: for data that are not a finite floating tensor (batch, *event).
        NotAffineError: for an SDE without a Gaussian kernel.
        ValueError: for options that make no sense.
    """
    checked_choice(at, "at", ("data", "cutoff"))
    clock, draws, seed = _Times(_kernel(model, "The likelihood bound"), times), _even(draws), resolve_seed(seed)
    x = model.states(x)
    if not len(x):
        empty = torch.zeros(0, dtype=torch.float64, device=x.device)
        return Elbo(empty, empty, empty, empty, 0.0, empty, 0, empty)
    model = model.of_batch(len(x))
    with torch.inference_mode(False), torch.no_grad(), evaluating(model.score):
        sample = _Sample(model, x)
        first, last = sample.end(model.cutoff), sample.end(model.T)
        excess = torch.cat([sample.excess(draw) for draw in sample.draws(clock, draws, seed, progress)])
        gain = sample.cost_of_prior(last, draws, seed)
        entropy = float((first.path.sigma.log_det(sample.event) - last.path.sigma.log_det(sample.event)).sum())
        # Of the reference alone, prior + diffusion + entropy is its cross-entropy at the cutoff, exactly.
        of_reference = sample.cross_entropy(last)
        prior = of_reference + gain.mean(0)
        diffusion = sample.cross_entropy(first) - of_reference - entropy + excess.mean(0)
        parts = [*((part, 1) for part in _of_strata(excess)), (gain.var(0) / len(gain), len(gain) - 1)]
        reconstruction, nfe = torch.zeros_like(prior), draws
        if at == "data":
            nfe += max(2, draws // 4)
            reconstruction, of_decoder = sample.reconstruction(first, nfe - draws, seed)
            parts.append((of_decoder, nfe - draws - 1))
    variance, dof = total_variance(parts)
    value = -(prior + diffusion + entropy + reconstruction)
    stderr = variance.sqrt()
    error = heavy_tails(draws) * widening(dof) * stderr
    return Elbo(value, stderr, prior, diffusion, entropy, reconstruction, nfe, error)


def kl_bound(
    model: Model,
    data: Tensor,
    score_of_data: ScoreFunction | Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    draws: int = 8,
    times: str = "log_snr",
    seed: int | torch.Generator | None = None,
    progress: bool | None = None,
) -> KLBound:
    r"""A bound on how far the reverse-time SDE's samples are from the data, by the error of its score.

        KL(p_cutoff ‖ p^θ_cutoff) <= ½ ∫ E ‖∇ log p_t - s‖²_Q dt + KL(p_T ‖ π)

    and for uniform t the integral is (T - cutoff)/2 E_t E ‖∇ log p_t - s‖²_Q, Q = g². arXiv:2101.09258, theorem 1.
    Without ``score_of_data``, ∇ log p(x_t | x_0) takes the place of ∇ log p_t (Vincent 2011), and what is bounded is
    the cross-entropy E[-log p^θ_cutoff] = KL + H(p_cutoff): the mean of -``elbo(at="cutoff")``. The data's entropy is
    not known, so neither is the divergence then. Of a coupled state the divergence is joint, and so bounds that of
    its data component.

    Args:
        model: the SDE with its score and prior, as ``sde.reverse(score).model``.
        data: draws (n, *event) of p_0.
        score_of_data: the exact ∇ log p_t, such as :class:`sdeflow.scores.GaussianMixture`. Without a method
            ``log_prob(x, t)``, KL(p_T ‖ π) is replaced by its bound E KL(p(x_T | x_0) ‖ π).
        draws: of (t, eps) for each sample, even.
        times: as of :func:`elbo`.
        seed: of the draws.
        progress: a progress bar; None shows it on a terminal only.

    Raises:
        DataError, NotAffineError, ValueError: as :func:`elbo`; a ValueError also for a score of another SDE.
    """
    kernel = _kernel(model, "The bound of the divergence")
    clock, draws, seed = _Times(kernel, times), _even(draws), resolve_seed(seed)
    data = model.states(data, "data")
    if not len(data):
        raise DataError("the data set is empty.")
    if score_of_data is None:
        bound = elbo(model, data, at="cutoff", draws=draws, times=times, seed=seed, progress=progress)
        score, prior = float(bound.diffusion.mean()), float(bound.prior.mean()) + bound.entropy
        stderr, error = _stderr_of_mean(bound.value), _bar_of_mean(bound.value)
        return KLBound(score + prior, stderr, score, prior, "cross_entropy", draws, error)
    model, truth = model.of_batch(len(data)), as_score(score_of_data, model.score).of_batch(len(data))
    with torch.inference_mode(False), torch.no_grad(), evaluating(model.score), evaluating(truth):
        sample = _Sample(model, data)
        other = model.with_score(truth)
        parts = []
        for draw in sample.draws(clock, draws, seed, progress):
            difference = draw.noise_of(model) - draw.noise_of(other)
            parts.append(draw.product(difference, difference))
        of_score, of_prior = torch.cat(parts).mean(0), sample.divergence_of_prior(truth, draws, seed)
    each, score, prior = of_score + of_prior, float(of_score.mean()), float(of_prior.mean())
    return KLBound(score + prior, _stderr_of_mean(each), score, prior, "kl", draws, _bar_of_mean(each))


def _kernel(model: Model, purpose: str) -> Kernel:
    return model.kernel.require_gaussian(purpose)


def _even(draws: int) -> int:
    wanted = "an even integer of at least 2 (two for each stratum of time)"
    return checked_count(checked_real(draws, "draws", wanted, lambda n: n >= 2 and n % 2 == 0), "draws", 2)


def _stderr_of_mean(values: Tensor) -> float:
    if len(values) < 2:
        return math.nan
    return float(values.std() / math.sqrt(len(values)))


def _bar_of_mean(values: Tensor) -> float:
    return heavy_tails(len(values)) * _stderr_of_mean(values) * float(widening(values.new_tensor(len(values) - 1.0)))


def _of_strata(values: Tensor) -> Tensor:
    """What each stratum of two independent draws adds to the variance of the mean of (draws, batch): unbiased."""
    return (values[0::2] - values[1::2]).square() / len(values) ** 2


def _stratified_variance(values: Tensor) -> Tensor:
    """The variance of the mean of (draws, batch), (batch,)."""
    return _of_strata(values).sum(0)


# -------------------------------------------------------------------- times


class _Times:
    """t(u) and dt/du for u in [0, 1]. Unbiased whatever the table's accuracy.

    Under "log_snr" uniform u draws t by importance, ½ tr(P⁻¹ Q), the rate of log|sigma| - log|alpha|; elementwise that
    is -λ, averaged over the event. Under "t" half of the draws are uniform in t and the other half are these, as one
    density: where the noise runs over many scales, as EDM's does, uniform times alone miss nearly all of the integral,
    and their spread does not tell.
    """

    def __init__(self, kernel: Kernel, times: str) -> None:
        checked_choice(times, "times", ("log_snr", "t"))
        self.cutoff, self.T = kernel.cutoff, kernel.T
        from scipy.interpolate import PchipInterpolator  # half a second to import

        with torch.no_grad():
            ends = kernel.half_log_snr(torch.tensor([kernel.cutoff, kernel.T], dtype=torch.float64))
            level = torch.linspace(float(ends[0]), float(ends[1]), _NODES, dtype=torch.float64)
            t = kernel.time_of(level)
            t[0], t[-1] = kernel.cutoff, kernel.T
            rising = -level
            if kernel.coupled:
                alpha, sigma, _ = kernel.coefficients(t)
                exact = torch.linalg.slogdet(sigma)[1] - torch.linalg.slogdet(alpha)[1]
                if bool(torch.isfinite(exact).all() & (exact.diff() > 0).all()):  # |alpha| of a stiff SDE underflows
                    rising = exact
            u = (rising - rising[0]) / (rising[-1] - rising[0])
            if times == "t":
                u = 0.5 * (u + (t - t[0]) / (t[-1] - t[0]))
        # Where g = 0 the level stands still: such times have no importance, and one of each level is enough.
        keep = torch.cat([torch.tensor([True]), u[1:] > u[:-1].cummax(0).values])
        self._curve = PchipInterpolator(u[keep].numpy(), t[keep].numpy())
        self._slope = self._curve.derivative()

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t and dt/du, shaped as u, float64."""
        at = u.cpu().numpy()
        t, rate = (torch.as_tensor(curve(at), device=u.device) for curve in (self._curve, self._slope))
        return t.clamp(self.cutoff, self.T), rate

    def drawn(self, batch: int, draws: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """t and dt/du, (draws, batch): two of each stratum of u, one after the other.

        Each has a uniform number of its own rather than one for all (as in arXiv:2107.00630), which
        makes the standard error unbiased and, for an integrand that is not periodic, the spread of t smaller.
        """
        u = NoiseStream(seed, "bound times").uniform((batch, draws), torch.float64, device)
        strata = torch.arange(draws, device=device) // 2
        return self(((strata + u) / (draws // 2)).mT)


# -------------------------------------------------------------------- draws of one batch


class _End(NamedTuple):
    """The kernel at one time, with the maps of the Gaussian reference."""

    time: float
    path: Path
    reference: _Reference


class _Reference(NamedTuple):
    """N(alpha m + offset, S Sᵀ), S Sᵀ = alpha c² alphaᵀ + sigma sigmaᵀ: the law at t of Gaussian data."""

    root: Linear  # S
    signal: Linear  # S⁻¹ alpha
    noise: Linear  # S⁻¹ sigma

    def whitened(self, deviation: Tensor, eps: Tensor) -> Tensor:
        """S⁻¹ (x_t - alpha m - offset)."""
        return self.signal(deviation) + self.noise(eps)

    def expected_noise(self, deviation: Tensor, eps: Tensor) -> Tensor:
        """E[eps | x_t]."""
        return self.noise.T(self.whitened(deviation, eps))


@dataclass(frozen=True)
class _Draw:
    """States x_t = alpha x_0 + offset + sigma eps, ``times`` draws of a batch one after the other in their rows."""

    times: int
    path: Path
    t: Tensor
    x_t: Tensor
    deviation: Tensor
    eps: Tensor
    metric: Linear  # M = sigma⁻¹ Q sigma⁻ᵀ
    rate: Tensor  # dt/du

    @property
    def rows(self) -> Tensor:
        """Which sample each row is a draw of."""
        return torch.arange(len(self.x_t) // self.times).repeat(self.times)

    def noise_of(self, model: Model) -> Tensor:
        """-sigmaᵀ s in the kernel's basis, float64."""
        score = model.score if self.times == 1 else model.rows(self.rows).score
        return model.kernel.to_basis(score.noise(self.x_t, self.t).double())

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """½ aᵀ M b dt/du, (times, batch)."""
        return (0.5 * self.rate * (a * self.metric(b)).flatten(1).sum(1)).reshape(self.times, -1)


class _Sample:
    """A batch of data under the kernel, and all that is drawn from it.

    Args:
        model: the SDE with its score and prior.
        x: data (batch, *event).
    """

    def __init__(self, model: Model, x: Tensor) -> None:
        model.require_dtype(x)
        self.model, self.kernel, self.dtype = model, _kernel(model, "The likelihood bound"), x.dtype
        self.x_0 = self.kernel.lift(x.detach().double(), noisy=False)
        self.event = tuple(self.x_0.shape[1:])
        self.kernel.require_event(self.event)
        moments = model.score.data_moments() or (torch.tensor(0.0), torch.tensor(1.0))
        level = self.kernel.data_level(moments[0].double(), self.x_0)
        self.coefficients = self.kernel.to_basis(self.x_0)
        self.deviation = self.coefficients if level is None else self.coefficients - level
        self.scale = self.kernel.scale(moments[1], self.x_0)

    def reference(self, path: Path) -> _Reference:
        """The Gaussian reference, of the score's mean and scale, at the times of ``path``."""
        root = path.sigma @ (path.sigma.inverse @ path.alpha @ self.scale).root_of_one_plus_gram
        return _Reference(root, root.inverse @ path.alpha, root.inverse @ path.sigma)

    def end(self, time: float) -> _End:
        """The kernel and the reference at one time."""
        path = self.kernel.path(self.x_0, torch.tensor(time, dtype=torch.float64))
        return _End(time, path, self.reference(path))

    def draws(self, clock: _Times, draws: int, seed: int, progress: bool | None) -> Iterator[_Draw]:
        """``draws`` draws of (t, eps) for each sample, as many at once as make a large batch."""
        batch = len(self.x_0)
        t, rate = clock.drawn(batch, draws, seed, self.x_0.device)
        stream = NoiseStream(seed, "bound")
        fold = max(1, _ROWS // batch)
        shown = checked_flag(progress, "progress", optional=True)
        with tqdm(total=draws, desc="bound", disable=None if shown is None else not shown, leave=False) as bar:
            for first in range(0, draws, fold):
                times = min(fold, draws - first)
                yield self._draw(t[first : first + times], rate[first : first + times], stream)
                bar.update(times)

    def _draw(self, t: Tensor, rate: Tensor, stream: NoiseStream) -> _Draw:
        times, t = len(t), t.flatten()
        eps = torch.cat([self._normal(stream) for _ in range(times)])
        path = self.kernel.path(eps, t)
        _, _, q = self.kernel.equation(eps, t)
        metric = path.sigma.inverse @ q @ path.sigma.T.inverse
        x_t, deviation = self._noisy(path, eps, times), self._repeated(self.deviation, times)
        return _Draw(times, path, t, x_t, deviation, eps, metric, rate.flatten())

    def excess(self, draw: _Draw) -> Tensor:
        """½ (‖eps - eps̃‖²_M - ‖eps - eps̃_ref‖²_M) dt/du, (times, batch)."""
        ours = draw.noise_of(self.model)
        theirs = self.reference(draw.path).expected_noise(draw.deviation, draw.eps)
        return draw.product(ours - theirs, ours + theirs - 2.0 * draw.eps)

    def cross_entropy(self, end: _End) -> Tensor:
        """E_q[-log of the reference's density], (batch,), in closed form."""
        _, _, (root, signal, noise) = end
        constant = 0.5 * noise.gram.trace(self.event) + root.log_det(self.event)
        d = math.prod(self.event)
        return 0.5 * signal(self.deviation).square().flatten(1).sum(1) + constant + 0.5 * d * _LOG_2PI

    def cost_of_prior(self, last: _End, draws: int, seed: int) -> Tensor:
        """log of the reference's density minus log π at x_T, (draws, batch): 0 where they are one."""
        prior, stream = self._prior(), NoiseStream(seed, "bound prior")
        d = math.prod(self.event)
        constant = last.reference.root.log_det(self.event) + 0.5 * d * _LOG_2PI
        costs = []
        for _ in range(draws):
            eps = self._normal(stream)
            whitened = last.reference.whitened(self.deviation, eps)
            of_reference = -0.5 * whitened.square().flatten(1).sum(1) - constant
            costs.append(of_reference - prior.log_prob(self._noisy(last.path, eps, 1, torch.float64)))
        return torch.stack(costs)

    def divergence_of_prior(self, truth: ScoreFunction, draws: int, seed: int) -> Tensor:
        """Of each sample an estimate whose mean is KL(p_T ‖ π), or E KL(p(x_T | x_0) ‖ π) above it, (batch,)."""
        last, prior, stream = self.end(self.kernel.T), self._prior(), NoiseStream(seed, "bound prior")
        log_det, d = last.path.sigma.log_det(self.event), math.prod(self.event)
        log_prob: Callable[[Tensor, float], Tensor] | None = getattr(truth, "log_prob", None)
        costs = []
        for _ in range(draws):
            eps = self._normal(stream)
            x_T = self._noisy(last.path, eps, 1, torch.float64)
            if log_prob is not None:
                of_data = log_prob(x_T, self.kernel.T)
            else:
                of_data = -0.5 * eps.square().flatten(1).sum(1) - log_det - 0.5 * d * _LOG_2PI
            costs.append(of_data - prior.log_prob(x_T))
        return torch.stack(costs).mean(0)

    def reconstruction(self, first: _End, draws: int, seed: int) -> tuple[Tensor, Tensor]:
        """E_q[-log r(x | x_cutoff)] - H(q_cutoff), (batch,), and the variance of its estimate.

        r has the precision J = R Rᵀ, and Rᵀ (x - E[x_0 | x_cutoff]) = -W (eps - eps̃), elementwise with W = 1.
        """
        _, path, (_, signal, noise) = first
        W, half_log_det, d = self._decoder(path)
        stream, clean = NoiseStream(seed, "bound decoder"), noise.T.gram
        left = clean.one - clean  # eps - eps̃_ref = left eps - noiseᵀ signal deviation
        of_reference = 0.5 * (W @ left).gram.trace(self.event)
        of_reference = of_reference + 0.5 * W(noise.T(signal(self.deviation))).square().flatten(1).sum(1)
        parts = []
        for _ in range(draws):
            eps = self._normal(stream)
            x_t = self._noisy(path, eps, 1)
            ours = self.kernel.to_basis(self.model.score.noise(x_t, first.time).double())
            theirs = first.reference.expected_noise(self.deviation, eps)
            parts.append(0.5 * (W(ours - theirs) * W(ours + theirs - 2.0 * eps)).flatten(1).sum(1))
        excess = torch.stack(parts)
        entropy = path.sigma.log_det(self.event) + 0.5 * math.prod(self.event) * (1.0 + _LOG_2PI)
        value = of_reference + excess.mean(0) + 0.5 * d * _LOG_2PI - half_log_det - entropy
        return value, excess.var(0) / draws

    def _decoder(self, path: Path) -> tuple[Linear, Tensor, int]:
        """W = Rᵀ alpha⁻¹ sigma for R Rᵀ = J, ½ log|J| over the event, and the dimension of the data."""
        precision = path.sigma.inverse @ path.alpha
        if not self.kernel.coupled:
            return Diagonal(torch.ones_like(precision.values)), precision.log_det(self.event), math.prod(self.event)
        data = torch.tensor(self.kernel.numbers.data, device=self.x_0.device)
        R = torch.linalg.cholesky(precision.T.gram.values[data[:, None], data])
        W = torch.zeros_like(precision.values)  # no rows for auxiliary components, which nobody decodes
        W[data] = R.mT @ (path.alpha.inverse @ path.sigma).values[data]
        sites = math.prod(self.event[1:])
        return Blocks(W), sites * R.diagonal().log().sum(), sites * len(data)

    def _prior(self) -> Prior:
        return self.model.prior_for(self.x_0.to(self.dtype))

    def _normal(self, stream: NoiseStream) -> Tensor:
        return stream.normal(tuple(self.x_0.shape), torch.float64, self.x_0.device)

    def _noisy(self, path: Path, eps: Tensor, times: int, dtype: torch.dtype | None = None) -> Tensor:
        """x_t of noise ``eps``, in the data's dtype by default."""
        u = path.alpha(self._repeated(self.coefficients, times)) + path.offset + path.sigma(eps)
        return self.kernel.from_basis(u).to(dtype or self.dtype)

    @staticmethod
    def _repeated(x: Tensor, times: int) -> Tensor:
        return x if times == 1 else x.repeat(times, *(1,) * (x.ndim - 1))
