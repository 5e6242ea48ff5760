"""The Jacobian of the optimality conditions, and its inverse by one factorization on the active set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.linear import Factor, LinearOperator, LinearSolution, LinearSolver
from difflayers.qp._data import Data, Point, times, transposed
from difflayers.qp._reduced import Reduced
from difflayers.qp._sparse_reduced import reduced


class OptimalityJacobian(LinearOperator):
    """The Jacobian of the optimality conditions at ``w``: a row is active where its ``v`` is positive.

    With ``D`` the diagonal of active rows and ``C`` all inequalities: ``[[P, Aᵀ, CᵀD], [A, 0, 0], [C, 0, D - I]]``.
    """

    def __init__(self, data: Data, point: Tensor, batch_dims: int) -> None:
        self.like, self.batch_dims, self.properties = point, batch_dims, frozenset()
        self.data, self.layout, self.solver = data, data.layout, ActiveSetSolve()

    @cached_property
    def _active(self) -> Point:
        x, y, *multipliers = self.layout.split(self.like)
        return Point(x, y, *[(v > 0).to(self.like.dtype) for v in multipliers])

    @cached_property
    def _low(self) -> Tensor | None:
        return None if self.data.lb is None else self.data.lb.isfinite().to(self.like.dtype)

    @cached_property
    def _high(self) -> Tensor | None:
        return None if self.data.ub is None else self.data.ub.isfinite().to(self.like.dtype)

    def apply(self, x: Tensor) -> Tensor:
        d, on = self.layout.split(x), self._active
        first, rows = times(self.data.P, d.x), []
        if self.data.A is not None:
            first = first + transposed(self.data.A, d.y)
            rows.append(times(self.data.A, d.x))
        if self.data.G is not None:
            first = first + transposed(self.data.G, on.v * d.v)
            rows.append(times(self.data.G, d.x) + (on.v - 1) * d.v)
        if self._low is not None:
            first = first - on.low * d.low
            rows.append(-self._low * d.x + (on.low - 1) * d.low)
        if self._high is not None:
            first = first + on.high * d.high
            rows.append(self._high * d.x + (on.high - 1) * d.high)
        return torch.cat([first, *rows], dim=-1)

    def apply_transpose(self, x: Tensor) -> Tensor:
        u, on = self.layout.split(x), self._active
        first, rows = times(self.data.P, u.x), []  # P is symmetric
        if self.data.A is not None:
            first = first + transposed(self.data.A, u.y)
            rows.append(times(self.data.A, u.x))
        if self.data.G is not None:
            first = first + transposed(self.data.G, u.v)
            rows.append(on.v * times(self.data.G, u.x) + (on.v - 1) * u.v)
        if self._low is not None:
            first = first - self._low * u.low
            rows.append(-on.low * u.x + (on.low - 1) * u.low)
        if self._high is not None:
            first = first + self._high * u.high
            rows.append(on.high * u.x + (on.high - 1) * u.high)
        return torch.cat([first, *rows], dim=-1)

    @cached_property
    def inverse(self) -> LinearOperator:  # type: ignore[override]
        """The inverse, factored on first use; least squares where there is none."""
        data = self.data.flattened(self.like.shape[: self.batch_dims])
        if data.q.dtype != torch.float64:  # a copy would forget what was factored before
            data = data.map(torch.Tensor.double)
        active = torch.cat(self._active[2:], dim=-1).reshape(self.samples, self.layout.inequalities) > 0
        return Inverse(reduced(data, active), self.like, self.batch_dims)


class Inverse(LinearOperator):
    """The inverse of :class:`OptimalityJacobian`, or of its transpose, from the factored system of the active rows."""

    def __init__(self, reduced: Reduced, like: Tensor, batch_dims: int, transposes: bool = False) -> None:
        self.like, self.batch_dims, self.properties = like, batch_dims, frozenset()
        self.reduced, self._transposes = reduced, transposes

    @property
    def transpose(self) -> Inverse:
        return Inverse(self.reduced, self.like, self.batch_dims, not self._transposes)

    def apply(self, x: Tensor) -> Tensor:
        return self.solve(x)[0]

    def apply_transpose(self, x: Tensor) -> Tensor:
        return self.transpose.apply(x)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """The solution to rounding, and the norm of what it leaves of ``rhs``, ``(*batch,)``."""
        system, n = self.reduced, self.reduced.layout.n
        flat = rhs.reshape(self.samples, self.size).to(system.dtype)
        first, sides = flat[:, :n], flat[:, n:]
        if self._transposes:
            # Idle rows: -u = r, which the first block then knows.
            idle = torch.where(system.kept, 0, sides)
            found = system.solved(first + system.data.drawn(idle), sides)
            w = found.w - idle
        else:
            # Idle rows: C x - v = r, once x is known.
            found = system.solved(first, sides)
            w = torch.where(system.kept, found.w, -found.slack)
        x = torch.cat([found.x, w], dim=-1)
        left = torch.linalg.vector_norm(found.left, dim=-1)
        return x.to(rhs.dtype).reshape(rhs.shape), left.to(rhs.dtype).reshape(rhs.shape[:-1])


@dataclass(frozen=True)
class ActiveSetSolve(LinearSolver):
    """Solves with the factored inverse of an :class:`OptimalityJacobian`.

    Where that is singular it gives the least-squares solution of least norm.
    """

    final: ClassVar[bool] = True

    def factor(self, operator: LinearOperator) -> Factor:
        return Factor(operator, operator.inverse)

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        x, left = (factor.data.transpose if transpose else factor.data).solve(rhs)
        status = torch.where(left < torch.inf, int(Status.SUCCESS), int(Status.NONFINITE))
        return LinearSolution(x, status.to(torch.int8), left, torch.ones_like(status))
