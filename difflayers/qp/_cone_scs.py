"""SCS: operator splitting for cone programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from difflayers._solution import Status
from difflayers.qp._cone_host import ConeResults, ConeSamples, HostConeSolver
from difflayers.qp._cones import Cones
from difflayers.qp._host import Array, backend

# What scs calls them: 1 solved, 2 solved inaccurately, -1 and -6 unbounded, -2 and -7 infeasible.
_STATUS = {
    1: Status.SUCCESS,
    2: Status.MAX_STEPS,
    -1: Status.UNBOUNDED,
    -6: Status.UNBOUNDED,
    -2: Status.INFEASIBLE,
    -7: Status.INFEASIBLE,
}


@dataclass(frozen=True)
class SCS(HostConeSolver):
    """A first-order method (O'Donoghue 2021, SIAM J. Optimization 31), for all cones; many cheap steps.

    Args:
        tol: absolute and relative accuracy; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``.
        threads: how many; None is ``torch.get_num_threads()``.
    """

    tol: float = 1e-8
    max_steps: int = 100_000

    def solve_samples(self, samples: ConeSamples, rows: Sequence[int], results: ConeResults) -> None:
        module = backend("scs", "qp")
        order = _rows(samples.cones)
        for i in rows:
            data = {"P": samples.P.at(i), "c": samples.q[i], "A": samples.C.at(i)[order], "b": samples.d[i][order]}
            solver = module.SCS(
                data, _cone(samples.cones), verbose=False, eps_abs=self.tol, eps_rel=self.tol, max_iters=self.max_steps
            )
            found = solver.solve()
            results.x[i], results.y[i, order], results.s[i, order] = found["x"], found["y"], found["s"]
            results.status[i] = _STATUS.get(found["info"]["status_val"], Status.BACKEND_ERROR)
            results.steps[i] = found["info"]["iter"]


def _cone(cones: Cones) -> dict[str, Any]:
    return {
        "z": cones.zero, "l": cones.nonnegative, "q": list(cones.second_order), "s": list(cones.semidefinite),
        "ep": cones.exponential, "p": list(cones.power),
    }  # fmt: skip


def _rows(cones: Cones) -> Array:
    """SCS takes the lower triangle of a matrix column by column, which is the upper one row by row."""
    start = cones.linear + sum(cones.second_order)
    parts = [np.arange(start)]
    for order in cones.semidefinite:
        rows, columns = np.triu_indices(order)
        parts.append(start + columns * (columns + 1) // 2 + rows)
        start += len(rows)
    parts.append(np.arange(start, cones.rows))
    return np.concatenate(parts)
