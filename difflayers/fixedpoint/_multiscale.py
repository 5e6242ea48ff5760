"""Multiscale deep equilibrium layer: several resolutions of an image, in equilibrium with one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate

from difflayers._adjoint import Adjoint
from difflayers._solution import OnFailure, Solution
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.fixedpoint._deq import DEQ, Equilibrium
from difflayers.fixedpoint._heads import spare

# The gain at initialization of what closes a loop: blocks, and paths from coarser to finer resolutions.
FEEDBACK = 0.25
# Of the norms in the cell. Where an image is blank a group can be almost constant, and a norm with torch's default so
# steep there (its slope is up to 1/√ε) that no solver gets hold of the equilibrium.
EPSILON = 0.1


class MultiscaleDEQ(nn.Module):
    """Features of an image at several resolutions, held at equilibrium together.

    The equilibrium is that of all ``zᵢ`` at once, where each resolution has half the height and width of the one before
    it, rounded up (Bai, Koltun, Kolter 2020, NeurIPS, "Multiscale Deep Equilibrium Models")::

        yᵢ = xᵢ + conv(norm(relu(conv(zᵢ))))        residual blocks; x₀ is the stem of x, the other xᵢ are 0
        zⱼ = norm(yⱼ + Σᵢ pathᵢⱼ(relu(yᵢ)))         fusion; strided 3 × 3 convolutions down, 1 × 1 up

    Norms are group norms, which leave samples independent. The residual is around the input and not around ``z``: in
    front of a norm, ``z`` added to ``y`` would only damp the iteration. The last norm sees the input too, directly or
    through the finer resolutions, whose paths start strong where those that feed back start weak; thus the cell
    starts as a contraction. Training may end that, which :meth:`jacobian_penalty` sees.

    Input ``(batch, in_channels, h, w)``, of any size that leaves the last resolution 2 × 2 pixels; output a tuple of
    ``(batch, channels[i], ⌈h / 2ⁱ⌉, ⌈w / 2ⁱ⌉)``, for a :class:`ClassificationHead` or a :class:`SegmentationHead`.

    Args:
        in_channels: channels of an image.
        channels: of every resolution, finest first.
        groups: of every group norm; divides all ``channels``, and leaves each group two or more.
        dropout: probability with which an entry within the residual blocks is zeroed, one mask per solve.
        solver: a solver object, or the name of one with its defaults.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``; see :class:`~difflayers.ImplicitFunction`.

    >>> import torch
    >>> from difflayers.fixedpoint import MultiscaleDEQ
    >>> layer = MultiscaleDEQ(3, (8, 16, 32))
    >>> [tuple(z.shape) for z in layer(torch.randn(2, 3, 13, 10))]
    [(2, 8, 13, 10), (2, 16, 7, 5), (2, 32, 4, 3)]
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        *,
        groups: int = 4,
        dropout: float = 0.0,
        solver: str | Solver = "anderson",
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        self.in_channels, self.channels = in_channels, tuple(channels)
        _check_channels(self.channels, groups)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, self.channels[0], 3, padding=1), nn.GroupNorm(groups, self.channels[0])
        )
        cell = MultiscaleCell(self.channels, groups, dropout)
        self.deq = DEQ(cell, solver=solver, adjoint=adjoint, on_failure=on_failure, start=cell.start)

    def forward(self, x: Tensor, *, init: Sequence[Tensor] | Solution | None = None) -> tuple[Tensor, ...]:
        """The states, finest first; ``init`` as in :meth:`solve`."""
        states: tuple[Tensor, ...] = self.solve(x, init=init).value
        return states

    def solve(
        self,
        x: Tensor,
        *,
        init: Sequence[Tensor] | Solution | None = None,
        at: Sequence[int] = (),
        progress: bool = False,
    ) -> Equilibrium:
        """The equilibrium with status and statistics, its value on the graph; arguments as in :meth:`DEQ.solve`.

        Raises:
            ProblemError: the images have the wrong number of channels, or too few pixels.
        """
        return self.deq.solve(self._injection(x), init=init, at=at, progress=progress)

    def jacobian_penalty(
        self, solution: Equilibrium, x: Tensor, *, samples: int = 1, generator: Generator | None = None
    ) -> Tensor:
        """How far from a contraction the cell is, ``(batch,)``; see :meth:`DEQ.jacobian_penalty`."""
        return self.deq.jacobian_penalty(solution, self._injection(x), samples=samples, generator=generator)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, channels={self.channels}"

    def _injection(self, x: Tensor) -> Tensor:
        least = 2 ** (len(self.channels) - 1) + 1
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ProblemError(f"x must be images (batch, {self.in_channels}, h, w), got shape {tuple(x.shape)}")
        if min(x.shape[-2:]) < least:
            raise ProblemError(
                f"images are {x.shape[-2]} × {x.shape[-1]}, but {len(self.channels)} resolutions, of which the last "
                f"has 2 × 2 pixels or more, need at least {least} × {least}; give the layer fewer channels"
            )
        return spare(self.stem, (x,)).to(x.dtype)


