"""Solvers for ``J = A - I``, the Jacobian of a fixed-point residual: ``x = A x - b`` is itself a fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from difflayers._mixing import History, mix
from difflayers._solution import Status
from difflayers.linear._base import Factor, IterativeLinearSolver, LinearSolution, LinearSolver, Product, shaped
from difflayers.linear._operator import Property

_FIXED_POINT: frozenset[Property] = frozenset({"fixed_point"})


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """``steps`` terms of the Neumann series after the first; phantom gradients (Geng et al. 2021, NeurIPS).

    Approximate: the error falls like the spectral radius of ``A`` to the power ``steps + 1``.
    """

    steps: int = 5
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[Property]] = _FIXED_POINT

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        operator = factor.operator
        product = operator.products(transpose)
        flat = rhs.reshape(operator.samples, operator.size)
        x = -flat
        for _ in range(self.steps):
            x = x + product(x) - flat
        status = torch.where(x.isfinite().all(1), int(Status.SUCCESS), int(Status.NONFINITE))
        return shaped(operator, x, status, None, torch.full_like(status, self.steps))


@dataclass(frozen=True)
class Identity(LinearSolver):
    """``J ≈ -I``: Jacobian-free backpropagation (Fung et al. 2022, AAAI). Approximate, and free."""

    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[Property]] = _FIXED_POINT

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        return Neumann(steps=0).solve(factor, rhs, transpose=transpose)


@dataclass(frozen=True)
class Picard(IterativeLinearSolver):
    """The Neumann series, summed until it converges. Keeps one vector; needs a spectral radius below one.

    Further options are those of :class:`IterativeLinearSolver`.
    """

    requires: ClassVar[frozenset[Property]] = _FIXED_POINT

    def iterate(self, product: Product, rhs: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _iterate(product, rhs, tolerance, self.max_steps, lambda x, r: x + r)


@dataclass(frozen=True)
class Anderson(IterativeLinearSolver):
    """Picard's iteration, accelerated from the last ``memory`` iterates.

    Further options are those of :class:`IterativeLinearSolver`.
    """

    memory: int = 8
    requires: ClassVar[frozenset[Property]] = _FIXED_POINT

    def iterate(self, product: Product, rhs: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        history = History.empty(rhs, self.memory)

        def step(x: Tensor, r: Tensor) -> Tensor:
            nonlocal history
            x, history = mix(history, x, r, 1.0)
            return x

        return _iterate(product, rhs, tolerance, self.max_steps, step)


def _iterate(
    product: Product, rhs: Tensor, tolerance: Tensor, max_steps: int, step: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    x, steps = -rhs, torch.zeros(rhs.shape[0], dtype=torch.int64, device=rhs.device)
    r = product(x) - rhs
    error: Tensor = r.norm(dim=1)
    for _ in range(max_steps):
        active = error.isfinite() & ~(error <= tolerance)
        if not active.any():
            break
        x = torch.where(active[:, None], step(x, r), x)
        r = torch.where(active[:, None], product(x) - rhs, r)
        error = r.norm(dim=1)
        steps = steps + active
    return x, error, steps
