"""Initial value problems and their gradients beside torchdiffeq, torchode, diffrax and SciPy, and what was asked.

One process, one thread, CPU time, minimum over repetitions that take turns. See ``README.md`` for what is compared and
why. Single parts: ``--only spiral20`` (or spiral512, wide, lotka, rows, stiff, classics, gradients), any number of
times.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

# Before XLA starts: with two cores and this left out, its thread pool waits for itself.
os.environ.setdefault("NPROC", "1")

import torch
from _measure import INF, stopwatch
from _ode_bad import CHECKED, METHODS, THEIRS, Outcome, Solve, bad, cell
from _ode_gradients import GRADIENTS, Gradient
from _ode_measure import Comparison, Floor, Result, compare, floor, least
from _ode_peers import ADJOINT, TAPE, Method, Ours, installed, missing
from _ode_problems import CASES, Case, lotka_volterra
from _ode_stiff import CLASSICS, ROBERTSON, Stiff
from _report import Goal, Part, Report, ms, run
from torch import Tensor
from tqdm import tqdm

from difflayers.ode import CheckpointedAdjoint, Rodas, odeint

OURS = "difflayers"
# Of the time of odeint_adjoint and odeint; of the floor, forward and both; of odeint's tape.
ASKED = {
    "spiral20": (15.0, 3.5, 1.4, 0.6, None),
    "spiral512": (5.0, 1.4, 1.4, 1.3, None),
    "wide": (6.0, 1.4, 1.4, 1.3, 35.0),
    "lotka": (15.0, 3.5, 1.4, 0.6, None),
}


def joint(report: Report, part: str) -> None:
    """One step for all samples, against what others take."""
    case = CASES[part]()
    repetitions, seconds = (2, 1.0) if report.quick else (15, 8.0)
    methods: dict[str, Method] = {
        OURS: Ours(),
        "difflayers, step by step": Ours(adjoint=CheckpointedAdjoint(stage_parallel=False)),
        **_tightened(case),
        **installed(),
    }
    comparison = compare(case, methods, repetitions, seconds)
    least_of_all = floor(case, Ours(), repetitions)
    _table(report, case, comparison, least_of_all)
    adjoint, tape, forward, both, memory = ASKED[part]
    _against(report, case, comparison, ADJOINT, adjoint, least_of_all)
    _against(report, case, comparison, TAPE, tape, least_of_all)
    result = comparison.results[OURS]
    for what, took, bound, asked in (
        ("forward", result.forward, least_of_all.forward, forward),
        ("forward + backward", result.total, least_of_all.total, both),
    ):
        share = took / bound
        work = f"{case.name}: {what}, of the floor"
        report.goal(Goal(work, "", ms(took), ms(bound), "", f"≤ {asked:g}×", f"{share:.2f}×", share <= asked))
    if memory is not None and TAPE in comparison.results:
        theirs, kept = comparison.results[TAPE].tape or 0, result.tape or 1
        ratio = theirs / kept
        sizes = f"{theirs / 2**20:.2f} MB", f"{kept / 2**20:.2f} MB"
        report.goal(Goal(f"{case.name}: kept for backward", *sizes, "", "", f"≤ 1/{memory:g}", f"1/{ratio:.1f}",
                         ratio >= memory))  # fmt: skip


def _tightened(case: Case) -> dict[str, Method]:
    """Ours at smaller tolerances, for the gradient error of a peer that happens to be smaller."""
    shares = (0.5, 0.25, 0.1)
    at = lambda share: lambda case: Ours()(replace(case, rtol=case.rtol * share, atol=case.atol * share))  # noqa: E731
    return {f"difflayers at {case.rtol * share:.1e}": at(share) for share in shares}


def _matching(comparison: Comparison, error: float) -> tuple[str, Result]:
    """Our fastest row whose gradient error is no larger; the default where there is none."""
    rows = {n: r for n, r in comparison.results.items() if n.startswith(OURS) and r.gradient_error <= error}
    return min(rows.items(), key=lambda row: row[1].total, default=(OURS, comparison.results[OURS]))


def _against(
    report: Report, case: Case, comparison: Comparison, peer: str, asked: float, bound: Floor, tightened: bool = True
) -> None:
    if peer not in comparison.results:
        return report.note(f"{case.name}: {peer} isn't there, so nothing to compare")
    theirs = comparison.results[peer]
    name, ours = _matching(comparison, theirs.gradient_error) if tightened else (OURS, comparison.results[OURS])
    ratio, default = theirs.total / ours.total, theirs.total / comparison.results[OURS].total
    where = f"floor {bound.total / ours.total:.0%} of it"
    good = ratio >= asked and ours.gradient_error <= theirs.gradient_error
    report.goal(
        Goal(
            f"{case.name}: forward + backward",
            f"{ms(theirs.total)}, gradient {theirs.gradient_error:.0e} ({peer.removeprefix('torchdiffeq ')})",
            f"{ms(ours.total)}, gradient {ours.gradient_error:.0e} ({name.removeprefix('difflayers ')})",
            f"{ms(bound.total)} ({theirs.total / bound.total:.1f}×)",
            where,
            f"≥ {asked:g}×",
            f"{ratio:.2f}×" + ("" if name == OURS else f" (default {default:.2f}×)"),
            good,
        )
    )
    return None


def _table(report: Report, case: Case, comparison: Comparison, bound: Floor) -> None:
    rows = [
        (
            name,
            ms(result.forward),
            ms(result.total),
            f"{result.gradient_error:.0e}",
            "" if result.tape is None else f"{result.tape / 2**20:.3f} MB",
        )
        for name, result in comparison.results.items()
    ]
    rows.append(("floor", ms(bound.forward), ms(bound.total), "", ""))
    title = f"{case.name}, rtol {case.rtol:g}, atol {case.atol:g}"
    report.table(title, "method|forward|forward + backward|gradient error|kept for backward", rows)
    for name, reason in comparison.failed.items():
        report.note(f"  left out: {name}: {reason}")
    for name in missing():
        report.note(f"  left out: {name}: not installed")


def rows(report: Report) -> None:
    """A thousand systems whose rates spread over e³, each with its own steps."""
    case = lotka_volterra(100 if report.quick else 1000)
    repetitions, seconds = (1, 1.0) if report.quick else (5, 10.0)
    ours = Ours(per_sample=True)
    peers = {name: method for name, method in installed().items() if name != "diffrax, compiled"}
    comparison = compare(case, {OURS: ours, "difflayers, one step for all": Ours(), **peers}, repetitions, seconds)
    bound = floor(case, ours, repetitions)
    _table(report, case, comparison, bound)
    evaluated, alone = _counted(case, ours)
    ratio = evaluated / alone
    report.goal(Goal(f"{case.name}: rows of f evaluated", f"{alone:,} one by one", f"{evaluated:,}", "", "", "≤ 1.1",
                     f"{ratio:.3f}", ratio <= 1.1))  # fmt: skip
    _against(report, case, comparison, ADJOINT, 3.5, bound, tightened=False)


def _counted(case: Case, ours: Ours) -> tuple[int, int]:
    """Rows of ``f`` that a solve of all evaluates, and the evaluations of as many solves one by one."""
    count = 0

    def field(t: Tensor, y: Tensor, *args: Tensor) -> Tensor:
        nonlocal count
        count += len(y)
        value: Tensor = case.field(t, y, *args)
        return value

    solver = ours.solver(case)
    with torch.no_grad():
        odeint(field, case.y0, case.t, case.args, batch_dims=1, solver=solver)
        together, count = count, 0
        for i in tqdm(range(len(case.y0)), desc="one by one"):
            odeint(field, case.y0[i : i + 1], case.t, [a[i : i + 1] for a in case.args], batch_dims=1, solver=solver)
    return together, count


def stiff(report: Report) -> None:
    """A thousand Robertson systems, SciPy one after the other."""
    samples = 100 if report.quick else 1000
    ours = _stiff_rows(report, ROBERTSON, samples, 1 if report.quick else 3, 3 if report.quick else 20)
    for what, took, asked in (("forward", ours[0], 0.3e-3), ("backward", ours[1], 1e-3)):
        work = f"{samples} × {ROBERTSON.system.name} at {ROBERTSON.system.rtol:g}: {what}, a sample"
        met = took <= asked
        peer = "Radau {}, LSODA {}".format(*map(ms, ours[2])) if what == "forward" else ""
        report.goal(Goal(work, peer, ms(took), ms(ours[3]) if what == "forward" else "", "", f"≤ {asked * 1e3:g} ms",
                         ms(took), met))  # fmt: skip


def classics(report: Report) -> None:
    for case in CLASSICS[1:] if report.quick else CLASSICS:
        _stiff_rows(report, case, 10 if report.quick else 100, 1, 3)


def _stiff_rows(
    report: Report, case: Stiff, samples: int, repetitions: int, count: int
) -> tuple[float, float, tuple[float, float], float]:
    """Seconds a sample: forward, backward, SciPy's two, and the floor of forward."""
    system = case.system
    solver = Rodas(rtol=system.rtol, atol=system.atol, per_sample=True, max_steps=100_000)
    y0, p = torch.tensor(system.y0, dtype=torch.float64).repeat(samples, 1), case.rates(samples)
    forward = total = INF
    for _ in range(repetitions):
        with torch.no_grad():
            forward = min(forward, stopwatch(lambda: case.solution(solver, y0, p)) / samples)
        total = min(total, stopwatch(lambda: case.gradient(solver, samples)) / samples)
    ends, gradients = case.gradient(solver, samples)
    error = max(case.sample(i, samples).error(gradients[i]) for i in range(1 if case.spread == 0 else 2))
    with torch.no_grad():
        steps = float(case.solution(solver, y0, p).stats["steps"].double().mean())
    bound = steps * _step_floor(case, samples, 3) / samples
    table = [("difflayers Rodas", ms(forward), ms(total - forward), f"{case.end_error(ends.numpy(), samples):.0e}",
              f"{error:.0e}")]  # fmt: skip
    peers = []
    for method in ("Radau", "LSODA"):
        took, end_error = case.scipy_loop(method, samples, count)
        peers.append(took)
        table.append((f"SciPy {method}, {count} of them", ms(took), "", f"{end_error:.0e}", ""))
    table.append((f"floor of {steps:.0f} steps", ms(bound), "", "", ""))
    title = f"{samples} × {system.name}, rtol {system.rtol:g}, atol {system.atol:g}: a sample"
    report.table(title, "method|forward|backward|error of the end|gradient error", table)
    return forward, total - forward, (peers[0], peers[1]), bound


