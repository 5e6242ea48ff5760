"""Dense solvers: one Jacobian per sample, from ``n`` batched vector-Jacobian products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32
from difflayers._solution import Status
from difflayers.linear._base import Factor, LinearSolution, LinearSolver, shaped
from difflayers.linear._operator import LinearOperator

_SAFE = 64  # rows of a matrix that batched LU can be trusted with, see lu_factor


@dataclass(frozen=True)
class LU(LinearSolver):
    """LU factorization with partial pivoting of every sample's Jacobian.

    A sample is ``SINGULAR`` when its smallest pivot is below rounding of its largest one, and ``STALLED`` when its
    residual is more than rounding: above ``10 √n eps (‖J‖ ‖x‖ + ‖b‖)`` (Higham 2002, section 9.3).
    """

    final: ClassVar[bool] = True

    def factor(self, operator: LinearOperator) -> Factor:
        return Factor(operator, lu_factor(at_least_float32(operator.dense)))

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        lu, pivots = factor.data
        operator, matrix = factor.operator, factor.operator.dense
        flat = rhs.reshape(operator.samples, operator.size)
        status = pivot_status(lu)
        x = torch.linalg.lu_solve(lu, pivots, flat.unsqueeze(-1).to(lu.dtype), adjoint=transpose).squeeze(-1)
        x = torch.where((status == Status.SUCCESS)[:, None], x, 0).to(rhs.dtype)
        matrix = matrix.mT if transpose else matrix
        residual = (_product(matrix, x) - flat).norm(dim=1)
        status = _confirmed(status, residual, _rounding(matrix, x, flat))
        return shaped(operator, x, status, residual, torch.full_like(status, operator.size, dtype=torch.int64))


@dataclass(frozen=True)
class LeastSquares(LinearSolver):
    """The solution of least norm among those of least residual; singular systems are answered, not refused.

    Singular values below ``rtol`` times the largest one count as zero (None: ``n`` times machine epsilon). A sample
    whose residual ``r`` isn't the least one, by ``Jᵀ r``, is ``STALLED``.
    """

    rtol: float | None = None

    def factor(self, operator: LinearOperator) -> Factor:
        matrix = at_least_float32(operator.dense)
        finite = matrix.isfinite().all(-1).all(-1)
        # The SVD refuses a whole batch for one NaN in it.
        left, values, right = torch.linalg.svd(torch.where(finite[:, None, None], matrix, 0))
        cut = self._cut(matrix) * values.amax(1, keepdim=True) if operator.size else values
        # Not multiplied to one matrix, whose rounding would be that of its largest entry.
        return Factor(operator, (left, torch.where(values > cut, 1 / values, 0), right.mT, finite))

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        left, inverse, right, finite = factor.data
        operator, matrix = factor.operator, factor.operator.dense
        flat = rhs.reshape(operator.samples, operator.size)
        if transpose:
            matrix, left, right = matrix.mT, right, left
        x = _product(right, inverse * _product(left.mT, flat.to(left.dtype))).to(rhs.dtype)
        r = _product(matrix, x) - flat
        allowed = _rounding(matrix, x, flat) + self._cut(matrix) * flat.norm(dim=1)
        status = torch.where(finite, int(Status.SUCCESS), int(Status.NONFINITE))
        status = _confirmed(status, _product(matrix.mT, r).norm(dim=1), allowed * matrix.norm(dim=(1, 2)))
        return shaped(operator, x, status, r.norm(dim=1), torch.full_like(status, operator.size))

    def _cut(self, matrix: Tensor) -> float:
        return matrix.shape[-1] * torch.finfo(matrix.dtype).eps if self.rtol is None else self.rtol


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


def lu_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """LU factors and pivots, ``(*batch, n, n)`` and ``(*batch, n)``; singular ones are for the caller to see."""
    crowded = matrix.dim() > 2 and matrix.shape[0] > 1 and matrix.shape[-1] > _SAFE and torch.get_num_threads() > 1
    if not crowded or matrix.device.type != "cpu":
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        return lu, pivots
    # One by one: in torch 2.13 with MKL and several threads, a batch of more than about a hundred rows each gets
    # pivots that are no rows ("Parameter 6 was incorrect on entry to DLASWP"), and may never end.
    rows = matrix.reshape(-1, *matrix.shape[-2:])
    parts = [torch.linalg.lu_factor_ex(one)[:2] for one in rows]
    lu, pivots = (torch.stack(kind).reshape(*matrix.shape[:-2], *kind[0].shape) for kind in zip(*parts, strict=True))
    return lu, pivots


def pivot_status(lu: Tensor) -> Tensor:
    """``SUCCESS``, ``SINGULAR`` or ``NONFINITE`` of every factorization ``(samples, n, n)``."""
    if lu.shape[-1] == 0:
        return torch.zeros(lu.shape[0], dtype=torch.int64, device=lu.device)
    pivots = lu.diagonal(dim1=-2, dim2=-1).abs()
    singular = pivots.amin(-1) <= lu.shape[-1] * torch.finfo(lu.dtype).eps * pivots.amax(-1)
    status = torch.where(singular, int(Status.SINGULAR), int(Status.SUCCESS))
    return torch.where(pivots.isfinite().all(-1), status, int(Status.NONFINITE))


def _confirmed(status: Tensor, error: Tensor, allowed: Tensor) -> Tensor:
    """The status, ``STALLED`` or ``NONFINITE`` where a success has an error that it mustn't have."""
    judged = torch.where(error <= allowed, int(Status.SUCCESS), int(Status.STALLED))
    judged = torch.where(error.isfinite(), judged, int(Status.NONFINITE))
    return torch.where(status == Status.SUCCESS, judged, status)


def _rounding(matrix: Tensor, x: Tensor, rhs: Tensor) -> Tensor:
    """The residual of a backward stable answer, roughly and from above."""
    eps = 10 * matrix.shape[-1] ** 0.5 * torch.finfo(x.dtype).eps
    bound: Tensor = eps * (matrix.norm(dim=(1, 2)) * x.norm(dim=1) + rhs.norm(dim=1))
    return bound


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)
