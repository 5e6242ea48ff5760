"""Time and accuracy of methods that solve the same QPs, and the floor under ours; see ``README.md``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from _measure import INF, stopwatch
from _qp_peers import PEERS, Method, Peer, Run, differentiated, leaf
from _qp_problems import Case
from torch import Tensor

from difflayers import available_solvers
from difflayers.errors import MissingBackendError, ProblemError
from difflayers.qp import QPProblem, solve_qp

# A peer whose gradient is further off isn't one to be faster than.
CREDIBLE = 1e-3


@dataclass(frozen=True)
class Ours:
    """``solve_qp`` with a backend by name; from the solution of ``start`` where that is given."""

    solver: str = "auto"
    start: Case | None = None

    def __call__(self, case: Case) -> Run:
        init = None if self.start is None else solve_qp(*map(leaf, self.start.blocks), solver=self.solver)
        return differentiated(case, lambda *blocks: solve_qp(*blocks, solver=self.solver, init=init).x)


@dataclass
class Result:
    """One method on one case; CPU seconds of forward and backward."""

    case: Case
    x_error: float
    gradient_error: float
    total: float = INF


@dataclass
class Comparison:
    """Methods on one case, and the methods that didn't run, with the reason."""

    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def best(self, names: Iterable[str], credible: float = CREDIBLE) -> tuple[str, Result] | None:
        """The fastest of those whose gradient error is at most ``credible``."""
        candidates = {
            name: self.results[name]
            for name in names
            if name in self.results and self.results[name].gradient_error <= credible
        }
        return min(candidates.items(), key=lambda item: item[1].total, default=None)


def compare(methods: Mapping[str, tuple[Method, Case]], repetitions: int, seconds: float) -> Comparison:
    """All methods, each on its case, taking turns; a slow one leaves the round after as many ``seconds``."""
    comparison, runs, spent = Comparison(), {}, dict.fromkeys(methods, 0.0)
    for name, (method, case) in methods.items():
        try:
            run = method(case)
            comparison.results[name] = examined(case, *run())
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


def examined(case: Case, x: Any, gradients: Sequence[Any]) -> Result:
    of_P, *others = gradients
    of_P = None if of_P is None else (of_P + of_P.mT) / 2
    arrays = [None if g is None else _array(g) for g in (of_P, *others)]
    reference = case.reference
    return Result(case, reference.x_error(np.asarray(x, dtype=np.float64)), reference.gradient_error(arrays))


def _array(gradient: Any) -> np.ndarray[Any, Any]:
    """In float64; of a sparse matrix the entries, row by row."""
    if isinstance(gradient, Tensor) and gradient.is_sparse:
        gradient = gradient.coalesce().values()[None]
    return np.asarray(gradient, dtype=np.float64)


def calls(run: Callable[[], object], seconds: float = 0.01) -> int:
    """How many calls a clock can tell."""
    return max(1, min(50, round(seconds / max(stopwatch(run), 1e-6))))


def installed(peers: Mapping[str, Peer] = PEERS) -> dict[str, Method]:
    return {name: peer.method for name, peer in peers.items() if not peer.missing}


def missing(peers: Mapping[str, Peer] = PEERS) -> dict[str, str]:
    return {name: f"{', '.join(peer.missing)} not installed" for name, peer in peers.items() if peer.missing}


def backends() -> tuple[dict[str, Method], dict[str, str]]:
    """Our backends that run here on a strictly convex QP, and why the others don't."""
    case, running, others = _tiny(), {}, {}
    for name in available_solvers("qp"):
        try:
            solve_qp(*case, solver=name)
            running[name] = Ours(name)
        except (MissingBackendError, ProblemError, TypeError) as error:
            others[name] = str(error).splitlines()[0]
    return running, others


def _tiny() -> tuple[Tensor, ...]:
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    return one[None], one, one[None], one, zero[:, None].expand(0, 1), zero


@dataclass
class Floor:
    """CPU seconds without which no such method can do: the backend by itself, and one factorization per sample."""

    backend: float
    factorization: float

    @property
    def total(self) -> float:
        return self.backend + self.factorization


def floor(case: Case, solver: str | None, repetitions: int) -> Floor:
    """Of a solve with a backend, None for a warm start that needs none, on the active set of the reference."""
    alone = None if solver is None else _sparse_piqp(case) if case.is_sparse else _alone(case, solver)
    factor = _sparse_factored(case) if case.is_sparse else _factored(case)
    backend, factorization = (0.0 if run is None else _least(run, repetitions) for run in (alone, factor))
    return Floor(backend, factorization)


