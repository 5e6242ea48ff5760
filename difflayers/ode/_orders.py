"""Derivatives that are exact up to some order, and refused beyond it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._autodiff import in_functorch, is_tracked, primal
from difflayers.errors import ProblemError


def limited(tensor: Tensor, orders: int, what: str) -> Tensor:
    """The same tensor, whose derivatives beyond so many orders raise a ``ProblemError`` about ``what``."""
    return tensor + _zero(tensor, orders, orders, what) if is_tracked(tensor) else tensor


def _zero(tensor: Tensor, left: int, orders: int, what: str) -> Tensor:
    zero: Tensor = _Countdown.apply(tensor, left, orders, what)  # type: ignore[no-untyped-call]
    return zero


class _Countdown(torch.autograd.Function):
    """Zero, whose derivative is zero with one order less ``left``: every derivative of a sum with it comes by here.

    The identity wouldn't do: its derivative is a constant, which nothing comes by any more.
    """

    @staticmethod
    def forward(tensor: Tensor, left: int, orders: int, what: str) -> Tensor:
        return torch.zeros_like(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensor, *ctx.limit = inputs
        ctx.save_for_backward(tensor)
        ctx.save_for_forward(tensor)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (tensor,) = ctx.saved_tensors
        return _derived(tensor, *ctx.limit), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            (tensor,) = ctx.saved_tensors
            return _derived(primal(tensor), *ctx.limit)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], tensor: Tensor, *limit: Any) -> tuple[Tensor, int | None]:
        return _zero(tensor, *limit), in_dims[0]


def _derived(tensor: Tensor, left: int, orders: int, what: str) -> Tensor:
    if not left:
        raise ProblemError(f"{what} have derivatives up to order {orders}, and this is one more")
    tracked = torch.is_grad_enabled() or in_functorch()
    return _zero(tensor, left - 1, orders, what) if tracked else torch.zeros_like(tensor)
