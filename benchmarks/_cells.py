"""The cells of the fixed-point benchmark, as modules ``z, x -> z`` on flat states ``(batch, n)``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scalar = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A cell with its data: ``z = cell(z, x)`` from zero, to a relative residual of ``tolerance``.

    Attributes:
        steps: as many as any solver could need, for it or for its adjoint.
        smooth: whether the cell is differentiable everywhere.
    """

    name: str
    cell: nn.Module
    x: Tensor
    z0: Tensor
    tolerance: float = 1e-8
    steps: int = 300
    smooth: bool = True

    @property
    def weights(self) -> list[Tensor]:
        return list(self.cell.parameters())

    @property
    def cotangent(self) -> Tensor:
        """The derivative of the loss with respect to the answer."""
        generator = torch.Generator().manual_seed(5)
        return torch.randn(self.z0.shape, generator=generator, dtype=torch.float64).to(self.z0.dtype)

    def of(self, cell: nn.Module) -> Case:
        """The same data with another cell."""
        return replace(self, cell=cell)

    def in_float32(self, tolerance: float) -> Case:
        cell = copy.deepcopy(self.cell).float()
        name = f"{self.name}, float32"
        return replace(self, name=name, cell=cell, x=self.x.float(), z0=self.z0.float(), tolerance=tolerance)


class Dense(nn.Module):
    """``activation(z Wᵀ + x Uᵀ + b)``; ``slope`` gives the derivative of the activation from its value."""

    def __init__(self, W: Tensor, U: Tensor, b: Tensor, activation: Scalar, slope: Scalar) -> None:
        super().__init__()
        self.W, self.U, self.b = nn.Parameter(W), nn.Parameter(U), nn.Parameter(b)
        self.activation, self.slope = activation, slope

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.activation(z @ self.W.T + (x @ self.U.T + self.b))


class Residual(nn.Module):
    """The residual block of multiscale deep equilibrium models (Bai, Koltun, Kolter 2020, NeurIPS)."""

    def __init__(self, channels: int, inner: int, std: float = 0.01) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (
            nn.GroupNorm(8, inner),
            nn.GroupNorm(8, channels),
            nn.GroupNorm(8, channels),
        )
        nn.init.normal_(self.conv1.weight, std=std)
        nn.init.normal_(self.conv2.weight, std=std)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = self.norm1(F.relu(self.conv1(z)))
        value: Tensor = self.norm3(F.relu(z + self.norm2(x + self.conv2(inner))))
        return value


class Flat(nn.Module):
    """A cell on images, for solvers that want ``(batch, n)``."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        value: Tensor = self.cell(z.reshape(x.shape), x).flatten(1)
        return value


class Multiscale(nn.Module):
    """Residual blocks at halved resolutions, fused at every step."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        pairs = [(i, j) for i in range(levels) for j in range(levels) if i != j]
        pairs.sort(key=lambda pair: pair[0] > pair[1])  # in the order in which the prototype drew its weights
        self.blocks = nn.ModuleList(Residual(channels, channels) for _ in range(levels))
        self.paths = nn.ModuleDict({f"{i}{j}": _path(channels, j - i) for i, j in pairs})
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(levels))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inputs = [F.avg_pool2d(x, 2**i) * 2**i for i in range(len(self.blocks))]
        states = z.split([i[0].numel() for i in inputs], dim=1)
        y = [block(s.reshape(i.shape), i) for block, s, i in zip(self.blocks, states, inputs, strict=True)]
        fused = [norm(self._fused(y, j)).flatten(1) for j, norm in enumerate(self.norms)]
        return torch.cat(fused, dim=1)

    def _fused(self, y: list[Tensor], j: int) -> Tensor:
        total = y[j]
        for i, source in enumerate(y):
            if i < j:
                total = total + 0.05 * self.paths[f"{i}{j}"](source)
            if i > j:
                total = total + 0.05 * F.interpolate(self.paths[f"{i}{j}"](source), scale_factor=2 ** (i - j))
        return total


