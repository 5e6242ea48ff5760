"""Initial value problems and their gradients beside torchdiffeq, torchode, diffrax and SciPy, and what was asked.

One process, one thread, CPU time, minimum over repetitions that take turns. See ``README.md`` for what is compared and
why. Single parts: ``--only spiral20`` (or spiral512, wide, lotka, compiled, rows, stiff, classics, dae, gradients),
any number of times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

# Before XLA starts: with two cores and this left out, its thread pool waits for itself.
os.environ.setdefault("NPROC", "1")

import torch
from _ode_bad import CHECKED, METHODS, THEIRS, Outcome, Solve, bad, cell
from _ode_gradients import GRADIENTS, Gradient
from _ode_measure import Comparison, compare, floor
from _ode_peers import ADJOINT, TAPE, Method, Ours, installed
from _ode_problems import CASES, Case, lotka_volterra
from _ode_stiff_parts import classics, dae, stiff
from _ode_tables import OURS, against, elsewhere, table
from _report import Goal, Part, Report, ms, run
from torch import Tensor
from tqdm import tqdm

from difflayers import UnrolledAdjoint
from difflayers.ode import CheckpointedAdjoint, odeint

COMPILED = "difflayers, compiled"
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
        "difflayers, unrolled": Ours(adjoint=UnrolledAdjoint()),
        **elsewhere(case, Ours()),
        **elsewhere(case, Ours(adjoint=UnrolledAdjoint()), "difflayers, unrolled", (4, 2, 0.5)),
        **installed(),
    }
    comparison = compare(case, methods, repetitions, seconds)
    least_of_all = floor(case, Ours(), repetitions)
    table(report, case, comparison, least_of_all)
    adjoint, tape, forward, both, memory = ASKED[part]
    against(report, case, comparison, ADJOINT, adjoint, least_of_all)
    against(report, case, comparison, TAPE, tape, least_of_all)
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


def compiled(report: Report) -> None:
    """The same with ``compile=True``, against eager, and the two ways of torchdiffeq."""
    torch.compiler.config.force_disable_caches = True  # what it takes when nothing is on disk
    repetitions, seconds = (2, 1.0) if report.quick else (15, 8.0)
    lines = []
    for part, make in CASES.items():
        case = make()
        ours = Ours(compile=True)
        took = _first_call(case, ours)
        peers = {name: method for name, method in installed().items() if name in (ADJOINT, TAPE)}
        methods = {OURS: Ours(), COMPILED: ours, **elsewhere(case, ours, COMPILED), **peers}
        comparison = compare(case, methods, repetitions, seconds)
        bound = floor(case, Ours(), repetitions)
        for name, reason in comparison.failed.items():
            report.note(f"{case.name}: left out: {name}: {reason}")
        lines.append(_compiled_row(case, comparison, took))
        for peer, asked in zip((ADJOINT, TAPE), ASKED[part], strict=False):
            against(report, case, comparison, peer, asked, bound, COMPILED)
    names = "eager: forward|forward + backward|compiled: forward|forward + backward|gain|odeint|odeint_adjoint|÷ it"
    report.table("compile=True", f"problem|{names}|gradient error|compiled in", lines)


def _first_call(case: Case, ours: Ours) -> float:
    """Seconds on the wall of the first solve with its gradient; compilers run in processes of their own."""
    start = time.perf_counter()
    ours(case).gradient()
    return time.perf_counter() - start


def _compiled_row(case: Case, comparison: Comparison, took: float) -> list[str]:
    results = comparison.results
    eager, ours = results[OURS], results[COMPILED]
    peers = [ms(results[name].total) if name in results else "–" for name in (TAPE, ADJOINT)]
    ratio = f"{results[ADJOINT].total / ours.total:.1f}×" if ADJOINT in results else "–"
    times = (eager.forward, eager.total, ours.forward, ours.total)
    errors = f"{eager.gradient_error:.0e}, {ours.gradient_error:.0e}"
    return [case.name, *map(ms, times), f"{eager.total / ours.total:.2f}×", *peers, ratio, errors, f"{took:.1f} s"]


def rows(report: Report) -> None:
    """A thousand systems whose rates spread over e³, each with its own steps."""
    case = lotka_volterra(100 if report.quick else 1000)
    repetitions, seconds = (1, 1.0) if report.quick else (5, 10.0)
    ours = Ours(per_sample=True)
    peers = {name: method for name, method in installed().items() if name != "diffrax, compiled"}
    comparison = compare(case, {OURS: ours, "difflayers, one step for all": Ours(), **peers}, repetitions, seconds)
    bound = floor(case, ours, repetitions)
    table(report, case, comparison, bound)
    evaluated, alone = _counted(case, ours)
    ratio = evaluated / alone
    report.goal(Goal(f"{case.name}: rows of f evaluated", f"{alone:,} one by one", f"{evaluated:,}", "", "", "≤ 1.1",
                     f"{ratio:.3f}", ratio <= 1.1))  # fmt: skip
    against(report, case, comparison, ADJOINT, 3.5, bound, elsewhere=False)


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
    lines = [(problem.name, *map(cell, row)) for problem, row in zip(problems, rows, strict=True)]
    report.table(title, "|".join(["problem", *methods]), lines)
    return {method: list(found) for method, found in zip(methods, zip(*rows, strict=True), strict=True)}


PARTS: dict[str, Part] = {
    **{name: lambda report, name=name: joint(report, name) for name in CASES},
    "compiled": compiled,
    "rows": rows,
    "stiff": stiff,
    "classics": classics,
    "dae": dae,
    "gradients": gradients,
}


if __name__ == "__main__":
    run(PARTS, __doc__, "peer", silenced="torchode|torchtyping|jax|diffrax|equinox")
