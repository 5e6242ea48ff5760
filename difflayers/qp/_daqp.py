"""DAQP: a dual active-set method in C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from difflayers._solution import Status
from difflayers.qp._host import HostQPSolver, Results, Samples

_EQUATION = 5
_NO_BOUND = 1e30
# Exit flags of DAQP's documentation.
_STATUS = {
    1: Status.SUCCESS,
    2: Status.SUCCESS,
    -1: Status.INFEASIBLE,
    -2: Status.STALLED,
    -3: Status.UNBOUNDED,
    -4: Status.MAX_STEPS,
}


@dataclass(frozen=True)
class DAQP(HostQPSolver):
    """A dual active-set method for dense strictly convex QPs (Arnström, Bemporad, Axehill 2022, IEEE TAC 67(8)).

    The fastest up to about 150 unknowns. Its multipliers are positive where the upper side of a row is active and
    negative where the lower one is.

    Args:
        max_steps: iterations before a sample is ``MAX_STEPS``.
        threads: how many samples at a time; None is ``torch.get_num_threads()``.
    """

    max_steps: int = 10_000
    package: ClassVar[str] = "daqp"
    releases_gil: ClassVar[bool] = True

    def solve_samples(self, samples: Samples, rows: range, results: Results) -> None:
        solve, layout = self.module().solve, samples.layout
        matrices, lower, upper = samples.two_sided
        bounds = len(lower[0]) - layout.p - layout.m
        sense = np.zeros(len(lower[0]), dtype=np.int32)
        sense[bounds : bounds + layout.p] = _EQUATION
        options = {"iter_limit": self.max_steps}
        found = [solve(samples.P[i], samples.q[i], matrices[i], upper[i], lower[i], sense, **options) for i in rows]
        x, _, flags, told = zip(*found, strict=True)
        part = slice(rows.start, rows.stop)
        results.x[part], results.steps[part] = x, [each["iterations"] for each in told]
        results.status[part] = [_STATUS.get(flag, Status.BACKEND_ERROR) for flag in flags]
        signed = np.array([each["lam"] for each in told])
        results.set_signed(part, signed[:, :bounds], signed[:, bounds:])
