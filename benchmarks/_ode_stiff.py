"""Stiff systems: batches of them for ours, one after the other for SciPy, each with a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from _measure import stopwatch
from _ode_gradients import Gradient, kept, oregonator, robertson, van_der_pol
from scipy.integrate import solve_ivp
from torch import Tensor

from difflayers.ode import AdaptiveSolver, ODESolution, odeint

Plain = Callable[[float, Sequence[float], Sequence[float]], list[float]]


@dataclass(frozen=True)
class Stiff:
    """One system, and the same in plain Python, which SciPy is fastest with."""

    system: Gradient
    plain: Plain
    spread: float = 0.0

    def rates(self, samples: int) -> Tensor:
        """Parameters of every sample, the first ones those of the textbook."""
        generator = torch.Generator().manual_seed(0)
        p = torch.tensor(self.system.p, dtype=torch.float64)
        noise = torch.randn(samples, len(p), generator=generator, dtype=torch.float64)
        noise[0] = 0
        return p * torch.exp(self.spread * noise)

    def starts(self, samples: int) -> Tensor:
        """Where every sample starts."""
        return torch.tensor(self.system.y0, dtype=torch.float64).repeat(samples, 1)

    def solution(self, solver: AdaptiveSolver, y0: Tensor, p: Tensor) -> ODESolution:
        def field(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
            return self.system.field(t, y, p.unbind(-1))

        return odeint(field, y0, self.system.t, (p,), batch_dims=1, solver=solver)

    def gradient(self, solver: AdaptiveSolver, samples: int) -> tuple[Tensor, Tensor]:
        """Ends ``(samples, n)``, and gradients ``(samples, n + p)`` of their weighted sums."""
        y0, p = self.starts(samples).requires_grad_(), self.rates(samples).requires_grad_()
        ys = self.solution(solver, y0, p).ys
        found = torch.autograd.grad((ys[1:] @ self.system.weights).sum(), (y0, p))
        return ys[-1].detach(), torch.cat(found, 1)

    def sample(self, i: int, samples: int) -> Gradient:
        """One sample as a problem with a reference of its own."""
        return kept(replace(self.system, p=tuple(self.rates(samples)[i].tolist())))

    def scipy(self, method: str, p: Sequence[float], rtol: float, atol: float) -> np.ndarray:
        """The end of one sample."""
        t = self.system.t
        options = {"rtol": rtol, "atol": atol, "args": (p,)}
        found = solve_ivp(self.plain, (t[0], t[-1]), self.system.y0, method, **options)
        end: np.ndarray = found.y[:, -1]
        return end

    def scipy_loop(self, method: str, samples: int, count: int) -> tuple[float, float]:
        """CPU seconds a sample and relative error of the first ``count`` of so many samples."""
        rates = self.rates(samples)[:count].tolist()
        ends: list[np.ndarray] = []
        rtol, atol = self.system.rtol, self.system.atol
        seconds = stopwatch(lambda: ends.extend(self.scipy(method, p, rtol, atol) for p in rates)) / count
        return seconds, self.end_error(np.stack(ends), samples)

    def end_error(self, ends: np.ndarray, samples: int) -> float:
        """The largest relative error of a number at the end, of the first samples."""
        count = min(3, len(ends))
        rates = self.rates(samples)[:count].tolist()
        rtol, atol = 1e-11, 1e-3 * self.system.atol
        best = np.stack([self.scipy("Radau", p, rtol, atol) for p in rates])
        return float(np.abs(ends[:count] / best - 1).max())


def _robertson(t: float, y: Sequence[float], p: Sequence[float]) -> list[float]:
    a, b, c = y
    first, second, third = p[0] * a, p[1] * b * b, p[2] * b * c
    return [third - first, first - third - second, second]


def _van_der_pol(t: float, y: Sequence[float], p: Sequence[float]) -> list[float]:
    return [y[1], p[0] * (1 - y[0] ** 2) * y[1] - y[0]]


def _oregonator(t: float, y: Sequence[float], p: Sequence[float]) -> list[float]:
    a, b, c = y
    return [p[0] * (b + a * (1 - p[1] * a - b)), (c - (1 + a) * b) / p[0], p[2] * (a - c)]


def _hires(t: float, y: Sequence[float], p: Sequence[float]) -> list[float]:
    a, b, c, d, e, f, g, h = y
    met = p[1] * f * h
    return [
        -p[0] * a + 0.43 * b + 8.32 * c + 0.0007,
        p[0] * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + p[0] * c - 1.12 * d,
        -1.745 * e + 0.43 * f + 0.43 * g,
        -met + 0.69 * d + p[0] * e - 0.43 * f + 0.69 * g,
        met - 1.81 * g,
        -met + 1.81 * g,
    ]


def hires(t: Tensor, y: Tensor, p: Sequence[Tensor]) -> Tensor:
    return torch.stack(_hires(0.0, y.unbind(-1), p), -1)  # type: ignore[arg-type]


ROBERTSON = Stiff(
    Gradient("Robertson to 1e4", robertson, (0.04, 3e7, 1e4), (1.0, 0.0, 0.0), (0.0, 1e4), 1e-7, 1e-11, True),
    _robertson,
    0.1,
)
# Hairer and Wanner 1996, "Solving Ordinary Differential Equations II", section IV.10.
CLASSICS = [
    Stiff(
        Gradient("van der Pol, μ = 1000, to 2000", van_der_pol, (1e3,), (2.0, 0.0), (0.0, 2e3), 1e-7, 1e-9, True),
        _van_der_pol,
        0.1,
    ),
    Stiff(
        Gradient(
            "HIRES", hires, (1.71, 280.0), (1.0, *[0.0] * 6, 0.0057), (0.0, 321.8122), 1e-7, 1e-11, True
        ),
        _hires,
    ),
    Stiff(
        Gradient(
            "OREGO to 360", oregonator, (77.27, 8.375e-6, 0.161), (1.0, 2.0, 3.0), (0.0, 360.0), 1e-7, 1e-9, True
        ),
        _oregonator,
    ),
]  # fmt: skip
