"""Anderson's mixing of the last few iterates, shared by the nonlinear and the linear solver of that name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32
from difflayers._autodiff import primal


class History(NamedTuple):
    """The last ``memory`` iterates and residuals of every sample, ``(batch, memory, n)``, and their Gram matrix."""

    iterates: Tensor
    residuals: Tensor
    gram: Tensor
    ridge: Tensor
    used: int = 0

    @classmethod
    def empty(cls, like: Tensor, memory: int) -> History:
        batch, n = like.shape
        memory = min(memory, n + 1)  # of more, many combinations would be the best
        blank = like.new_zeros(batch, memory, n)
        gram = at_least_float32(like.new_zeros(batch, memory, memory))
        ridge = 10 * torch.finfo(gram.dtype).eps * torch.eye(memory, dtype=gram.dtype, device=gram.device)
        return cls(blank, blank.clone(), gram, ridge.repeat(batch, 1, 1))


def mix(history: History, z: Tensor, residual: Tensor, damping: float) -> tuple[Tensor, History]:
    """Anderson's next iterate from ``z`` and ``residual``, both ``(batch, n)``.

    Minimizes ``‖Σ aᵢ rᵢ‖`` subject to ``Σ aᵢ = 1`` and returns ``Σ aᵢ (zᵢ + damping · rᵢ)`` (Walker and Ni 2011, SIAM
    J. Numer. Anal. 49(4), section 2).
    """
    memory = history.gram.shape[-1]
    slot = history.used % memory
    used = min(history.used + 1, memory)
    iterates = with_row(history.iterates, slot, torch.add(z, residual, alpha=damping))
    residuals = with_row(history.residuals, slot, residual)
    # (1, n) times (n, memory), not (memory, n) times (n, 1): several times faster in batched BLAS.
    row = torch.bmm(residual.unsqueeze(1), residuals.mT).squeeze(1).to(history.gram.dtype)
    gram = with_row(with_row(history.gram, slot, row).mT, slot, row).mT
    history = History(iterates, residuals, gram, history.ridge, history.used + 1)
    weights = _weights(gram[:, :used, :used], history.ridge[:, :used, :used]).to(z.dtype)
    return torch.bmm(weights.mT, iterates[:, :used]).squeeze(1), history


def _weights(gram: Tensor, ridge: Tensor) -> Tensor:
    # Of residuals scaled to length one: those kept span many orders of magnitude, which a regularization of another
    # size would be lost in, or drown; and without any the matrix is singular once there are more than unknowns. The
    # sum of weights stays one even where all residuals are the same (z + 1).
    tiny = torch.finfo(gram.dtype).tiny ** (2 / 3)  # with a derivative that is finite
    inverse = gram.diagonal(dim1=-2, dim2=-1).clamp_min(tiny).rsqrt().unsqueeze(-1)
    right = inverse / inverse.amax(1, keepdim=True)
    weights = right * _solved(gram * inverse * inverse.mT + ridge, right)
    normalized: Tensor = weights / weights.sum(1, keepdim=True)
    return normalized


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _Solve.apply(matrix, right)  # type: ignore[no-any-return,no-untyped-call]
    return torch.linalg.solve_ex(matrix, right)[0]  # type: ignore[no-any-return]


class _Solve(torch.autograd.Function):
    """``linalg.solve``, whose own forward mode over another derivative is wrong in torch 2.13."""

    @staticmethod
    def forward(matrix: Tensor, right: Tensor) -> Tensor:
        return torch.linalg.solve_ex(matrix, right)[0]  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        matrix, x = ctx.saved_tensors
        u = _solved(matrix.mT, cotangent)
        return -u @ x.mT, u

    @staticmethod
    def jvp(ctx: Any, matrix_tangent: Tensor, right_tangent: Tensor) -> Tensor:
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):  # for an enclosing transform
            matrix, x = (primal(t) for t in ctx.saved_tensors)
            return _solved(matrix, right_tangent - matrix_tangent @ x)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        stacked = (
            t.expand(info.batch_size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, in_dims, strict=True)
        )
        return _solved(*stacked), 0


def with_row(tensor: Tensor, slot: int, row: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        tensor[:, slot] = row
        return tensor
    return torch.cat([tensor[:, :slot], row.unsqueeze(1), tensor[:, slot + 1 :]], dim=1)
