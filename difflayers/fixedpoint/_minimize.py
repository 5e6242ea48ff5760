"""Minima: where the gradient of an objective vanishes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from difflayers._arrays import Packing
from difflayers._autodiff import in_functorch, value_and_gradient
from difflayers._problem import Form, Problem, Residual, RootProblem
from difflayers.errors import ProblemError
from difflayers.linear import Property


class Gradient(Residual):
    """``z -> ∇L(z)`` of an objective, which is evaluated along with it and remembered too."""

    def __init__(self, fn: Callable[[Any], Tensor], problem: Problem) -> None:
        super().__init__(self._gradient, problem)
        self._raw = fn
        self._raw_value: tuple[Any, Tensor] | None = None
        self._curvature: tuple[Tensor, Tensor, Tensor] | None = None

    def raw(self, z: Any) -> Tensor:
        return self._raw(z)

    def packed(self, packing: Packing) -> Callable[[Tensor], Tensor]:
        return lambda z: self._raw(packing.unpack(z))

    def total(self, raw: Tensor) -> Tensor:
        """The sum of all samples' objectives."""
        return raw.sum()

    def objective(self, z: Tensor) -> Tensor:
        """``L(z)``, ``(*batch,)``; costs nothing where the gradient was evaluated."""
        return self._raw_at(z)

    def curvature(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient and the Hessian at ``z``, ``(samples, n)`` and ``(samples, n, n)``; remembered."""
        if self._curvature is None or self._curvature[0] is not z:
            hessian = self.jacobian(z).dense
            self._curvature = z, self(z).reshape(hessian.shape[:2]), hessian
        return self._curvature[1:]

    def _raw_at(self, z: Tensor) -> Tensor:
        if self._raw_value is None or self._raw_value[0] is not z:
            self._raw_value = z, self._raw(z)
            self.evaluations += 1
        return self._raw_value[1]

    def _gradient(self, z: Tensor) -> Tensor:
        value, gradient = value_and_gradient(self._raw, z, self.total)
        if not in_functorch():
            self._raw_value = z, value
        if gradient is None:
            raise ProblemError(
                "the function to minimize doesn't depend on its unknown: no differentiable torch operation leads from "
                "z to the result; look for .detach(), .item(), no_grad or NumPy inside it"
            )
        if z.requires_grad and torch.is_grad_enabled() and not gradient.requires_grad:
            return gradient + 0 * z  # linear in z, which is no mistake: its Hessian is zero, not missing
        return gradient


@dataclass(frozen=True)
class MinimizeProblem(RootProblem):
    """``∇_z L(z, *params) = 0`` at a minimum of ``L``; here ``residual`` is the objective ``L``.

    Args:
        residual: a function or ``nn.Module`` of ``(z, *params)`` that returns one real number per sample, of shape
            ``(*batch,)``: a scalar where ``batch_dims`` is 0.
        batch_dims: leading dimensions of ``z`` that index independent problems; a promise by the caller.
        properties: what is known of the Hessian: symmetric, and for a strictly convex objective positive definite.
    """

    residual: Callable[..., Any]
    batch_dims: int = 0
    form: ClassVar[Form] = "minimize"
    advice: ClassVar[str] = "LBFGS(), Newton() or ScipyMinimize()"
    residual_type: ClassVar[type[Residual]] = Gradient
    properties: frozenset[Property] = field(default=frozenset({"symmetric"}))

    def bind(self, *params: Any) -> Residual:
        return Gradient(lambda z: one_per_sample(self.residual(z, *params), z, self.batch_dims), self)


def one_per_sample(value: Any, z: Any, batch_dims: int) -> Tensor:
    """``value``, after checking that it is one real number per sample, of the dtype and on the device of ``z``."""
    like = pytree.tree_leaves(z)[0]
    value = checked(value, like, "objective")
    batch = tuple(like.shape[:batch_dims])
    if value.shape != batch:
        more = "sum over the rest" if value.shape[:batch_dims] == batch else "does batch_dims count the samples?"
        raise ProblemError(
            f"objective returned shape {tuple(value.shape)}, but with batch_dims={batch_dims} and an unknown of shape "
            f"{tuple(like.shape)} it must return one number per sample, {batch}; {more}"
        )
    return value  # type: ignore[no-any-return]


def checked(value: Any, like: Tensor, name: str) -> Tensor:
    """``value``, after checking that it is a tensor of the dtype and on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise ProblemError(f"{name} returned {type(value).__name__}; write it with torch operations")
    if value.device != like.device:
        raise ProblemError(f"{name} returned a tensor on {value.device}, but the unknown is on {like.device}")
    if value.dtype != like.dtype:
        if torch.is_autocast_enabled(like.device.type):
            return value.to(like.dtype)
        raise ProblemError(
            f"{name} returned {value.dtype}, but the unknown is {like.dtype}; convert parameters or init with .to()"
        )
    return value
