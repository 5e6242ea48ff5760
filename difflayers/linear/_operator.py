"""Linear maps on ``(*batch, *event)`` tensors, known by their products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from difflayers._autodiff import Pullback, pull, push
from difflayers.errors import ProblemError

if TYPE_CHECKING:
    from difflayers.linear._base import LinearSolver

Property = Literal["fixed_point", "contractive", "symmetric", "positive_definite"]
"""What is known of a Jacobian. ``fixed_point``: it is ``A - I`` for the derivative ``A`` of a map; ``contractive``:
that, and the symmetric part of ``A`` is below one."""


class LinearOperator(ABC):
    """A square linear map per sample, from and to ``(*batch, *event)``.

    Attributes:
        like: a tensor of that shape, dtype and device.
        batch_dims: how many leading dimensions index independent samples.
        properties: what is known of the map.
        inverse: roughly its inverse, such as what a quasi-Newton solver learnt on its way, or None.
        solver: the linear solver that knows its structure, or None.
    """

    like: Tensor
    batch_dims: int
    properties: frozenset[Property]
    inverse: LinearOperator | None = None
    solver: LinearSolver | None = None

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``J x``."""

    @abstractmethod
    def apply_transpose(self, x: Tensor) -> Tensor:
        """``Jᵀ x``."""

    @property
    def size(self) -> int:
        """Unknowns per sample."""
        return self.like.shape[self.batch_dims :].numel()

    @property
    def samples(self) -> int:
        """How many independent systems."""
        return self.like.shape[: self.batch_dims].numel()

    @cached_property
    def dense(self) -> Tensor:
        """The matrices, ``(samples, size, size)``, by ``size`` transposed products."""
        rows = [self.apply_transpose(unit).reshape(self.samples, self.size) for unit in self._units()]
        return torch.stack(rows, dim=1) if rows else self.like.new_zeros(self.samples, 0, 0)

    @property
    def transpose(self) -> LinearOperator:
        """The transposed map."""
        return _Transpose(self)

    def products(self, transpose: bool) -> Callable[[Tensor], Tensor]:
        """The product as a function on ``(samples, size)`` matrices."""
        apply = self.apply_transpose if transpose else self.apply
        return lambda x: apply(x.reshape(self.like.shape)).reshape(self.samples, self.size)

    def _units(self) -> list[Tensor]:
        eye = torch.eye(self.size, dtype=self.like.dtype, device=self.like.device)
        return [row.expand(self.samples, -1).reshape(self.like.shape) for row in eye]


class JacobianOperator(LinearOperator):
    """The Jacobian of ``fn`` at ``point`` through autodiff products; linearizes on first use."""

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        point: Tensor,
        batch_dims: int = 0,
        properties: frozenset[Property] = frozenset(),
        pullback: Pullback | None = None,
    ) -> None:
        self._fn, self.like, self.batch_dims, self.properties = fn, point, batch_dims, properties
        self._known_pullback = pullback

    @cached_property
    def _pullback(self) -> Pullback:
        return self._known_pullback or pull(self._fn, (self.like,))

    def apply(self, x: Tensor) -> Tensor:
        return push(self._fn, (self.like,), (x,))

    def apply_transpose(self, x: Tensor) -> Tensor:
        (pulled,) = self._pullback(x)
        if pulled is None:
            raise ProblemError(
                "the residual doesn't depend on its unknown: no differentiable torch operation leads from z to the "
                "result; look for .detach(), .item(), no_grad or NumPy inside it"
            )
        return pulled


class MatrixOperator(LinearOperator):
    """Given matrices ``(*batch, n, n)``, acting on ``(*batch, n)``."""

    def __init__(self, matrix: Tensor, properties: frozenset[Property] = frozenset()) -> None:
        self.matrix, self.like = matrix, matrix[..., 0]
        self.batch_dims, self.properties = matrix.dim() - 2, properties

    def apply(self, x: Tensor) -> Tensor:
        return (self.matrix @ x.unsqueeze(-1)).squeeze(-1)

    def apply_transpose(self, x: Tensor) -> Tensor:
        return (self.matrix.mT @ x.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def dense(self) -> Tensor:
        return self.matrix.reshape(self.samples, self.size, self.size)


class _Transpose(LinearOperator):
    def __init__(self, base: LinearOperator) -> None:
        self.base, self.like = base, base.like
        self.batch_dims, self.properties = base.batch_dims, base.properties
        self.inverse = None if base.inverse is None else base.inverse.transpose
        self.solver = base.solver

    def apply(self, x: Tensor) -> Tensor:
        return self.base.apply_transpose(x)

    def apply_transpose(self, x: Tensor) -> Tensor:
        return self.base.apply(x)

    @property
    def dense(self) -> Tensor:
        return self.base.dense.mT

    @property
    def transpose(self) -> LinearOperator:
        return self.base
