"""PIQP: a proximal interior-point method in C++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from difflayers._solution import Status
from difflayers.qp._host import HostQPSolver, Results, Samples


@dataclass(frozen=True)
class PIQP(HostQPSolver):
    """A proximal interior-point method (Schwan, Jiang, Kuhn, Jones 2023, CDC), for any convex QP, LPs included.

    All its multipliers are positive where a side is active. Sparse problems stay sparse. It keeps Python's lock, so
    samples come one after another.

    Args:
        tol: absolute and relative tolerance of the backend; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``.
        threads: of no use here, since it keeps Python's lock.
    """

    tol: float = 1e-9
    max_steps: int = 250
    package: ClassVar[str] = "piqp"
    sparse: ClassVar[bool] = True

    def solve_samples(self, samples: Samples, rows: range, results: Results) -> None:
        from scipy.sparse import issparse

        module, m, low = self.module(), samples.layout.m, samples.layout.low
        status = _statuses(module)
        solver = self._made(module, samples.sparse)
        equations, bounds = (samples.A, samples.b), (samples.lb, samples.ub)
        blocks_of_all = samples.P, samples.q, *equations, samples.G, None, samples.h, *bounds
        for number, i in enumerate(rows):
            blocks = [None if each is None else each[i] for each in blocks_of_all]
            if samples.sparse:
                blocks = [block.tocsc() if issparse(block) else block for block in blocks]  # type: ignore[union-attr]
            (solver.update if number else solver.setup)(*blocks)
            results.status[i] = status.get(solver.solve(), Status.BACKEND_ERROR)
            found = solver.result
            results.x[i], results.y[i], results.steps[i] = found.x, found.y, found.info.iter
            results.z[i, :m] = found.z_u
            if low:
                results.z[i, m : m + low] = found.z_bl
            if samples.layout.high:
                results.z[i, m + low :] = found.z_bu

    def _made(self, module: Any, sparse: bool) -> Any:
        solver = module.SparseSolver() if sparse else module.DenseSolver()
        settings = solver.settings
        settings.eps_abs = settings.eps_rel = self.tol
        settings.check_duality_gap = True
        settings.eps_duality_gap_abs = settings.eps_duality_gap_rel = self.tol
        settings.max_iter = self.max_steps
        return solver


def _statuses(module: Any) -> dict[Any, Status]:
    return {
        module.PIQP_SOLVED: Status.SUCCESS,
        module.PIQP_MAX_ITER_REACHED: Status.MAX_STEPS,
        module.PIQP_PRIMAL_INFEASIBLE: Status.INFEASIBLE,
        module.PIQP_DUAL_INFEASIBLE: Status.UNBOUNDED,
        module.PIQP_NUMERICS: Status.STALLED,
    }
