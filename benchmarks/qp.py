"""Quadratic programs and their gradients beside other differentiable QP solvers: time, accuracy, and what was asked.

One process, one thread, CPU time, minimum over repetitions that take turns. See ``README.md`` for what is compared and
why. Single parts: ``--only dense`` (or single, accuracy, sparse, threads, many, curve), any number of times; with
``--backends`` every backend of ours is a row.
"""

from __future__ import annotations

import resource

import torch
from _measure import stopwatch
from _qp_measure import (
    Comparison,
    Floor,
    Ours,
    Result,
    backends,
    chosen,
    compare,
    examined,
    floor,
    installed,
    missing,
    wall,
)
from _qp_peers import PEERS, SPARSE_PEERS, Method, differentiated
from _qp_problems import MARGIN, Case, dense
from _qp_problems import sparse as sparse_case
from _report import Goal, Part, Report, ms, run
from tqdm import tqdm

from difflayers.qp import DAQP, solve_qp

DENSE = ((128, 10, 10, 2), (128, 50, 50, 10), (32, 100, 100, 20), (8, 200, 200, 40))
THREADED = ((128, 50, 50, 10), (256, 100, 100, 20), (1024, 50, 50, 10))
# Times the best peer, cold and warm, and times qpth.
ASKED = {
    "128, 10, 10, 2": (3.0, None, 10.0),
    "128, 50, 50, 10": (4.0, 12.0, 9.0),
    "32, 100, 100, 20": (3.5, 12.0, None),
    "8, 200, 200, 40": (2.3, 8.0, None),
}
COLD, WARM, QPTH, QPLAYER = "difflayers", "difflayers, warm start", "qpth 0.0.18", "ProxQP's QPLayer 0.8"


def dense_sizes(report: Report) -> None:
    for size in DENSE:
        case = dense(*size)
        comparison, floors = _compared(report, case)
        best = comparison.best(installed())
        cold, warm, qpth = ASKED[case.name]
        _ratio_goal(report, f"{case.name}: cold", comparison, COLD, best, cold, floors[COLD])
        if QPTH in comparison.results and qpth is not None:
            against = QPTH, comparison.results[QPTH]
            _ratio_goal(report, f"{case.name}: cold, qpth", comparison, COLD, against, qpth, floors[COLD])
        if warm is not None:
            _ratio_goal(report, f"{case.name}: warm start", comparison, WARM, best, warm, floors[WARM])


def single(report: Report) -> None:
    """One small QP."""
    case = dense(1, 10, 10, 2)
    comparison, floors = _compared(report, case)
    if QPLAYER in comparison.results:
        _share_goal(report, case, comparison, floors[COLD])
    else:
        report.note(f"{case.name}: no goal without ProxQP")


def _compared(report: Report, case: Case) -> tuple[Comparison, dict[str, Floor]]:
    """All methods on a case, as a table; the floors of ours."""
    moved, repetitions = case.moved(), 3 if report.quick else 15
    running, others = backends()
    ours: dict[str, tuple[Method, Case]] = {COLD: (Ours(), case), WARM: (Ours(start=case), moved)}
    if report.backends:
        ours |= {name: (method, case) for name, method in running.items() if name != "auto"}
    comparison = compare(
        ours | {name: (method, case) for name, method in installed().items()}, repetitions, 1 if report.quick else 6
    )
    auto = chosen(case)
    floors = {name: floor(case, auto if name == COLD else name, repetitions) for name in ours if name != WARM}
    floors[WARM] = floor(moved, None, repetitions)
    _report_table(report, case, comparison, floors, comparison.best(installed()), f'"auto" is {auto}')
    skipped = missing() | comparison.failed | (others if report.backends else {})
    for name, reason in skipped.items():
        quoted = PEERS[name].quoted.get(case.name) if name in PEERS else None
        note = f" (not measured in this run; on a quiet core when the area was planned: {quoted})" if quoted else ""
        report.note(f"  left out: {name}: {reason}{note}")
    return comparison, floors


