"""ProxQP: a proximal augmented Lagrangian method in C++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from difflayers._solution import Status
from difflayers.qp._host import Array, HostQPSolver, Results, Samples

_SURE = 1e-8


@dataclass(frozen=True)
class ProxQP(HostQPSolver):
    """A proximal augmented Lagrangian method (Bambade et al. 2025, IEEE Trans. Robot. 41), for any convex QP.

    Its multipliers are positive where the upper side of a row is active and negative where the lower one is; those of
    the bounds come last. It may call LPs and badly scaled problems infeasible; those it solves again with a stricter
    test, which keeps Python's lock.

    Args:
        tol: absolute tolerance of the backend; the answer is polished afterwards.
        max_steps: outer iterations before a sample is ``MAX_STEPS``.
        threads: how many samples at a time; None is ``torch.get_num_threads()``.
    """

    tol: float = 1e-9
    max_steps: int = 1000
    package: ClassVar[str] = "proxsuite"
    releases_gil: ClassVar[bool] = True

    def solve_samples(self, samples: Samples, rows: range, results: Results) -> None:
        proxqp, m = self.module().proxqp, samples.layout.m
        status = _statuses(proxqp.QPSolverOutput)
        free = np.full(samples.layout.n, np.inf)
        for i in rows:
            P, q, G, h, A, b, low, high = samples.at(i)
            blocks = (P, q, A, b, G, np.full(m, -np.inf) if m else None, h)
            bounds = (
                () if low is None and high is None else (-free if low is None else low, free if high is None else high)
            )
            found = self._first(proxqp, blocks, bounds)
            if status.get(found.info.status) in (Status.INFEASIBLE, Status.UNBOUNDED):
                again = self._strict(proxqp, blocks, bounds)
                found = again if again.info.status == proxqp.QPSolverOutput.PROXQP_SOLVED else found
            results.x[i], results.steps[i] = found.x, found.info.iter_ext
            results.status[i] = status.get(found.info.status, Status.BACKEND_ERROR)
            results.set_signed(i, found.z[m:], np.concatenate([found.y, found.z[:m]]))

    def _first(self, proxqp: Any, blocks: tuple[Any, ...], bounds: tuple[Array, ...]) -> Any:
        box = dict(zip(("l_box", "u_box"), bounds, strict=False))
        return proxqp.dense.solve_no_gil(*blocks, **box, eps_abs=self.tol, eps_rel=0.0, max_iter=self.max_steps)

    def _strict(self, proxqp: Any, blocks: tuple[Any, ...], bounds: tuple[Array, ...]) -> Any:
        rows = [0 if side is None else len(side) for side in (blocks[3], blocks[6])]
        solver = proxqp.dense.QP(len(blocks[1]), *rows, bool(bounds))
        settings = solver.settings
        settings.eps_abs, settings.eps_rel, settings.max_iter = self.tol, 0.0, self.max_steps
        settings.eps_primal_inf = settings.eps_dual_inf = _SURE
        solver.init(*blocks, *bounds)
        solver.solve()
        return solver.results


def _statuses(output: Any) -> dict[Any, Status]:
    return {
        output.PROXQP_SOLVED: Status.SUCCESS,
        output.PROXQP_MAX_ITER_REACHED: Status.MAX_STEPS,
        output.PROXQP_PRIMAL_INFEASIBLE: Status.INFEASIBLE,
        output.PROXQP_DUAL_INFEASIBLE: Status.UNBOUNDED,
    }
