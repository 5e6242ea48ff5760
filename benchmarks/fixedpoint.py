"""Fixed points, roots and their gradients beside torchdeq and SciPy: time, evaluations, accuracy, and what was asked.

One process, one thread, CPU time, minimum over repetitions that take turns. See ``README.md`` for what is compared and
why. Single parts: ``--only conv`` (or multiscale, tanh, linear, counts, overhead, roots, digits), any number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import _cells
import digits
import roots
import torch
from _cells import Case
from _measure import Comparison, Counted, compare, examine, stopwatch, time_f
from _report import Goal, Part, Report, run
from peers import Method, torchdeq_approximate, torchdeq_exact
from torch import Tensor, nn

from difflayers import ImplicitAdjoint, ImplicitFunction, Solver, linear
from difflayers.fixedpoint import DEQ, Anderson, Broyden, FixedPointProblem, Newton, Picard


@dataclass(frozen=True)
class Ours:
    """A deep equilibrium layer as a method of the benchmark, held to the tolerance of the case."""

    solver: type[Anderson] | type[Broyden] | type[Newton] | type[Picard]
    linear_solver: linear.LinearSolver

    def __call__(self, case: Case) -> Callable[[], Tensor]:
        linear_solver = self.linear_solver
        if isinstance(linear_solver, linear.Picard):
            linear_solver = replace(linear_solver, max_steps=case.steps)
        layer = DEQ(case.cell, solver=solver(self.solver, case), adjoint=ImplicitAdjoint(linear_solver))

        def solve() -> Tensor:
            value: Tensor = layer(case.x, init=case.z0)
            return value

        return solve


DEFAULT = "Anderson, ImplicitAdjoint()"
LEARNT = "Broyden, ImplicitAdjoint()"
COLD = "Anderson, linear.GCR"
EXACT: dict[str, Method] = {
    DEFAULT: Ours(Anderson, linear.Auto()),
    LEARNT: Ours(Broyden, linear.Auto()),
    COLD: Ours(Anderson, linear.GCR()),
    "Anderson, linear.GMRES": Ours(Anderson, linear.GMRES()),
    "Anderson, linear.BiCGSTAB": Ours(Anderson, linear.BiCGSTAB()),
    "Picard, ImplicitAdjoint()": Ours(Picard, linear.Auto()),
    "Picard, linear.Picard": Ours(Picard, linear.Picard()),
}
# Where a Jacobian per sample is small enough to be formed.
DENSE: dict[str, Method] = {"Newton, ImplicitAdjoint()": Ours(Newton, linear.Auto())}
APPROXIMATE: dict[str, Method] = {
    "Anderson, linear.Neumann(5)": Ours(Anderson, linear.Neumann(5)),
    "Anderson, linear.Identity": Ours(Anderson, linear.Identity()),
}


def solver(kind: type[Anderson] | type[Broyden] | type[Newton] | type[Picard], case: Case) -> Solver:
    """A solver with its defaults, but for the tolerance and the number of steps."""
    return kind(rtol=case.tolerance, atol=0.0, max_steps=case.steps)


@cache
def posed(name: str) -> tuple[Case, Tensor, float]:
    """A case in float64, the true gradient, and the residual of the point at which that was taken."""
    case = {
        "conv": _cells.conv,
        "multiscale": _cells.multiscale,
        "tanh": _cells.tanh,
        "linear 0.9": _cells.linear,
        "linear 0.99": lambda: _cells.linear(radius=0.99),
    }[name]()
    residual, gradient = _cells.reference(case)
    return case, gradient, residual


def conv(report: Report) -> None:
    _timing(report, "conv", 3.0)


def multiscale(report: Report) -> None:
    _timing(report, "multiscale", 4.0, float32=1e-4)


def tanh(report: Report) -> None:
    _timing(report, "tanh", 3.0)


def linear_cells(report: Report) -> None:
    _timing(report, "linear 0.9", 3.0)
    _timing(report, "linear 0.99", 3.0)


def _timing(report: Report, name: str, asked: float, float32: float | None = None) -> None:
    case, gradient, residual = posed(name)
    report.note(f"{case.name}: residual at the reference {residual:.0e}")
    if float32 is not None:
        case = case.in_float32(float32)
    small = isinstance(case.cell, _cells.Dense)
    own = {**EXACT, **(DENSE if case.z0.shape[1] <= 64 else {})}
    methods = {**own, **torchdeq_exact()}
    if small and not report.quick:
        methods |= {**APPROXIMATE, **torchdeq_approximate()}
    comparison = compare(
        case, methods, gradient, 20 if small and not report.quick else 5 if small else 3 - report.quick
    )
    _report_times(report, comparison)
    (_, peer), (name, ours) = comparison.best(torchdeq_exact()), comparison.best(own)
    ratio, default = peer.total / ours.total, peer.total / comparison.results[DEFAULT].total
    report.goal(
        Goal(
            f"{case.name}: forward + backward",
            f"{peer.total * 1e3:.1f} ms",
            f"{ours.total * 1e3:.1f} ms ({name})",
            f"{ours.floor * 1e3:.1f} ms ({peer.total / ours.floor:.1f}×)",
            f"outside f and vjps: {ours.outside:.0%}",
            f"≥ {asked:g}×",
            f"{ratio:.2f}× (default {default:.2f}×)",
            ratio >= asked,
        )
    )


def _report_times(report: Report, comparison: Comparison) -> None:
    case = comparison.case
    n, peer = len(case.x), comparison.best(torchdeq_exact())[1]
    one = f"f {comparison.one_f[n] * 1e3:.3f} ms, its vjp {comparison.one_vjp[n] * 1e3:.3f} ms"
    headings = "method|forward|forward + backward|torchdeq's best ÷ it|floor|outside|f|vjp|residual|gradient error"
    rows = [
        (
            name,
            f"{r.forward * 1e3:.1f} ms",
            f"{r.total * 1e3:.1f} ms",
            f"{peer.total / r.total:.2f}",
            f"{r.floor * 1e3:.1f} ms",
            f"{r.outside:.0%}",
            str(r.evaluations),
            str(r.vjps),
            f"{r.residual:.0e}",
            f"{r.gradient_error:.0e}",
        )
        for name, r in comparison.results.items()
    ]
    report.table(f"{case.name}, to {case.tolerance:g}: {one}", headings, rows)


def counts(report: Report) -> None:
    """Evaluations of ``f`` and vjps at 1e-8 in float64, and how exact the gradient is; no times."""
    names = ("conv", "multiscale", "tanh", "linear 0.9", "linear 0.99")
    methods = {"torchdeq": torchdeq_exact()["torchdeq anderson"], **EXACT}
    rows = []
    for name in names:
        case, gradient, _ = posed(name)
        found = {key: examine(case, methods[key], gradient) for key in ("torchdeq", DEFAULT, COLD, LEARNT)}
        rows.append((case, found))
        _evaluation_goal(report, case, found["torchdeq"].evaluations, found[DEFAULT].evaluations)
    for case, found in rows:
        _adjoint_goal(report, case, *(found[key].vjps for key in (COLD, DEFAULT, LEARNT)))
    for case, found in rows:
        if case.smooth:
            _gradient_goal(report, case, *(found[key].gradient_error for key in ("torchdeq", DEFAULT, LEARNT)))


def _evaluation_goal(report: Report, case: Case, peer: int, ours: int) -> None:
    ratio = ours / peer
    work = f"{case.name}: evaluations of f at {case.tolerance:g}"
    report.goal(Goal(work, f"{peer} (Anderson)", f"{ours} (Anderson)", "", "", "≤ 0.4", f"{ratio:.2f}", ratio <= 0.4))


def _adjoint_goal(report: Report, case: Case, cold: int, default: int, learnt: int) -> None:
    least, most = min(default, learnt), max(default, learnt)
    linear_cell = case.name.startswith("linear")
    report.goal(
        Goal(
            f"{case.name}: vjps of the adjoint",
            "",
            f"{default} after Anderson, {learnt} after Broyden, {cold} cold GCR",
            "",
            "",
            "≤ 0.6 of cold GCR" if linear_cell else "≤ cold GCR",
            f"{least / cold:.2f}" if linear_cell else f"{most / cold:.2f}",
            most <= cold and (least <= 0.6 * cold or not linear_cell),
        )
    )


def _gradient_goal(report: Report, case: Case, peer: float, default: float, learnt: float) -> None:
    in_tolerances = max(default, learnt) / case.tolerance
    report.goal(
        Goal(
            f"{case.name}: gradient error at {case.tolerance:g}",
            f"{peer:.0e} (Anderson)",
            f"{default:.0e} after Anderson, {learnt:.0e} after Broyden",
            "",
            "",
            "≤ 10 tolerances",
            f"{in_tolerances:.1f}",
            in_tolerances <= 10,
        )
    )


def overhead(report: Report) -> None:
    """What an iteration takes beyond its evaluation of ``f``, in evaluations of ``f``."""
    rows = []
    slow, fast = _cells.conv(), _cells.linear().in_float32(1e-4)
    for case, repetitions, limits in ((slow, 2 if report.quick else 3, (0.15, 0.15)), (fast, 50, (1.5, 8.0))):
        for kind, asked in zip((Picard, Anderson), limits, strict=True):
            rows.append(_overhead(report, case, kind, asked, repetitions))
    headings = "cell|solver|one f|evaluations|solver alone: overhead per iteration|in a DEQ"
    report.table("Overhead", headings, rows)


def _overhead(
    report: Report, case: Case, kind: type[Anderson] | type[Picard], asked: float, repetitions: int
) -> tuple[str, ...]:
    counted = Counted(case.cell)
    runs = [_forward(case, case.cell, kind, deq=False), _forward(case, case.cell, kind, deq=True)]
    count = _forward(case, counted, kind, deq=False)
    count()
    counted.evaluations.clear()
    count()
    times, ones = [float("inf")] * 2, {samples: float("inf") for samples in counted.evaluations}
    for _ in range(repetitions):
        ones = {samples: min(best, time_f(case, samples)) for samples, best in ones.items()}
        times = [min(best, stopwatch(run)) for best, run in zip(times, runs, strict=True)]
    floor = sum(n * ones[samples] for samples, n in counted.evaluations.items())
    evaluations, one = counted.evaluations.total(), ones[len(case.x)]
    alone, layer = ((t - floor) / evaluations / one for t in times)
    report.goal(
        Goal(
            f"{case.name}: overhead of an iteration, {kind.__name__}",
            "",
            f"{times[0] * 1e3:.2f} ms, {evaluations} evaluations of {one * 1e3:.3f} ms",
            f"{floor * 1e3:.2f} ms",
            f"outside f: {1 - floor / times[0]:.0%}",
            f"≤ {asked:g} f",
            f"{alone:.2f} f (in a DEQ {layer:.2f})",
            alone <= asked,
        )
    )
    return case.name, kind.__name__, f"{one * 1e3:.3f} ms", str(evaluations), f"{alone:.2f} f", f"{layer:.2f} f"


def _forward(case: Case, cell: nn.Module, kind: type[Anderson] | type[Picard], *, deq: bool) -> Callable[[], None]:
    layer = DEQ(cell, solver=solver(kind, case))
    function = ImplicitFunction(FixedPointProblem(cell, 1), solver(kind, case))

    def run() -> None:
        with torch.no_grad():
            _ = layer(case.x, init=case.z0) if deq else function.solve(case.x, init=case.z0)

    return run


PARTS: dict[str, Part] = {
    "conv": conv,
    "multiscale": multiscale,
    "tanh": tanh,
    "linear": linear_cells,
    "counts": counts,
    "overhead": overhead,
    "roots": roots.run,
    "digits": digits.run,
}


if __name__ == "__main__":
    run(PARTS, __doc__, "torchdeq")
