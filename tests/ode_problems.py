"""Stiff problems and differential-algebraic ones, with answers from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

DOUBLE = torch.float64


@dataclass(frozen=True)
class StiffProblem:
    """``M dy/dt = fn(t, y, *args)`` from ``y0``, and what is known at the last of the times ``t``."""

    name: str
    fn: Callable[..., Tensor]
    y0: Tensor
    t: list[float]
    args: tuple[Tensor, ...] = ()
    mass: Tensor | None = None
    end: Tensor | None = None

    def __str__(self) -> str:
        return self.name


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=DOUBLE)


RATES = vector(0.04, 3e7, 1e4)


def robertson(t, y, rates):
    k1, k2, k3 = rates.unbind(-1)
    a, b, c = y.unbind(-1)
    first, second, third = k1 * a, k2 * b * b, k3 * b * c
    return torch.stack((third - first, first - third - second, second), -1)


def robertson_dae(t, y, rates):
    """The same with what is conserved in place of the last equation."""
    return torch.cat((robertson(t, y, rates)[..., :2], y.sum(-1, keepdim=True) - 1), -1)


def van_der_pol(t, y, mu):
    x, v = y.unbind(-1)
    return torch.stack((v, mu * (1 - x * x) * v - x), -1)


def hires(t, y):
    a, b, c, d, e, f, g, h = y.unbind(-1)
    return torch.stack((
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
        1.71 * a - 8.75 * b,
        -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d,
        -1.745 * e + 0.43 * f + 0.43 * g,
        -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        280 * f * h - 1.81 * g,
        -280 * f * h + 1.81 * g,
    ), -1)  # fmt: skip


def orego(t, y, rates):
    s, q, w = rates.unbind(-1)
    a, b, c = y.unbind(-1)
    return torch.stack((s * (b + a * (1 - q * a - b)), (c - (1 + a) * b) / s, w * (a - c)), -1)


def pendulum(t, y, gravity):
    """A rod of length one: places, speeds and the tension ``λ``, whose equation is the constraint derived twice."""
    x, z, u, v, tension = y.unbind(-1)
    constraint = u * u + v * v - tension * (x * x + z * z) - gravity * z
    return torch.stack((u, v, -tension * x, -tension * z - gravity, constraint), -1)


# The ends of HIRES, OREGO and van der Pol's equation: Mazzia, Magherini 2008, "Test Set for IVP Solvers", release 2.4.
PROBLEMS = [
    StiffProblem("robertson", robertson, vector(1, 0, 0), [0.0, 0.4, 40.0, 1e4], (RATES,)),
    StiffProblem("robertson_dae", robertson_dae, vector(1, 0, 0), [0.0, 0.4, 40.0, 1e4], (RATES,),
                 torch.diag(vector(1, 1, 0))),
    StiffProblem("van_der_pol", van_der_pol, vector(2, 0), [0.0, 600.0, 1500.0, 2000.0], (vector(1000.0).squeeze(),),
                 end=vector(1.706167732170469, -0.8928097010248125e-3)),
    StiffProblem("hires", hires, vector(1, 0, 0, 0, 0, 0, 0, 0.0057), [0.0, 5.0, 100.0, 321.8122], end=vector(
        0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2,
        0.2386356198831331e-2, 0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2)),
    StiffProblem("orego", orego, vector(1, 2, 3), [0.0, 30.0, 200.0, 360.0], (vector(77.27, 8.375e-6, 0.161),),
                 end=vector(0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3)),
    StiffProblem("pendulum", pendulum, vector(1, 0, 0, 0, 0), [0.0, 0.5, 1.0, 2.0], (vector(9.81).squeeze(),),
                 torch.diag(vector(1, 1, 1, 1, 0))),
]  # fmt: skip


def radau(fn, y0, t, *args, rtol=3e-9, atol=1e-13):
    """SciPy's answer, far tighter."""

    def plain(t, y):
        return fn(torch.tensor(t, dtype=DOUBLE), torch.from_numpy(y), *args).numpy()

    found = solve_ivp(plain, (float(t[0]), float(t[-1])), y0.numpy(), "Radau", t, rtol=rtol, atol=atol)
    return torch.from_numpy(found.y.T)


def swinging(t: list[float], gravity: float) -> Tensor:
    """The pendulum by its angle ``φ`` below the horizontal, ``φ'' = g cos φ``, and the tension that follows."""

    def angle(t, y):
        return torch.stack((y[..., 1], gravity * torch.cos(y[..., 0])), -1)

    phi, speed = radau(angle, vector(0, 0), t, rtol=1e-12, atol=1e-14).unbind(-1)
    x, z = torch.cos(phi), -torch.sin(phi)
    return torch.stack((x, z, speed * z, -speed * x, speed**2 - gravity * z), -1)


@functools.cache
def reference(name: str) -> Tensor:
    """The answer at the times of the problem of that name."""
    (problem,) = (p for p in PROBLEMS if p.name == name)
    if problem.name == "pendulum":
        return swinging(problem.t, float(problem.args[0]))
    fn = robertson if problem.name == "robertson_dae" else problem.fn
    return radau(fn, problem.y0, problem.t, *problem.args)
