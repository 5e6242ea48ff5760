"""Anderson's mixing of the last few iterates, shared by the nonlinear and the linear solver of that name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32


@dataclass(frozen=True)
class History:
    """The last ``memory`` iterates and residuals of every sample, ``(batch, memory, n)``, and their Gram matrix."""

    iterates: Tensor
    residuals: Tensor
    gram: Tensor
    count: int = 0

    @classmethod
    def empty(cls, like: Tensor, memory: int) -> History:
        batch, n = like.shape
        blank = like.new_zeros(batch, memory, n)
        return cls(blank, blank.clone(), like.new_zeros(batch, memory, memory))


def mix(history: History, z: Tensor, residual: Tensor, damping: float) -> tuple[Tensor, History]:
    """Anderson's next iterate from ``z`` and ``residual``, both ``(batch, n)``.

    Minimizes ``‖Σ aᵢ rᵢ‖`` subject to ``Σ aᵢ = 1`` and returns ``Σ aᵢ (zᵢ + damping · rᵢ)`` (Walker and Ni 2011, SIAM
    J. Numer. Anal. 49(4), section 2).
    """
    memory = history.gram.shape[-1]
    slot = history.count % memory
    used = min(history.count + 1, memory)
    iterates = _with_row(history.iterates, slot, torch.add(z, residual, alpha=damping))
    residuals = _with_row(history.residuals, slot, residual)
    row = torch.bmm(residuals, residual.unsqueeze(-1)).squeeze(-1)
    gram = _with_row(history.gram, slot, row)
    gram = _with_row(gram.mT, slot, row).mT if torch.is_grad_enabled() else _with_column(gram, slot, row)
    weights = _weights(gram[:, :used, :used])
    mixed = torch.bmm(weights.unsqueeze(1), iterates[:, :used]).squeeze(1)
    return mixed, History(iterates, residuals, gram, history.count + 1)


def _weights(gram: Tensor) -> Tensor:
    dtype, gram = gram.dtype, at_least_float32(gram)
    finfo = torch.finfo(gram.dtype)
    # Relative to the smallest residual kept: an absolute regularization stops acting like Anderson once residuals
    # are small, and the sum of weights stays one even where all residuals are the same (z + 1).
    scale = gram.diagonal(dim1=-2, dim2=-1).amin(-1).clamp_min(finfo.tiny)[:, None, None]
    system = gram / scale + 10 * finfo.eps * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve_ex(system, torch.ones_like(system[..., :1]))[0].squeeze(-1)
    normalized: Tensor = weights / weights.sum(-1, keepdim=True)
    return normalized.to(dtype)


def _with_row(tensor: Tensor, slot: int, row: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        tensor[:, slot] = row
        return tensor
    return torch.cat([tensor[:, :slot], row.unsqueeze(1), tensor[:, slot + 1 :]], dim=1)


def _with_column(tensor: Tensor, slot: int, column: Tensor) -> Tensor:
    tensor[:, :, slot] = column
    return tensor
