"""The default: a solver chosen by size and by what is known of the Jacobian."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.linear._base import Factor, LinearSolution, LinearSolver
from difflayers.linear._direct import LU
from difflayers.linear._krylov import CG, GCR, GMRES
from difflayers.linear._operator import LinearOperator


@dataclass(frozen=True)
class Auto(LinearSolver):
    """LU for small systems, Krylov solvers for large ones; what an operator says knows its structure comes first.

    LU up to ``dense_size`` unknowns per sample; above, conjugate gradients for positive definite Jacobians, conjugate
    residuals (GCR) for fixed points, and GMRES otherwise, with LU for what they leave unsolved if the matrices have at
    most ``dense_entries`` entries. Where the forward solver learnt something of the inverse, GCR starts from that.

    ``rtol`` is that of the iterative solvers; None is the tolerance of the solve whose derivative it serves.
    """

    rtol: float | None = None
    dense_size: int = 32
    dense_entries: int = 2**25

    def held_to(self, rtol: float) -> LinearSolver:
        return replace(self, rtol=rtol) if self.rtol is None else self

    def choose(self, operator: LinearOperator) -> LinearSolver:
        """The solver that serves this operator first."""
        if operator.solver is not None:
            return operator.solver
        if operator.inverse is not None:
            return GCR(rtol=self.rtol)
        if operator.size <= self.dense_size:
            return LU()
        if {"symmetric", "positive_definite"} <= operator.properties:
            return CG(rtol=self.rtol)
        # With -J positive real, GCR converges for any memory, so a short one will do.
        if "fixed_point" in operator.properties:
            return GCR(rtol=self.rtol, memory=10 if "contractive" in operator.properties else 60)
        return GMRES(rtol=self.rtol)

    def factor(self, operator: LinearOperator) -> Factor:
        solver = self.choose(operator)
        return Factor(operator, (solver, solver.factor(operator)))

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        solver, prepared = factor.data
        solution: LinearSolution = solver.solve(prepared, rhs, transpose=transpose)
        operator = factor.operator
        if solver.final or operator.samples * operator.size**2 > self.dense_entries:
            return solution
        solved = solution.status == Status.SUCCESS
        if bool(solved.all()):
            return solution
        return _merge(solved, solution, LU().solve(LU().factor(operator), rhs, transpose=transpose))


def _merge(keep: Tensor, first: LinearSolution, second: LinearSolution) -> LinearSolution:
    wide = keep.reshape(keep.shape + (1,) * (first.value.dim() - keep.dim()))
    return LinearSolution(
        value=torch.where(wide, first.value, second.value),
        status=torch.where(keep, first.status, second.status),
        residual=torch.where(keep, first.residual, second.residual),  # type: ignore[arg-type]
        steps=first.steps + torch.where(keep, 0, second.steps),
    )
