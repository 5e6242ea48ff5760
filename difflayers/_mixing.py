"""Anderson's mixing of the last few iterates, shared by the nonlinear and the linear solver of that name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32


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
    # Relative to the smallest residual kept: an absolute regularization stops acting like Anderson once residuals
    # are small, and the sum of weights stays one even where all residuals are the same (z + 1).
    scale = gram.diagonal(dim1=-2, dim2=-1).amin(-1).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    weights = torch.linalg.solve_ex(gram / scale + ridge, gram.new_ones(gram.shape[0], gram.shape[1], 1))[0]
    normalized: Tensor = weights / weights.sum(1, keepdim=True)
    return normalized


def with_row(tensor: Tensor, slot: int, row: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        tensor[:, slot] = row
        return tensor
    return torch.cat([tensor[:, :slot], row.unsqueeze(1), tensor[:, slot + 1 :]], dim=1)
