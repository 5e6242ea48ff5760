"""The projector on the eigenvectors of positive eigenvalues, differentiable where eigenvectors are not.

Eigenvectors turn arbitrarily where eigenvalues meet, and autograd divides by the differences of eigenvalues. But the
subspace that belongs to all positive ones together moves smoothly as long as none crosses zero. Its derivative,
``T(E) = Σ qᵢqᵢᵀ E qⱼqⱼᵀ / |λᵢ - λⱼ|`` over pairs of different sign (Kato 1995, "Perturbation theory for linear
operators", II.2), divides by no other differences, and the derivative of ``T`` is made of ``T`` and products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function, forward_ad

from difflayers._autodiff import primal
from difflayers.qp.projections._call import batch_first


def positive_projector(X: Tensor) -> Tensor:
    """``P = Σ qqᵀ`` over the eigenvectors of symmetric ``X (*batch, n, n)`` with eigenvalues above rounding."""
    if torch.compiler.is_compiling():
        return _outside_dynamo(X)
    P: Tensor = _Projector.apply(X)[0]  # type: ignore[no-untyped-call]
    return P


# Dynamo can't trace a function with a jvp.
_outside_dynamo = _disable_dynamo(positive_projector)


class _Projector(Function):
    """``X -> (P, Q, M)``, with eigenvectors ``Q`` and, in their basis, the multipliers ``M`` of ``T``."""

    @staticmethod
    def forward(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, Q = torch.linalg.eigh(X)
        rounding = X.shape[-1] * torch.finfo(X.dtype).eps * torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        above = values > rounding
        across = above.unsqueeze(-1) != above.unsqueeze(-2)
        gap = (values.unsqueeze(-1) - values.unsqueeze(-2)).abs()
        P = (Q * above.unsqueeze(-2)) @ Q.mT
        return P, Q, torch.where(across, 1 / torch.where(across, gap, 1), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, C: Tensor, *_: Any) -> Tensor:
        X, P, Q, M = ctx.saved_tensors
        return _turned(X, P, C, Q, M)

    @staticmethod
    def jvp(ctx: Any, dX: Tensor) -> tuple[Tensor, None, None]:
        with forward_ad._set_fwd_grad_enabled(True):  # as in _adjoint
            X, P, Q, M = [primal(t) for t in ctx.saved_tensors]
            return _turned(X, P, dX, Q, M), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], X: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        return _Projector.apply(X.movedim(in_dims[0], 0)), (0, 0, 0)  # type: ignore[no-untyped-call]


class _Turn(Function):
    """``Y = T(E)``, with ``P`` and ``T`` those of ``X``; self-adjoint and linear in ``E``.

    With the sign matrix ``A = 2P - I``, ``Y`` is what satisfies ``XY - YX = (AE - EA)/2`` and ``AY + YA = 0``.
    Differentiating the first gives the part of ``dY`` across signs, and the second the rest:
    ``dY = T(dE + A (dP E - E dP - dX Y + Y dX)) - A (dP Y + Y dP)``.
    """

    @staticmethod
    def forward(X: Tensor, P: Tensor, E: Tensor, Q: Tensor, M: Tensor) -> Tensor:
        return Q @ (M * (Q.mT @ E @ Q)) @ Q.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, C: Tensor) -> tuple[Tensor | None, ...]:
        X, P, E, Q, M, Y = ctx.saved_tensors
        V = _turned(X, P, C, Q, M)
        AV, AC = _signed(P, V), _signed(P, C)
        in_X = Y.mT @ AV - AV @ Y.mT
        in_P = AV @ E.mT - E.mT @ AV - AC @ Y.mT - Y.mT @ AC
        return in_X, in_P, V, None, None

    @staticmethod
    def jvp(ctx: Any, dX: Tensor | None, dP: Tensor | None, dE: Tensor | None, *_: None) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            X, P, E, Q, M, Y = [primal(t) for t in ctx.saved_tensors]
            dX, dP, dE = (torch.zeros_like(X) if d is None else d for d in (dX, dP, dE))
            inner = dE + _signed(P, dP @ E - E @ dP - dX @ Y + Y @ dX)
            return _turned(X, P, inner, Q, M) - _signed(P, dP @ Y + Y @ dP)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return _turned(*batch_first(info.batch_size, in_dims, inputs)), 0


def _turned(X: Tensor, P: Tensor, E: Tensor, Q: Tensor, M: Tensor) -> Tensor:
    Y: Tensor = _Turn.apply(X, P, E, Q, M)  # type: ignore[no-untyped-call]
    return Y


def _signed(P: Tensor, Z: Tensor) -> Tensor:
    """``AZ``."""
    return 2 * P @ Z - Z
