"""HiGHS: simplex and interior-point methods for linear programs, through SciPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from difflayers._solution import Status
from difflayers.errors import ProblemError
from difflayers.qp._data import Data
from difflayers.qp._host import HostQPSolver, Results, Samples
from difflayers.qp._solver import Answers

# scipy.optimize.linprog's: numerical difficulties, or what presolve can't tell apart, is 4.
_STATUS = {0: Status.SUCCESS, 1: Status.MAX_STEPS, 2: Status.INFEASIBLE, 3: Status.UNBOUNDED, 4: Status.BACKEND_ERROR}
_UNDECIDED = 4


@dataclass(frozen=True)
class HiGHS(HostQPSolver):
    """Simplex for linear programs (Huangfu, Hall 2018, Math. Prog. Comp. 10), through ``scipy.optimize.linprog``.

    SciPy's marginals are derivatives of the optimal objective by right-hand sides: our multipliers are their negatives,
    except at lower bounds.

    Args:
        tol: primal and dual feasibility; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``; None is no limit.
        threads: of no use here, since it keeps Python's lock.

    Raises:
        ProblemError: when it solves, if ``P`` isn't zero.
    """

    tol: float = 1e-9
    max_steps: int | None = None
    package: ClassVar[str] = "scipy.optimize"

    def answers(self, data: Data, count: int) -> Answers:
        if data.P is not None and bool(data.P.any()):
            raise ProblemError("HiGHS solves linear programs, but P isn't zero; use DAQP(), PIQP() or Clarabel()")
        return super().answers(data, count)

    def solve_samples(self, samples: Samples, rows: range, results: Results) -> None:
        layout, m, low = samples.layout, samples.layout.m, samples.layout.low
        free = np.full(layout.n, np.inf)
        for i in rows:
            _, q, G, h, A, b, below, above = samples.at(i)
            bounds = np.stack([-free if below is None else below, free if above is None else above], axis=1)
            found = self._found(q, G, h, A, b, bounds)
            results.status[i], results.steps[i] = _STATUS[found.status], found.nit
            if found.x is None or found.status not in (0, 1):
                continue
            results.x[i], results.y[i] = found.x, -found.eqlin.marginals
            results.z[i, :m] = -found.ineqlin.marginals
            if low:
                results.z[i, m : m + low] = found.lower.marginals
            if layout.high:
                results.z[i, m + low :] = -found.upper.marginals

    def _found(self, *problem: Any) -> Any:
        linprog = self.module().linprog
        options = {"primal_feasibility_tolerance": self.tol, "dual_feasibility_tolerance": self.tol}
        if self.max_steps is not None:
            options["maxiter"] = self.max_steps
        found = linprog(*problem, method="highs", options=options)
        if found.status != _UNDECIDED:
            return found
        return linprog(*problem, method="highs", options=options | {"presolve": False})
