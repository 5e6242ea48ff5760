"""Methods that descend an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32, sample_norm
from difflayers._problem import Form, Residual
from difflayers._solution import Status
from difflayers._solver import IterativeSolver
from difflayers.fixedpoint._line_search import LineSearch
from difflayers.fixedpoint._minimize import Gradient


class Memory(NamedTuple):
    """The last steps and changes of the gradient, newest last, ``(samples, memory, n)``."""

    steps: Tensor
    changes: Tensor
    inverse: Tensor  # 1 / (step · change), (samples, memory); zero where there is none
    level: Tensor  # (samples,): the largest |objective| so far
    status: Tensor

    @classmethod
    def empty(cls, rows: Tensor, memory: int, level: Tensor) -> Memory:
        blank = rows.new_zeros(len(rows), memory, rows.shape[1])
        status = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        return cls(blank, blank, blank[..., 0], level, status)

    def product(self, gradient: Tensor) -> Tensor:
        """The estimate of the inverse Hessian times the gradient, by two loops (Nocedal 1980)."""
        weights, q = [], gradient
        for i in reversed(range(self.steps.shape[1])):
            weights.append(self.inverse[:, i, None] * (self.steps[:, i] * q).sum(-1, keepdim=True))
            q = q - weights[-1] * self.changes[:, i]
        q = q * self._first_scale()[:, None]
        for i, weight in enumerate(reversed(weights)):
            q = q + self.steps[:, i] * (
                weight - self.inverse[:, i, None] * (self.changes[:, i] * q).sum(-1, keepdim=True)
            )
        return q

    @property
    def used(self) -> Tensor:
        """Which samples remember anything."""
        return self.inverse[:, -1] > 0

    def _first_scale(self) -> Tensor:
        newest = self.inverse[:, -1] * self.changes[:, -1].square().sum(-1)
        return torch.where(newest > 0, 1 / newest, 1)

    def extended(self, step: Tensor, change: Tensor, forget: Tensor) -> Memory:
        """With one more pair, where its curvature is positive enough; with none where it is to forget."""
        curvature = (step * change).sum(-1)
        least = torch.finfo(step.dtype).eps * step.norm(dim=-1) * change.norm(dim=-1)
        keep = (curvature > least) & ~forget
        pairs = (self.steps, step), (self.changes, change), (self.inverse, 1 / curvature)
        steps, changes, inverse = (_shifted(old, new, keep) for old, new in pairs)
        return self._replace(steps=steps, changes=changes, inverse=torch.where(forget[:, None], 0, inverse))


@dataclass(frozen=True)
class LBFGS(IterativeSolver):
    """Quasi-Newton descent that remembers ``memory`` steps (Nocedal 1980; Liu and Nocedal 1989), with a line search.

    Memory: ``2 · memory`` states, whatever ``max_steps``. Every step decreases the objective, until that is lost in
    rounding. What it ends at is a stationary point, and a minimum unless it starts at a saddle or a maximum, where the
    gradient leads nowhere: :class:`Newton` sees the difference. A sample whose objective falls as far as its dtype goes
    is ``UNBOUNDED``.

    Args:
        memory: pairs of steps and gradients that are remembered.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    max_steps: int = 500
    memory: int = 10
    serves: ClassVar[frozenset[Form]] = frozenset({"minimize", "least_squares"})
    divisible: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    traceable: ClassVar[bool] = False  # lengths of steps come from searches

    def init(self, residual: Residual, z: Tensor) -> Memory:
        rows = at_least_float32(residual.rows(z))
        memory = Memory.empty(rows, self.memory, objective(residual, z).abs())
        return memory._replace(status=memory.status.reshape(z.shape[: residual.problem.batch_dims]))

    def error(self, residual: Residual, z: Tensor) -> Tensor:
        return gradient_norm(residual, z)

    def merit(self, residual: Residual, z: Tensor, error: Tensor) -> Tensor:
        return objective(residual, z).reshape(error.shape)

    def failure(self, state: Memory) -> Tensor:
        return state.status

    def step(self, residual: Residual, z: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        gradient = at_least_float32(residual.rows(residual(z)))
        direction = -state.product(gradient)
        downhill = (direction * gradient).sum(-1) < 0
        direction = torch.where((state.used & downhill)[:, None], direction, -gradient)
        direction = torch.where(going(residual, len(direction))[:, None], direction, 0)
        first = 1 / gradient.detach().norm(dim=-1).clamp_min(torch.finfo(gradient.dtype).tiny)
        search = LineSearch(
            checked_gradient(residual),
            z,
            direction,
            torch.where(state.used & downhill, 1, first.clamp_max(1)),
            state.level,
        )
        change = at_least_float32(residual.rows(residual(search.point))) - gradient
        moved = at_least_float32(residual.rows(search.point) - residual.rows(z))
        # A search that fails with what is remembered is tried again without; one that fails without is the end.
        stuck = ~search.found & ~state.used
        status = search_status(search, stuck).reshape(state.status.shape)
        state = state.extended(moved, change, forget=~search.found | ~downhill)
        return search.point, state._replace(level=torch.maximum(state.level, search.value.abs()), status=status)


def objective(residual: Residual, z: Tensor) -> Tensor:
    """What is to be minimized, ``(samples,)``."""
    return checked_gradient(residual).objective(z).detach().reshape(-1)


def checked_gradient(residual: Residual) -> Gradient:
    """The residual, after checking that it is that of a minimization."""
    if not isinstance(residual, Gradient):
        raise TypeError(f"expected the residual of a minimization, got {type(residual).__name__}")
    return residual


def gradient_norm(residual: Residual, z: Tensor) -> Tensor:
    """The norm of the gradient, ``(*batch,)``; NaN where the objective isn't finite, whatever the gradient."""
    norm = sample_norm(residual(z).detach(), residual.problem.batch_dims)
    return torch.where(objective(residual, z).isfinite().reshape(norm.shape), norm, torch.nan)


def search_status(search: LineSearch, stuck: Tensor) -> Tensor:
    """The status of every sample after a search; ``stuck`` are those that can't go on from where they are."""
    limit = -(torch.finfo(search.value.dtype).max ** 0.5)
    bottomless = search.bottomless | (search.value < limit)
    return torch.where(bottomless, int(Status.UNBOUNDED), torch.where(stuck, int(Status.STALLED), int(Status.SUCCESS)))


def going(residual: Residual, samples: int) -> Tensor:
    """The samples that the loop is still working on, ``(samples,)``."""
    active = residual.active
    return torch.ones(samples, dtype=torch.bool) if active is None else active.reshape(-1)


def _shifted(old: Tensor, new: Tensor, keep: Tensor) -> Tensor:
    shifted = torch.cat([old[:, 1:], new.unsqueeze(1)], dim=1)
    return torch.where(keep.reshape(-1, *[1] * (old.dim() - 1)), shifted, old)
