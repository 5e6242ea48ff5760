"""
Which solver: three problems
============================

A well-behaved contraction, two maps on which plain iteration is slow or fails, and systems of equations from rough
starts. What decides is how many unknowns there are, what an evaluation costs, and how far away the answer is.
:doc:`/fixedpoint/choosing` has the advice that follows from this.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.functional import pad

from difflayers import Solution, Solver, Status
from difflayers.fixedpoint import (
    Anderson,
    Broyden,
    Dogleg,
    LevenbergMarquardt,
    Newton,
    Picard,
    ScipyRoot,
    fixed_point,
    root,
)

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)

# %%
# Fixed points
# ------------
# Three maps of 64 unknowns.
#
# - *contraction*: :math:`\tanh(W z + x)` with a spectral radius of 0.6 at the answer.
# - *slow contraction*: a linear map whose symmetric matrix has eigenvalues from -0.5 to 0.999.
# - *no contraction*: :math:`S \tanh(z) + x`, where ``S`` has eigenvalues from -3 to 0.9. Plain iteration swings away
#   from the fixed point; it is there all the same.

SIZE = 64
weight = 0.9 * torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0]
x = torch.randn(SIZE, generator=generator)


def symmetric(low: float, high: float) -> Tensor:
    return basis @ torch.diag(torch.linspace(low, high, SIZE)) @ basis.T


slow, swinging = symmetric(-0.5, 0.999), symmetric(-3.0, 0.9)
maps = {
    "contraction": lambda z: torch.tanh(weight @ z + x),
    "slow contraction": lambda z: slow @ z + 0.1 * x,
    "no contraction": lambda z: swinging @ torch.tanh(z) + x,
}

# %%
# What counts is the evaluations of the map and, for methods with a Jacobian, the products with its transpose, which
# cost about as much: 64 for one Jacobian.


class Recorder:
    """A map that writes down its relative residual and what it has cost so far."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.cost = function, 0
        self.costs: list[int] = []
        self.residuals: list[float] = []

    def __call__(self, z: Tensor) -> Tensor:
        value = self.function(z)
        self.cost += 1
        if value.requires_grad:
            value.register_hook(self._pulled)
        best = min([float((value - z).detach().norm() / value.detach().norm()), *self.residuals[-1:]])
        self.costs.append(self.cost)
        self.residuals.append(best)
        return value

    def _pulled(self, _: Tensor) -> None:
        self.cost += 1


SOLVERS = {
    "Picard": Picard(max_steps=20_000),
    "Picard, damping 0.4": Picard(damping=0.4, max_steps=1000),
    "Anderson": Anderson(max_steps=1000),
    "Anderson, memory 20": Anderson(memory=20, max_steps=1000),
    "Broyden": Broyden(max_steps=1000),
    "Newton": Newton(),
}


def record(function: Callable[[Tensor], Tensor], solver: Solver) -> tuple[Recorder, Solution]:
    recorder = Recorder(function)
    return recorder, fixed_point(recorder, torch.zeros(SIZE), solver=solver, on_failure="ignore")


recorded = {title: {name: record(fn, solver) for name, solver in SOLVERS.items()} for title, fn in maps.items()}
for title, found in recorded.items():
    print(f"\n{title}: evaluations and products")
    for name, (recorder, solution) in found.items():
        print(f"{name:20} {recorder.cost:6}  {Status(int(solution.status)).name}")

# %%
# Roots from rough starts
# -----------------------
# Six systems of the collection of Moré, Garbow and Hillstrom (1981, ACM TOMS 7(1)), with 2 to 10 unknowns, from 64
# starts each: the standard one plus Gaussian noise as large as that start itself. All starts are solved as one batch.
# A start counts as solved when its residual reaches the default tolerance, 4e-11 of what it was at the start.


def rosenbrock(z: Tensor) -> Tensor:
    return torch.stack([1 - z[:, 0], 10 * (z[:, 1] - z[:, 0] ** 2)], dim=1)


def helical_valley(z: Tensor) -> Tensor:
    turns = torch.atan2(z[:, 1], z[:, 0]) / (2 * torch.pi)
    return torch.stack([10 * (z[:, 2] - 10 * turns), 10 * (torch.hypot(z[:, 0], z[:, 1]) - 1), z[:, 2]], dim=1)


def wood(z: Tensor) -> Tensor:
    a, b, c, d = z.unbind(1)
    s, t = b - a**2, d - c**2
    first = [-200 * a * s - (1 - a), 200 * s + 20.2 * (b - 1) + 19.8 * (d - 1)]
    return torch.stack([*first, -180 * c * t - (1 - c), 180 * t + 20.2 * (d - 1) + 19.8 * (b - 1)], dim=1)


def trigonometric(z: Tensor) -> Tensor:
    n = z.shape[1]
    return n - z.cos().sum(1, keepdim=True) + torch.arange(1, n + 1) * (1 - z.cos()) - z.sin()


def almost_linear(z: Tensor) -> Tensor:
    sums = z[:, :-1] + z.sum(1, keepdim=True) - (z.shape[1] + 1)
    return torch.cat([sums, z.prod(1, keepdim=True) - 1], dim=1)


