"""The solvers of other libraries, and ours, behind three small interfaces for ``benchmarks/solvers.py``.

    Free        a whole solve with a network that costs next to nothing, for what it costs outside of it
    Flow        x at the cutoff from x_T along the probability flow, in so many calls or to a tolerance
    Stochastic  samples of p(x) at the cutoff from the reverse SDE, in so many calls

Every peer is called as its documentation does, given the best that it takes: exact coefficients typed in, times in
float64 where they are ours to choose, noise levels that end at the cutoff. diffusers and azula are given the noise
levels of each SDE in their own variance-preserving or (alpha, sigma) form, k-diffusion x/alpha. What is not installed
raises ImportError, and what does not work raises what it raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import overhead
import torch
from problems import BETA_MAX, BETA_MIN, Problem
from torch import Tensor

import sdeflow

ENTRY_STEPS = 50


@dataclass(frozen=True)
class Free:
    """A solve with a free network.

    Attributes:
        name: in the table.
        prepare: shape -> a function that solves once and returns the number of calls of the network.
        ours: whether it is sdeflow's.
    """

    name: str
    prepare: Callable[[tuple[int, ...]], Callable[[], int]]
    ours: bool = False


@dataclass(frozen=True)
class Flow:
    """A solver of the probability flow.

    Attributes:
        name: in the table.
        solve: (problem, setting) -> x at the cutoff; the setting is a number of calls, or a tolerance.
        adaptive: whether it is a tolerance.
        calls_per_step: the numbers of calls possible are its multiples.
        ours: whether it is sdeflow's.
    """

    name: str
    solve: Callable[[Problem, float], Tensor]
    adaptive: bool = False
    calls_per_step: int = 1
    ours: bool = False


@dataclass(frozen=True)
class Stochastic:
    """A sampler of the reverse SDE.

    Attributes:
        name: in the table.
        sample: (problem, calls, batch, seed) -> samples at the cutoff.
        calls_per_step: the numbers of calls possible are its multiples.
        ours: whether it is sdeflow's.
    """

    name: str
    sample: Callable[[Problem, int, int, int], Tensor]
    calls_per_step: int = 1
    ours: bool = False


# ---------------------------------------------------------------- k-diffusion


@cache
def k_diffusion() -> ModuleType:
    """``k_diffusion.sampling`` alone.

    The package's ``__init__`` imports what its training and metrics need: clip, clean-fid, scikit-image, jsonmerge and
    dctorch, which does not install beside NumPy 2; and its ``utils`` imports torchvision for two conversions of images.
    The samplers need none of them: empty modules stand in while they are imported.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        raise ImportError("k-diffusion is not installed")
    images = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    stand_ins = {name: ModuleType(name) for name in images if name not in sys.modules}
    stand_ins["k_diffusion"] = importlib.util.module_from_spec(spec)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _karras(problem: Problem, calls: int) -> Tensor:
    """calls + 1 noise levels from T to the cutoff, rho = 7, without the zero that the library appends."""
    first, last = problem.levels
    return k_diffusion().get_sigmas_karras(calls + 1, last, first)[:-1]


def _dpmpp_2m(problem: Problem, calls: float) -> Tensor:
    sigmas = _karras(problem, int(calls))
    z = k_diffusion().sample_dpmpp_2m(problem.denoise, problem.to_z(problem.x_T), sigmas, disable=True)
    return problem.from_z(z)


