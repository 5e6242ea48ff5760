"""Dense solvers: one Jacobian per sample, from ``n`` batched vector-Jacobian products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32
from difflayers._solution import Status
from difflayers.linear._base import Factor, LinearSolution, LinearSolver, shaped
from difflayers.linear._operator import LinearOperator


@dataclass(frozen=True)
class LU(LinearSolver):
    """LU factorization with partial pivoting of every sample's Jacobian.

    A sample is ``SINGULAR`` when its smallest pivot is below rounding of its largest one.
    """

    def factor(self, operator: LinearOperator) -> Factor:
        return Factor(operator, torch.linalg.lu_factor_ex(at_least_float32(operator.dense))[:2])

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        lu, pivots = factor.data
        operator, matrix = factor.operator, factor.operator.dense
        flat = rhs.reshape(operator.samples, operator.size)
        status = pivot_status(lu)
        x = torch.linalg.lu_solve(lu, pivots, flat.unsqueeze(-1).to(lu.dtype), adjoint=transpose).squeeze(-1)
        x = torch.where((status == Status.SUCCESS)[:, None], x, 0).to(rhs.dtype)
        residual = _residual(matrix.mT if transpose else matrix, x, flat)
        return shaped(operator, x, status, residual, torch.full_like(status, operator.size, dtype=torch.int64))


@dataclass(frozen=True)
class LeastSquares(LinearSolver):
    """The solution of least norm among those of least residual; singular systems are answered, not refused.

    Singular values below ``rtol`` times the largest one count as zero (None: ``n`` times machine epsilon).
    """

    rtol: float | None = None

    def factor(self, operator: LinearOperator) -> Factor:
        matrix = at_least_float32(operator.dense)
        finite = matrix.isfinite().all(-1).all(-1)
        # The SVD refuses a whole batch for one NaN in it.
        inverse = torch.linalg.pinv(torch.where(finite[:, None, None], matrix, 0), rtol=self.rtol)
        return Factor(operator, (inverse.to(operator.like.dtype), finite))

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        inverse, finite = factor.data
        operator, matrix = factor.operator, factor.operator.dense
        flat = rhs.reshape(operator.samples, operator.size)
        x = ((inverse.mT if transpose else inverse) @ flat.unsqueeze(-1)).squeeze(-1)
        status = torch.where(finite & flat.isfinite().all(1), int(Status.SUCCESS), int(Status.NONFINITE))
        residual = _residual(matrix.mT if transpose else matrix, x, flat)
        return shaped(operator, x, status, residual, torch.full_like(status, operator.size))


class FactoredInverse(LinearOperator):
    """The inverses of factored matrices ``(samples, n, n)``; the identity where they are singular."""

    def __init__(self, lu: Tensor, pivots: Tensor, like: Tensor, batch_dims: int) -> None:
        self._lu, self._pivots, self.like, self.batch_dims, self.properties = lu, pivots, like, batch_dims, frozenset()

    def apply(self, x: Tensor) -> Tensor:
        return self._solve(x, adjoint=False)

    def apply_transpose(self, x: Tensor) -> Tensor:
        return self._solve(x, adjoint=True)

    def _solve(self, x: Tensor, *, adjoint: bool) -> Tensor:
        columns = x.reshape(self._lu.shape[0], -1, 1).to(self._lu.dtype)
        solved = torch.linalg.lu_solve(self._lu, self._pivots, columns, adjoint=adjoint).to(x.dtype)
        return torch.where(solved.isfinite(), solved, columns.to(x.dtype)).reshape(x.shape)


class LowRankInverse(LinearOperator):
    """``x -> Uᵀ V x - x`` with ``U, V`` of shape ``(samples, rank, n)``: what Broyden's method makes of ``-I``."""

    def __init__(self, left: Tensor, right: Tensor, like: Tensor, batch_dims: int) -> None:
        self._left, self._right, self.like, self.batch_dims = left, right, like, batch_dims
        self.properties = frozenset()

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, self._left, self._right)

    def apply_transpose(self, x: Tensor) -> Tensor:
        return self._product(x, self._right, self._left)

    def _product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        row = x.reshape(left.shape[0], 1, left.shape[2])
        product: Tensor = torch.baddbmm(row, torch.bmm(row, right.mT), left, beta=-1)
        return product.reshape(x.shape)


def pivot_status(lu: Tensor) -> Tensor:
    """``SUCCESS``, ``SINGULAR`` or ``NONFINITE`` of every factorization ``(samples, n, n)``."""
    if lu.shape[-1] == 0:
        return torch.zeros(lu.shape[0], dtype=torch.int64, device=lu.device)
    pivots = lu.diagonal(dim1=-2, dim2=-1).abs()
    singular = pivots.amin(-1) <= lu.shape[-1] * torch.finfo(lu.dtype).eps * pivots.amax(-1)
    status = torch.where(singular, int(Status.SINGULAR), int(Status.SUCCESS))
    return torch.where(pivots.isfinite().all(-1), status, int(Status.NONFINITE))


def _residual(matrix: Tensor, x: Tensor, rhs: Tensor) -> Tensor:
    norm: Tensor = ((matrix @ x.unsqueeze(-1)).squeeze(-1) - rhs).norm(dim=1)
    return norm
