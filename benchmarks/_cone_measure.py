"""Time and accuracy of layers on the same problems, and the floor under ours; see ``README.md``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from _cone_peers import PEERS, Method, Run, differentiated
from _cone_problems import Case
from _measure import INF, stopwatch
from _qp_measure import Floor, calls
from scipy.sparse import csc_matrix
from torch import Tensor

from difflayers.qp import Cones, CvxpyLayer


def ours(case: Case) -> Run:
    return differentiated(case, _layer(case))


@cache
def _layer(case: Case) -> CvxpyLayer:
    return CvxpyLayer(case.problem, case.parameters, case.variables, gp=case.gp, on_failure="raise")


@dataclass
class Result:
    """One method on one case; CPU seconds of forward and backward."""

    variable_error: float
    gradient_error: float
    total: float = INF


@dataclass
class Comparison:
    """Methods on one case, and the methods that didn't run, with the reason."""

    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def compare(case: Case, methods: Mapping[str, Method], repetitions: int, seconds: float) -> Comparison:
    """All methods, taking turns; a slow one leaves the round after as many ``seconds``."""
    comparison, runs, spent = Comparison(), {}, dict.fromkeys(methods, 0.0)
    for name, method in methods.items():
        try:
            run = method(case)
            comparison.results[name] = _examined(case, *run())
            runs[name] = run, calls(run)
        except Exception as error:  # a peer that can't do this case is left out of it
            comparison.failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    for turn in range(repetitions):
        for name, (run, count) in runs.items():
            if turn < 2 or spent[name] < seconds:
                took = stopwatch(run, count)
                spent[name] += took * count
                comparison.results[name].total = min(comparison.results[name].total, took)
    return comparison


def _examined(case: Case, found: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Result:
    reference = case.reference
    return Result(reference.variable_error(found), reference.gradient_error(case, gradients))


def installed() -> dict[str, Method]:
    return {name: peer.method for name, peer in PEERS.items() if not peer.missing}


def missing() -> dict[str, str]:
    return {name: f"{', '.join(peer.missing)} not installed" for name, peer in PEERS.items() if peer.missing}


def floor(case: Case, repetitions: int) -> Floor:
    """The backend by itself, and one LU per sample of the system of unknowns and active directions.

    The backend is called in a loop on arrays that are ready: Clarabel, which is updated, or PIQP for linear programs.
    """
    layer = _layer(case)
    flat = [value.reshape(case.samples, -1) for value in case.values]
    P, q, C, d = layer.canonical.data(flat, torch.Size([case.samples]))
    cones: Cones = layer.canonical.cones
    P = q.new_zeros(q.shape[-1], q.shape[-1]) if P is None else P
    blocks = [_arrays(block, case.samples, dims) for block, dims in ((P, 2), (q, 1), (C, 2), (d, 1))]
    backend = _piqp(blocks, cones) if cones.linear == cones.rows else _clarabel(blocks, cones)
    cone = layer.solve(*case.values).cone
    size = q.shape[-1] + _active(cones, (cone.y - cone.s).detach())
    systems = torch.randn(case.samples, size, size, dtype=torch.float64)
    factor = [_least(run, repetitions) for run in (backend, lambda: torch.linalg.lu_factor(systems))]
    return Floor(*factor)


def _arrays(block: Any, samples: int, dims: int) -> np.ndarray[Any, Any]:
    dense = block if isinstance(block, Tensor) else block.dense()
    array: np.ndarray[Any, Any] = dense.expand(samples, *dense.shape[dense.dim() - dims :]).detach().numpy()
    return array


def _active(cones: Cones, v: Tensor) -> int:
    """How many eigenvalues of the projection's derivative are at least a half, at most over samples."""
    D = torch.func.vmap(torch.func.jacrev(cones.project))(v)
    return int((torch.linalg.eigvalsh((D + D.mT) / 2) >= 0.5).sum(-1).max())


def _least(run: Callable[[], object], repetitions: int) -> float:
    count = calls(run)
    return min(stopwatch(run, count) for _ in range(repetitions))


def _clarabel(blocks: list[Any], cones: Cones) -> Callable[[], None]:
    import clarabel

    P, q, C, d = blocks
    upper = [np.triu(matrix) for matrix in P]
    # One pattern for all.
    patterns = [csc_matrix(np.any(np.stack(list(m)) != 0, axis=0).astype(float)) for m in (upper, C)]
    P_values, C_values = (
        [sample[p.indices, np.repeat(np.arange(p.shape[1]), np.diff(p.indptr))] for sample in m]
        for p, m in zip(patterns, (upper, C), strict=True)
    )
    listed = [clarabel.ZeroConeT(cones.zero), clarabel.NonnegativeConeT(cones.nonnegative)]
    listed += [clarabel.SecondOrderConeT(size) for size in cones.second_order]
    listed += [clarabel.PSDTriangleConeT(order) for order in cones.semidefinite]
    listed += [clarabel.ExponentialConeT()] * cones.exponential
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.presolve_enable, settings.chordal_decomposition_enable = False, False, False
    settings.max_threads = 1

    def run() -> None:
        solver = None
        for i in range(len(q)):
            if solver is None:
                matrices = [
                    csc_matrix((v, p.indices, p.indptr), shape=p.shape)
                    for v, p in zip((P_values[i], C_values[i]), patterns, strict=True)
                ]
                solver = clarabel.DefaultSolver(matrices[0], q[i], matrices[1], d[i], listed, settings)
            else:
                solver.update(P=P_values[i], q=q[i], A=C_values[i], b=d[i])
            solver.solve()

    return run


def _piqp(blocks: list[Any], cones: Cones) -> Callable[[], None]:
    import piqp

    P, q, C, d = blocks
    A, G, b, h = C[:, : cones.zero], C[:, cones.zero :], d[:, : cones.zero], d[:, cones.zero :]

    def run() -> None:
        solver = piqp.DenseSolver()
        settings = solver.settings
        settings.eps_abs = settings.eps_rel = 1e-9
        for i in range(len(q)):
            (solver.update if i else solver.setup)(P[i], q[i], A[i], b[i], G[i], None, h[i], None, None)
            solver.solve()

    return run
