"""What every linear solver is: factor once, solve for many right-hand sides and for the transpose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from difflayers._arrays import default_tolerance
from difflayers._options import check_options
from difflayers._solution import Status
from difflayers.linear._operator import LinearOperator, Property

Product = Callable[[Tensor], Tensor]
Iterate = Callable[[Product, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
MEASURED = 4


@dataclass(frozen=True)
class Factor:
    """An operator, with what a solver prepared from it."""

    operator: LinearOperator
    data: Any = None


@dataclass(frozen=True)
class LinearSolution:
    """The answer ``(*batch, *event)``; status, residual norm and products used per sample, ``(*batch,)``.

    ``residual`` is None for approximate solvers, which don't look at it.
    """

    value: Tensor
    status: Tensor
    residual: Tensor | None
    steps: Tensor


class LinearSolver(ABC):
    """Solves ``J x = b`` and ``Jᵀ x = b`` for a batch of independent systems."""

    exact: ClassVar[bool] = True
    requires: ClassVar[frozenset[Property]] = frozenset()
    final: ClassVar[bool] = False  # whether no other solver finds what it doesn't

    def __post_init__(self) -> None:
        check_options(self)

    def supports(self, properties: frozenset[Property]) -> str | None:
        """Why this solver can't serve an operator with these properties, or None."""
        missing = sorted(self.requires - properties)
        return f"{type(self).__name__} needs a Jacobian that is {' and '.join(missing)}" if missing else None

    def held_to(self, rtol: float) -> LinearSolver:
        """This solver with the tolerance ``rtol``, if it has one and wasn't given any."""
        return self

    def factor(self, operator: LinearOperator) -> Factor:
        """Whatever doesn't depend on the right-hand side."""
        return Factor(operator)

    @abstractmethod
    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        """The solution for ``rhs`` of shape ``(*batch, *event)``."""


@dataclass(frozen=True)
class IterativeLinearSolver(LinearSolver):
    """A solver that needs products only and stops, per sample, at ``‖J x - b‖ <= atol + rtol ‖b‖``.

    Where rounding can make that false, the answer is confirmed by one more product and improved; what then remains
    above the tolerance is ``STALLED``.

    Args:
        rtol: relative tolerance; None is that of the solve whose derivative it serves, and on its own what the dtype
            allows with some room (4e-11 in float64, 2e-5 in float32).
        atol: absolute tolerance.
        max_steps: steps before a sample is ``MAX_STEPS``.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int = 1000
    refinements: ClassVar[int] = 3

    def held_to(self, rtol: float) -> LinearSolver:
        return replace(self, rtol=rtol) if self.rtol is None else self

    @abstractmethod
    def iterate(self, product: Product, rhs: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, residual norm, steps)`` for ``rhs`` of shape ``(samples, n)``."""

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        return self.solve_by(self.iterate, factor, rhs, transpose)

    def solve_by(self, iterate: Iterate, factor: Factor, rhs: Tensor, transpose: bool) -> LinearSolution:
        """The solution by an iteration like :meth:`iterate`."""
        operator = factor.operator
        flat = rhs.reshape(operator.samples, operator.size)
        rtol = default_tolerance(rhs.dtype) if self.rtol is None else self.rtol
        tolerance = self.atol + rtol * flat.norm(dim=1)
        with torch.no_grad():  # histories are written in place; derivatives of a solve are another solve
            product = _Measured(operator.products(transpose))
            x, residual, steps = self._confirmed(iterate, product, flat, tolerance)
        status = torch.where(steps < self.max_steps, int(Status.STALLED), int(Status.MAX_STEPS))
        status = torch.where(residual <= tolerance, int(Status.SUCCESS), status)
        finite = residual.isfinite() & x.isfinite().all(1)
        status = torch.where(finite, status, int(Status.NONFINITE)).to(torch.int8)
        return shaped(operator, x, status, residual, steps)

    def _confirmed(
        self, iterate: Iterate, product: _Measured, rhs: Tensor, tolerance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``iterate`` finds, with its true residual wherever the one that recursions carry may be another.

        They drift apart by about ``eps ‖J‖ ‖x‖`` (Greenbaum 1997, SIAM J. Matrix Anal. Appl. 18(3)). Iterating again
        from the true one is iterative refinement, which helps until that is all there is.
        """
        x, error, steps = iterate(product, rhs, tolerance)
        drift = torch.finfo(x.dtype).eps * product.norm * x.norm(dim=1)
        doubtful = (drift * steps.sqrt() > tolerance) & error.isfinite()
        if not bool(doubtful.any()):
            return x, error, steps
        again = doubtful & (error <= tolerance) & (drift < 10 * tolerance)
        r = rhs - product(x)
        error = torch.where(doubtful, r.norm(dim=1), error)
        for _ in range(self.refinements):
            again = again & (error > tolerance) & (steps < self.max_steps)
            if not bool(again.any()):
                break
            update, _, more = iterate(product, torch.where(again[:, None], r, 0), tolerance)
            refined = x + update
            r = rhs - product(refined)
            steps, again = steps + more, again & (r.norm(dim=1) < error)
            x, error = torch.where(again[:, None], refined, x), torch.where(again, r.norm(dim=1), error)
        return x, error, steps


class _Measured:
    """Products, and the largest factor by which the first few made a vector longer: about the operator's norm."""

    def __init__(self, product: Product) -> None:
        self.product, self.count = product, 0
        self.norm = torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        y = self.product(x)
        self.count += 1
        if self.count <= MEASURED:
            ratio = y.norm(dim=1) / x.norm(dim=1)
            self.norm = torch.fmax(self.norm, ratio) if self.count > 1 else ratio  # not NaN, which zeros give
        return y


def shaped(
    operator: LinearOperator, x: Tensor, status: Tensor, residual: Tensor | None, steps: Tensor
) -> LinearSolution:
    """Flat results in the shape of the operator's batch."""
    batch = operator.like.shape[: operator.batch_dims]
    return LinearSolution(
        value=x.reshape(operator.like.shape),
        status=status.to(torch.int8).reshape(batch),
        residual=None if residual is None else residual.reshape(batch),
        steps=steps.reshape(batch),
    )
