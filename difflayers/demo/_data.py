"""The digits, and the small distortions under which they stay what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


def distort(images: Tensor) -> Tensor:
    """Each image turned by up to 13°, sheared by 0.15, stretched by 10 % and shifted by 0.7 pixels, at random."""
    pixel = 2 / images.shape[-1]
    angle, shear, wide, high, right, down = (
        torch.empty(len(images), device=images.device).uniform_(-limit, limit)
        for limit in (0.225, 0.15, 0.1, 0.1, 0.7 * pixel, 0.7 * pixel)
    )
    rows = [
        torch.stack([angle.cos() * (1 + wide), shear - angle.sin(), right], dim=1),
        torch.stack([angle.sin(), angle.cos() * (1 + high), down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
