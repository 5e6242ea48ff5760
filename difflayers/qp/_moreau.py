"""Moreau: an interior-point method in Rust that solves a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from difflayers.errors import UnknownNameError
from difflayers.qp._data import Data
from difflayers.qp._host import Array, backend, conic_status
from difflayers.qp._solver import Answers, QPSolver

_METHODS = ("ipm", "active_set", "auto")


@dataclass(frozen=True)
class Moreau(QPSolver):
    """A batched interior-point method (Nobel, Diamond, Barratt; moreau.so), for convex QPs, LPs and cone programs.

    Like Clarabel it takes every constraint as a row, and its multipliers are those of ``rows · x + s = limits``. A
    bound that is infinite becomes a row of zeros.

    Args:
        method: ``"ipm"``; ``"active_set"``, which calls unbounded problems solved; or ``"auto"``, which is the second
            for small problems.
        tol: feasibility and duality gap of the interior-point method; the answer is polished afterwards.
        max_steps: iterations before a sample is ``MAX_STEPS``.
    """

    method: str = "ipm"
    tol: float = 1e-9
    max_steps: int = 200
    package: ClassVar[str] = "moreau"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in _METHODS:
            raise UnknownNameError("method", self.method, _METHODS)

    def answers(self, data: Data, count: int) -> Answers:
        module, layout = backend(self.package, "qp"), data.layout
        offsets, columns, values, limits = _rows(data, count)
        P = np.zeros((count, layout.n, layout.n)) if data.P is None else host_array(data.P, count, 2)
        cones = module.Cones(num_zero_cones=layout.p, num_nonneg_cones=limits.shape[1] - layout.p)
        square = np.arange(layout.n + 1) * layout.n, np.tile(np.arange(layout.n), layout.n)
        solver = module.CompiledSolver(
            layout.n, limits.shape[1], *square, offsets, columns, cones, self._settings(module, count)
        )
        solver.setup(P.reshape(count, -1), values)
        found = solver.solve(host_array(data.q, count, 1), limits)
        statuses = [int(conic_status(status)) for status in solver.info.status]
        y, z = np.split(found.z, [layout.p], axis=1)
        arrays = found.x, y, z, np.array(statuses), np.array(solver.info.iterations)
        return Answers(*[torch.from_numpy(np.ascontiguousarray(array)).to(data.q.device) for array in arrays])

    def _settings(self, module: Any, count: int) -> Any:
        tolerances = module.IPMSettings(tol_gap_abs=self.tol, tol_gap_rel=self.tol, tol_feas=self.tol)
        return module.Settings(
            solver=self.method, device="cpu", batch_size=count, max_iter=self.max_steps, ipm_settings=tolerances
        )


def _rows(data: Data, count: int) -> tuple[Array, Array, Array, Array]:
    """``[A; G; -I; I]`` of every sample in compressed rows, one structure for all, and the right-hand sides."""
    layout, n = data.layout, data.layout.n
    full, bounds = layout.p + layout.m, layout.low + layout.high
    lengths = np.r_[np.full(full, n), np.ones(bounds, dtype=np.int64)]
    offsets = np.r_[0, np.cumsum(lengths)]
    columns = np.r_[np.tile(np.arange(n), full), np.tile(np.arange(n), bounds // n)]
    limits = host_array(data.limits, count, 1)
    bounded = np.isfinite(limits[:, layout.m :])
    signs = np.r_[-np.ones(layout.low), np.ones(layout.high)]
    matrices = [host_array(block, count, 2).reshape(count, -1) for block in (data.A, data.G) if block is not None]
    values = np.concatenate([*matrices, bounded * signs], axis=1)
    equations = [] if data.b is None else [host_array(data.b, count, 1)]
    return offsets, columns, values, np.concatenate([*equations, np.where(np.isfinite(limits), limits, 1)], axis=1)


def host_array(block: torch.Tensor, count: int, event: int) -> Array:
    array: Array = block.cpu().numpy()
    return np.ascontiguousarray(np.broadcast_to(array, (count, *array.shape[-event:])))
