"""A small convolutional cell on 8×8 digits: at equilibrium, or applied once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from difflayers import ImplicitAdjoint, linear
from difflayers.fixedpoint import DEQ, Anderson


class Data(NamedTuple):
    """Images ``(samples, 1, 8, 8)`` in [0, 1] and labels, for training and for testing."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(seed: int, device: str) -> Data:
    """The 1797 handwritten digits that ship with scikit-learn, a fifth of them for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)

    def image(array: Any) -> Tensor:
        return torch.as_tensor(array / 16.0, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8)

    return Data(image(x), torch.as_tensor(y, device=device), image(x_test), torch.as_tensor(y_test, device=device))


class Cell(nn.Module):
    """``tanh(W * z + b + x)`` with a 3×3 convolution ``W``.

    The absolute weights of an output channel sum to at most ``bound``, which in practice keeps the cell a contraction
    while it trains. (One would prove it, and leave hardly anything to iterate.)
    """

    def __init__(self, channels: int, bound: float = 3.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bound = bound

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        weight = self.conv.weight
        scale = (self.bound / weight.abs().sum((1, 2, 3), keepdim=True)).clamp(max=1)
        return torch.tanh(nn.functional.conv2d(z, weight * scale, self.conv.bias, padding=1) + x)


class Classifier(nn.Module):
    """Digits to ten logits through a cell, at its equilibrium or applied once from zero."""

    def __init__(self, *, equilibrium: bool, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        cell = Cell(channels)
        adjoint = ImplicitAdjoint(linear.GMRES(rtol=1e-3, max_steps=60, restart=20))
        self.core: nn.Module = (
            DEQ(cell, solver=Anderson(rtol=1e-3, atol=1e-5, max_steps=60), adjoint=adjoint, on_failure="ignore")
            if equilibrium
            else cell
        )
        self.head = nn.Linear(channels * 16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        z = self.core(x) if isinstance(self.core, DEQ) else self.core(torch.zeros_like(x), x)
        logits: Tensor = self.head(nn.functional.avg_pool2d(z, 2).flatten(1))
        return logits
