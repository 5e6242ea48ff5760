"""Newton's method, for roots and for minima."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32, sample_norm, widen
from difflayers._problem import Residual
from difflayers._solution import Status
from difflayers._solver import IterativeSolver
from difflayers.fixedpoint._descent import gradient_norm, objective, search_status
from difflayers.fixedpoint._line_search import LineSearch
from difflayers.fixedpoint._minimize import Gradient
from difflayers.linear import LinearOperator
from difflayers.linear._direct import FactoredInverse, lu_factor, pivot_status


class Factors(NamedTuple):
    """A factorization per sample, and how it went."""

    status: Tensor  # (*batch,)
    lu: Tensor  # (samples, n, n)
    pivots: Tensor  # (samples, n)
    left: Tensor  # (samples,): the steps that it is still good for
    level: Tensor  # (samples,): the largest |objective| so far, of a minimization


@dataclass(frozen=True)
class Newton(IterativeSolver):
    """Newton's method with a dense Jacobian per sample and a line search (Nocedal and Wright 2006, chapters 3 and 11).

    Quadratic convergence near an answer; for up to a few hundred unknowns per sample.

    Roots: the search halves steps until ``‖F‖`` decreases. A sample whose Jacobian is singular is ``SINGULAR``.

    Minima: directions of negative curvature are followed downward, by the Hessian with its eigenvalues' absolute
    values, and a point where the Hessian has negative eigenvalues is no answer, even if the gradient vanishes there. A
    sample that finds no bottom is ``UNBOUNDED``.

    Args:
        refactor: steps that one Jacobian and its factorization serve, for roots: 1 is Newton's method, more is the
            chord method, which converges linearly at a fraction of the cost (Shamanskii 1967). A step that doesn't
            decrease ``‖F‖`` asks for a new one.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    max_steps: int = 50
    patience: int = field(default=20, kw_only=True)
    refactor: int = field(default=1, kw_only=True)
    divisible: ClassVar[bool] = True
    halvings: ClassVar[int] = 12
    decrease: ClassVar[float] = 1e-4

    def init(self, residual: Residual, z: Tensor) -> Factors:
        batch = z.shape[: residual.problem.batch_dims]
        rows = at_least_float32(residual.rows(z))
        eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=z.device).repeat(len(rows), 1, 1)
        status = torch.zeros(batch, dtype=torch.int64, device=z.device)
        level = objective(residual, z).abs() if isinstance(residual, Gradient) else rows.new_zeros(len(rows))
        lu, pivots = torch.linalg.lu_factor(eye)
        return Factors(status, lu, pivots, status.reshape(-1), level)

    def error(self, residual: Residual, z: Tensor) -> Tensor:
        if not isinstance(residual, Gradient):
            return super().error(residual, z)
        norm = gradient_norm(residual, z)
        size = 1 + sample_norm(z.detach(), residual.problem.batch_dims)
        return norm + size * concavity(residual.curvature(z)[1].detach()).to(norm.dtype).reshape(norm.shape)

    def merit(self, residual: Residual, z: Tensor, error: Tensor) -> Tensor:
        return objective(residual, z).reshape(error.shape) if isinstance(residual, Gradient) else error

    def failure(self, state: Factors) -> Tensor:
        return state.status

    def inverse(self, residual: Residual, z: Tensor, state: Factors) -> LinearOperator | None:
        if isinstance(residual, Gradient):
            return None
        return FactoredInverse(state.lu, state.pivots, z, residual.problem.batch_dims)

    def step(self, residual: Residual, z: Tensor, state: Factors) -> tuple[Tensor, Factors]:
        if isinstance(residual, Gradient):
            return self._descend(residual, z, state)
        due = state.left <= 0
        state = self._factored(residual, z, state, due)
        regular = state.status.reshape(-1) == Status.SUCCESS
        right = -residual.rows(residual(z)).unsqueeze(-1).to(state.lu.dtype)
        move = torch.linalg.lu_solve(state.lu, state.pivots, right).squeeze(-1)
        move = torch.where(regular[:, None], move, 0).to(z.dtype).reshape(z.shape)
        trial, enough = self._search(residual, z, move, regular.reshape(state.status.shape))
        enough = enough.reshape(-1)
        # With an old Jacobian a short step is no progress worth having.
        stay = widen((~enough & ~due).reshape(state.status.shape), z)
        trial = torch.where(stay, z, trial) if bool(stay.any()) else trial
        return trial, state._replace(left=torch.where(enough, state.left - 1, 0))

    def _factored(self, residual: Residual, z: Tensor, state: Factors, due: Tensor) -> Factors:
        """New factors where they are due."""
        if not bool(due.any()):
            return state
        lu, pivots = lu_factor(at_least_float32(residual.jacobian(z).dense))
        if not bool(due.all()):
            lu = torch.where(due[:, None, None], lu, state.lu)
            pivots = torch.where(due[:, None], pivots, state.pivots)
        left = torch.where(due, self.refactor, state.left)
        return Factors(pivot_status(lu).reshape(state.status.shape), lu, pivots, left, state.level)

    def _search(self, residual: Residual, z: Tensor, move: Tensor, regular: Tensor) -> tuple[Tensor, Tensor]:
        """The longest of the steps 1, 1/2, 1/4, ... that decreases the residual norm enough, and whether any did."""
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
        return trial, ~searching

    def _descend(self, residual: Gradient, z: Tensor, state: Factors) -> tuple[Tensor, Factors]:
        gradient, hessian = (at_least_float32(t) for t in residual.curvature(z))
        broken = ~hessian.isfinite().all(-1).all(-1)
        active = ~broken if residual.active is None else residual.active.reshape(-1) & ~broken
        hessian = torch.where(active[:, None, None], hessian, torch.eye(hessian.shape[-1]).to(hessian))
        direction = torch.where(active[:, None], downhill(gradient, hessian, residual.rows(z)), 0)
        search = LineSearch(residual, z, direction, torch.ones_like(state.level), state.level)
        status = torch.where(broken, int(Status.NONFINITE), search_status(search, ~search.found))
        level = torch.maximum(state.level, search.value.abs())
        return search.point, state._replace(status=status.reshape(state.status.shape), level=level)


