"""
What a gradient costs, and how wrong it is
==========================================

Every way to differentiate a fixed point that the package has, on one cell, at two spectral radii: exact ones with six
linear solvers, with what the forward solver learnt on its way as a preconditioner, and the approximate ones, cut
Neumann series, Jacobian-free, and backpropagation through unrolled steps. :doc:`/fixedpoint/choosing` says what to do
with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from difflayers import Adjoint, ImplicitAdjoint, Solution, Solver, UnrolledAdjoint, linear, monitor
from difflayers.errors import SolverError
from difflayers.fixedpoint import Anderson, Broyden, Newton, Picard, fixed_point

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)

# %%
# The cell
# --------
# :math:`f(z) = \tanh(W z + x)` with 128 units and a batch of 64. ``W`` is a random matrix, scaled so that among all
# samples the largest spectral radius of :math:`\partial f/\partial z` at the equilibrium is the one that we want.

SIZE, BATCH = 128, 64
gaussian = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
x = 0.3 * torch.randn(BATCH, SIZE, generator=generator)
target = torch.randn(BATCH, SIZE, generator=generator)
TIGHT = Anderson(rtol=1e-12, atol=0.0, max_steps=1000)


def cell(z: Tensor, W: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ W.T + x)


def radius(W: Tensor) -> float:
    """The largest spectral radius of a sample; infinite where the equilibrium isn't found."""
    try:
        z = fixed_point(cell, torch.zeros_like(x), (W, x), batch_dims=1, solver=TIGHT).value
    except SolverError:
        return float("inf")
    return float(torch.linalg.eigvals((1 - z**2)[:, :, None] * W).abs().max())


def scaled(wanted: float) -> Tensor:
    low, high = 0.5, 1.5
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle * gaussian) < wanted else (low, middle)
    return low * gaussian


# %%
# What is measured
# ----------------
# The loss is a square distance, and the gradient that of ``W`` and ``x`` together. Its error is relative to a reference
# from Newton's method and dense factorizations. Forward solves go to 1e-12, so that nothing but the adjoint is seen.
#
# Costs are those of the backward pass: products with :math:`(\partial f/\partial z)^\top`, as many as the slowest
# sample asks for, plus the one that every backward pass ends with, for the parameters; and CPU time on one thread.


@dataclass(frozen=True)
class Point:
    vjps: int
    milliseconds: float
    error: float


