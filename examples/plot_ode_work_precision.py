"""
Which ODE solver: work and precision
====================================

Every solver on one problem of each class of DETEST (Hull, Enright, Fellen, Sedgwick 1972, "Comparing numerical methods
for ordinary differential equations"), at tolerances from 1e-3 to 1e-9, beside torchdiffeq and SciPy: how much work buys
how many digits. :doc:`/ode/choosing` has the advice that follows from this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from scipy.integrate import solve_ivp
from torch import Tensor

from difflayers.ode import Bosh3, Dopri5, Dopri8, Kvaerno5, Rodas, ScipyIVP, TorchDiffEq, Tsit5, odeint

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

# %%
# Problems
# --------
# One of every class, from 0 to 20 (the belt of E to 10): single equations (A), small systems (B), moderate ones (C),
# orbits (D) and higher-order equations (E). Robertson's chemistry, to 40, is here because none of these is stiff. All
# run once with the numbers of PyTorch and once with SciPy's DOP853 or Radau at 1e-13 for the truth.


@dataclass(frozen=True)
class Problem:
    name: str
    field: Callable[[Tensor, Tensor], Tensor]
    y0: Sequence[float]
    end: float = 20.0
    stiff: bool = False

    def truth(self) -> Tensor:
        def plain(t: float, y: np.ndarray) -> np.ndarray:
            return self.field(torch.tensor(t), torch.from_numpy(y)).numpy()

        method, rtol = ("Radau", 1e-11) if self.stiff else ("DOP853", 1e-13)
        found = solve_ivp(plain, (0, self.end), np.array(self.y0), method, rtol=rtol, atol=1e-15)
        return torch.from_numpy(found.y[:, -1])


def logistic(t: Tensor, y: Tensor) -> Tensor:
    return y / 4 * (1 - y / 20)


def chemistry(t: Tensor, y: Tensor) -> Tensor:
    a, b, _ = y
    return torch.stack([-a, a - b * b, b * b])


chain = torch.diag(torch.full((10,), -2.0)) + torch.diag(torch.ones(9), 1) + torch.diag(torch.ones(9), -1)


def orbit(t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([y[2:], -y[:2] / y[:2].norm() ** 3])


def bessel(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[1] / (t + 1) - (1 - 0.25 / (t + 1) ** 2) * y[0]])


def robertson(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y
    first, second, third = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return torch.stack([third - first, first - third - second, second])


half_bessel = math.sqrt(2 / math.pi)
problems = [
    Problem("A4 logistic", logistic, [1.0]),
    Problem("B3 chemistry", chemistry, [1.0, 0.0, 0.0]),
    Problem("C3 chain of 10", lambda t, y: chain @ y, [1.0] + [0.0] * 9),
    Problem("D3 orbit, e = 0.5", orbit, [0.5, 0.0, 0.0, math.sqrt(3)]),
    Problem("E1 Bessel, order ½", bessel, [half_bessel * math.sin(1), half_bessel * (math.cos(1) - math.sin(1) / 2)]),
    Problem("Robertson, stiff", robertson, [1.0, 0.0, 0.0], 40.0, True),
]

# %%
# Solvers
# -------
# Work is evaluations of :math:`f`; for ``Rodas`` and ``Kvaerno5`` with the products for Jacobians, which cost about as
# much. SciPy's implicit methods get the exact Jacobian, and its products aren't counted.

tolerances = [10.0**-k for k in range(3, 10)]
solvers = {
    "Bosh3": Bosh3,
    "Dopri5": Dopri5,
    "Tsit5": Tsit5,
    "Dopri8": Dopri8,
    "Rodas": Rodas,
    "Kvaerno5": Kvaerno5,
    "torchdiffeq dopri5": TorchDiffEq,
    "torchdiffeq dopri8": lambda **t: TorchDiffEq("dopri8", **t),
    "SciPy DOP853": lambda **t: ScipyIVP("DOP853", **t),
    "SciPy LSODA": lambda **t: ScipyIVP("LSODA", **t),
    "SciPy Radau": lambda **t: ScipyIVP("Radau", **t),
}
IMPLICIT = ("Rodas", "Kvaerno5")
SLOW = {"Kvaerno5": 5, "Bosh3": 6, "SciPy Radau": 5}  # tolerances that the documentation can wait for


@dataclass(frozen=True)
class Point:
    error: float
    work: float
    seconds: float


def measured(problem: Problem, name: str, truth: Tensor, tolerance: float) -> Point | None:
    """None where there is no answer."""
    scale = 1e-6 if problem.stiff else 1.0
    kinds = {"Bosh3", "Dopri5", "Tsit5", "Dopri8", *IMPLICIT}
    limits = {"max_steps": 4000} if name in kinds else {"max_evaluations": 20000}
    solver = solvers[name](rtol=tolerance, atol=tolerance * scale, **limits)
    y0 = torch.tensor(problem.y0)
    start = time.process_time()
    with torch.no_grad():
        solution = odeint(problem.field, y0, [0.0, problem.end], solver=solver, on_failure="ignore")
    seconds = time.process_time() - start
    if not solution.ok:
        return None
    # Robertson's numbers differ by orders of magnitude: each by its own size.
    size = truth.abs() if problem.stiff else truth.abs().max()
    error = ((solution.ys[-1] - truth).abs() / size).max()
    work = float(solution.stats["evaluations"])
    if name in IMPLICIT:
        work += len(problem.y0) * float(solution.stats["steps"])
    return Point(float(error), work, seconds)


curves: dict[tuple[str, str], list[Point]] = {}
for problem in problems:
    truth = problem.truth()
    for name in solvers:
        explicit = name not in (*IMPLICIT, "SciPy LSODA", "SciPy Radau")
        if problem.stiff and explicit:
            continue  # 20,000 evaluations and more at any tolerance
        points = [measured(problem, name, truth, tolerance) for tolerance in tolerances[: SLOW.get(name, 7)]]
        curves[problem.name, name] = [point for point in points if point is not None]

# %%
# What buys what
# --------------
# The lower left is best. Solid lines are ours, dashed ones others' through the same interface.

styles = {
    "Bosh3": ("C7", "-", "o"),
    "Dopri5": ("C0", "-", "o"),
    "Tsit5": ("C2", "-", "s"),
    "Dopri8": ("C3", "-", "D"),
    "Rodas": ("C4", "-", "^"),
    "Kvaerno5": ("C6", "-", "v"),
    "torchdiffeq dopri5": ("C0", "--", "x"),
    "torchdiffeq dopri8": ("C3", "--", "x"),
    "SciPy DOP853": ("C1", "--", "+"),
    "SciPy LSODA": ("C5", "--", "+"),
    "SciPy Radau": ("C8", "--", "+"),
}


def drawn(value: Callable[[Point], float], label: str) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.6), layout="constrained", sharey=True)
    for problem, ax in zip(problems, axes.flat, strict=True):
        for name, (color, line, marker) in styles.items():
            points = curves.get((problem.name, name), [])
            ax.plot(
                [value(p) for p in points], [max(p.error, 1e-13) for p in points],
                color=color, linestyle=line, marker=marker, markersize=4, linewidth=1.2, label=name,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", title=problem.name, ylim=(1e-12, 1))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel(label)
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error at the end")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False)


drawn(lambda p: p.work, "evaluations")

# %%
# The same points by time, in milliseconds of one core. These fields are tiny, so this is mostly what surrounds them;
# with a network for :math:`f` the picture above counts.

drawn(lambda p: p.seconds * 1e3, "ms")

# %%
# In numbers: the evaluations that an error of 1e-6 takes, between the points that were measured.


def needed(points: list[Point], error: float = 1e-6) -> str:
    if not points or min(p.error for p in points) > error:
        return "–"
    ordered = sorted(points, key=lambda p: -p.error)
    at = np.interp(
        -math.log(error), [-math.log(max(p.error, 1e-13)) for p in ordered], np.log([p.work for p in ordered])
    )
    return f"{math.exp(at):.0f}"


print(f"{'':20s}" + "".join(f"{problem.name.split(',')[0][:16]:>18s}" for problem in problems))
for name in solvers:
    print(f"{name:20s}" + "".join(f"{needed(curves.get((problem.name, name), [])):>18s}" for problem in problems))
