"""Monotone operator equilibrium networks: layers with one equilibrium, whatever their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._areas import available_solvers, resolve
from difflayers._implicit import ImplicitFunction
from difflayers._problem import Residual
from difflayers._solution import OnFailure, Solution
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.fixedpoint._heads import spare
from difflayers.fixedpoint._splitting import (
    Blocks,
    ForwardBackward,
    MonotoneProblem,
    MonotoneResidual,
    PeacemanRachford,
)

SPLITTINGS: dict[str, type[Solver]] = {"forward_backward": ForwardBackward, "peaceman_rachford": PeacemanRachford}


class _Monotone(nn.Module):
    """What the dense and the convolutional layer share."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(
        self,
        injection: nn.Module,
        margin: float,
        solver: str | Solver,
        adjoint: Adjoint | None,
        on_failure: OnFailure,
    ) -> None:
        super().__init__()
        if not margin > 0:
            raise ProblemError(f"margin must be positive, got {margin}; it is what makes the equilibrium unique")
        self.injection, self.margin, self.on_failure = injection, margin, on_failure
        self.solver = resolve(solver, {**available_solvers("fixedpoint"), **SPLITTINGS})
        self.adjoint = adjoint or ImplicitAdjoint()
        self._checked: dict[int, set[Any]] = {}

    def forward(self, x: Tensor, *, init: Any = None) -> Tensor:
        """The equilibrium for the input ``x``; ``init`` starts the solve (default: zeros)."""
        value: Tensor = self.solve(x, init=init).value
        return value

    def _function(self, problem: MonotoneProblem) -> ImplicitFunction:
        function = ImplicitFunction(problem, self.solver, self.adjoint, self.on_failure)
        object.__setattr__(function, "_checked", self._checked.setdefault(problem.batch_dims, set()))
        return function

    def solve(self, x: Tensor, *, init: Any = None, progress: bool = False) -> Solution:
        """The equilibrium with status and statistics, its value on the graph; with a bar if ``progress``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"margin={self.margin}, solver={self.solver!r}, adjoint={self.adjoint!r}"


class MonotoneDEQ(_Monotone):
    """The one ``z`` with ``z = relu(W z + U x + b)``, where ``W = (1 - m)I - AᵀA + B - Bᵀ``, as a layer.

    ``I - W ⪰ mI`` whatever ``A`` and ``B`` are, so the equilibrium exists and is unique, and splittings find it from
    anywhere (Winston and Kolter 2020, NeurIPS, "Monotone operator equilibrium networks", sections 3.1 to 3.3). Where an
    entry of ``W z + U x + b`` is exactly zero relu has a kink; on this set of measure zero the gradient is the one for
    slope zero.

    Input ``(*batch, in_features)``, output ``(*batch, features)``; every sample is solved on its own.

    Args:
        in_features: size of an input.
        features: size of ``z``.
        margin: ``m > 0``. Large ones are easy to solve for, small ones let more through.
        bias: whether there is a ``b``.
        solver: ``"peaceman_rachford"``, ``"forward_backward"``, or any solver for fixed points; an object or a name.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``; see :class:`~difflayers.ImplicitFunction`.

    >>> import torch
    >>> from difflayers.fixedpoint import MonotoneDEQ
    >>> layer = MonotoneDEQ(3, 8)
    >>> z = layer(torch.ones(2, 3))
    >>> bool(torch.allclose(z, torch.relu(z @ layer.weight.mT + layer.injection(torch.ones(2, 3))), atol=1e-4))
    True
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        margin: float = 1.0,
        bias: bool = True,
        solver: str | Solver = "peaceman_rachford",
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__(nn.Linear(in_features, features, bias=bias), margin, solver, adjoint, on_failure)
        bound = features**-0.5
        self.A = nn.Parameter(torch.empty(features, features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.empty(features, features).uniform_(-bound, bound))
        self._function(MonotoneProblem())

    @property
    def weight(self) -> Tensor:
        """``W``, ``(features, features)``."""
        eye = torch.eye(self.A.shape[0], dtype=self.A.dtype, device=self.A.device)
        return (1 - self.margin) * eye - self.A.mT @ self.A + self.B - self.B.mT

    def solve(self, x: Tensor, *, init: Any = None, progress: bool = False) -> Solution:
        """The equilibrium with status and statistics, its value on the graph; with a bar if ``progress``."""
        batch = x.shape[:-1]
        offset = spare(self.injection, (x.reshape(batch.numel(), x.shape[-1]),))
        offset = offset.reshape(*batch, offset.shape[-1])
        problem = MonotoneProblem(batch_dims=offset.dim() - 1)
        init = torch.zeros_like(offset) if init is None else init
        return self._function(problem)(self.weight, offset, init=init, progress=progress)


class MonotoneConvDEQ(_Monotone):
    """The same with circular convolutions: ``A`` and ``B`` are kernels, ``W`` and its inverses act by frequency.

    On ``h × w`` images circular convolutions are block diagonal in the Fourier basis, with one ``channels × channels``
    block per frequency, so that ``(I + α (I - W))⁻¹`` costs one small factorization per frequency and two transforms
    (Winston and Kolter 2020, section 3.4 and appendix).

    Input ``(*batch, in_channels, h, w)``, output ``(*batch, channels, h, w)``; both at least ``kernel_size`` wide and
    high.

    Args:
        in_channels: channels of an input.
        channels: channels of ``z``.
        kernel_size: of all kernels, odd.
        margin: ``m > 0``.
        bias: whether the injection has one.
        solver: as in :class:`MonotoneDEQ`.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        *,
        margin: float = 1.0,
        bias: bool = True,
        solver: str | Solver = "peaceman_rachford",
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        if kernel_size % 2 == 0:
            raise ProblemError(f"kernel_size must be odd, got {kernel_size}")
        injection = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)
        super().__init__(injection, margin, solver, adjoint, on_failure)
        shape, bound = (channels, channels, kernel_size, kernel_size), channels**-0.5 / kernel_size
        self.A = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self._function(ConvolutionProblem(margin=margin))

    def solve(self, x: Tensor, *, init: Any = None, progress: bool = False) -> Solution:
        """The equilibrium with status and statistics, its value on the graph; with a bar if ``progress``."""
        size = self.A.shape[-1]
        if min(x.shape[-2:]) < size:
            raise ProblemError(f"images are {x.shape[-2]} × {x.shape[-1]}, smaller than the kernel of {size} × {size}")
        batch = x.shape[:-3]
        offset = spare(self.injection, (x.reshape(batch.numel(), *x.shape[-3:]),))
        offset = offset.reshape(*batch, *offset.shape[-3:])
        problem = ConvolutionProblem(batch_dims=len(batch), margin=self.margin)
        init = torch.zeros_like(offset) if init is None else init
        return self._function(problem)(self.A, self.B, offset, init=init, progress=progress)


class Circulant(Blocks):
    """``(1 - m)I - AᵀA + B - Bᵀ`` for circular convolutions on ``(channels, h, w)``, as one block per frequency."""

    def __init__(self, A: Tensor, B: Tensor, margin: float, size: torch.Size) -> None:
        self.A, self.B, self.margin, self.size = A, B, margin, size

    @property
    def matrices(self) -> Tensor:  # type: ignore[override]
        a, b = (_spectrum(kernel, self.size) for kernel in (self.A, self.B))
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return (1 - self.margin) * eye - a.mH @ a + b - b.mH

    def apply(self, z: Tensor) -> Tensor:
        images = z.reshape(-1, *z.shape[-3:])
        rotated = _convolve(images, self.B) - _transposed(images, self.B)
        result = (1 - self.margin) * images - _transposed(_convolve(images, self.A), self.A) + rotated
        return result.reshape(z.shape)

    def analyze(self, z: Tensor) -> Tensor:
        return torch.fft.rfft2(z).flatten(-2).mT  # type: ignore[no-any-return]

    def synthesize(self, coefficients: Tensor, like: Tensor) -> Tensor:
        h, w = self.size
        frequencies = coefficients.mT.unflatten(-1, (h, w // 2 + 1))
        return torch.fft.irfft2(frequencies, s=(h, w)).to(like.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ConvolutionProblem(MonotoneProblem):
    """``z = relu(W z + x)`` in the parameters ``(A, B, x)`` of :class:`MonotoneConvDEQ`."""

    margin: float = 1.0
    shared = 2

    def bind(self, *params: Any) -> Residual:
        A, B, offset = params
        return MonotoneResidual(Circulant(A, B, self.margin, offset.shape[-2:]), offset, self)


def _convolve(images: Tensor, kernel: Tensor) -> Tensor:
    margin = kernel.shape[-1] // 2
    return conv2d(pad(images, (margin,) * 4, mode="circular"), kernel)


def _transposed(images: Tensor, kernel: Tensor) -> Tensor:
    return _convolve(images, kernel.transpose(0, 1).flip((-2, -1)))


def _spectrum(kernel: Tensor, size: torch.Size) -> Tensor:
    """The blocks ``(frequencies, out, in)`` of a circular cross-correlation, for real images of that size."""
    h, w = size
    margin = kernel.shape[-1] // 2
    image = torch.zeros(*kernel.shape[:2], h, w, dtype=kernel.dtype, device=kernel.device)
    image = pad(kernel, (0, w - kernel.shape[-1], 0, h - kernel.shape[-2])) + image
    centered = torch.roll(image, (-margin, -margin), (-2, -1))
    return torch.fft.rfft2(centered).conj().flatten(-2).movedim(-1, 0)  # type: ignore[no-any-return]