def _report_table(
    report: Report,
    case: Case,
    comparison: Comparison,
    floors: dict[str, Floor],
    best: tuple[str, Result] | None,
    note: str,
) -> None:
    rows = []
    for name, result in comparison.results.items():
        own = floors.get(name)
        rows.append(
            (
                name,
                ms(result.total),
                "" if best is None else f"{best[1].total / result.total:.2f}",
                ms(own.total) if own else "",
                f"{ms(own.backend)} + {ms(own.factorization)}" if own else "",
                f"{result.x_error:.0e}",
                f"{result.gradient_error:.0e}",
            )
        )
    reference = case.reference
    irregular = int((~reference.regular).sum())
    title = (
        f"{case.name}: {reference.active.sum(1).mean():.1f} active rows, margin {reference.margin.min():.0e}"
        f"{f', {irregular} samples below {MARGIN:g} left out of errors' if irregular else ''}; {note}"
    )
    headings = "method|forward + backward|best peer ÷ it|floor|backend + factorization|x error|gradient error"
    report.table(title, headings, rows)


def _ratio_goal(
    report: Report,
    work: str,
    comparison: Comparison,
    ours: str,
    against: tuple[str, Result] | None,
    asked: float,
    least: Floor,
) -> None:
    if against is None or ours not in comparison.results:
        report.note(f"{work}: nothing to compare")
        return
    peer, result = against[1], comparison.results[ours]
    ratio = peer.total / result.total
    report.goal(
        Goal(
            f"{work}: forward + backward",
            f"{ms(peer.total)}, gradient {peer.gradient_error:.0e} ({against[0]})",
            f"{ms(result.total)}, gradient {result.gradient_error:.0e}",
            f"{ms(least.total)} ({peer.total / least.total:.1f}×)",
            _where(result, least),
            f"≥ {asked:g}×",
            f"{ratio:.2f}×",
            ratio >= asked,
        )
    )


def _share_goal(report: Report, case: Case, comparison: Comparison, least: Floor) -> None:
    peer, result = comparison.results[QPLAYER], comparison.results[COLD]
    share = result.total / peer.total
    report.goal(
        Goal(
            f"{case.name}: forward + backward",
            f"{ms(peer.total)}, gradient {peer.gradient_error:.0e} ({QPLAYER})",
            f"{ms(result.total)}, gradient {result.gradient_error:.0e}",
            f"{ms(least.total)} ({least.total / peer.total:.2f})",
            _where(result, least),
            "≤ 0.5 of its time",
            f"{share:.2f}",
            share <= 0.5,
        )
    )


def _where(result: Result, least: Floor) -> str:
    backend, factor = least.backend / result.total, least.factorization / result.total
    return f"backend {backend:.0%}, factorization {factor:.0%}, rest {1 - backend - factor:.0%}"


def accuracy(report: Report) -> None:
    """Gradient errors of every backend, from data in float64 and in float32."""
    running, _ = backends()
    rows, worst = [], {"float64": 0.0, "float32": 0.0}
    cases = [dense(*size) for size in DENSE]
    for name, method in running.items():
        for kind in ("float64", "float32"):
            errors = []
            for case in cases if kind == "float64" else [case.in_float32() for case in cases]:
                errors.append(examined(case, *method(case)()).gradient_error)
            worst[kind] = max(worst[kind], *errors)
            rows.append((f"{name}, {kind}", *[f"{error:.0e}" for error in errors]))
    report.table("Gradient error", "|".join(["backend", *[case.name for case in cases]]), rows)
    for kind, asked in (("float64", 1e-10), ("float32", 1e-5)):
        report.goal(
            Goal(
                f"gradient error, {kind}, {len(running)} backends, {len(cases)} sizes",
                "",
                f"{worst[kind]:.0e}",
                "",
                "",
                f"≤ {asked:g}",
                f"{worst[kind]:.0e}",
                worst[kind] <= asked,
            )
        )


def threads(report: Report) -> None:
    """Wall-clock time with one thread and with two."""
    for size in THREADED[:1] if report.quick else THREADED:
        _two_threads(report, dense(*size))