def _path(channels: int, down: int) -> nn.Module:
    if down < 0:
        return nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(*[nn.Conv2d(channels, channels, 3, 2, 1, bias=False) for _ in range(down)])


def linear(size: int = 64, batch: int = 128, radius: float = 0.9) -> Case:
    W, U, b, x = _data(size, batch)
    W = W * (radius / torch.linalg.eigvals(W).abs().max())
    name = f"linear cell {size}, radius {radius}, batch {batch}"
    return Case(
        name, Dense(W, U, b, lambda y: y, torch.ones_like), x, torch.zeros_like(x), steps=round(30 / (1 - radius))
    )


def tanh(size: int = 128, batch: int = 256, gain: float = 1.15) -> Case:
    W, U, b, x = _data(size, batch)
    name = f"tanh cell {size}, batch {batch}"
    return Case(name, Dense(gain * W, U, b, torch.tanh, lambda y: 1 - y**2), x, torch.zeros_like(x))


def conv(batch: int = 64) -> Case:
    torch.manual_seed(0)
    cell = Flat(Residual(48, 64)).double()
    x = torch.randn(batch, 48, 8, 8, dtype=torch.float64)
    name = f"conv cell 48×8×8, batch {batch}"
    return Case(name, cell, x, torch.zeros_like(x).flatten(1), smooth=False)


def multiscale(batch: int = 32, channels: int = 24, levels: int = 3) -> Case:
    torch.manual_seed(0)
    cell = Multiscale(channels, levels).double()
    x = torch.randn(batch, channels, 8, 8, dtype=torch.float64)
    n = sum(channels * (8 >> i) ** 2 for i in range(levels))
    name = f"three-resolution cell, batch {batch}"
    return Case(name, cell, x, x.new_zeros(batch, n), smooth=False)


def reference(case: Case) -> tuple[float, Tensor]:
    """The relative residual of a float64 answer, and the gradient of all weights there; no package involved.

    Newton's method and dense solves for dense cells, plain iterations to the end of float64 for the others.
    """
    rule = _by_dense_solves if isinstance(case.cell, Dense) else _by_iterations
    z, gradients = rule(case, case.cell, case.cotangent)
    return relative_residual(case, z), torch.cat([g.flatten() for g in gradients])


def relative_residual(case: Case, z: Tensor) -> float:
    """The largest ``‖f(z) - z‖ / ‖f(z)‖`` of a sample."""
    with torch.no_grad():
        return _distance(case.cell(z, case.x), z)


def _by_dense_solves(case: Case, cell: Dense, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
    z, eye = case.z0, torch.eye(len(cell.b), dtype=case.z0.dtype)
    with torch.no_grad():
        for _ in range(100):
            z = cell(z, case.x)
        for _ in range(6):
            value = cell(z, case.x)
            z = z + torch.linalg.solve(eye - cell.slope(value).unsqueeze(-1) * cell.W, value - z)
        slope = cell.slope(z)
        u = slope * torch.linalg.solve((eye - slope.unsqueeze(-1) * cell.W).mT, cotangent)
    return z, [u.T @ z, u.T @ case.x, u.sum(0)]


def _by_iterations(case: Case, cell: nn.Module, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        z = _iterated(lambda z: cell(z, case.x), case.z0)
    z.requires_grad_()
    value = cell(z, case.x)
    u = _iterated(lambda u: cotangent + torch.autograd.grad(value, z, u, retain_graph=True)[0], cotangent)
    return z.detach(), list(torch.autograd.grad(value, case.weights, u))


def _iterated(f: Scalar, start: Tensor, tolerance: float = 2e-14) -> Tensor:
    for _ in range(1000):
        value = f(start)
        if _distance(value, start) < tolerance:
            return value
        start = value
    raise RuntimeError(f"plain iteration doesn't reach {tolerance}")


def _distance(value: Tensor, z: Tensor) -> float:
    return float(((value - z).norm(dim=1) / value.norm(dim=1)).max())


def _data(size: int, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, size), (size, size), (size,), (batch, size)]
    W, U, b, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return W / size**0.5, U / size**0.5, b, x
