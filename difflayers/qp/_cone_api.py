"""Cone programs: state the problem, get the solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._adjoint import Adjoint, ImplicitAdjoint
from difflayers._areas import resolve
from difflayers._arrays import to_tensors, uses_numpy
from difflayers._autodiff import in_functorch, without_autocast
from difflayers._progress import showing
from difflayers._solution import OnFailure, Solution, in_shape, to_numpy
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.qp._api import QPSolution, solve_qp
from difflayers.qp._checks import batch_shape, check_objective
from difflayers.qp._clarabel import Clarabel
from difflayers.qp._cone_checks import check_cone_blocks
from difflayers.qp._cone_clarabel import ConeClarabel
from difflayers.qp._cone_moreau import ConeMoreau
from difflayers.qp._cone_problem import ConeProblem
from difflayers.qp._cone_scaling import Units, extreme, plain
from difflayers.qp._cone_scs import SCS
from difflayers.qp._cones import Cones
from difflayers.qp._data import MATRICES, Data, Matrix, flattened
from difflayers.qp._lpgd import LPGDAdjoint
from difflayers.qp._moreau import Moreau
from difflayers.qp._solver import QPSolver
from difflayers.qp._sparse import Sparse, as_sparse

CONE_SOLVERS: dict[str, type[Solver]] = {"clarabel": Clarabel, "moreau": Moreau, "scs": SCS}
# The problem knows C and d under the names that a QP has for them.
_NAMES = {"P": "P", "q": "q", "C": "G", "d": "h"}


@dataclass(frozen=True)
class ConeSolution(Solution):
    """The answer of a cone program. ``value`` is ``x``; what has no answer is NaN.

    Attributes:
        y: multipliers, in the dual cone, ``(*batch, m)``: ``Px + q + Cᵀy = 0`` and ``yᵀs = 0``.
        s: slacks ``d - Cx``, in the cone, ``(*batch, m)``.
        solver: which solver it was.
        point: what warm starts start from, off the graph.
    """

    y: Any = None
    s: Any = None
    solver: Solver | None = None
    point: Any = field(default=None, repr=False, compare=False)

    @property
    def x(self) -> Any:
        """The minimizer, ``(*batch, n)``."""
        return self.value

    def numpy(self) -> ConeSolution:
        """The same with NumPy arrays, detached, on the CPU."""
        plain = super().numpy()
        y, s = to_numpy(self.y), to_numpy(self.s)
        return ConeSolution(plain.value, plain.status, plain.stats, None, y, s, self.solver, self.point)


def solve_cone(
    P: Any,
    q: Any,
    C: Any,
    d: Any,
    cones: Cones | Mapping[str, Any],
    *,
    solver: str | Solver = "clarabel",
    adjoint: Adjoint | None = None,
    init: Any = None,
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> ConeSolution:
    """Minimize ``½xᵀPx + qᵀx`` subject to ``Cx + s = d``, ``s ∈ K``; differentiable in all four.

    All leading dimensions are batch, and broadcast: a block without them is shared by all samples, and its gradient is
    summed over them. Matrices may be sparse, as in :func:`solve_qp`; derivatives are dense all the same.

    Args:
        P: symmetric positive semidefinite, ``(*batch, n, n)``; None for a linear objective.
        q: ``(*batch, n)``.
        C: ``(*batch, m, n)``.
        d: ``(*batch, m)``.
        cones: :class:`Cones`, or a mapping with their names: how the ``m`` rows are divided.
        solver: a solver object or ``"clarabel"``, ``"moreau"`` or ``"scs"``. Where there are zero and nonnegative cones
            only, that is a QP: ``"clarabel"`` is then what :func:`solve_qp` chooses, and its solver objects serve too.
        adjoint: the derivative rule; None is :class:`~difflayers.ImplicitAdjoint`.
        init: an earlier solution of a similar problem.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``.
        progress: whether to show a bar; see :func:`difflayers.progress`.

    Raises:
        ProblemError: shapes or dtypes don't fit, or ``P`` isn't symmetric or positive semidefinite.
        SolverError: a sample failed and ``on_failure`` is ``"raise"``.

    >>> import torch
    >>> from difflayers.qp import Cones, solve_cone
    >>> center = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> C = torch.cat([torch.zeros(1, 2, dtype=torch.float64), -eye])  # s = (1, x): the unit disk
    >>> d = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    >>> solution = solve_cone(eye, -center, C, d, Cones(second_order=(3,)))
    >>> solution.x.detach()
    tensor([0.6000, 0.8000], dtype=torch.float64)
    >>> solution.x[0].backward()
    >>> center.grad
    tensor([ 0.1280, -0.0960], dtype=torch.float64)
    """
    cones = Cones.of(cones)
    blocks = {"P": P, "q": q, "C": C, "d": d}
    numpy = uses_numpy(list(blocks.values()), list(blocks.values()))
    like = next((block for block in blocks.values() if isinstance(block, Tensor)), None)
    blocks = {name: as_sparse(to_tensors(block, like), name, like) for name, block in blocks.items()}
    check_cone_blocks(blocks, cones)
    chosen = resolve(solver, CONE_SOLVERS)
    given = {_NAMES[name]: block for name, block in blocks.items() if block is not None}
    batch = batch_shape(given)
    if cones.linear == cones.rows and isinstance(chosen, QPSolver):
        quadratic: str | Solver = "auto" if solver == "clarabel" else chosen
        solution = showing(progress, lambda: _linear(given, cones, batch, quadratic, adjoint, init, on_failure))
    else:
        solution = showing(progress, lambda: _solved(given, cones, batch, chosen, adjoint, init, on_failure))
    return solution.numpy() if numpy else solution


def _flat(given: Mapping[str, Matrix], batch: torch.Size) -> dict[str, Matrix]:
    """With one batch dimension, or without."""
    return {name: flattened(block, batch, 2 if name in MATRICES else 1) for name, block in given.items()}


def _solved(
    given: Mapping[str, Matrix],
    cones: Cones,
    batch: torch.Size,
    chosen: Solver,
    adjoint: Adjoint | None,
    init: Any,
    on_failure: OnFailure,
) -> ConeSolution:
    blocks, samples, known = _flat(given, batch), batch.numel(), None
    data = Data.of(blocks)
    if not in_functorch():
        known = data.map(lambda block: block.detach().double())
        check_objective(known, data.q.dtype)
    units = _units(data if known is None else known, cones, samples, adjoint)
    if units is not None:
        blocks, known = units.applied(blocks), None
        data = Data.of(blocks)
    start = _start(data, units, samples, init)
    patterns = {name: block.pattern for name, block in blocks.items() if isinstance(block, Sparse)}
    params = tuple(block.values if isinstance(block, Sparse) else block for block in blocks.values())
    problem = ConeProblem(cones, tuple(blocks), warm=init is not None, patterns=patterns, known=known)
    serving = _for_cones(chosen)
    if reason := serving.supports(problem) or (adjoint or ImplicitAdjoint()).supports(problem, serving):
        raise TypeError(f"{chosen!r} can't serve here: {reason}")
    with without_autocast(start.device):
        found = (adjoint or ImplicitAdjoint()).apply(problem, serving, params, start, on_failure)
        x, v = found.value.split((data.layout.n, data.layout.m), dim=-1)
        y, s = _parts(v, cones)
    stats = found.stats
    if units is not None:
        (x, y, s), stats = units.outward(x, y, s), units.stats(stats)
    point = torch.cat([x, y, s], dim=-1).detach()
    return in_shape(ConeSolution(x, found.status, stats, None, y, s, chosen, point), batch, "value", "y", "s")


def _units(data: Data, cones: Cones, samples: int, adjoint: Adjoint | None) -> Units | None:
    """Those of samples whose numbers are far from one, if there are any, or if that can't be seen here."""
    if 0 in (samples, data.layout.n, data.layout.m) or isinstance(adjoint, LPGDAdjoint):  # whose tau is the caller's
        return None
    data, seen = data.map(lambda block: block.detach().double()), not in_functorch()
    if seen and plain(data):
        return None
    needed = extreme(data, samples)
    return None if seen and not bool(needed.any()) else Units.of(data, cones, needed)


