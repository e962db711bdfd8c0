r"""The gradient of log p by the adjoint equation, in memory that does not grow with the steps.

Along the flow du/dλ = G(u, λ), with p(λ) = ∂ log p / ∂u(λ) and the Hamiltonian H = pᵀ G + div G,

    dp/dλ = -∂H/∂u,      ∂ log p / ∂θ = ∫ ∂H/∂θ dλ,      p(T) = ∇ log π

(Pontryagin 1962; for flows arXiv:1806.07366). For an exact score p is the score itself. In the coordinates z = M⁻¹ u,
M the propagator of the Gaussian reference from T on, all that is linear drops out of G, which leaves

    G = -M⁻¹ ½ Q r / (dλ/dt).

From x_T on, state and adjoint are carried back to the cutoff together on the nodes of the forward solve, by Adams'
method of order 3 with its corrector, on a polynomial in the half-log-SNR. A node's graph is gone before the next one's.
Forward and backward solve the same equation with different errors: the gradient is that of log p up to the solver's
error, and not to the last digit that of the number computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdeflow.likelihood.nodes import Carried, Carrier, Integrand, quadrature_weights
from sdeflow.numerics.linear import multiplied
from sdeflow.scores import evaluating
from sdeflow.solvers.exponential.weights import derive
from sdeflow.solving.model import Model

__all__ = ["carried"]

_ORDER = 3


def carried(carrier: Carrier, model: Model, x: Tensor, rows: Tensor, round: int = 0) -> Carried:
    """As :class:`~sdeflow.likelihood.nodes.Carrier`, with a value whose gradient the adjoint equation gives."""
    with torch.no_grad():
        found = carrier(model, x.detach(), rows, round)
    parameters = [p for p in model.score.parameters() if p.requires_grad]
    value = _Adjoint.apply(_Solve(carrier, model, rows, round), found, x, *parameters)
    return found._replace(value=value)


@dataclass
class _Solve:
    """A solve, for its way back."""

    carrier: Carrier
    model: Model
    rows: Tensor
    round: int

    def back(self, x_T: Tensor, weight: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Σ_b weight_b ∂ log p_b by x, (batch, *event), and by each parameter."""
        model, carrier = self.model, self.carrier
        u = model.to_solver(x_T, model.T)
        times = carrier.solver.grid(carrier.problem(model, u), carrier.steps)
        field = _Hamiltonian(self, times, u, weight, parameters)
        lam, last = field.lam, len(times) - 1
        z, p = field.at_end(u)
        base = z, p
        past: deque[State] = deque(maxlen=_ORDER + 1)
        for n in range(last, -1, -1):
            past.appendleft(field.rates(n, z, p))
            if n < last:
                z, p = base = _moved(base, past, lam[n : n + len(past)], lam[n + 1], lam[n])
            if n:
                z, p = _moved(base, past, lam[n : n + min(len(past), _ORDER)], lam[n], lam[n - 1])
        return model.kernel.from_basis(field.M[0].inverse.T(p)), field.gradients


class _Hamiltonian:
    """dz/dλ and dp/dλ at each node, and ∫ ∂H/∂θ dλ as it gathers; p and H are weighted for each sample."""

    def __init__(
        self, solve: _Solve, times: np.ndarray, u: Tensor, weight: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        model, kernel = solve.model, solve.model.kernel.require_gaussian("the adjoint equation of log p")
        self.solve, self.weight, self.parameters = solve, weight, parameters
        self.integrand = Integrand(model, times, u, solve.carrier.dtype)
        self.rest = self.integrand.rest()
        self.lam = kernel.bounded_log_snr(self.integrand.times).numpy()
        self.rate = self.integrand.rate.tolist()
        self.shares = quadrature_weights(self.lam).tolist()
        self.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        scale = torch.as_tensor(model.reference_scale(), dtype=torch.float64)
        back = times[::-1].copy()
        state = derive(kernel, back[:-1], back[1:], "reference", scale, orders=1).state
        maps = [kernel.maps.identity(u).to(u.device)]
        for values in kernel.maps.shaped(state.to(u.device), u).values:
            maps.append(kernel.maps(values) @ maps[-1])
        self.M = maps[::-1]
        self.mean = self.integrand.mean()

    def at_end(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z and p at T, where M = 1."""
        model, dtype = self.solve.model, self.solve.carrier.dtype
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            log_p = model.prior_for(u.detach().to(dtype)).log_prob(model.from_solver(u, model.T))
            (p,) = torch.autograd.grad((log_p * self.weight).sum(), u)
        return (u if self.mean is None else u - self.mean[-1]).detach(), p

    def rates(self, n: int, z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """dz/dλ and dp/dλ at node n."""
        M, integrand, solve = self.M[n], self.integrand, self.solve
        integral = solve.carrier.integral(integrand.weight, z, solve.rows, solve.round, create_graph=True)
        integral.revisit(n)
        with torch.enable_grad():
            u = (M(z) if self.mean is None else M(z) + self.mean[n]).detach().requires_grad_(True)
            pushed = multiplied(integrand.push[n], integrand.output(n, u))
            divergence = integral.add(pushed, u)
            G = M.inverse(pushed + self.rest(n, u)) / -self.rate[n]
            H = (p * G).sum() - (self.weight * divergence).sum() / self.rate[n]
            by_u, *by_parameters = torch.autograd.grad(H, (u, *self.parameters), allow_unused=True)
        for total, gradient in zip(self.gradients, by_parameters, strict=True):
            if gradient is not None:
                total.add_(gradient, alpha=self.shares[n])
        return G.detach(), -M.T(by_u)


class _Context(Protocol):
    """What PyTorch keeps from forward to backward."""

    solve: _Solve
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, solve: _Solve, found: Carried, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(found.x_T, *parameters)  # PyTorch then knows if a parameter has changed since
        return found.value

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_T, *parameters = ctx.saved_tensors
        with evaluating(ctx.solve.model.score):
            by_x, by_parameters = ctx.solve.back(x_T, gradient, parameters)
        return None, None, by_x, *by_parameters


State = tuple[Tensor, Tensor]


def _moved(base: State, past: Sequence[State], nodes: np.ndarray, start: float, stop: float) -> State:
    """``base`` plus the integral from start to stop of the polynomial through the rates at ``nodes``."""
    half, centre = 0.5 * (stop - start), 0.5 * (start + stop)
    points, mass = np.polynomial.legendre.leggauss(len(nodes))
    vandermonde = np.vander((nodes - centre) / half, increasing=True)
    moments = half * mass @ np.vander(points, len(nodes), increasing=True)
    shares = np.linalg.solve(vandermonde.T, moments).tolist()
    z, p = base
    for share, (of_z, of_p) in zip(shares, past, strict=False):
        z, p = z.add(of_z, alpha=share), p.add(of_p, alpha=share)
    return z, p
