"""Batched iterations for fixed points and roots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32, sample_norm, widen
from difflayers._mixing import History, mix
from difflayers._problem import Residual
from difflayers._solution import Status
from difflayers._solver import IterativeSolver
from difflayers.linear import LinearOperator
from difflayers.linear._direct import FactoredInverse, pivot_status


@dataclass(frozen=True)
class Picard(IterativeSolver):
    """Fixed-point iteration with damping: ``z <- z + damping · (f(z) - z)``.

    Converges linearly where the spectral radius of ``∂f/∂z`` is below one. For a root problem it follows ``F``
    itself, ``z <- z + damping · F(z)``.
    """

    damping: float = 1.0
    divisible = True

    def init(self, residual: Residual, z: Tensor) -> None:
        return None

    def step(self, residual: Residual, z: Tensor, state: None) -> tuple[Tensor, None]:
        return torch.add(z, residual(z), alpha=self.damping), None


@dataclass(frozen=True)
class Anderson(IterativeSolver):
    """Anderson acceleration (type II): the combination of the last ``memory`` iterates with the least residual.

    On linear maps it is GMRES in disguise (Walker and Ni 2011). Memory: ``2 · memory`` states, whatever ``max_steps``.
    """

    memory: int = 6
    damping: float = 1.0
    divisible = True

    def init(self, residual: Residual, z: Tensor) -> History:
        return History.empty(z.reshape(z.shape[: residual.problem.batch_dims].numel(), -1), self.memory)

    def step(self, residual: Residual, z: Tensor, state: History) -> tuple[Tensor, History]:
        rows = state.iterates.shape[0]
        mixed, state = mix(state, z.reshape(rows, -1), residual(z).reshape(rows, -1), self.damping)
        return mixed.reshape(z.shape), state


class _Factored(NamedTuple):
    """How the last factorization went, and what it is: ``(*batch,)``, ``(samples, n, n)``, ``(samples, n)``."""

    status: Tensor
    lu: Tensor
    pivots: Tensor


@dataclass(frozen=True)
class Newton(IterativeSolver):
    """Newton's method with a dense Jacobian per sample and a backtracking line search on ``‖F‖``.

    Quadratic convergence near a root; for up to a few hundred unknowns per sample. A sample whose Jacobian is singular
    is ``SINGULAR`` (Nocedal and Wright 2006, section 11.2).
    """

    max_steps: int = 50
    halvings = 12
    decrease = 1e-4
    divisible = True

    def init(self, residual: Residual, z: Tensor) -> _Factored:
        batch = z.shape[: residual.problem.batch_dims]
        n = z.shape[residual.problem.batch_dims :].numel()
        eye = at_least_float32(torch.eye(n, dtype=z.dtype, device=z.device).repeat(batch.numel(), 1, 1))
        status = torch.zeros(batch, dtype=torch.int64, device=z.device)
        return _Factored(status, *torch.linalg.lu_factor(eye))

    def failure(self, state: _Factored) -> Tensor:
        return state.status

    def inverse(self, residual: Residual, z: Tensor, state: _Factored) -> LinearOperator:
        return FactoredInverse(state.lu, state.pivots, z, residual.problem.batch_dims)

    def step(self, residual: Residual, z: Tensor, state: _Factored) -> tuple[Tensor, _Factored]:
        value = residual(z)
        matrix = at_least_float32(residual.jacobian(z).dense)
        rows = matrix.shape[0]
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        status = pivot_status(lu)
        move = torch.linalg.lu_solve(lu, pivots, -value.reshape(rows, -1, 1).to(lu.dtype)).to(z.dtype).reshape(z.shape)
        status = status.reshape(z.shape[: residual.problem.batch_dims])
        move = torch.where(widen(status == Status.SUCCESS, move), move, 0)
        return self._search(residual, z, move, status == Status.SUCCESS), _Factored(status, lu, pivots)

    def _search(self, residual: Residual, z: Tensor, move: Tensor, regular: Tensor) -> Tensor:
        """The longest of the steps 1, 1/2, 1/4, ... that decreases the residual norm enough."""
        batch_dims = residual.problem.batch_dims
        start = sample_norm(residual(z).detach(), batch_dims)
        scale = torch.ones_like(start)
        searching = regular if residual.active is None else regular & residual.active
        trial = z + move
        for _ in range(self.halvings):
            norm = sample_norm(residual(trial).detach(), batch_dims)
            enough = norm <= (1 - self.decrease * scale) * start
            searching = searching & ~enough
            if not searching.any():
                break
            scale = torch.where(searching, scale / 2, scale)
            trial = z + widen(scale, move) * move
        return trial