def tridiagonal(z: Tensor) -> Tensor:
    padded = pad(z, (1, 1))
    return (3 - 2 * z) * z - padded[:, :-2] - 2 * padded[:, 2:] + 1


SYSTEMS = {
    rosenbrock: [-1.2, 1.0],
    helical_valley: [-1.0, 0.0, 0.0],
    wood: [-3.0, -1.0, -3.0, -1.0],
    trigonometric: [0.1] * 10,
    almost_linear: [0.5] * 10,
    tridiagonal: [-1.0] * 10,
}
ROOT_SOLVERS = {
    "Dogleg": Dogleg(max_steps=200),
    "LevenbergMarquardt": LevenbergMarquardt(max_steps=200),
    "Newton": Newton(max_steps=200),
    "Anderson": Anderson(max_steps=200),
    "Broyden": Broyden(max_steps=200),
    "ScipyRoot": ScipyRoot(),
}
STARTS = 64


def starts(standard: list[float]) -> Tensor:
    center = torch.tensor(standard)
    noise = torch.randn(STARTS, len(standard), generator=torch.Generator().manual_seed(0))
    return center + noise * center.abs().clamp_min(1)


def steps_to_roots(solver: Solver) -> tuple[Tensor, list[int]]:
    """How many steps each start took, infinite where no root was found; and how many starts of each system did."""
    solutions = [
        root(system, starts(standard), batch_dims=1, solver=solver, on_failure="ignore")
        for system, standard in SYSTEMS.items()
    ]
    steps = [torch.where(s.ok, s.stats["steps"].double(), torch.inf) for s in solutions]
    return torch.cat(steps), [int(s.ok.sum()) for s in solutions]


roots = {name: steps_to_roots(solver) for name, solver in ROOT_SOLVERS.items()}
print(f"solved of {STARTS}:", ", ".join(system.__name__ for system in SYSTEMS))
for name, (_, solved) in roots.items():
    print(f"{name:20} {solved}  total {sum(solved)}")

# %%
# The picture
# -----------

TEXT = "#767676"  # a gray for light and dark pages
STYLES = {
    "Picard": ("#e69f00", "-"),
    "Picard, damping 0.4": ("#e69f00", "--"),
    "Anderson": ("#009e73", "-"),
    "Anderson, memory 20": ("#009e73", "--"),
    "Broyden": ("#cc79a7", "-"),
    "Newton": ("#7b5ea7", "-"),
    "Dogleg": ("#0072b2", "-"),
    "LevenbergMarquardt": ("#56b4e9", "-"),
}
plt.rcParams.update(
    {
        "font.size": 11,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    }
)
figure, grid = plt.subplots(2, 2, figsize=(7.6, 7.6), layout="constrained")
for axes, (title, found) in zip(grid.flat, recorded.items(), strict=False):
    for name, (recorder, solution) in found.items():
        color, line = STYLES[name]
        axes.plot(
            recorder.costs,
            recorder.residuals,
            color=color,
            linestyle=line,
            linewidth=2,
            label=name,
            drawstyle="steps-post",
        )
        if not solution.ok:
            axes.plot(recorder.costs[-1], recorder.residuals[-1], "x", color=color, markersize=9, markeredgewidth=2)
    axes.set(xscale="log", yscale="log", ylim=(1e-12, 3), title=title, xlabel="evaluations and products")
    axes.set_ylabel("best relative residual")

shares = grid[1, 1]
for name, (steps, _) in roots.items():
    if name != "ScipyRoot":  # its steps are evaluations
        color, line = STYLES[name]
        ordered = steps[steps.isfinite()].sort().values
        share = torch.arange(1, len(ordered) + 1) / len(steps)
        x_values, y_values = [*ordered.tolist(), 200], [*share.tolist(), share[-1].item()]
        shares.step(x_values, y_values, where="post", color=color, linestyle=line, linewidth=2, label=name)
shares.set(xscale="log", ylim=(0, 1), title="roots from rough starts", xlabel="steps", ylabel="share of starts solved")
for axes in grid.flat:
    axes.grid(color=TEXT, alpha=0.2, linewidth=0.8)
lines = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %%
# What it shows
# -------------
# - On a good contraction all but Newton's method do about the same. Take what costs least per step: ``Picard`` where
#   the map is cheap, ``Anderson`` where it isn't.
# - Near a spectral radius of one, Anderson's and Broyden's methods save factors of 30 to 150 over plain iteration, and
#   ``memory`` decides which: what spans the slow directions must fit into it.
# - A fixed point doesn't have to attract. Plain iteration gives up on the third map (the cross); damped it converges,
#   and Anderson's and Broyden's methods need no such help.
# - Newton's method takes a handful of steps whatever the spectrum. Each costs as many products as there are unknowns,
#   so it pays where these are few, or where the others crawl.
# - Methods for fixed points are no root finders: from rough starts they solve few systems. ``Dogleg`` and
#   ``LevenbergMarquardt`` solve the most. None solves all of them: where the norm of ``F`` has a local
#   minimum that is no root, another start is the remedy. ``status`` says which samples need one.
