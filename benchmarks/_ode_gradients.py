"""Twenty gradients that are easy to get wrong: unstable, stiff, chaotic, damped, near a blow-up and beyond it.

The reference is SciPy's DOP853 or Radau on the variational equations, at a tolerance near rounding; no package that is
compared is involved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
Array = np.ndarray


@dataclass(frozen=True)
class Gradient:
    """The gradient, in the start and the parameters, of all outputs but the first, summed with weights 1, 2, ….

    Attributes:
        stiff: whether explicit methods need many more steps than the answer has turns.
        exists: whether the solution gets to the end.
    """

    name: str
    field: Field
    p: tuple[float, ...]
    y0: tuple[float, ...]
    t: tuple[float, ...]
    rtol: float = 1e-6
    atol: float = 1e-8
    stiff: bool = False
    exists: bool = True

    def start(self) -> tuple[Tensor, Tensor]:
        """``y0`` and ``p`` as leaves."""
        make = lambda numbers: torch.tensor(numbers, dtype=torch.float64, requires_grad=True)  # noqa: E731
        return make(self.y0), make(self.p)

    def of(self, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The gradient by ``solve(y0, p) -> (T, n)``, ``y0`` first."""
        leaves = self.start()
        loss = solve(*leaves)[1:] @ self.weights
        return torch.cat(torch.autograd.grad(loss.sum(), leaves)).detach()

    @property
    def weights(self) -> Tensor:
        return torch.arange(1, 1 + len(self.y0), dtype=torch.float64)

    def error(self, gradient: Tensor) -> float:
        """Relative, in the largest number of each of the two parts."""
        n = len(self.y0)
        parts = [(gradient[:n], self.reference[:n]), (gradient[n:], self.reference[n:])]
        return max(float((ours - true).abs().max() / true.abs().max()) for ours, true in parts)

    @cached_property
    def reference(self) -> Tensor:
        n, width = len(self.y0), len(self.y0) + len(self.p)
        both = np.concatenate([self.y0, np.eye(n, width).ravel()])
        method, rtol = ("Radau", 1e-10) if self.stiff else ("DOP853", 1e-13)
        total = torch.zeros(width, dtype=torch.float64)
        # Steps that end at outputs: interpolation is less accurate.
        for span in itertools.pairwise(self.t):
            found = solve_ivp(self._variational, span, both, method, rtol=rtol, atol=1e-15)
            if not found.success:
                raise RuntimeError(f"no reference for {self.name}: {found.message}")
            both = found.y[:, -1]
            total += self.weights @ torch.from_numpy(both[n:].reshape(n, width))
        return total

    def _variational(self, t: float, both: Array) -> Array:
        n = len(self.y0)
        y = torch.from_numpy(both[:n]).requires_grad_()
        p = self.start()[1]
        slope = self.field(torch.tensor(t, dtype=torch.float64), y, p)
        rows = [torch.autograd.grad(one, (y, p), retain_graph=True, materialize_grads=True) for one in slope]
        of_y, of_p = (torch.stack(parts).numpy() for parts in zip(*rows, strict=True))
        moved = of_y @ both[n:].reshape(n, -1)
        moved[:, n:] += of_p
        return np.concatenate([slope.detach().numpy(), moved.ravel()])


@cache
def kept(gradient: Gradient) -> Gradient:
    """The first one that was like this, with its reference: that takes a while."""
    return gradient


def _stacked(*parts: Tensor) -> Tensor:
    return torch.stack(parts, -1)