class Comparison:
    """Gradients of one cell in many ways."""

    def __init__(self, W: Tensor) -> None:
        self.inputs = [W.clone().requires_grad_(), x.clone().requires_grad_()]
        exact = ImplicitAdjoint(linear.LU())
        self.reference = self.gradient(self.solve(Newton(rtol=1e-13, atol=0.0), exact))
        self.answer = self.solve(TIGHT).value.detach()

    def solve(self, solver: Solver, adjoint: Adjoint | None = None, init: Tensor | None = None) -> Solution:
        z0 = torch.zeros_like(x) if init is None else init
        arguments = {"batch_dims": 1, "solver": solver, "adjoint": adjoint, "on_failure": "ignore"}
        return fixed_point(cell, z0, self.inputs, **arguments)

    def gradient(self, solution: Solution) -> Tensor:
        loss = (solution.value - target).square().sum() / 2
        parts = torch.autograd.grad(loss, self.inputs, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def point(self, solution: Solution, per_step: int = 1, steps: int = 0) -> Point:
        best = float("inf")
        for _ in range(3):
            with monitor() as log:
                start = time.process_time()
                gradient = self.gradient(solution)
                best = min(best, time.process_time() - start)
        products = steps or per_step * log[0].steps + 1
        error = (gradient - self.reference).norm() / self.reference.norm()
        return Point(products, 1e3 * best, float(error))

    def implicit(self, linear_solver: linear.LinearSolver, per_step: int = 1) -> Point:
        return self.point(self.solve(TIGHT, ImplicitAdjoint(linear_solver), self.answer), per_step)

    def learnt(self, solver: Solver, rtol: float) -> Point:
        """The default, GCR, preconditioned by the forward solver's own estimate of the inverse."""
        return self.point(self.solve(solver, ImplicitAdjoint(linear.Auto(rtol=rtol))))

    def unrolled(self, steps: int) -> Point:
        solver = Picard(rtol=0.0, atol=0.0, max_steps=steps)
        return self.point(self.solve(solver, UnrolledAdjoint()), steps=steps)


TOLERANCES = [10.0**-k for k in range(1, 11)]
BROYDEN = Broyden(rtol=1e-12, atol=0.0, memory=100, max_steps=1000)
NEWTON = Newton(rtol=1e-12, atol=0.0)


def curves(compare: Comparison) -> dict[str, list[Point]]:
    steps = [2**k for k in range(1, 9)]
    return {
        "LU": [compare.implicit(linear.LU())],
        "GCR": [compare.implicit(linear.GCR(rtol=t)) for t in TOLERANCES],
        "GMRES": [compare.implicit(linear.GMRES(rtol=t)) for t in TOLERANCES],
        "BiCGSTAB": [compare.implicit(linear.BiCGSTAB(rtol=t), per_step=2) for t in TOLERANCES],
        "Anderson": [compare.implicit(linear.Anderson(rtol=t)) for t in TOLERANCES],
        "Picard": [compare.implicit(linear.Picard(rtol=t)) for t in TOLERANCES],
        "GCR, Broyden's inverse": [compare.learnt(BROYDEN, t) for t in TOLERANCES],
        "GCR, Newton's inverse": [compare.learnt(NEWTON, t) for t in TOLERANCES],
        "Identity": [compare.implicit(linear.Identity())],
        "Neumann(k)": [compare.implicit(linear.Neumann(k)) for k in (1, 2, 5, 10, 20, 50, 100)],
        "unrolled, k steps": [compare.unrolled(k) for k in steps],
    }


comparisons = {wanted: Comparison(scaled(wanted)) for wanted in (0.8, 0.98)}
measured = {wanted: curves(compare) for wanted, compare in comparisons.items()}

# %%
# In numbers: what an error of 1e-4 takes, and how wrong the cheap ones are.

for wanted, found in measured.items():
    print(f"\nspectral radius {wanted}: products, ms and error of ...")
    for name, points in found.items():
        good = [point for point in points if point.error <= 2e-4]
        text = f"{good[0].vjps:4}  {good[0].milliseconds:5.1f} ms  {good[0].error:.0e}" if good else "not reached here"
        print(f"{name:24} {text}")
    print(f"{'errors':24} Identity {found['Identity'][0].error:.2f}, Neumann(5) {found['Neumann(k)'][2].error:.2f}")

# %%
# The picture
# -----------
# Down and to the left is better. Solid lines are exact methods, at tolerances from 1e-1 to 1e-10; dashed ones
# approximate, for more and more terms or steps. Exact methods say when they haven't reached their tolerance, the others
# can't.

TEXT = "#767676"  # a gray for light and dark pages
STYLES = {
    "LU": (TEXT, "D", "none"),
    "GCR": ("#0072b2", "o", "-"),
    "GMRES": ("#56b4e9", "v", "-"),
    "BiCGSTAB": ("#a6761d", "P", "-"),
    "Anderson": ("#009e73", "s", "-"),
    "Picard": ("#e69f00", "^", "-"),
    "GCR, Broyden's inverse": ("#cc79a7", "o", "-"),
    "GCR, Newton's inverse": ("#7b5ea7", "X", "-"),
    "Identity": ("#d55e00", "*", "none"),
    "Neumann(k)": ("#d55e00", ".", "--"),
    "unrolled, k steps": (TEXT, ".", "--"),
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


def draw(axes: plt.Axes, found: dict[str, list[Point]], cost: str) -> None:
    for name, points in found.items():
        color, marker, line = STYLES[name]
        size = 11 if marker == "*" else 8 if marker == "D" else 5
        costs, errors = [getattr(p, cost) for p in points], [p.error for p in points]
        axes.plot(costs, errors, color=color, marker=marker, linestyle=line, markersize=size, label=name)
    axes.set(xscale="log", yscale="log", ylim=(1e-13, 3))
    axes.grid(color=TEXT, alpha=0.2, linewidth=0.8)


figure, grid = plt.subplots(2, 2, figsize=(7.6, 8), sharey=True, sharex="row", layout="constrained")
for column, (wanted, found) in enumerate(measured.items()):
    grid[0, column].set_title(f"spectral radius {wanted}")
    for row, (cost, label) in enumerate((("vjps", "vector-Jacobian products"), ("milliseconds", "backward, CPU ms"))):
        draw(grid[row, column], found, cost)
        grid[row, column].set_xlabel(label)
        grid[row, 0].set_ylabel("relative error of the gradient")
names, labels = grid[0, 0].get_legend_handles_labels()
figure.legend(names, labels, loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %%
# What it shows
# -------------
# - Where the cell contracts well, everything exact is cheap, and plain summation (``Picard``) is as good as any.
# - Near a radius of one, plain summation needs hundreds of products where Krylov methods need tens.
# - What Newton's method leaves behind, a factorization one step before the answer, is nearly the inverse: one or two
#   products do. It was paid for on the way forward, with 128 products a step. What Broyden's method learnt
#   comes for free. It saves a third of the products at 0.8 and a sixth at 0.98, but using it costs time too, and with
#   a cell as cheap as this one nothing is left of the gain.
# - A Neumann series that is cut is ``Picard`` without the test whether it has converged. Its error falls like the
#   spectral radius to the power ``k + 1``: at 0.98, five terms leave more than a third of the gradient wrong, and
#   ``Identity`` leaves most of it wrong. Networks do train with them, but what they follow is no gradient.
# - Unrolling costs about what summing the series does, and keeps every step in memory.
#
# An adjoint more accurate than the forward solve buys nothing: its error is hidden by that of the answer. The default
# follows the forward solver's ``rtol``.

compare = comparisons[0.8]
print("forward rtol   adjoint rtol   products   error of the gradient")
for forward in 1e-2, 1e-5:
    for adjoint in 1e-2, 1e-5, 1e-8:
        solver = Anderson(rtol=forward, atol=0.0)
        point = compare.point(compare.solve(solver, ImplicitAdjoint(linear.GCR(rtol=adjoint))))
        print(f"{forward:12.0e}   {adjoint:12.0e}   {point.vjps:8}   {point.error:.0e}")
