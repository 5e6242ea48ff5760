"""Least squares: where the gradient of a sum of squares vanishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from difflayers._autodiff import value_and_jacobian
from difflayers._problem import Form, Residual
from difflayers.errors import ProblemError
from difflayers.fixedpoint._minimize import Gradient, MinimizeProblem, checked


class SumOfSquares(Gradient):
    """``z -> Jᵀr(z)``, the gradient of ``½‖r(z)‖²``; ``raw`` is ``r``, ``(*batch, m)``."""

    def total(self, raw: Tensor) -> Tensor:
        return raw.square().sum() / 2

    def objective(self, z: Tensor) -> Tensor:
        return self._raw_at(z).square().sum(-1) / 2

    def equations(self, z: Tensor) -> Tensor:
        raw = self._raw_at(z)
        return raw.reshape(z.shape[: self.problem.batch_dims].numel(), raw.shape[-1])

    def _linearize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        value, jacobian = value_and_jacobian(self._raw, z, self.problem.batch_dims)
        self._raw_value = z, value.reshape(*z.shape[: self.problem.batch_dims], -1)
        return value, jacobian


@dataclass(frozen=True)
class LeastSquaresProblem(MinimizeProblem):
    """``Jᵀr = 0`` for residuals ``r(z, *params)`` and ``J = ∂r/∂z``: where ``½‖r‖²`` is stationary.

    Args:
        residual: a function or ``nn.Module`` of ``(z, *params)`` that returns the residuals, ``(*batch, ...)``, as many
            per sample as it likes, or a pytree of such.
        batch_dims: leading dimensions of ``z`` that index independent problems; a promise by the caller.
        properties: what is known of the Hessian ``JᵀJ + Σ rᵢ∇²rᵢ``.
    """

    form: ClassVar[Form] = "least_squares"
    advice: ClassVar[str] = "LevenbergMarquardt(), Dogleg() or ScipyLeastSquares()"
    residual_type: ClassVar[type[Residual]] = SumOfSquares

    def bind(self, *params: Any) -> Residual:
        return SumOfSquares(lambda z: rows_per_sample(self.residual(z, *params), z, self.batch_dims), self)


def rows_per_sample(value: Any, z: Any, batch_dims: int) -> Tensor:
    """Residuals as one row per sample, ``(*batch, m)``, after checking them."""
    like = pytree.tree_leaves(z)[0]
    batch = like.shape[:batch_dims]
    leaves = [checked(leaf, like, "residual") for leaf in pytree.tree_leaves(value)]
    for leaf in leaves:
        if leaf.shape[:batch_dims] != batch:
            raise ProblemError(
                f"residual returned shape {tuple(leaf.shape)}, but with batch_dims={batch_dims} and an unknown of "
                f"shape {tuple(like.shape)} it must begin with {tuple(batch)}"
            )
    # Not reshape, which can't infer a size where there are no samples.
    rows = [leaf.flatten(batch_dims) if leaf.dim() > batch_dims else leaf.unsqueeze(-1) for leaf in leaves]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)
