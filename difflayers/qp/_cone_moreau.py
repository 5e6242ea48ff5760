"""Moreau for cone programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from difflayers._problem import Problem
from difflayers.qp._cone_factor import constraints
from difflayers.qp._cone_host import ROUGH
from difflayers.qp._cone_solver import ConeAnswers, ConeSolver
from difflayers.qp._cones import Cones
from difflayers.qp._data import Data, Matrix
from difflayers.qp._host import Array, backend, conic_status
from difflayers.qp._moreau import host_array
from difflayers.qp._sparse import Sparse


@dataclass(frozen=True)
class ConeMoreau(ConeSolver):
    """A batched interior-point method (Nobel, Diamond, Barratt; moreau.so), with the objective as it is.

    It solves all samples at once; its answers are polished and verified like those of others.
    """

    method: str = "ipm"
    tol: float = 1e-9
    max_steps: int = 200
    package: ClassVar[str] = "moreau"

    def supports(self, problem: Problem) -> str | None:
        if self.method == "active_set":
            return "its active-set method knows zero and nonnegative cones only; use Moreau() or Clarabel()"
        return super().supports(problem)

    def rough(self) -> ConeSolver | None:
        return replace(self, tol=ROUGH) if self.tol < ROUGH else None

    def answers(self, data: Data, cones: Cones, count: int) -> ConeAnswers:
        module, n = backend(self.package, "qp"), data.layout.n
        C, d = constraints(data)
        P = Sparse.empty(data.q, (n, n)) if data.P is None else data.P
        order = _order(cones)
        patterns, values = zip(*[_rows(P, np.arange(n), count), _rows(C, order, count)], strict=True)
        solver = module.CompiledSolver(
            n, cones.rows, *patterns[0], *patterns[1], _listed(module, cones), self._settings(module, count)
        )
        solver.setup(*values)
        found = solver.solve(host_array(data.q, count, 1), host_array(d, count, 1)[:, order])
        statuses = [int(conic_status(status)) for status in solver.info.status]
        y, s = np.empty_like(found.z), np.empty_like(found.s)
        y[:, order], s[:, order] = found.z, found.s
        arrays = found.x, y, s, np.array(statuses), np.array(solver.info.iterations)
        return ConeAnswers(*[torch.from_numpy(np.ascontiguousarray(array)).to(data.q.device) for array in arrays])

    def _settings(self, module: Any, count: int) -> Any:
        tolerances = module.IPMSettings(tol_gap_abs=self.tol, tol_gap_rel=self.tol, tol_feas=self.tol)
        return module.Settings(
            solver="ipm", device="cpu", batch_size=count, max_iter=self.max_steps, ipm_settings=tolerances
        )


def _listed(module: Any, cones: Cones) -> Any:
    return module.Cones(
        num_zero_cones=cones.zero,
        num_nonneg_cones=cones.nonnegative + cones.sizes.count(1),
        so_cone_dims=[size for size in cones.second_order if size > 1],
        psd_dims=[order for order in cones.semidefinite if order > 1],
        num_exp_cones=cones.exponential,
        power_alphas=list(cones.power),
    )


def _order(cones: Cones) -> Array:
    """Its rows in our numbers: curved cones of one row are nonnegative ones for it."""
    curved = np.repeat(np.array(cones.sizes, dtype=np.int64) > 1, cones.sizes)
    return np.argsort(np.r_[np.zeros(cones.linear, dtype=bool), curved], kind="stable")


def _rows(matrix: Matrix, order: Array, count: int) -> tuple[tuple[Array, Array], Array]:
    """A matrix by compressed rows, in this order: one structure for all samples, and the values of each."""
    sparse = matrix if isinstance(matrix, Sparse) else Sparse.of(matrix)
    place = np.argsort(order)[sparse.pattern.rows.cpu().numpy()]
    columns = sparse.pattern.columns.cpu().numpy()
    sorting = np.lexsort((columns, place))
    offsets = np.r_[0, np.bincount(place, minlength=len(order)).cumsum()]
    return (offsets, columns[sorting]), host_array(sparse.values, count, 1)[:, sorting]