def _step_floor(case: Stiff, samples: int, repetitions: int) -> float:
    """CPU seconds of one Rosenbrock step of all: 8 evaluations, a Jacobian by vjps, a factorization, 8 solves."""
    system, n = case.system, len(case.system.y0)
    y = torch.tensor(system.y0, dtype=torch.float64).repeat(samples, 1).requires_grad_()
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


def gradients(report: Report) -> None:
    """Twenty gradients: within ten tolerances of the truth, or flagged."""
    problems = GRADIENTS[:6] if report.quick else GRADIENTS
    silent = "! where that is more than ten times rtol and nobody says so"
    plain = _gradients(report, f"Relative error of the gradient; {silent}", problems, METHODS | THEIRS)
    title = f"The same with CheckpointedAdjoint(check=5 × rtol); {silent}"
    checked = _gradients(report, title, problems, CHECKED)
    outcomes = {name: plain[name] for name in METHODS} | {
        f"{name}, with check": found for name, found in checked.items()
    }
    for method, found in outcomes.items():
        wrong = sum(outcome.silent for outcome in found)
        report.goal(Goal(f"{len(problems)} gradients by {method}: wrong and not flagged", "", f"{wrong}", "", "", "0",
                         f"{wrong}", wrong == 0))  # fmt: skip


def _gradients(
    report: Report, title: str, problems: Sequence[Gradient], methods: Mapping[str, Solve]
) -> dict[str, list[Outcome]]:
    rows = [[bad(problem, method) for method in methods.values()] for problem in tqdm(problems, desc="gradients")]
    table = [(problem.name, *map(cell, row)) for problem, row in zip(problems, rows, strict=True)]
    report.table(title, "|".join(["problem", *methods]), table)
    return {method: list(found) for method, found in zip(methods, zip(*rows, strict=True), strict=True)}


PARTS: dict[str, Part] = {
    **{name: lambda report, name=name: joint(report, name) for name in CASES},
    "rows": rows,
    "stiff": stiff,
    "classics": classics,
    "gradients": gradients,
}


if __name__ == "__main__":
    run(PARTS, __doc__, "peer", silenced="torchode|torchtyping|jax|diffrax|equinox")
