"""CVXPY problems as layers beside cvxpylayers: time, accuracy of gradients, and what was asked.

One process, one thread, CPU time, minimum over repetitions that take turns. See ``README.md`` for what is compared and
why. Single parts: ``--only l1`` (or dual, geometric, lasso, correlation, logistic, threads), any number of times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _cone_measure import Comparison, Result, compare, floor, installed, missing, ours
from _cone_peers import DEFAULT, MOREAU
from _cone_problems import Case, correlation, dual, geometric, l1, lasso, logistic
from _qp_measure import Floor, wall
from _report import Goal, Part, Report, ms, run

OURS, ERROR = "difflayers", 1e-8


def readme(report: Report, make: Callable[[int], Case]) -> None:
    """An example of cvxpylayers' README: 128 samples, and one."""
    compared(report, make(128), {DEFAULT: 40.0, MOREAU: 1.8})
    compared(report, make(1), {DEFAULT: 5.0})


def compared(report: Report, case: Case, asked: dict[str, float]) -> None:
    """All methods on a case, as a table, and how many times faster than a peer ours must be."""
    repetitions = 3 if report.quick else 15
    comparison = compare(case, {OURS: ours} | installed(), repetitions, 1 if report.quick else 10)
    least = floor(case, repetitions)
    _table(report, case, comparison, least)
    for name, reason in (missing() | comparison.failed).items():
        report.note(f"  left out: {name}: {reason}")
    if OURS not in comparison.results:
        return
    mine = comparison.results[OURS]
    for peer, ratio in asked.items():
        if peer in comparison.results:
            _goal(report, case, (peer, comparison.results[peer]), mine, least, ratio)
        else:
            report.note(f"{case.name}: no goal without {peer}")
    error = f"{mine.gradient_error:.0e}"
    report.goal(
        Goal(f"{case.name}: gradient error", "", error, "", "", f"≤ {ERROR:g}", error, mine.gradient_error <= ERROR)
    )


def _table(report: Report, case: Case, comparison: Comparison, least: Floor) -> None:
    mine = comparison.results.get(OURS)
    rows = []
    for name, result in comparison.results.items():
        own = result is mine
        rows.append(
            (
                name,
                ms(result.total),
                "" if mine is None else f"{result.total / mine.total:.2f}",
                ms(least.total) if own else "",
                f"{ms(least.backend)} + {ms(least.factorization)}" if own else "",
                f"{result.variable_error:.0e}",
                f"{result.gradient_error:.0e}",
            )
        )
    regular = case.reference.regular
    kinks = f", {(~regular).sum()} at kinks left out" if not regular.all() else ""
    title = (
        f"{case.name}: errors of {len(regular)} samples{kinks}; differences agree to {case.reference.uncertainty:.0e}"
    )
    report.table(
        title, "method|forward + backward|÷ ours|floor|backend + factorization|variable error|gradient error", rows
    )


def _goal(report: Report, case: Case, peer: tuple[str, Result], mine: Result, least: Floor, asked: float) -> None:
    name, other = peer
    ratio = other.total / mine.total
    report.goal(
        Goal(
            f"{case.name}: forward + backward",
            f"{ms(other.total)}, gradient {other.gradient_error:.0e} ({name})",
            f"{ms(mine.total)}, gradient {mine.gradient_error:.0e}",
            f"{ms(least.total)} ({other.total / least.total:.1f}×)",
            _where(mine, least),
            f"≥ {asked:g}×",
            f"{ratio:.2f}×",
            ratio >= asked,
        )
    )


def _where(mine: Result, least: Floor) -> str:
    if mine.total < least.total:
        return "less than Clarabel alone"
    backend, factor = least.backend / mine.total, least.factorization / mine.total
    return f"backend {backend:.0%}, factorization {factor:.0%}, rest {1 - backend - factor:.0%}"


def threads(report: Report) -> None:
    """Wall-clock time with one thread and with two."""
    case = lasso()
    run, least = ours(case), {}
    for count in (1, 2):
        torch.set_num_threads(count)
        run()
        least[count] = wall(run, 3 if report.quick else 10)
    torch.set_num_threads(1)
    rows = [(str(count), ms(seconds)) for count, seconds in least.items()]
    report.table(f"{case.name}, wall-clock time", "threads|forward + backward", rows)
    ratio = least[1] / least[2]
    found = f"{ms(least[1])}, {ms(least[2])}"
    work = f"{case.name}: two threads, wall clock"
    report.goal(Goal(work, "", found, "", "", "≥ 1.6×", f"{ratio:.2f}×", ratio >= 1.6))


PARTS: dict[str, Part] = {
    "l1": lambda report: readme(report, l1),
    "dual": lambda report: readme(report, dual),
    "geometric": lambda report: readme(report, geometric),
    "lasso": lambda report: compared(report, lasso(), {DEFAULT: 4.0, MOREAU: 2.0}),
    "correlation": lambda report: compared(report, correlation(), {DEFAULT: 4.0}),
    "logistic": lambda report: compared(report, logistic(), {DEFAULT: 4.0}),
    "threads": threads,
}


if __name__ == "__main__":
    run(PARTS, __doc__, "peer", silenced="cvxpy|cvxpylayers|diffcp")