def _dpmpp_2m_sde(problem: Problem, calls: int, batch: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    z = problem.to_z(_prior(problem, batch, seed))
    sampler = k_diffusion().sample_dpmpp_2m_sde
    noise = lambda sigma, sigma_next: torch.randn_like(z)  # noqa: E731  the law of its Brownian tree, at no cost
    return problem.from_z(sampler(problem.denoise, z, _karras(problem, calls), disable=True, noise_sampler=noise))


def _free_dpmpp_2m(shape: tuple[int, ...]) -> Callable[[], int]:
    sampling, x = k_diffusion(), torch.randn(shape)

    def solve() -> int:
        sigmas = sampling.get_sigmas_karras(ENTRY_STEPS, 0.002, 80.0)
        sampling.sample_dpmpp_2m(half, x * sigmas[0], sigmas, disable=True)
        return ENTRY_STEPS

    return solve


# ---------------------------------------------------------------- diffusers


def _unipc(
    problem: Problem, calls: float, order: int, levels: Callable[[Problem, int], Tensor] | None = None
) -> Tensor:
    """UniPC in variance-preserving coordinates x / sqrt(alpha² + sigma²), by default uniform in log-SNR.

    The scheduler knows only the 1,000 levels of its training and ends at sigma = 0, so its levels are put in place;
    with an end above zero there is no reason to lower the order there.
    """
    from diffusers import UniPCMultistepScheduler

    calls = int(calls)
    sigmas = (levels or _uniform)(problem, calls)
    scheduler = UniPCMultistepScheduler(solver_order=order, prediction_type="sample", lower_order_final=False)
    scheduler.set_timesteps(calls)
    scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps = sigmas, torch.arange(calls), calls
    scheduler.set_begin_index(0)
    scale = torch.sqrt(1.0 + sigmas**2).tolist()
    x = problem.to_z(problem.x_T) / scale[0]
    for k in range(calls):
        denoised = problem.denoise(x * scale[k], sigmas[k])
        x = scheduler.step(denoised, scheduler.timesteps[k], x, return_dict=False)[0]
    return problem.from_z(x * scale[-1])


def _uniform(problem: Problem, calls: int) -> Tensor:
    """calls + 1 values of sigma/alpha from T to the cutoff, uniform in log-SNR."""
    first, last = problem.levels
    return torch.logspace(math.log10(first), math.log10(last), calls + 1, dtype=torch.float64)


def _our_pilot(problem: Problem, calls: int) -> Tensor:
    """The levels of our pilot grid: those at which a solve of ours asks the score."""
    solve = partial(_decode, problem, calls, solver=partial(_reference, 3), grid="pilot")
    solve()  # the pilot run, if it is the first
    problem.score.start()
    solve()
    times = torch.tensor([*problem.score.times, problem.span[1]], dtype=torch.float64)
    problem.score.start()
    return torch.exp(-problem.sde.kernel.half_log_snr(times))


def _free_diffusers(shape: tuple[int, ...], scheduler: str, **options: object) -> Callable[[], int]:
    """The loop of its pipelines."""
    diffusers, x_T = importlib.import_module("diffusers"), torch.randn(shape)

    def solve() -> int:
        solver = getattr(diffusers, scheduler)(prediction_type="sample", **options)
        solver.set_timesteps(ENTRY_STEPS)
        x = x_T * solver.init_noise_sigma
        for t in solver.timesteps:
            x = solver.step(half(solver.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        return ENTRY_STEPS

    return solve


# ---------------------------------------------------------------- azula


def _azula_denoiser(denoise: Callable[[Tensor, Tensor], Tensor], schedule: object) -> object:
    from azula.denoise import Denoiser, DiracPosterior

    class Given(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> DiracPosterior:
            return DiracPosterior(denoise(x_t, t))

    return Given()


def _azula(problem: Problem, calls: float, sampler: str, **options: object) -> Tensor:
    """Uniform in t, which is what it offers."""
    azula = importlib.import_module("azula.sample")
    first, last = problem.span
    denoiser = _azula_denoiser(problem.score.denoise, problem.by_hand.kernel)
    solver = getattr(azula, sampler)(
        denoiser, start=first, stop=last, steps=int(calls), silent=True, dtype=torch.float64, **options
    )
    return solver(problem.x_T).float()


def _free_azula(shape: tuple[int, ...], sampler: str, **options: object) -> Callable[[], int]:
    samplers, noise = importlib.import_module("azula.sample"), importlib.import_module("azula.noise")
    denoiser, x_T = _azula_denoiser(half, noise.VPSchedule()), torch.randn(shape)
    solver = getattr(samplers, sampler)(denoiser, steps=ENTRY_STEPS, silent=True, **options)

    def solve() -> int:
        solver(x_T)
        return ENTRY_STEPS

    return solve


# ---------------------------------------------------------------- torchdiffeq, torchode, SciPy


def _rk4(problem: Problem, calls: float) -> Tensor:
    import torchdiffeq

    steps, (first, last) = int(calls) // 4, problem.span
    times = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    options = {"grid_constructor": lambda field, y, t: times}
    return torchdiffeq.odeint(problem.flow, problem.x_T, times[[0, -1]], method="rk4", options=options)[-1]


def _dopri5(problem: Problem, tolerance: float, stop: bool = False) -> Tensor:
    """dopri5 in t; ``stop`` passes ``step_t``, so that the first step stays inside."""
    import torchdiffeq

    span = torch.tensor(problem.span, dtype=torch.float64)
    options = {"max_num_steps": 2000} | ({"step_t": span[1:]} if stop else {})
    return torchdiffeq.odeint(
        problem.flow, problem.x_T, span, method="dopri5", rtol=tolerance, atol=tolerance, options=options
    )[-1]


def _scipy_rk45(problem: Problem, tolerance: float) -> Tensor:
    """As score_sde_pytorch calls it: the state flattened, in float64 outside of the score."""
    from scipy.integrate import solve_ivp

    shape = problem.x_T.shape

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y.reshape(shape)).float()
        return problem.flow(torch.tensor(t), x).flatten().numpy()

    solution = solve_ivp(
        slope, problem.span, problem.x_T.flatten().numpy(), rtol=tolerance, atol=tolerance, method="RK45"
    )
    return torch.from_numpy(solution.y[:, -1]).reshape(shape).float()


def _free_torchdiffeq(shape: tuple[int, ...], method: str) -> Callable[[], int]:
    import torchdiffeq

    adaptive, per_step = method == "dopri5", {"euler": 1, "rk4": 4}.get(method, 0)
    times, x_T = torch.tensor([1.0, 1e-3]), torch.randn(shape)
    options = {} if adaptive else {"step_size": (1.0 - 1e-3) * per_step / 48}
    field = Counter(overhead.flow_by_hand)

    def solve() -> int:
        field.calls = 0
        torchdiffeq.odeint(field, x_T, times, method=method, rtol=1e-5, atol=1e-5, options=options)
        return field.calls

    return solve


def _free_torchode(shape: tuple[int, ...]) -> Callable[[], int]:
    torchode = importlib.import_module("torchode")
    batch, features = shape[0], math.prod(shape[1:])
    span = (torch.full((batch,), 1.0), torch.full((batch,), 1e-3))
    y_T = torch.randn(batch, features)

    @Counter
    def field(t: Tensor, y: Tensor) -> Tensor:
        beta = (BETA_MIN + (BETA_MAX - BETA_MIN) * t)[:, None]
        return -0.5 * beta * (y + overhead.free_score(y, t))

    def solve() -> int:
        field.calls = 0
        term = torchode.ODETerm(field)
        controller = torchode.IntegralController(1e-5, 1e-5, term=term)
        torchode.solve_ivp(term, y_T, None, t_span=span, method="tsit5", controller=controller)
        return field.calls

    return solve


def _free_scipy(shape: tuple[int, ...]) -> Callable[[], int]:
    from scipy.integrate import solve_ivp

    x_T = torch.randn(shape).flatten().numpy()

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y.reshape(shape)).float()
        return overhead.flow_by_hand(torch.tensor(t), x).flatten().numpy()

    def solve() -> int:
        return solve_ivp(slope, (1.0, 1e-3), x_T, rtol=1e-5, atol=1e-5, method="RK45").nfev

    return solve


# ---------------------------------------------------------------- torchsde, and Euler-Maruyama by hand


class _Reverse:
    """The reverse SDE in r = T - t, flattened, as torchsde takes it."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def f(self, r: Tensor, y: Tensor) -> Tensor:
        """-(f - g² s)."""
        t, hand = self._time(r), self.problem.by_hand
        return (-hand.drift(t) * y + hand.diffusion(t) * self.problem.score_by_hand(y, t)).to(y.dtype)

    def g(self, r: Tensor, y: Tensor) -> Tensor:
        """g, in every coordinate."""
        return self.problem.by_hand.diffusion(self._time(r)).sqrt().to(y.dtype).expand_as(y)

    def _time(self, r: Tensor) -> Tensor:
        first, last = self.problem.span
        return (first - r.double()).clamp(last, first)


def _torchsde(problem: Problem, calls: int, batch: int, seed: int, method: str, per_step: int) -> Tensor:
    import torchsde

    first, last = problem.span
    y = _prior(problem, batch, seed)
    times = torch.tensor([0.0, first - last], dtype=torch.float64)
    dt = (first - last) / (calls // per_step) * (1.0 + 1e-12)  # no sliver at the end
    levy = {"levy_area_approximation": "space-time"} if method == "srk" else {}
    noise = torchsde.BrownianInterval(0.0, first - last, size=tuple(y.shape), entropy=seed, dt=dt, **levy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchsde.sdeint(_Reverse(problem), y, times, bm=noise, dt=dt, method=method)[-1]


def _euler_maruyama(problem: Problem, calls: int, batch: int, seed: int) -> Tensor:
    """Uniform in t."""
    torch.manual_seed(seed)
    x, reverse = _prior(problem, batch, seed), _Reverse(problem)
    first, last = problem.span
    dt = (first - last) / calls
    for r in (torch.tensor(k * dt, dtype=torch.float64) for k in range(calls)):
        x = x + dt * reverse.f(r, x) + math.sqrt(dt) * reverse.g(r, x) * torch.randn_like(x)
    return x


def _prior(problem: Problem, batch: int, seed: int) -> Tensor:
    """Draws of p(x_T) itself, (batch, d) in float32."""
    kernel = problem.sde.kernel
    x_0 = problem.score.sample(batch, seed=seed + 100_000, dtype=torch.float64)
    return kernel.sample(x_0, torch.full((batch,), kernel.T, dtype=torch.float64), seed=seed + 200_000).float()


def _free_torchsde(shape: tuple[int, ...], path: bool) -> Callable[[], int]:
    import torchsde

    flat = (shape[0], math.prod(shape[1:]))
    times, dt, y_T = torch.tensor([0.0, 1.0 - 1e-3]), (1.0 - 1e-3) / ENTRY_STEPS, torch.randn(flat)

    def solve() -> int:
        noise = torchsde.BrownianPath(t0=0.0, w0=torch.zeros(flat)) if path else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torchsde.sdeint(overhead.ReverseVP(), y_T, times, bm=noise, dt=dt, method="euler")
        return ENTRY_STEPS

    return solve


# ---------------------------------------------------------------- by hand


def half(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is one multiplication."""
    return 0.5 * x


class Counter:
    """A function that counts its calls, at the price of one attribute."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.calls += 1
        return self.function(*arguments)


def _free_loop(shape: tuple[int, ...]) -> Callable[[], int]:
    """First-order steps of the flow in x/alpha: z moves to D by a fraction, one fused operation."""
    z_T, sigmas = torch.randn(shape), torch.logspace(2, -3, ENTRY_STEPS + 1).tolist()
    shares = [after / before for before, after in pairwise(sigmas)]
    times = torch.tensor(sigmas)[:, None].expand(-1, shape[0])

    def solve() -> int:
        z = z_T
        for k, share in enumerate(shares):
            z = torch.lerp(half(z, times[k]), z, share)
        return ENTRY_STEPS

    return solve


def _free_network(shape: tuple[int, ...]) -> Callable[[], int]:
    """The network alone."""
    x, t = torch.randn(shape), torch.rand(shape[0])

    def solve() -> int:
        for _ in range(ENTRY_STEPS):
            half(x, t)
        return ENTRY_STEPS

    return solve


# ---------------------------------------------------------------- sdeflow


def exponential(**options: Any) -> object:
    """``sdeflow.solvers.Exponential(...)``."""
    if not hasattr(sdeflow.solvers, "Exponential"):
        raise ImportError("sdeflow.solvers.Exponential is not there yet")
    return sdeflow.solvers.Exponential(**options)


def _reference(order: int, corrector: bool = True) -> object:
    return exponential(order=order, prediction="reference", corrector=corrector)


def _decode(problem: Problem, calls: float, solver: Callable[[], object] | None, grid: str | None) -> Tensor:
    flow = problem.sde.flow_ode(problem.score)
    made = None if solver is None else solver()
    return flow.decode(problem.x_T, solver=made, steps=int(calls), grid=grid, progress=False)


def _reverse(
    problem: Problem, calls: int, batch: int, seed: int, solver: Callable[[], object], grid: str | None
) -> Tensor:
    reverse = problem.sde.reverse(problem.score)
    shape = (batch, problem.x_T.shape[1])
    return reverse.sample(shape, solver=solver(), steps=calls, grid=grid, seed=seed, progress=False)


def _free_ours(
    shape: tuple[int, ...], solver: Callable[[], object], per_step: int = 1, grid: str = "log_snr", sde: bool = False
) -> Callable[[], int]:
    declared = sdeflow.catalog.VP(BETA_MIN, BETA_MAX)
    score = Counter(overhead.free_score)
    equation = (declared.reverse if sde else declared.flow_ode)(score, prior=sdeflow.Gaussian(0.0, 1.0))
    made, x_T, steps = solver(), torch.randn(shape), 48 // per_step

    def solve() -> int:
        score.calls = 0
        options = {"solver": made, "steps": steps, "grid": grid, "progress": False}
        if sde:
            equation.sample(shape, seed=0, **options)
        else:
            equation.decode(x_T, **options)
        return score.calls

    return solve


# ---------------------------------------------------------------- the lists

NETWORK = Free("the network alone", _free_network)

FREE = (
    Free("bare loop, one fused update", _free_loop),
    Free("k-diffusion dpmpp_2m", _free_dpmpp_2m),
    Free("diffusers Euler", partial(_free_diffusers, scheduler="EulerDiscreteScheduler")),
    Free("diffusers DPM++2M", partial(_free_diffusers, scheduler="DPMSolverMultistepScheduler")),
    Free("diffusers UniPC3", partial(_free_diffusers, scheduler="UniPCMultistepScheduler", solver_order=3)),
    Free("torchdiffeq euler", partial(_free_torchdiffeq, method="euler")),
    Free("torchdiffeq rk4", partial(_free_torchdiffeq, method="rk4")),
    Free("torchdiffeq dopri5", partial(_free_torchdiffeq, method="dopri5")),
    Free("torchode tsit5", _free_torchode),
    Free("azula DDIMSampler", partial(_free_azula, sampler="DDIMSampler")),
    Free("azula xEABSampler, order 3", partial(_free_azula, sampler="xEABSampler", order=3)),
    Free("SciPy RK45", _free_scipy),
    Free("torchsde euler", partial(_free_torchsde, path=False)),
    Free("torchsde euler, BrownianPath", partial(_free_torchsde, path=True)),
    Free("sdeflow order 1", partial(_free_ours, solver=partial(_reference, 1, corrector=False)), ours=True),
    Free("sdeflow order 2", partial(_free_ours, solver=partial(_reference, 2, corrector=False)), ours=True),
    Free("sdeflow order 2, corrector", partial(_free_ours, solver=partial(_reference, 2)), ours=True),
    Free("sdeflow order 3, corrector", partial(_free_ours, solver=partial(_reference, 3)), ours=True),
    Free(
        "sdeflow order 2, eta 1",
        partial(_free_ours, solver=partial(exponential, order=2, eta=1.0), sde=True),
        ours=True,
    ),
    Free(
        'sdeflow Torchdiffeq("euler"), in t',
        partial(_free_ours, solver=lambda: sdeflow.solvers.Torchdiffeq("euler"), grid="t"),
        ours=True,
    ),
)

FLOWS = (
    Flow("torchdiffeq rk4 in t", _rk4, calls_per_step=4),
    Flow("torchdiffeq dopri5 in t", _dopri5, adaptive=True),
    Flow("torchdiffeq dopri5 in t, step_t", partial(_dopri5, stop=True), adaptive=True),
    Flow("SciPy RK45", _scipy_rk45, adaptive=True),
    Flow("azula DDIM", partial(_azula, sampler="DDIMSampler")),
    Flow("azula vAB3", partial(_azula, sampler="vABSampler", order=3)),
    Flow("k-diffusion dpmpp_2m, Karras", _dpmpp_2m),
    Flow("diffusers UniPC2, uniform log-SNR", partial(_unipc, order=2)),
    Flow("diffusers UniPC3, uniform log-SNR", partial(_unipc, order=3)),
    Flow("diffusers UniPC3, our pilot grid", partial(_unipc, order=3, levels=_our_pilot)),
    Flow("sdeflow order 2, log-SNR", partial(_decode, solver=partial(_reference, 2), grid="log_snr"), ours=True),
    Flow("sdeflow order 3, log-SNR", partial(_decode, solver=partial(_reference, 3), grid="log_snr"), ours=True),
    Flow("sdeflow order 2, pilot", partial(_decode, solver=partial(_reference, 2), grid="pilot"), ours=True),
    Flow("sdeflow order 3, pilot", partial(_decode, solver=partial(_reference, 3), grid="pilot"), ours=True),
    Flow("sdeflow order 4, pilot", partial(_decode, solver=partial(_reference, 4), grid="pilot"), ours=True),
    Flow("sdeflow default", partial(_decode, solver=None, grid=None), ours=True),
    Flow("sdeflow default, pilot", partial(_decode, solver=None, grid="pilot"), ours=True),
)

_SDE_STEP = partial(exponential, order=2, eta=1.0)

STOCHASTIC = (
    Stochastic("Euler-Maruyama in t", _euler_maruyama),
    Stochastic("torchsde euler in t", partial(_torchsde, method="euler", per_step=1)),
    Stochastic("torchsde srk in t", partial(_torchsde, method="srk", per_step=10), calls_per_step=10),
    Stochastic("k-diffusion dpmpp_2m_sde, Karras", _dpmpp_2m_sde),
    Stochastic(
        'sdeflow Torchsde("euler"), angle',
        partial(_reverse, solver=lambda: sdeflow.solvers.Torchsde("euler"), grid="angle"),
        ours=True,
    ),
    Stochastic("sdeflow order 2, eta 1, log-SNR", partial(_reverse, solver=_SDE_STEP, grid="log_snr"), ours=True),
    Stochastic("sdeflow order 2, eta 1, pilot", partial(_reverse, solver=_SDE_STEP, grid="pilot"), ours=True),
)
