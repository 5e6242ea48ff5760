"""A zoo of conditions whose answer has a closed form, or a slow and obvious algorithm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A fixed point ``z = fn(z, *params)`` with its answer as a differentiable function of the parameters."""

    name: str
    fn: Callable[..., Tensor]
    answer: Callable[..., Tensor]
    params: Callable[[], tuple[Tensor, ...]]
    shape: tuple[int, ...]
    batch_dims: int

    def __str__(self):
        return self.name

    def z0(self, *params):
        return torch.zeros(self.shape)


def iterated(fn, shape, steps=300):
    """The answer by brute force: the traced route that implicit derivatives are held against."""

    def answer(*params):
        z = torch.zeros(shape)
        for _ in range(steps):
            z = fn(z, *params)
        return z

    return answer


def tanh_cell(z, W, x):
    return torch.tanh(z @ W.mT + x)


def affine(z, A, b):
    return (A @ z.unsqueeze(-1)).squeeze(-1) + b


def solved(A, b):
    return torch.linalg.solve(torch.eye(A.shape[-1]) - A, b.unsqueeze(-1)).squeeze(-1)


def heron(z, a):
    return (z + a / z.clamp_min(0.1)) / 2


def _params(*shapes, scale=0.3):
    def make():
        generator = torch.Generator().manual_seed(1)
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64) * (scale if i == 0 else 1.0)
            for i, shape in enumerate(shapes)
        )

    return make


TANH = Case("tanh", tanh_cell, iterated(tanh_cell, (3, 4)), _params((4, 4), (3, 4)), (3, 4), 1)
AFFINE = Case("affine", affine, solved, _params((2, 3, 3), (2, 3)), (2, 3), 1)
ONE_SYSTEM = Case("one system", tanh_cell, iterated(tanh_cell, (2, 3)), _params((3, 3), (2, 3)), (2, 3), 0)
HERON = Case("heron", heron, torch.sqrt, lambda: (torch.tensor([2.0, 3.0, 0.5]),), (3,), 1)
ZOO = [TANH, AFFINE, ONE_SYSTEM, HERON]


class Cell(nn.Module):
    """A contraction: ``tanh(W z + b + x) / 2``."""

    def __init__(self, n=4):
        super().__init__()
        self.linear = nn.Linear(n, n)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.linear(z) + x)