def _least(run: Callable[[], object], repetitions: int) -> float:
    count = calls(run)
    return min(stopwatch(run, count) for _ in range(repetitions))


def chosen(case: Case) -> str:
    """The backend that ``"auto"`` chooses."""
    solver = available_solvers("qp")["auto"]()
    choices = getattr(solver, "choices", None)
    first = solver if choices is None else choices(_data(case))[0]
    return type(first).__name__.lower()


def _data(case: Case):  # the type is internal to the package
    return QPProblem(("P", "q", "G", "h", "A", "b")).data(case.blocks)


def _alone(case: Case, solver: str) -> Callable[[], object]:
    """The backend on arrays that are ready; for other backends than DAQP and PIQP with our loop around it."""
    direct = {"daqp": _daqp, "piqp": _piqp}.get(solver)
    if direct is not None:
        return direct(case)
    backend, data = available_solvers("qp")[solver](), _data(case)

    def run() -> None:
        with torch.no_grad():
            backend.answers(data, case.samples)

    return run


def _daqp(case: Case) -> Callable[[], None]:
    from daqp import solve

    P, q, G, h, A, b = (block.double().numpy() for block in case.blocks)
    rows = np.ascontiguousarray(np.concatenate([A, G], axis=1))
    upper = np.concatenate([b, h], axis=1)
    lower = np.concatenate([b, np.full_like(h, -1e30)], axis=1)
    sense = np.repeat(np.array([5, 0], dtype=np.int32), [b.shape[1], h.shape[1]])

    def run() -> None:
        for sample in zip(P, q, rows, upper, lower, strict=True):
            solve(*sample, sense)

    return run


def _piqp(case: Case) -> Callable[[], None]:
    import piqp

    P, q, G, h, A, b = (block.double().numpy() for block in case.blocks)

    def run() -> None:
        solver = piqp.DenseSolver()
        settings = solver.settings
        settings.eps_abs = settings.eps_rel = 1e-9
        for number, sample in enumerate(zip(P, q, A, b, G, h, strict=True)):
            *blocks, upper = sample
            (solver.update if number else solver.setup)(*blocks, None, upper, None, None)
            solver.solve()

    return run


def _factored(case: Case) -> Callable[[], Tensor]:
    """Two batched Cholesky factorizations: of ``P``, and of ``C P⁻¹ Cᵀ`` with equations and active rows ``C``."""
    P, _, G, _, A, _ = case.blocks
    active = torch.from_numpy(case.reference.active)
    count = active.sum(1)
    first = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    there = torch.arange(first.shape[1]) < count[:, None]
    rows = torch.cat([A, G.gather(1, first[..., None].expand(-1, -1, G.shape[2])) * there[..., None]], dim=1)

    def run() -> Tensor:
        lower = torch.linalg.cholesky_ex(P)[0]
        reached = torch.linalg.solve_triangular(lower, rows.mT, upper=False)
        gram = reached.mT @ reached
        gram.diagonal(dim1=1, dim2=2)[:, A.shape[1] :].add_(~there)
        return torch.linalg.cholesky_ex(gram)[0]

    return run


def _sparse_piqp(case: Case) -> Callable[[], None]:
    import piqp

    P, q, G, h, A, b = (block.tocsc() if sp.issparse(block) else block[0].numpy() for block in case.blocks)

    def run() -> None:
        solver = piqp.SparseSolver()
        settings = solver.settings
        settings.eps_abs = settings.eps_rel = 1e-9
        solver.setup(P, q, A, b, G, None, h, None, None)
        solver.solve()

    return run


def _sparse_factored(case: Case) -> Callable[[], object]:
    import qdldl

    P, _, G, _, A, _ = case.blocks
    rows = sp.vstack([A, G[case.reference.active[0]]])
    system = sp.bmat([[P, rows.T], [rows, -1e-9 * sp.eye(rows.shape[0])]]).tocsc()
    return lambda: qdldl.Solver(system)


def wall(run: Callable[[], object], repetitions: int) -> float:
    """The least wall-clock seconds of a call, for threads."""
    best, count = INF, calls(run)
    for _ in range(repetitions):
        start = time.perf_counter()
        for _ in range(count):
            run()
        best = min(best, (time.perf_counter() - start) / count)
    return best