def _two_threads(report: Report, case: Case) -> None:
    rows, least = [], {}
    for count in (1, 2):
        torch.set_num_threads(count)
        run = differentiated(case, lambda *blocks, count=count: solve_qp(*blocks, solver=DAQP(threads=count)).x)
        run()
        least[count] = wall(run, 5 if report.quick else 25)
        rows.append((str(count), ms(least[count])))
    torch.set_num_threads(1)
    report.table(f"{case.name}, wall-clock time", "threads|forward + backward", rows)
    ratio = least[1] / least[2]
    ours = f"{ms(least[1])}, {ms(least[2])}"
    report.goal(
        Goal(f"{case.name}: two threads, wall clock", "", ours, "", "", "≥ 1.6×", f"{ratio:.2f}×", ratio >= 1.6)
    )


def many(report: Report) -> None:
    """Tiny QPs in pieces, made when they are needed."""
    total, piece = 10_000 if report.quick else 100_000, 5_000
    seconds, worst, first = 0.0, 0.0, 0.0
    with tqdm(total=total, unit="QP", unit_scale=True, desc="10, 10, 2") as bar:
        for seed in range(total // piece):
            case = dense(piece, 10, 10, 2, seed)
            run = Ours()(case)
            seconds += stopwatch(run)
            bar.update(piece)
            if seed == 0:
                worst, first = examined(case, *run()).gradient_error, _peak()
    rise = _peak() - first
    speed = f"{total / seconds:,.0f} QPs/s, {seconds:.1f} s, gradient {worst:.0e}"
    text = f"{speed}; peak memory {first:.0f} MB after the first piece, {rise:.0f} MB more at the end"
    report.note(f"{total:,} QPs of 10, 10, 2 in pieces of {piece:,}: {text}")
    report.goal(Goal(f"{total:,} tiny QPs", "", text, "", "", "bounded memory", f"{rise:.0f} MB more", rise < 100))


def _peak() -> float:
    """The process's peak memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def curve(report: Report) -> None:
    """Which backend is fastest at which size: milliseconds per sample, forward and backward, by batch."""
    running, _ = backends()
    names = [name for name in running if name != "auto"]
    rows = []
    for n, batch in ((5, 128), (10, 128), (20, 128), (50, 64), (100, 32), (150, 16), (200, 8), (300, 4), (500, 2)):
        case = dense(batch, n, n, n // 5)
        repetitions, budget = (2, 0.5) if report.quick else (5, 3)
        comparison = compare({name: (running[name], case) for name in names}, repetitions, budget)
        times = {name: result.total / batch for name, result in comparison.results.items()}
        cells = [f"{times[name] * 1e3:.3f}" if name in times else "–" for name in names]
        rows.append((str(n), str(batch), *cells, min(times, key=times.get), chosen(case)))
    report.table(
        "ms per QP with n inequalities and n/5 equations", "|".join(["n", "batch", *names, "fastest", "auto"]), rows
    )


def sparse(report: Report) -> None:
    """One QP of 5000 unknowns; peers differentiate in the vectors only."""
    for kind in ("banded",) if report.quick else ("banded", "random"):
        case = sparse_case(kind)
        moved = case.moved()
        methods = {name: (method, case) for name, method in installed(SPARSE_PEERS).items()}
        ours = {COLD: (Ours(), case), WARM: (Ours(start=case), moved)}
        # Random ones fill in, and take PIQP 20 s each.
        repetitions = 2 if report.quick or kind == "random" else 10
        comparison = compare(ours | methods, repetitions, 10)
        floors = {COLD: floor(case, "piqp", repetitions), WARM: floor(moved, None, repetitions)}
        # No peer has a credible gradient.
        best = comparison.best(methods, credible=float("inf"))
        _report_table(report, case, comparison, floors, best, "floor: sparse PIQP and QDLDL")
        for name, reason in (missing(SPARSE_PEERS) | comparison.failed).items():
            report.note(f"  left out: {name}: {reason}")
        for name, asked in ((COLD, 7.0), (WARM, 20.0)):
            _ratio_goal(report, f"{case.name}: {name}", comparison, name, best, asked, floors[name])


PARTS: dict[str, Part] = {
    "dense": dense_sizes,
    "single": single,
    "accuracy": accuracy,
    "sparse": sparse,
    "threads": threads,
    "many": many,
    "curve": curve,
}


if __name__ == "__main__":
    run(PARTS, __doc__, "best peer", silenced="cvxpy|cvxpylayers|diffcp|jax|jaxopt", backends=True)
