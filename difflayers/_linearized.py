"""The linear systems behind derivatives, as problems like any other, and the solver that serves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from difflayers import linear
from difflayers._arrays import widen
from difflayers._problem import Problem, Residual
from difflayers._solution import Solution, has_answer
from difflayers._solver import Solver, empty_solution


class _Affine(Residual):
    """``x -> operator x + offset``."""

    def __init__(self, operator: linear.LinearOperator, offset: Tensor, problem: Problem) -> None:
        super().__init__(lambda x: operator.apply(x) + offset, problem)
        self.operator, self.offset = operator, offset


@dataclass(frozen=True)
class Linearized(Problem):
    """``Jx + b = 0``, what holds of a tangent, or ``Jᵀx + b = 0``, of an adjoint; in parameters ``(b, z, *params)``."""

    base: Problem
    transpose: bool
    residual: Residual | None = field(default=None, compare=False)
    inverse: linear.LinearOperator | None = field(default=None, compare=False)

    @property
    def batch_dims(self) -> int:  # type: ignore[override]
        return self.base.batch_dims

    @property
    def properties(self) -> frozenset[linear.Property]:  # type: ignore[override]
        return self.base.properties

    @property
    def points(self) -> int:  # type: ignore[override]
        return 2 + self.base.points

    def bind(self, *params: Any) -> Residual:
        offset, z, *rest = params
        operator = self.base.jacobian(self.residual or self.base.bind(*rest), z)
        if self.inverse is not None:
            operator.inverse = self.inverse
        return _Affine(operator.transpose if self.transpose else operator, offset, self)

    def jacobian(self, residual: Residual, z: Tensor) -> linear.LinearOperator:
        if not isinstance(residual, _Affine):
            raise TypeError(f"expected the residual that bind() made, got {type(residual).__name__}")
        return residual.operator

    def vmapped(self, in_dims: tuple[int | None, ...], randomness: str) -> Problem:
        # Inside, not around: the linearization then stays one per solve, not one per product.
        return replace(self, base=self.base.vmapped(in_dims[2:], randomness), residual=None, inverse=None)


@dataclass(frozen=True)
class LinearSolve(Solver):
    """Solves the adjoint and tangent systems of derivatives with a linear solver."""

    linear_solver: linear.LinearSolver

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if init.numel() == 0:
            return empty_solution(init, problem.batch_dims)
        residual = problem.bind(*params)
        operator = problem.jacobian(residual, init)
        result = self.linear_solver.solve(self.linear_solver.factor(operator), -params[0])
        stats = {"steps": result.steps}
        if result.residual is not None:
            stats["residual"] = result.residual
        # A derivative that wasn't found contributes nothing, whatever on_failure says of it.
        solved = has_answer(result.status)
        value = result.value if bool(solved.all()) else torch.where(widen(solved, result.value), result.value, 0)
        return Solution(value, result.status, stats)
