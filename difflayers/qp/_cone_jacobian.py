"""The Jacobian of a cone program's optimality conditions, and systems with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from difflayers._autodiff import Pullback, in_functorch, pull
from difflayers._solution import Status
from difflayers.linear import Factor, LinearOperator, LinearSolution, LinearSolver
from difflayers.qp._cone_factor import ConeFactor, constraints
from difflayers.qp._cone_factors import factored
from difflayers.qp._cones import Cones, Rotation
from difflayers.qp._data import Data, times, transposed

# How often a solution is refined, and the residual, over machine epsilon, that needs no more.
REFINEMENTS, ROUNDING = 6, 50


class ConeJacobian(LinearOperator):
    """``[[P, CᵀD], [C, D - I]]`` at ``w = (x, v)``, with ``D`` the derivative of the projection at ``v``."""

    def __init__(self, data: Data, cones: Cones, point: Tensor, batch_dims: int) -> None:
        self.like, self.batch_dims, self.properties = point, batch_dims, frozenset()
        self.data, self.cones, self.solver = data, cones, RefinedSolve()
        self.C, _ = constraints(data)

    def apply(self, x: Tensor) -> Tensor:
        dx, dv = self._split(x)
        projected = self._projected(dv)
        first = times(self.data.P, dx) + transposed(self.C, projected)
        return torch.cat([first, times(self.C, dx) + projected - dv], dim=-1)

    def apply_transpose(self, x: Tensor) -> Tensor:
        ux, uv = self._split(x)
        second = self._projected(times(self.C, ux) + uv) - uv
        return torch.cat([times(self.data.P, ux) + transposed(self.C, uv), second], dim=-1)

    def _projected(self, dv: Tensor) -> Tensor:
        """``D dv``; ``D`` is symmetric, so a pullback serves, with derivatives of every order."""
        if not torch.is_grad_enabled() and not in_functorch():
            rows = dv.reshape(-1, self.data.layout.m, 1)
            turned = self._rotation.values.unsqueeze(-1) * self.cones.turned(self._rotation, rows)
            return self.cones.turned(self._rotation, turned, back=True).reshape(dv.shape)
        (pulled,) = self._pullback(dv)
        return torch.zeros_like(dv) if pulled is None else pulled

    @cached_property
    def _rotation(self) -> Rotation:
        v = self._split(self.like.detach())[1].reshape(-1, self.data.layout.m)
        return self.cones.rotation(v, self.cones.project(v))

    @cached_property
    def _pullback(self) -> Pullback:
        return pull(self.cones.project, (self._split(self.like)[1],))

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor]:
        x, v = w.split((self.data.layout.n, self.data.layout.m), dim=-1)
        return x, v

    @cached_property
    def inverse(self) -> LinearOperator:  # type: ignore[override]
        """The inverse, factored on first use; least squares where there is none."""
        batch = self.like.shape[: self.batch_dims]
        data = self.data.flattened(batch).map(lambda block: block.detach().double())
        v = self._split(self.like.detach())[1].reshape(batch.numel(), -1).double()
        return ConeInverse(factored(data, self.cones, v, self.cones.project(v)), self.like, self.batch_dims)


class ConeInverse(LinearOperator):
    """The inverse of :class:`ConeJacobian`, as far as its factorization is exact."""

    def __init__(self, factor: ConeFactor, like: Tensor, batch_dims: int) -> None:
        self.like, self.batch_dims, self.properties = like, batch_dims, frozenset()
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        return self._packed(x, self.factor.solve(*self._parts(x)))

    def apply_transpose(self, x: Tensor) -> Tensor:
        return self._packed(x, self.factor.solve_transposed(*self._parts(x)))

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(self.samples, self.size).double()
        return flat[:, : self.factor.n], flat[:, self.factor.n :]

    def _packed(self, like: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1).to(like.dtype).reshape(like.shape)


@dataclass(frozen=True)
class RefinedSolve(LinearSolver):
    """Solves with the factored inverse of a :class:`ConeJacobian`, maybe of one nearby, refined until it is rounding.

    Where that is singular it gives the least-squares solution of least norm.
    """

    def factor(self, operator: LinearOperator) -> Factor:
        return Factor(operator, operator.inverse)

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        operator, inverse = (o.transpose if transpose else o for o in (factor.operator, factor.data))
        x = inverse.apply(rhs)
        rest = rhs - operator.apply(x)
        eps = ROUNDING * torch.finfo(x.dtype).eps
        for _ in range(REFINEMENTS):
            left, size = (t.abs().amax(-1, keepdim=True) for t in (rest, torch.cat([x, rhs], dim=-1)))
            if not bool((left > eps * size).any()):
                break
            trial = x + inverse.apply(rest)
            after = rhs - operator.apply(trial)
            better = after.abs().amax(-1, keepdim=True) < left
            x, rest = torch.where(better, trial, x), torch.where(better, after, rest)
            if not bool((better & (after.abs().amax(-1, keepdim=True) < left / 2)).any()):
                break
        status = torch.where(x.isfinite().all(-1), int(Status.SUCCESS), int(Status.NONFINITE))
        return LinearSolution(x, status.to(torch.int8), rest.norm(dim=-1), torch.ones_like(status))
