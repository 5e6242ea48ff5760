"""OSQP: an operator-splitting method in C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from difflayers._solution import Status
from difflayers.qp._host import HostQPSolver, Results, Samples

_STATUS = {
    "OSQP_SOLVED": Status.SUCCESS,
    "OSQP_SOLVED_INACCURATE": Status.SUCCESS,
    "OSQP_PRIMAL_INFEASIBLE": Status.INFEASIBLE,
    "OSQP_PRIMAL_INFEASIBLE_INACCURATE": Status.INFEASIBLE,
    "OSQP_DUAL_INFEASIBLE": Status.UNBOUNDED,
    "OSQP_DUAL_INFEASIBLE_INACCURATE": Status.UNBOUNDED,
    "OSQP_MAX_ITER_REACHED": Status.MAX_STEPS,
}


@dataclass(frozen=True)
class OSQP(HostQPSolver):
    """Operator splitting (Stellato et al. 2020, Math. Prog. Comp. 12), for any convex QP.

    Cheap steps, many of them; LPs and badly scaled problems may need more than ``max_steps``. Its multipliers are
    positive where the upper side of a row is active and negative where the lower one is; bounds are rows.

    Args:
        tol: absolute and relative tolerance of the backend; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``.
        threads: how many samples at a time; None is ``torch.get_num_threads()``.
    """

    tol: float = 1e-7
    max_steps: int = 20_000
    package: ClassVar[str] = "osqp"
    releases_gil: ClassVar[bool] = True

    def solve_samples(self, samples: Samples, rows: range, results: Results) -> None:
        from scipy.sparse import csc_matrix

        module, n = self.module(), samples.layout.n
        matrices, lower, upper = samples.two_sided
        bounds = len(lower[0]) - len(matrices[0])
        identity = np.eye(n)[:bounds]
        for i in rows:
            P = csc_matrix(np.triu(samples.P[i]))
            matrix = csc_matrix(np.concatenate([identity, matrices[i]]))
            solver = self._made(module, P, samples.q[i], matrix, lower[i], upper[i])
            found = solver.solve(raise_error=False)
            name = module.SolverStatus(found.info.status_val).name
            results.x[i], results.steps[i] = found.x, found.info.iter
            results.status[i] = _STATUS.get(name, Status.BACKEND_ERROR)
            results.set_signed(i, found.y[:bounds], found.y[bounds:])

    def _made(self, module: Any, *problem: Any) -> Any:
        solver = module.OSQP()
        solver.setup(*problem, verbose=False, eps_abs=self.tol, eps_rel=self.tol, max_iter=self.max_steps)
        return solver
