"""From the states of a multiscale equilibrium to logits: for an image, or for every pixel of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from difflayers._arrays import widen
from difflayers.errors import ProblemError


def spare(fn: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """``fn(*tensors)``, NaN and without gradients for samples that aren't finite.

    Outside of an equilibrium such a sample would reach everybody's weights, since ``0 · NaN`` is NaN.
    """
    finite = torch.stack([t.isfinite().flatten(1).all(1) for t in tensors]).all(0)
    value = fn(*[torch.where(widen(finite, t), t, 0) for t in tensors])
    return torch.where(widen(finite, value), value, torch.nan)


class ClassificationHead(nn.Module):
    """Logits of an image, from all resolutions of a :class:`MultiscaleDEQ`.

    ``h₀ = z₀``, ``hᵢ = relu(zᵢ + downᵢ(hᵢ₋₁))`` with strided 3 × 3 convolutions, then ``relu`` of a 1 × 1 convolution
    of the last one, its means over the fields of a grid, and a linear layer. The head of Bai, Koltun, Kolter 2020
    (NeurIPS, "Multiscale Deep Equilibrium Models") likewise gathers from fine to coarse.

    Input: the states ``(batch, channels[i], hᵢ, wᵢ)``; output ``(batch, classes)``. A sample whose states are NaN gives
    NaN, and no gradient.

    Args:
        channels: of every resolution, those of the :class:`MultiscaleDEQ`.
        classes: how many logits.
        features: how many of them every field of the grid has.
        grid: fields of the grid that is laid over an image, per side. 1 forgets where something was; the more, the
            faster classes are learnt that this tells apart, such as centered digits.

    >>> import torch
    >>> from difflayers.fixedpoint import ClassificationHead, MultiscaleDEQ
    >>> model = torch.nn.Sequential(MultiscaleDEQ(3, (8, 16)), ClassificationHead((8, 16), 10))
    >>> model(torch.randn(2, 3, 9, 9)).shape
    torch.Size([2, 10])
    """

    def __init__(self, channels: Sequence[int], classes: int, *, features: int = 64, grid: int = 2) -> None:
        super().__init__()
        self.channels, self.grid = _checked(channels), grid
        steps = zip(self.channels, self.channels[1:], strict=False)
        self.down = nn.ModuleList(nn.Conv2d(c, wider, 3, 2, 1) for c, wider in steps)
        self.last, self.linear = nn.Conv2d(self.channels[-1], features, 1), nn.Linear(features * grid**2, classes)
        for conv in (*self.down, self.last):
            nn.init.kaiming_normal_(cast(Tensor, conv.weight), nonlinearity="relu")

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The logits, ``(batch, classes)``."""
        _check(states, self.channels)
        return spare(self._logits, states)

    def _logits(self, h: Tensor, *coarser: Tensor) -> Tensor:
        for down, z in zip(self.down, coarser, strict=True):
            h = torch.relu(z + down(h))
        fields = adaptive_avg_pool2d(torch.relu(self.last(h)), self.grid)
        return self.linear(fields.flatten(1))  # type: ignore[no-any-return]


class SegmentationHead(nn.Module):
    """Logits of every pixel, from all resolutions of a :class:`MultiscaleDEQ`.

    ``out(relu(Σᵢ up(mixᵢ(zᵢ))))`` with 1 × 1 convolutions ``mixᵢ`` and ``out``, and bilinear interpolation ``up`` to
    the finest resolution.

    Input: the states ``(batch, channels[i], hᵢ, wᵢ)``; output ``(batch, classes, h₀, w₀)``, or of the ``size`` that the
    call asks for, as where images went through strided convolutions before they came to the layer. A sample whose
    states are NaN gives NaN, and no gradient.

    Args:
        channels: of every resolution, those of the :class:`MultiscaleDEQ`.
        classes: how many logits a pixel has.
        features: channels in which the resolutions are added up.

    >>> import torch
    >>> from difflayers.fixedpoint import MultiscaleDEQ, SegmentationHead
    >>> model = torch.nn.Sequential(MultiscaleDEQ(3, (8, 16)), SegmentationHead((8, 16), 2))
    >>> model(torch.randn(2, 3, 9, 9)).shape
    torch.Size([2, 2, 9, 9])
    """

    def __init__(self, channels: Sequence[int], classes: int, *, features: int = 64) -> None:
        super().__init__()
        self.channels = _checked(channels)
        self.mix = nn.ModuleList(nn.Conv2d(c, features, 1, bias=i == 0) for i, c in enumerate(self.channels))
        self.out = nn.Conv2d(features, classes, 1)

    def forward(self, states: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:
        """The logits, ``(batch, classes, *size)``; ``size`` is that of the first state if None."""
        _check(states, self.channels)
        logits = spare(self._logits, states)
        return logits if size is None else _resized(logits, size)

    def _logits(self, *states: Tensor) -> Tensor:
        first, *coarser = (mix(z) for mix, z in zip(self.mix, states, strict=True))
        total = sum((_resized(z, first.shape[-2:]) for z in coarser), start=first)
        return self.out(torch.relu(total))  # type: ignore[no-any-return]


def _resized(z: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(z, size=tuple(size), mode="bilinear", align_corners=False)


def _checked(channels: Sequence[int]) -> tuple[int, ...]:
    if not channels:
        raise ProblemError("channels is empty; give those of the MultiscaleDEQ, one number a resolution")
    return tuple(channels)


def _check(states: Any, channels: tuple[int, ...]) -> None:
    if isinstance(states, Tensor) or tuple(z.shape[1] for z in states if z.dim() == 4) != channels:
        found = "one tensor" if isinstance(states, Tensor) else [tuple(z.shape) for z in states]
        raise ProblemError(
            f"states must be {len(channels)} tensors (batch, channels, h, w) with {channels} channels, got {found}; "
            "pass what MultiscaleDEQ returns"
        )
