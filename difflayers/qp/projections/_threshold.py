"""The threshold of entmax: one implicit number per sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from difflayers._autodiff import primal
from difflayers.qp.projections._call import batch_first


def threshold(z: Tensor, power: Tensor) -> Tensor:
    """The ``τ`` with ``Σ max(0, z - τ)^power = 1``; ``z (*batch, n)`` has maximum zero, ``power (*batch, 1)``."""
    if torch.compiler.is_compiling():
        return _outside_dynamo(z, power)
    tau: Tensor = _Threshold.apply(z, power)  # type: ignore[no-untyped-call]
    return tau


# Dynamo can't trace a function with a jvp.
_outside_dynamo = _disable_dynamo(threshold)


class _Threshold(torch.autograd.Function):
    """Derivatives are formulas in ``z``, ``power`` and ``τ`` itself, so that they can be differentiated in turn."""

    @staticmethod
    def forward(z: Tensor, power: Tensor) -> Tensor:
        low, high = torch.full_like(power, -1), -(float(z.shape[-1]) ** (-1 / power))
        for _ in range(2 - round(math.log2(torch.finfo(z.dtype).eps))):  # a bit a step
            middle = (low + high) / 2
            above = (z - middle).clamp(min=0).pow(power).sum(-1, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        in_z, in_power = _partials(*ctx.saved_tensors)
        return cotangent * in_z, cotangent * in_power

    @staticmethod
    def jvp(ctx: Any, dz: Tensor | None, dpower: Tensor | None) -> Tensor:
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):  # as in _adjoint
            z, power, tau = [primal(t) for t in ctx.saved_tensors]
            in_z, in_power = _partials(z, power, tau)
            tangent = torch.zeros_like(tau) if dz is None else (in_z * dz).sum(-1, keepdim=True)
            return tangent if dpower is None else tangent + in_power * dpower

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], z: Tensor, power: Tensor) -> tuple[Tensor, int]:
        return threshold(*batch_first(info.batch_size, in_dims, (z, power))), 0


def _partials(z: Tensor, power: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """``∂τ/∂z`` and ``∂τ/∂power``."""
    support = z > tau
    above = torch.where(support, z - tau, 1)
    slope = torch.where(support, above ** (power - 1), 0)
    total = slope.sum(-1, keepdim=True)
    # One to any power has logarithm zero, so what isn't in the support adds nothing.
    return slope / total, (above**power * above.log()).sum(-1, keepdim=True) / (power * total)
