"""Fixed points and their gradients, beside torchdeq: time, evaluations, accuracy.

Run ``python benchmarks/fixedpoint.py [--quick] [--markdown]``. One process, one thread, CPU time, minimum over
repetitions that take turns. See ``README.md`` for what is compared and why.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peers import Solve, torchdeq_approximate, torchdeq_exact
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from difflayers import ImplicitAdjoint, ImplicitFunction, linear
from difflayers.fixedpoint import Anderson, FixedPointProblem, Picard

TOLERANCE = 1e-8


@dataclass(frozen=True)
class Cell:
    """``z = activation(z Wᵀ + x Uᵀ + b)`` on a batch, in float64."""

    name: str
    activation: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # of the activation, given its value
    params: tuple[Tensor, ...]
    z0: Tensor

    def fn(self, z: Tensor, W: Tensor, U: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return self.activation(z @ W.T + (x @ U.T + b))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.params[:3]

    @classmethod
    def linear(cls, size: int = 64, batch: int = 128, radius: float = 0.9) -> Cell:
        W, *rest = _data(size, batch)
        W = W * (radius / torch.linalg.eigvals(W).abs().max())
        name = f"linear cell, n={size}, batch {batch}, spectral radius {radius}"
        return cls(name, lambda y: y, torch.ones_like, *_posed(W, *rest))

    @classmethod
    def tanh(cls, size: int = 128, batch: int = 256, gain: float = 1.15) -> Cell:
        W, *rest = _data(size, batch)
        return cls(f"tanh cell, n={size}, batch {batch}", torch.tanh, lambda z: 1 - z**2, *_posed(gain * W, *rest))

    def reference(self, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The answer by Newton's method and the gradients of the weights by dense solves; no package involved."""
        W, U, b, x = (p.detach() for p in self.params)
        z, eye = self.z0, torch.eye(len(b), dtype=b.dtype)
        for _ in range(400):
            z = self.fn(z, W, U, b, x)
        for _ in range(4):
            value = self.fn(z, W, U, b, x)
            z = z + torch.linalg.solve(eye - self.slope(value).unsqueeze(-1) * W, value - z)
        slope = self.slope(z)
        u = slope * torch.linalg.solve((eye - slope.unsqueeze(-1) * W).mT, cotangent)
        return z, [u.T @ z, u.T @ x, u.sum(0)]


def _data(size: int, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, size), (size, size), (size,), (batch, size)]
    W, U, b, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return W / size**0.5, U / size**0.5, b, x


