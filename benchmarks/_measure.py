"""Counts, accuracy and CPU time of methods that solve the same case; see ``README.md`` for what is measured how."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _cells import Case, relative_residual
from peers import Method
from torch import Tensor, nn

INF = float("inf")


class Counted(nn.Module):
    """A cell that counts its evaluations and vjps, by how many samples they are of."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.evaluations: Counter[int] = Counter()
        self.vjps: Counter[int] = Counter()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        value: Tensor = self.cell(_Tally.apply(z, self), x)
        return value


class _Tally(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, counted: Counted) -> Tensor:
        ctx.counted = counted
        counted.evaluations[len(z)] += 1
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        ctx.counted.vjps[len(cotangent)] += 1
        return cotangent, None


@dataclass
class Result:
    """One method on one case; times in seconds."""

    evaluations: int
    vjps: int
    residual: float
    gradient_error: float
    counts: tuple[Counter[int], Counter[int]]
    forward: float = INF
    total: float = INF
    floor: float = INF

    def reaches(self, tolerance: float) -> bool:
        """Whether it solved the problem to the tolerance, and the adjoint system too.

        At kinks and at long distances from the answer a gradient is off by more than the answer is; a thousand times
        that is a gradient that wasn't found.
        """
        return self.residual <= 1.1 * tolerance and self.gradient_error <= 1e3 * tolerance

    @property
    def outside(self) -> float:
        """The share of the time that isn't evaluations or vjps."""
        return 1 - self.floor / self.total


@dataclass
class Comparison:
    """Methods on one case, and what one evaluation and one vjp take, by how many samples they are of."""

    case: Case
    results: dict[str, Result]
    one_f: dict[int, float] = field(default_factory=dict)
    one_vjp: dict[int, float] = field(default_factory=dict)

    def best(self, names: Iterable[str]) -> tuple[str, Result]:
        """The fastest of some methods, of those that reach the tolerance."""
        reaching = {name: self.results[name] for name in names if self.results[name].reaches(self.case.tolerance)}
        return min(reaching.items(), key=lambda item: item[1].total)


def compare(case: Case, methods: Mapping[str, Method], gradient: Tensor, repetitions: int) -> Comparison:
    """All methods on ``case``, taking turns; ``gradient`` is the true one."""
    results = {name: examine(case, method, gradient) for name, method in methods.items()}
    solves = {name: method(case) for name, method in methods.items()}
    comparison = Comparison(case, results)
    for _ in range(repetitions):
        _time_cell(comparison)
        for name, solve in solves.items():
            _time_method(results[name], case, solve)
    for result in results.values():
        evaluations, vjps = result.counts
        result.floor = cost(evaluations, comparison.one_f) + cost(vjps, comparison.one_vjp)
    return comparison


def examine(case: Case, method: Method, gradient: Tensor) -> Result:
    """Counts and accuracy. The first call, in which layers check their cell, doesn't count, and warms up."""
    counted = Counted(case.cell)
    solve = method(case.of(counted))
    solve()
    counted.evaluations, counted.vjps = Counter(), Counter()
    z = solve()
    gradients = torch.autograd.grad((z * case.cotangent).sum(), case.weights)
    got = torch.cat([g.flatten() for g in gradients]).to(gradient.dtype)
    error = float((got - gradient).norm() / gradient.norm())
    counts = counted.evaluations, counted.vjps
    return Result(counts[0].total(), counts[1].total(), relative_residual(case, z), error, counts)


def cost(counts: Counter[int], one: Mapping[int, float]) -> float:
    """What as many evaluations, or vjps, take by themselves."""
    return sum(count * one[samples] for samples, count in counts.items())


def stopwatch(run: Callable[[], object], calls: int = 1) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def time_f(case: Case, samples: int) -> float:
    """CPU seconds of one evaluation of ``samples`` samples."""
    z, x = case.cotangent[:samples], case.x[:samples]
    with torch.no_grad():
        calls = _calls(lambda: case.cell(z, x))
        return stopwatch(lambda: case.cell(z, x), calls)


def time_vjp(case: Case, samples: int) -> float:
    """CPU seconds of one vjp of ``samples`` samples, linearized before."""
    z = case.cotangent[:samples].clone().requires_grad_()
    value = case.cell(z, case.x[:samples])
    u = torch.ones_like(value)

    def run() -> None:
        torch.autograd.grad(value, z, u, retain_graph=True)

    return stopwatch(run, _calls(run))


def _calls(run: Callable[[], object], seconds: float = 0.01) -> int:
    """How many calls a clock can tell."""
    return max(1, min(50, round(seconds / max(stopwatch(run), 1e-6))))


def _time_cell(comparison: Comparison) -> None:
    case, results = comparison.case, comparison.results.values()
    for samples in set().union(*(r.counts[0] for r in results)):
        comparison.one_f[samples] = min(comparison.one_f.get(samples, INF), time_f(case, samples))
    for samples in set().union(*(r.counts[1] for r in results)):
        comparison.one_vjp[samples] = min(comparison.one_vjp.get(samples, INF), time_vjp(case, samples))


def _time_method(result: Result, case: Case, solve: Callable[[], Tensor]) -> None:
    cotangent = case.cotangent
    start = time.process_time()
    z = solve()
    middle = time.process_time()
    torch.autograd.grad((z * cotangent).sum(), case.weights)
    end = time.process_time()
    result.forward = min(result.forward, middle - start)
    result.total = min(result.total, end - start)