def concavity(hessian: Tensor) -> Tensor:
    """By how much the least eigenvalue is below zero, ``(samples,)``, where that isn't rounding; NaN is kept."""
    found = hessian.diagonal(dim1=-2, dim2=-1).sum(-1) * 0
    hessian = at_least_float32(hessian)
    finite = hessian.isfinite().all(-1).all(-1)
    size = hessian.abs().amax((-2, -1)) * torch.finfo(hessian.dtype).eps ** 0.5
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    doubtful = (torch.linalg.cholesky_ex(hessian + size[:, None, None] * eye)[1] > 0) & finite
    if not bool(doubtful.any()):
        return found
    least = torch.linalg.eigvalsh(hessian[doubtful])[:, 0]
    least = torch.where(least < -size[doubtful], -least, 0).to(found.dtype)
    return found.index_put((doubtful,), least)


def downhill(gradient: Tensor, hessian: Tensor, z: Tensor) -> Tensor:
    """Newton's direction where the Hessian is positive definite, else that of its absolute value.

    There, close to a saddle or a maximum, the direction of most negative curvature is added, which leads off it.
    """
    factor, info = torch.linalg.cholesky_ex(hessian)
    indefinite = info > 0
    direction = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    if not bool(indefinite.any()):
        return direction
    g, z = gradient[indefinite], z[indefinite]
    values, vectors = torch.linalg.eigh(hessian[indefinite])
    size = values.abs().amax(-1)
    # Without any curvature the direction is that of the gradient, a unit long.
    size = torch.where(size > 0, size, g.norm(dim=-1))
    floor = size * torch.finfo(size.dtype).eps ** 0.5 if bool((values != 0).any()) else size
    components = (vectors.mT @ g.unsqueeze(-1)).squeeze(-1)
    move = -components / torch.maximum(values.abs(), floor[:, None])
    reach = 0.1 * (1 + z.norm(dim=-1)).to(size.dtype)
    leave = (values[:, 0] < 0) & (move.norm(dim=-1) < reach)
    away = torch.where(components[:, 0] > 0, -reach, reach)
    move = torch.cat([torch.where(leave, away, move[:, 0]).unsqueeze(-1), move[:, 1:]], dim=-1)
    return direction.index_put((indefinite,), (vectors @ move.unsqueeze(-1)).squeeze(-1))
