"""Clarabel: a homogeneous interior-point method in Rust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from difflayers.qp._host import Array, HostQPSolver, Results, Samples, conic_status


@dataclass(frozen=True)
class Clarabel(HostQPSolver):
    """A homogeneous interior-point method (Goulart, Chen 2024, arXiv:2405.12762), for any convex QP, LPs included.

    It takes every constraint as a row, and its multipliers are those of ``rows · x + s = limits``: they have the signs
    that we use. Bounds that are infinite are left out.

    Args:
        tol: feasibility and duality gap, absolute and relative; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``.
        threads: how many samples at a time; None is ``torch.get_num_threads()``.
    """

    tol: float = 1e-9
    max_steps: int = 200
    package: ClassVar[str] = "clarabel"
    extra: ClassVar[str] = "qp"
    sparse: ClassVar[bool] = True
    releases_gil: ClassVar[bool] = True

    def solve_samples(self, samples: Samples, rows: range, results: Results) -> None:
        from scipy.sparse import csc_array, triu

        module, layout = self.module(), samples.layout
        settings = self._settings(module)
        matrices, limits = samples.one_sided
        for i in rows:
            kept = np.isfinite(limits[i])
            cones = [module.ZeroConeT(layout.p), module.NonnegativeConeT(int(kept.sum()) - layout.p)]
            P = csc_array(triu(samples.P[i], format="csc"))
            found = module.DefaultSolver(
                P, samples.q[i], csc_array(matrices[i][kept]), limits[i][kept], cones, settings
            ).solve()
            multipliers = _spread(found.z, kept)
            results.x[i], results.y[i], results.z[i] = found.x, multipliers[: layout.p], multipliers[layout.p :]
            results.status[i] = conic_status(found.status)
            results.steps[i] = found.iterations

    def _settings(self, module: Any) -> Any:
        settings = module.DefaultSettings()
        settings.verbose = False
        settings.max_threads = 1  # samples are what threads share
        settings.max_iter = self.max_steps
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = self.tol
        return settings


def _spread(values: Any, kept: Array) -> Array:
    full = np.zeros(len(kept))
    full[kept] = values
    return full
