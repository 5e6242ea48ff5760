"""Methods on one case: the table, and how many times faster than a peer ours must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from _ode_measure import Comparison, Floor, Result
from _ode_peers import Method, Ours, missing
from _ode_problems import Case
from _report import Goal, Report, ms

OURS = "difflayers"


def elsewhere(
    case: Case, ours: Ours, name: str = OURS, shares: Sequence[float] = (4, 2, 0.5, 0.25, 0.1)
) -> dict[str, Method]:
    """Ours at other tolerances, for the gradient error of a peer that is smaller or larger at this one."""
    at = lambda share: lambda case: ours(replace(case, rtol=case.rtol * share, atol=case.atol * share))  # noqa: E731
    return {f"{name} at {case.rtol * share:.1e}": at(share) for share in shares}


def matching(comparison: Comparison, error: float, own: str = OURS) -> tuple[str, Result]:
    """The fastest of our rows whose gradient error is no larger; ``own`` itself where there is none."""
    rows = {n: r for n, r in comparison.results.items() if n.startswith(own) and r.gradient_error <= error}
    return min(rows.items(), key=lambda row: row[1].total, default=(own, comparison.results[own]))


def against(
    report: Report,
    case: Case,
    comparison: Comparison,
    peer: str,
    asked: float,
    bound: Floor,
    own: str = OURS,
    elsewhere: bool = True,
) -> None:
    """The goal that the fastest row of those that start with ``own`` be so many times faster than a peer."""
    if peer not in comparison.results:
        return report.note(f"{case.name}: {peer} isn't there, so nothing to compare")
    theirs = comparison.results[peer]
    name, ours = matching(comparison, theirs.gradient_error, own) if elsewhere else (own, comparison.results[own])
    ratio, default = theirs.total / ours.total, theirs.total / comparison.results[own].total
    where = f"floor {bound.total / ours.total:.0%} of it"
    good = ratio >= asked and ours.gradient_error <= theirs.gradient_error
    report.goal(
        Goal(
            f"{case.name}: forward + backward",
            f"{ms(theirs.total)}, gradient {theirs.gradient_error:.0e} ({peer.removeprefix('torchdiffeq ')})",
            f"{ms(ours.total)}, gradient {ours.gradient_error:.0e} ({name.removeprefix(OURS).lstrip(', ') or OURS})",
            f"{ms(bound.total)} ({theirs.total / bound.total:.1f}×)",
            where,
            f"≥ {asked:g}×",
            f"{ratio:.2f}×" + ("" if name == own else f" (default {default:.2f}×)"),
            good,
        )
    )
    return None


def table(report: Report, case: Case, comparison: Comparison, bound: Floor) -> None:
    """All methods, and who was left out."""
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