def logistic(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return p[0] * y * (1 - y)


def cubic(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return -p[0] * y**3


def relaxation(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return -p[0] * (y - torch.cos(t))


def repelled(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Away from the curve that it is on, but for the error of its start."""
    return p[0] * (y - torch.cos(t)) - torch.sin(t)


def squared(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return p[0] * y * y


def van_der_pol(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return _stacked(v, p[0] * (1 - x * x) * v - x)


def lorenz(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    x, u, z = y.unbind(-1)
    return _stacked(p[0] * (u - x), x * (p[1] - z) - u, x * u - p[2] * z)


def roessler(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    x, u, z = y.unbind(-1)
    return _stacked(-u - z, x + p[0] * u, p[1] + z * (x - p[2]))


def double_pendulum(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """Two rods of equal length and mass; angles and their speeds."""
    a, b, da, db = y.unbind(-1)
    c, s = torch.cos(a - b), torch.sin(a - b)
    one = -db * db * s - 2 * p[0] * torch.sin(a)
    two = da * da * s - p[0] * torch.sin(b)
    det = 2 - c * c
    return _stacked(da, db, (one - c * two) / det, (2 * two - c * one) / det)


def kepler(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    x, u, dx, du = y.unbind(-1)
    pull = -p[0] * (x * x + u * u) ** -1.5
    return _stacked(dx, du, pull * x, pull * u)


def robertson(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    first, second, third = p[0] * a, p[1] * b * b, p[2] * b * c
    return _stacked(third - first, first - third - second, second)


def oregonator(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    a, b, c = y.unbind(-1)
    return _stacked(p[0] * (b + a * (1 - p[1] * a - b)), (c - (1 + a) * b) / p[0], p[2] * (a - c))


_LORENZ = (10.0, 28.0, 8 / 3), (1.0, 1.0, 1.0)
_LOOSE = 1e-3, 1e-6

GRADIENTS = [
    Gradient("logistic to 10", logistic, (3.0,), (0.1,), (0.0, 1.0, 10.0)),
    Gradient("logistic to 10, 1e-3", logistic, (3.0,), (0.1,), (0.0, 1.0, 10.0), *_LOOSE),
    Gradient("logistic to 5, 1e-3", logistic, (3.0,), (0.1,), (0.0, 1.0, 5.0), *_LOOSE),
    Gradient("-20 y³ to 3", cubic, (20.0,), (1.0,), (0.0, 0.1, 3.0)),
    Gradient("-20 y³ to 3, 1e-3", cubic, (20.0,), (1.0,), (0.0, 0.1, 3.0), *_LOOSE),
    Gradient("-30 (y - cos t), 1e-3", relaxation, (30.0,), (2.0,), (0.0, 0.02, 1.0), *_LOOSE),
    Gradient("-1e4 (y - cos t)", relaxation, (1e4,), (2.0,), (0.0, 1e-4, 1.0), stiff=True),
    Gradient("5 (y - cos t) - sin t to 3", repelled, (5.0,), (1.001,), (0.0, 1.0, 3.0)),
    Gradient("y² to 0.999", squared, (1.0,), (1.0,), (0.0, 0.5, 0.999)),
    Gradient("y² to 2", squared, (1.0,), (1.0,), (0.0, 0.5, 2.0), exists=False),
    Gradient("van der Pol 1 to 10", van_der_pol, (1.0,), (2.0, 0.0), (0.0, 2.0, 10.0)),
    Gradient("van der Pol 5 to 10", van_der_pol, (5.0,), (2.0, 0.0), (0.0, 2.0, 10.0)),
    Gradient("van der Pol 20 to 40", van_der_pol, (20.0,), (2.0, 0.0), (0.0, 15.0, 40.0), stiff=True),
    Gradient("Lorenz to 3, 1e-3", lorenz, *_LORENZ, (0.0, 1.0, 3.0), *_LOOSE),
    Gradient("Lorenz to 6", lorenz, *_LORENZ, (0.0, 2.0, 6.0)),
    Gradient("Rössler to 30", roessler, (0.2, 0.2, 5.7), (1.0, 1.0, 0.0), (0.0, 10.0, 30.0)),
    Gradient("double pendulum to 5", double_pendulum, (9.81,), (2.0, 2.5, 0.0, 0.0), (0.0, 2.0, 5.0)),
    Gradient("Kepler, e = 0.9, one orbit", kepler, (1.0,), (0.1, 0.0, 0.0, math.sqrt(19)), (0.0, 3.0, 2 * math.pi)),
    Gradient("Robertson to 40", robertson, (0.04, 3e7, 1e4), (1.0, 0.0, 0.0), (0.0, 0.4, 40.0), 1e-6, 1e-10, True),
    Gradient("Oregonator to 20", oregonator, (77.27, 8.375e-6, 0.161), (1.0, 2.0, 3.0), (0.0, 5.0, 20.0), stiff=True),
]  # fmt: skip