def _parts(v: Tensor, cones: Cones) -> tuple[Tensor, Tensor]:
    """Multiplier and slack; NaN where there is no answer, which eigenvalues couldn't be asked of."""
    answered = v.isfinite().all(-1, keepdim=True)
    fine = torch.where(answered, v, 0)
    y = cones.project(fine)
    return torch.where(answered, y, torch.nan), torch.where(answered, y - fine, torch.nan)


def _for_cones(solver: Solver) -> Solver:
    """The same backend for cones that a QP hasn't."""
    if isinstance(solver, Clarabel):
        return ConeClarabel(solver.tol, solver.max_steps, solver.threads)
    if isinstance(solver, Moreau):
        return ConeMoreau(solver.method, solver.tol, solver.max_steps)
    return solver


def _start(data: Data, units: Units | None, samples: int, init: Any) -> Tensor:
    n, m = data.layout.n, data.layout.m
    if init is None:
        return data.q.new_zeros(samples, n + m)
    point = init.point if isinstance(init, ConeSolution) else None
    if not isinstance(point, Tensor) or point.shape != (samples, n + 2 * m):
        what = f"of {tuple(point.shape[:-1])} problems" if isinstance(point, Tensor) else type(init).__name__
        raise ProblemError(
            f"init is {what}, but must be a ConeSolution of {samples} problems with {n} unknowns and {m} multipliers"
        )
    x, y, s = point.to(data.q).split((n, m, m), dim=-1)
    x, y, s = (x, y, s) if units is None else units.inward(x, y, s)
    return torch.cat([x, y - s], dim=-1)


