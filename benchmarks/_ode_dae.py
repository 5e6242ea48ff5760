"""Differential-algebraic equations of index 1, beside ordinary ones with the same solution, which have a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from _measure import stopwatch
from _ode_gradients import Field, Gradient, kept, robertson
from _ode_stiff import ROBERTSON, Stiff
from torch import Tensor

from difflayers.ode import AdaptiveSolver, ODESolution, consistent_initial, odeint

Start = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Consistent(Gradient):
    """A gradient through a start that satisfies algebraic equations, ``consistent(y0, p)`` in closed form."""

    consistent: Start = lambda y0, p: y0

    @property
    def ordinary(self) -> Gradient:
        """In a start that is any."""
        return Gradient(*[getattr(self, field.name) for field in fields(Gradient)])

    @cached_property
    def reference(self) -> Tensor:
        outer = kept(self.ordinary).reference
        y0, p = self.start()
        pulled = torch.autograd.grad(self.consistent(y0, p), (y0, p), outer[: len(y0)], materialize_grads=True)
        return torch.cat([pulled[0], pulled[1] + outer[len(y0) :]])


@dataclass(frozen=True)
class Dae(Stiff):
    """``mass · dy/dt = equations(t, y, p)`` with the solution of ``system``; ``mass`` is the diagonal."""

    system: Consistent
    equations: Field = robertson
    mass: tuple[float, ...] = ()

    @property
    def ordinary(self) -> Stiff:
        """Equations without mass with the same solution."""
        return Stiff(self.system.ordinary, self.plain, self.spread)

    def solution(self, solver: AdaptiveSolver, y0: Tensor, p: Tensor) -> ODESolution:
        options = {"batch_dims": 1, "solver": solver, "mass": self._matrix}
        return odeint(self._field, self.started(y0, p), self.system.t, (p,), **options)

    def started(self, y0: Tensor, p: Tensor) -> Tensor:
        """What is algebraic from the rest."""
        guess = torch.where(self._matrix.diagonal() == 0, 0, y0)
        found: Tensor = consistent_initial(self._field, guess, 0.0, (p,), mass=self._matrix, batch_dims=1)
        return found

    def start_time(self, samples: int, repetitions: int) -> float:
        """CPU seconds a sample of finding the start, without gradient."""
        y0, p = self.starts(samples), self.rates(samples)
        with torch.no_grad():
            return min(stopwatch(lambda: self.started(y0, p)) for _ in range(repetitions)) / samples

    @property
    def _matrix(self) -> Tensor:
        return torch.diag(torch.tensor(self.mass, dtype=torch.float64))

    def _field(self, t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return self.equations(t, y, p.unbind(-1))


def _conserved(y0: Tensor, p: Tensor) -> Tensor:
    a, b, _ = y0.unbind(-1)
    return torch.stack((a, b, 1 - a - b), -1)


def _robertson_dae(t: Tensor, y: Tensor, p: Sequence[Tensor]) -> Tensor:
    """What is conserved, in place of the last equation."""
    return torch.cat((robertson(t, y, p)[..., :2], y.sum(-1, keepdim=True) - 1), -1)


def _tension(y0: Tensor, p: Tensor) -> Tensor:
    x, z, u, v, _ = y0.unbind(-1)
    return torch.stack((x, z, u, v, (u * u + v * v - p[0] * z) / (x * x + z * z)), -1)


def _pendulum_dae(t: Tensor, y: Tensor, p: Sequence[Tensor]) -> Tensor:
    """A rod of length one: place, speed and tension, whose equation is the constraint derived twice."""
    x, z, u, v, tension = y.unbind(-1)
    constraint = u * u + v * v - tension * (x * x + z * z) - p[0] * z
    return torch.stack((u, v, -tension * x, -tension * z - p[0], constraint), -1)


def _pendulum(t: float, y: Sequence[float], p: Sequence[float]) -> list[float]:
    """Derived once more, so that the tension has a derivative too."""
    x, z, u, v, tension = y
    last = -(4 * tension * (u * x + v * z) + 3 * p[0] * v) / (x * x + z * z)
    return [u, v, -tension * x, -tension * z - p[0], last]


def _pendulum_field(t: Tensor, y: Tensor, p: Sequence[Tensor]) -> Tensor:
    return torch.stack(_pendulum(0.0, y.unbind(-1), p), -1)  # type: ignore[arg-type]


_SYSTEM = ROBERTSON.system
DAES = [
    Dae(
        Consistent(f"{_SYSTEM.name} as a DAE", robertson, _SYSTEM.p, _SYSTEM.y0, _SYSTEM.t, _SYSTEM.rtol,
                   _SYSTEM.atol, True, consistent=_conserved),
        ROBERTSON.plain, ROBERTSON.spread, _robertson_dae, (1.0, 1.0, 0.0),
    ),
    Dae(
        Consistent("pendulum to 2", _pendulum_field, (9.81,), (1.0, 0.0, 0.0, 0.5, 0.25), (0.0, 1.0, 2.0), 1e-7, 1e-9,
                   consistent=_tension),
        _pendulum, 0.1, _pendulum_dae, (1.0, 1.0, 1.0, 1.0, 0.0),
    ),
]  # fmt: skip
