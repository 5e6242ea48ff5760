"""Output times: shared, one row for every sample, or ragged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from difflayers._arrays import to_tensors
from difflayers._autodiff import in_functorch
from difflayers.errors import ProblemError
from difflayers.ode._state import State


def as_times(t: Any) -> Tensor:
    """``t`` as a tensor, ragged times padded with NaN.

    Python's numbers stay what they are, whatever torch's default precision.
    """
    t = to_tensors(t)
    if isinstance(t, list | tuple) and any(isinstance(own, Tensor) and own.dim() for own in t):
        return _padded(t)
    if isinstance(t, list | tuple) and len({len(own) if isinstance(own, list | tuple) else -1 for own in t}) > 1:
        return _padded([torch.as_tensor(own, dtype=torch.float64) for own in t])
    times = torch.as_tensor(t)
    return times if isinstance(t, Tensor) or not times.is_floating_point() else torch.as_tensor(t, dtype=torch.float64)


def _padded(rows: Any) -> Tensor:
    shapes = [tuple(torch.as_tensor(own).shape) for own in rows]
    if any(len(shape) != 1 or not shape[0] for shape in shapes):
        raise ProblemError(f"a list of output times has one tensor (T,) for every sample; its shapes are {shapes}")
    rows = [torch.as_tensor(own) for own in rows]
    rows = [own if own.is_floating_point() else own.to(torch.get_default_dtype()) for own in rows]
    return pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def output_times(t: Any, state: State, like: Tensor) -> Tensor:
    """``t`` as a tensor ``(T,)`` or ``(samples, T)``, the latter with NaN after the last time of a sample.

    Raises:
        ProblemError: it is empty, of another shape, not finite or not monotone.
    """
    times = as_times(t).to(like.device)
    if not times.is_floating_point():
        if times.is_complex():
            raise ProblemError("t is complex, but time is real")
        times = times.to(like.dtype)
    if times.dim() == 0 or times.shape[-1] == 0:
        raise ProblemError(f"t has shape {tuple(times.shape)}; pass the output times, the first one that of y0")
    if times.dim() > 1 and (times.shape[:-1] != state.batch or not state.batch):
        raise ProblemError(
            f"t has shape {tuple(times.shape)}, but must be (T,) or, with the batch of y0, "
            f"{(*state.batch, 'T') if state.batch else '(*batch, T) with batch_dims'}"
        )
    if not in_functorch():
        _check_monotone(filled(times.detach())[0])
    return times.reshape(-1, times.shape[-1]) if times.dim() > 1 else times


def filled(times: Tensor) -> tuple[Tensor, Tensor | None]:
    """Times in which a sample that is through stays at its last one; and which of them it asked for, None for all."""
    if times.dim() < 2:
        return times, None
    absent = times.isnan()
    if not in_functorch() and not bool(absent.any()):
        return times, None
    # From the first one on: NaN between times stays, and isn't finite.
    after = absent.flip(-1).long().cumprod(-1).flip(-1).bool()
    count = (~after).sum(-1, keepdim=True)
    last = times.gather(-1, (count - 1).clamp_min(0))
    return torch.where(after, last, times), ~after


def _check_monotone(times: Tensor) -> None:
    if not bool(times.isfinite().all()):
        raise ProblemError("t isn't finite; only after the last time of a sample may (*batch, T) be padded with NaN")
    steps = times.diff(dim=-1)
    good = (steps >= 0).all(-1) | (steps <= 0).all(-1)
    if not bool(good.all()):
        where = "" if times.dim() == 1 else f" in {int((~good).sum())} of {good.numel()} samples"
        raise ProblemError(f"t must increase or decrease, and doesn't{where}; sort it, or solve in pieces")
