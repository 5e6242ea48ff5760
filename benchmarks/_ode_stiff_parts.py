"""Stiff systems and differential-algebraic ones: CPU time a sample, and errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from _measure import INF, stopwatch
from _ode_dae import DAES
from _ode_measure import least
from _ode_stiff import CLASSICS, ROBERTSON, Stiff
from _report import Goal, Report, ms

from difflayers.ode import AdaptiveSolver, Kvaerno5, Rodas

HEADINGS = "method|forward|backward|error of the end|gradient error"


@dataclass(frozen=True)
class Measured:
    """One of our solvers on a batch: seconds a sample, relative errors, steps of an average sample."""

    forward: float
    backward: float
    end_error: float
    gradient_error: float
    steps: float

    @property
    def cells(self) -> list[str]:
        return [ms(self.forward), ms(self.backward), f"{self.end_error:.0e}", f"{self.gradient_error:.0e}"]


def stiff(report: Report) -> None:
    """A thousand Robertson systems, SciPy one after the other."""
    samples, system = 100 if report.quick else 1000, ROBERTSON.system
    ours, peers, bound = _rows(report, ROBERTSON, samples, 1 if report.quick else 3, 3 if report.quick else 20)
    for what, took, asked in (("forward", ours.forward, 0.3e-3), ("backward", ours.backward, 1e-3)):
        work = f"{samples} × {system.name} at {system.rtol:g}: {what}, a sample"
        peer, floor = (f"Radau {ms(peers[0])}, LSODA {ms(peers[1])}", ms(bound)) if what == "forward" else ("", "")
        report.goal(Goal(work, peer, ms(took), floor, "", f"≤ {asked * 1e3:g} ms", ms(took), took <= asked))


def classics(report: Report) -> None:
    """Van der Pol's equation, HIRES and OREGO."""
    for case in CLASSICS[1:] if report.quick else CLASSICS:
        _rows(report, case, 10 if report.quick else 100, 1, 3)


def dae(report: Report) -> None:
    """Equations of index 1, and ordinary ones with the same solution."""
    for case in DAES:
        samples, repetitions, count = (10, 1, 1) if report.quick else (1000, 3, 20)
        ordinary, table = case.ordinary, []
        ours = ("Rodas", case, Rodas), ("Kvaerno5", case, Kvaerno5), ("Rodas, ODE", ordinary, Rodas)
        for name, which, kind in ours:
            found = measured(which, solver(which, kind), samples, repetitions)
            start = ms(case.start_time(samples, repetitions)) if which is case else ""
            table.append((f"difflayers {name}", start, *found.cells, f"{found.steps:.0f}"))
        for method in ("Radau", "LSODA"):
            took, error = ordinary.scipy_loop(method, samples, count)
            table.append((f"SciPy {method}, ODE, {count} of them", "", ms(took), "", f"{error:.0e}", "", ""))
        name, *rest = HEADINGS.split("|")
        report.table(_title(case, samples), "|".join([name, "consistent start", *rest, "steps"]), table)


def solver(case: Stiff, kind: type[AdaptiveSolver] = Rodas) -> AdaptiveSolver:
    return kind(rtol=case.system.rtol, atol=case.system.atol, per_sample=True, max_steps=100_000)


def measured(case: Stiff, solver: AdaptiveSolver, samples: int, repetitions: int) -> Measured:
    """Times, the least of several; errors of the first samples."""
    y0, p = case.starts(samples), case.rates(samples)
    forward = total = INF
    for _ in range(repetitions):
        with torch.no_grad():
            forward = min(forward, stopwatch(lambda: case.solution(solver, y0, p)) / samples)
        total = min(total, stopwatch(lambda: case.gradient(solver, samples)) / samples)
    ends, gradients = case.gradient(solver, samples)
    error = max(case.sample(i, samples).error(gradients[i]) for i in range(1 if case.spread == 0 else 2))
    with torch.no_grad():
        steps = float(case.solution(solver, y0, p).stats["steps"].double().mean())
    return Measured(forward, total - forward, case.end_error(ends.numpy(), samples), error, steps)


def _rows(
    report: Report, case: Stiff, samples: int, repetitions: int, count: int
) -> tuple[Measured, list[float], float]:
    """A table, and what is in it: ours, seconds a sample of SciPy's two, and the floor of forward."""
    ours = measured(case, solver(case), samples, repetitions)
    bound = ours.steps * _step_floor(case, samples, 3) / samples
    table, peers = [("difflayers Rodas", *ours.cells)], []
    for method in ("Radau", "LSODA"):
        took, error = case.scipy_loop(method, samples, count)
        peers.append(took)
        table.append((f"SciPy {method}, {count} of them", ms(took), "", f"{error:.0e}", ""))
    table.append((f"floor of {ours.steps:.0f} steps", ms(bound), "", "", ""))
    report.table(_title(case, samples), HEADINGS, table)
    return ours, peers, bound


def _title(case: Stiff, samples: int) -> str:
    system = case.system
    return f"{samples} × {system.name}, rtol {system.rtol:g}, atol {system.atol:g}: a sample"


def _step_floor(case: Stiff, samples: int, repetitions: int) -> float:
    """CPU seconds of one Rosenbrock step of all: 8 evaluations, a Jacobian by vjps, a factorization, 8 solves."""
    system, n = case.system, len(case.system.y0)
    y = case.starts(samples).requires_grad_()
    p, t = case.rates(samples).unbind(-1), torch.tensor(system.t[0], dtype=torch.float64)
    right = torch.ones(samples, n, 1, dtype=torch.float64)
    matrix = torch.eye(n, dtype=torch.float64).expand(samples, n, n) + 0.1
    lu, pivots = torch.linalg.lu_factor(matrix)

    def plain() -> Any:
        with torch.no_grad():
            return system.field(t, y, p)

    def jacobian() -> Any:
        slope = system.field(t, y, p)
        return [torch.autograd.grad(slope[:, i].sum(), y, retain_graph=True) for i in range(n)]

    parts = 8 * least(plain, repetitions) + least(jacobian, repetitions)
    parts += least(lambda: torch.linalg.lu_factor(matrix), repetitions)
    return parts + 8 * least(lambda: torch.linalg.lu_solve(lu, pivots, right), repetitions)