def _linear(
    given: Mapping[str, Matrix],
    cones: Cones,
    batch: torch.Size,
    solver: str | Solver,
    adjoint: Adjoint | None,
    init: Any,
    on_failure: OnFailure,
) -> ConeSolution:
    """A QP, in better units where its own are far from one."""
    if init is not None and not (isinstance(init, ConeSolution) and isinstance(init.point, QPSolution)):
        raise ProblemError(f"init must be a ConeSolution of such a problem, got {type(init).__name__}")
    near, flat = None if init is None else init.point, _flat(given, batch)
    units = None if in_functorch() else _units(Data.of(flat), cones, batch.numel(), adjoint)
    if units is None:
        return _as_qp(given, cones, solver, adjoint, near, on_failure)
    if near is not None and near.point is not None:
        near = replace(near, point=near.point / units.of_point(near.point, cones.zero))
    found = _as_qp(units.applied(flat), cones, solver, adjoint, near, on_failure)
    x, y, s = units.outward(found.x, found.y, found.s)
    point = replace(
        found.point, value=x.detach(), point=found.point.point * units.of_point(found.point.point, cones.zero)
    )
    found = replace(found, value=x, y=y, s=s, stats=units.stats(found.stats), point=point)
    return in_shape(found, batch, "value", "y", "s")


def _as_qp(
    given: Mapping[str, Matrix],
    cones: Cones,
    solver: str | Solver,
    adjoint: Adjoint | None,
    near: QPSolution | None,
    on_failure: OnFailure,
) -> ConeSolution:
    """Zero and nonnegative cones are equations and inequalities."""
    C, d = given["G"], given["h"]
    parts = []
    for first, count in ((0, cones.zero), (cones.zero, cones.nonnegative)):
        rows = slice(first, first + count)
        parts.append((_rows(C, rows), d[..., rows]) if count else (None, None))
    equations, inequalities = parts
    found = solve_qp(
        given.get("P"), given["q"], *inequalities, *equations,
        solver=solver, adjoint=adjoint, init=near, on_failure=on_failure,
    )  # fmt: skip
    x, y, s = found.x, found.y, 0 * found.y.detach()  # NaN where there is no answer
    if cones.nonnegative:
        slack = d[..., cones.zero :] - _product(inequalities[0], x)
        y = torch.cat([y, found.z], dim=-1)
        s = torch.cat([s, torch.where(found.z > 0, 0 * slack, torch.relu(slack))], dim=-1)
    return ConeSolution(x, found.status, found.stats, None, y, s, found.solver, replace(found, value=found.x.detach()))


def _rows(C: Matrix, rows: slice) -> Matrix:
    if isinstance(C, Tensor):
        return C[..., rows, :]
    kept = (C.pattern.rows >= rows.start) & (C.pattern.rows < rows.stop)
    indices = torch.stack([C.pattern.rows[kept] - rows.start, C.pattern.columns[kept]])
    return Sparse(indices, C.values[..., kept], (rows.stop - rows.start, C.pattern.shape[1]))


def _product(G: Matrix, x: Tensor) -> Tensor:
    return G.times(x) if isinstance(G, Sparse) else (G @ x.unsqueeze(-1)).squeeze(-1)
