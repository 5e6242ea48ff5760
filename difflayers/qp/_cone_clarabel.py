"""Clarabel for cone programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from difflayers.qp._cone_host import ROUGH, ConeResults, ConeSamples, HostConeSolver
from difflayers.qp._cone_solver import ConeSolver
from difflayers.qp._cones import Cones
from difflayers.qp._host import backend, conic_status

# The accuracy that it can have where numbers are small.
FINEST = 1e-14


@dataclass(frozen=True)
class ConeClarabel(HostConeSolver):
    """A homogeneous interior-point method (Goulart, Chen 2024, arXiv:2405.12762), with the objective as it is.

    Samples have one pattern, so that all but the first one of a thread are updates of its solver.
    """

    def fine(self) -> ConeSolver | None:
        return replace(self, tol=FINEST) if self.tol > FINEST else None

    def solve_samples(self, samples: ConeSamples, rows: Sequence[int], results: ConeResults) -> None:
        module = backend("clarabel", "qp")
        solver = None
        for i in rows:
            q, d = samples.q[i], samples.d[i]
            if solver is None:
                cones, settings = _listed(module, samples.cones), self._settings(module)
                solver = module.DefaultSolver(samples.P.at(i), q, samples.C.at(i), d, cones, settings)
            else:
                changed = {name: m.change(i) for name, m in (("P", samples.P), ("A", samples.C)) if len(m.varying)}
                solver.update(q=q, b=d, **changed)
            found = solver.solve()
            results.x[i], results.y[i], results.s[i] = found.x, found.z, found.s
            results.status[i] = conic_status(found.status)
            results.steps[i] = found.iterations

    def _settings(self, module: Any) -> Any:
        settings = module.DefaultSettings()
        settings.verbose = False
        settings.max_threads = 1  # samples are what threads share
        settings.presolve_enable = False  # without, so that data can be updated
        settings.chordal_decomposition_enable = False
        settings.max_iter = self.max_steps
        settings.iterative_refinement_enable = self.tol < ROUGH
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = self.tol
        return settings


def _listed(module: Any, cones: Cones) -> list[Any]:
    listed = [module.ZeroConeT(cones.zero), module.NonnegativeConeT(cones.nonnegative)]
    listed += [module.SecondOrderConeT(size) for size in cones.second_order]
    listed += [module.PSDTriangleConeT(order) for order in cones.semidefinite]
    listed += [module.ExponentialConeT()] * cones.exponential
    return listed + [module.PowerConeT(exponent) for exponent in cones.power]
