"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from difflayers._mixing import with_row
from difflayers._problem import Form, Residual
from difflayers._solver import IterativeSolver
from difflayers.linear import LinearOperator
from difflayers.linear._direct import LowRankInverse


class _State(NamedTuple):
    """``left, right``: ``U, V`` of ``H = Uᵀ V - I``, ``(samples, memory, n)``; last ``z``, ``F(z)`` and ``H F(z)``."""

    left: Tensor
    right: Tensor
    z: Tensor
    value: Tensor
    product: Tensor
    used: int = -1  # before the first step

    def inverse(self, like: Tensor, batch_dims: int) -> LinearOperator:
        used = max(self.used, 0)
        return LowRankInverse(self.left[:, :used], self.right[:, :used], like, batch_dims)


@dataclass(frozen=True)
class Broyden(IterativeSolver):
    """Broyden's first ("good") method: the inverse of the Jacobian from ``-I`` by one rank per step.

    ``z <- z - H F(z)``, then ``H <- H + (s - H y) sᵀH / sᵀH y`` for the move ``s`` and the change ``y`` of ``F``:
    locally superlinear (Broyden 1965; Kelley 1995, chapter 7). It starts from ``H = -I``, which suits fixed points, and
    forgets everything after ``memory`` updates. What it learnt is a preconditioner for adjoints. Memory: ``2 · memory``
    states, whatever ``max_steps``, until the backward pass.

    Args:
        memory: updates before it forgets them all.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    memory: int = 60
    serves: ClassVar[frozenset[Form]] = frozenset({"root", "fixed_point"})
    divisible = True

    def init(self, residual: Residual, z: Tensor) -> _State:
        rows = residual.rows(z)
        left, right = rows.new_zeros(2, rows.shape[0], self.memory, rows.shape[1])
        return _State(left, right, rows, rows, rows)

    def inverse(self, residual: Residual, z: Tensor, state: _State) -> LinearOperator:
        return state.inverse(z, residual.problem.batch_dims)

    def step(self, residual: Residual, z: Tensor, state: _State) -> tuple[Tensor, _State]:
        shape = state.z.shape
        point, value = z.reshape(shape), residual(z).reshape(shape)
        old = state.inverse(state.z, 1)
        product = old.apply(value)
        if state.used >= 0:
            state, product = self._update(state, old, point, value, product)
        state = state._replace(z=point, value=value, product=product, used=max(state.used, 0))
        return z - product.reshape(z.shape), state

    def _update(
        self, state: _State, old: LinearOperator, z: Tensor, value: Tensor, product: Tensor
    ) -> tuple[_State, Tensor]:
        move, change = z - state.z, product - state.product
        row = old.apply_transpose(move)
        curvature = (move * change).sum(1, keepdim=True)
        # A sample that didn't move learns nothing; nor does one whose update would blow up.
        useful = curvature.abs() > 1e-8 * move.norm(dim=1, keepdim=True) * change.norm(dim=1, keepdim=True)
        column = torch.where(useful, (move - change) / torch.where(useful, curvature, 1), 0)
        slot = state.used % self.memory
        if slot == 0 and state.used:
            state = state._replace(left=torch.zeros_like(state.left), right=torch.zeros_like(state.right))
            return state._replace(used=0), -value
        state = state._replace(
            left=with_row(state.left, slot, column), right=with_row(state.right, slot, row), used=slot + 1
        )
        return state, product + column * (row * value).sum(1, keepdim=True)