def _posed(*data: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    *weights, x = data
    return (*(w.clone().requires_grad_() for w in weights), x), torch.zeros_like(x)


def exact() -> dict[str, Solve]:
    """Ours, with gradients to the tolerance."""
    anderson, picard = Anderson(TOLERANCE, 0.0), Picard(TOLERANCE, 0.0, max_steps=300)
    return {
        "Anderson, ImplicitAdjoint()": ours(anderson, linear.Auto()),
        "Anderson, linear.GMRES": ours(anderson, linear.GMRES(TOLERANCE)),
        "Anderson, linear.Anderson": ours(anderson, linear.Anderson(TOLERANCE)),
        "Picard, linear.Picard": ours(picard, linear.Picard(TOLERANCE)),
    }


def approximate() -> dict[str, Solve]:
    """Ours, with gradients that are approximate by choice."""
    anderson = Anderson(TOLERANCE, 0.0)
    return {
        "Anderson, linear.Neumann(5)": ours(anderson, linear.Neumann(5)),
        "Anderson, linear.Identity": ours(anderson, linear.Identity()),
    }


def ours(solver: Anderson | Picard, linear_solver: linear.LinearSolver) -> Solve:
    made: dict[Any, ImplicitFunction] = {}

    def solve(fn: Callable[..., Tensor], params: Sequence[Tensor], z0: Tensor) -> Tensor:
        # Made once, called often, like the layer that torchdeq's is.
        if fn not in made:
            made[fn] = ImplicitFunction(FixedPointProblem(fn, 1), solver, ImplicitAdjoint(linear_solver))
        value: Tensor = made[fn](*params, init=z0).value
        return value

    return solve


class _Counter(torch.autograd.Function):
    """The identity, which counts how often it is evaluated and pulled back."""

    evaluations = pullbacks = 0

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        _Counter.evaluations += 1
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        _Counter.pullbacks += 1
        return cotangent


@dataclass
class Result:
    """One method on one cell."""

    evaluations: int
    pullbacks: int
    residual: float
    gradient_error: float
    forward: float = float("inf")
    total: float = float("inf")
    floor: float = float("nan")  # what the evaluations and vjps alone would take


def examine(cell: Cell, solve: Solve, cotangent: Tensor, reference: Sequence[Tensor]) -> Result:
    """Counts and accuracy; the first call, which is not timed, warms up."""
    solve(cell.fn, cell.params, cell.z0)

    def counted(z: Tensor, *params: Tensor) -> Tensor:
        return cell.fn(_Counter.apply(z), *params)

    solve(counted, cell.params, cell.z0)
    _Counter.evaluations = _Counter.pullbacks = 0
    z = solve(counted, cell.params, cell.z0)
    gradients = torch.autograd.grad((z * cotangent).sum(), cell.weights)
    evaluations, pullbacks = _Counter.evaluations, _Counter.pullbacks
    with torch.no_grad():
        after = cell.fn(z, *cell.params)
        residual = ((after - z).norm(dim=1) / after.norm(dim=1)).max().item()
    got, want = (torch.cat([g.flatten() for g in gs]) for gs in (gradients, reference))
    return Result(evaluations, pullbacks, residual, ((got - want).norm() / want.norm()).item())


def stopwatch(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(cell: Cell, methods: dict[str, Solve], repetitions: int) -> tuple[dict[str, Result], float, float]:
    """Results, and the time of one evaluation of ``f`` and of one of its vjps."""
    cotangent = torch.randn(cell.z0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    _, reference = cell.reference(cotangent)
    results = {name: examine(cell, solve, cotangent, reference) for name, solve in methods.items()}
    one_f = one_vjp = float("inf")
    for _ in range(repetitions):
        one_f, one_vjp = min(one_f, _time_f(cell)), min(one_vjp, _time_vjp(cell, cotangent))
        for name, solve in methods.items():
            start = time.process_time()
            z = solve(cell.fn, cell.params, cell.z0)
            middle = time.process_time()
            torch.autograd.grad((z * cotangent).sum(), cell.weights)
            end = time.process_time()
            results[name].forward = min(results[name].forward, middle - start)
            results[name].total = min(results[name].total, end - start)
    for result in results.values():
        result.floor = result.evaluations * one_f + result.pullbacks * one_vjp
    return results, one_f, one_vjp


def _time_f(cell: Cell, calls: int = 20) -> float:
    with torch.no_grad():
        return stopwatch(lambda: [cell.fn(cell.z0, *cell.params) for _ in range(calls)]) / calls


def _time_vjp(cell: Cell, cotangent: Tensor, calls: int = 20) -> float:
    z = cell.z0.clone().requires_grad_()
    value = cell.fn(z, *cell.params)
    return (
        stopwatch(lambda: [torch.autograd.grad(value, z, cotangent, retain_graph=True) for _ in range(calls)]) / calls
    )


def report(title: str, results: dict[str, Result], console: Console, markdown: bool) -> None:
    best = min(results[name].total for name in torchdeq_exact(TOLERANCE) if results[name].residual <= 2 * TOLERANCE)
    table = Table(title=None if markdown else title, box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    headings = "forward|forward + backward|÷ torchdeq's best exact|floor|÷ floor|f|vjp|residual|gradient error"
    for heading in headings.split("|"):
        table.add_column(heading, justify="right")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r.forward * 1e3:.1f} ms",
            f"{r.total * 1e3:.1f} ms",
            f"{r.total / best:.2f}",
            f"{r.floor * 1e3:.1f} ms",
            f"{r.total / r.floor:.2f}",
            str(r.evaluations),
            str(r.pullbacks),
            f"{r.residual:.0e}",
            f"{r.gradient_error:.0e}",
        )
    if markdown:
        console.print(f"\n### {title}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions: do the numbers come out at all?")
    parser.add_argument("--markdown", action="store_true", help="tables as README.md has them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=170, highlight=False)
    console.print(f"Python {platform.python_version()}, torch {torch.__version__}, 1 thread, tolerance {TOLERANCE:g}")
    methods = {**exact(), **torchdeq_exact(TOLERANCE), **approximate(), **torchdeq_approximate()}
    for cell in (Cell.linear(), Cell.tanh()):
        results, one_f, one_vjp = measure(cell, methods, 3 if options.quick else 10)
        title = f"{cell.name}: f {one_f * 1e3:.3f} ms, its vjp {one_vjp * 1e3:.3f} ms"
        report(title, results, console, options.markdown)


if __name__ == "__main__":
    main()
