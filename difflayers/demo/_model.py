"""Digit classifiers around one convolutional cell: at its equilibrium, applied once, and as an explicit network."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from difflayers import ImplicitAdjoint, linear
from difflayers.fixedpoint import DEQ, Anderson

Kind = Literal["equilibrium", "once", "explicit"]

# A gradient step needs no more accuracy than its batch's noise; a measurement does.
TRAINING = Anderson(rtol=1e-2, atol=1e-5, max_steps=40, memory=5)
TESTING = Anderson(rtol=1e-4, atol=1e-6, max_steps=60, memory=5)


class Cell(nn.Module):
    """``z = gelu(x + W₂ * gelu(norm(W₁ * z)))``, with 3×3 convolutions.

    The norm bounds what comes after it, so ``z`` stays in a bounded set, and by Brouwer's theorem an equilibrium
    exists whatever the weights. That it is found quickly is left to the penalty on the Jacobian.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, inner)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.05)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = gelu(self.norm(self.conv1(z)))
        return gelu(x + self.conv2(inner))


class Once(nn.Module):
    """The cell applied once from zero: what the equilibrium model is without its equilibrium."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.cell(torch.zeros_like(x), x)
        return z


class Blocks(nn.Module):
    """Cells with weights of their own, one after the other, each a residual block: an ordinary network."""

    def __init__(self, *cells: Cell) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, z: Tensor) -> Tensor:
        for cell in self.cells:
            z = cell(z, z)
        return z


class Classifier(nn.Module):
    """Images to ten logits: a convolution, a core that keeps the shape, and a linear head."""

    def __init__(self, core: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(8, channels))
        self.core = core
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(channels * 16, 10))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.core(self.stem(images)))
        return logits

    def penalized(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits and, where there is an equilibrium, the mean size of the cell's Jacobian there."""
        if not isinstance(self.core, DEQ):
            return self(images), None
        x = self.stem(images)
        solution = self.core.solve(x)
        return self.head(solution.value), self.core.jacobian_penalty(solution, x).mean()


def classifier(kind: Kind) -> Classifier:
    """The model; all kinds have 24 000 parameters, to within 2 %."""
    if kind == "explicit":
        return Classifier(Blocks(*(Cell(16, 24) for _ in range(3))), 16)
    cell = Cell(32, 32)
    return Classifier(Once(cell) if kind == "once" else equilibrium(cell), 32)


def equilibrium(cell: Cell) -> DEQ:
    """The cell at its equilibrium, solved and differentiated as accurately as training needs."""
    adjoint = ImplicitAdjoint(linear.GCR(rtol=1e-2, max_steps=30))
    # Failures are counted and reported; a warning per step would say no more.
    return DEQ(cell, solver=TRAINING, adjoint=adjoint, on_failure="ignore")