class MultiscaleCell(nn.Module):
    """``(z, x) -> z`` of :class:`MultiscaleDEQ`; ``z`` is the tuple of states, ``x`` is like the first of them."""

    def __init__(self, channels: tuple[int, ...], groups: int, dropout: float) -> None:
        super().__init__()
        self.channels = channels
        levels = range(len(channels))
        self.blocks = nn.ModuleList(Block(c, groups, dropout) for c in channels)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, c, eps=EPSILON) for c in channels)
        # paths[j][i] leads from resolution i to resolution j.
        self.paths = nn.ModuleList(nn.ModuleList(_path(channels, i, j) for i in levels) for j in levels)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """Zeros."""
        batch, _, h, w = x.shape
        return tuple(x.new_zeros(batch, c, -(-h // 2**i), -(-w // 2**i)) for i, c in enumerate(self.channels))

    def forward(self, z: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
        first, *coarser = (block(state) for block, state in zip(self.blocks, z, strict=True))
        y = [x + first, *coarser]
        return tuple(norm(self._fused(y, j)) for j, norm in enumerate(self.norms))

    def _fused(self, y: Sequence[Tensor], j: int) -> Tensor:
        total = y[j]
        for i, path in enumerate(cast(nn.ModuleList, self.paths[j])):
            if i < j:
                total = total + path(torch.relu(y[i]))
            if i > j:
                total = total + interpolate(path(torch.relu(y[i])), size=y[j].shape[-2:])
        return total


class Block(nn.Module):
    """What a resolution adds to its input: ``conv(norm(relu(conv(z))))``."""

    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv3x3(channels, channels), _conv3x3(channels, channels, gain=FEEDBACK)
        self.norm = nn.GroupNorm(groups, channels, eps=EPSILON)
        # Dropout with probability 0 would draw masks nevertheless.
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        return self.conv2(self.dropout(self.norm(torch.relu(self.conv1(z)))))  # type: ignore[no-any-return]


def _path(channels: tuple[int, ...], i: int, j: int) -> nn.Module:
    if i == j:
        return nn.Identity()
    if i > j:
        return _scaled(nn.Conv2d(channels[i], channels[j], 1, bias=False), FEEDBACK)
    steps: list[nn.Module] = []
    for c, wider in zip(channels[i:j], channels[i + 1 : j + 1], strict=True):
        steps += [_conv3x3(c, wider, stride=2, gain=2**0.5), nn.ReLU()]
    return nn.Sequential(*steps[:-1])


def _conv3x3(channels: int, out: int, stride: int = 1, gain: float = 1.0) -> nn.Conv2d:
    return _scaled(nn.Conv2d(channels, out, 3, stride, 1, bias=False), gain)


def _scaled(conv: nn.Conv2d, gain: float) -> nn.Conv2d:
    """With outputs ``gain`` times as large as the inputs are, in the mean square."""
    nn.init.normal_(conv.weight, std=gain / conv.weight[0].numel() ** 0.5)
    return conv


def _check_channels(channels: tuple[int, ...], groups: int) -> None:
    if not channels:
        raise ProblemError("channels is empty; give the number of channels of every resolution, such as (16, 32)")
    if groups < 1 or any(c % groups or c < 2 * groups for c in channels):
        raise ProblemError(
            f"groups={groups} must divide each of channels={channels} and leave two or more in a group; "
            "choose multiples of 8, or fewer groups"
        )
