"""Proofs that a problem has no solution: of infeasibility (Farkas) and of unboundedness (a ray)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.errors import MissingBackendError
from difflayers.qp._data import Data
from difflayers.qp._sparse_reduced import constraints, samples_of

Array = np.ndarray[Any, np.dtype[np.float64]]
TOLERANCE, ROUNDING = 1e-7, 1e-9
# What is this many times longer than the data suggest isn't there.
FAR, ENDLESS = 1e3, 1e12
ATTEMPTS = 3  # at a direction, each with more rows held
FEW = 300  # unknowns, up to which everything is done densely
# Singular values below this share of the largest are zero.
FLAT = 1e-13
EPS, TINY = np.finfo(np.float64).eps, np.finfo(np.float64).tiny


def certified(data: Data, status: Tensor) -> tuple[Tensor, Tensor]:
    """Statuses of samples without an answer, and for each a proof, ``(samples, n + p + rows)``, zero if there is none.

    ``INFEASIBLE``: multipliers ``(0, y, z)`` with ``Aᵀy + Cᵀz = 0``, ``z ≥ 0`` and ``bᵀy + dᵀz < 0``, where ``C x ≤ d``
    are all inequalities ``[G; -I; I]``. ``UNBOUNDED``: a direction ``(x, 0, 0)`` with ``Px = 0``, ``Ax = 0``,
    ``Cx ≤ 0`` and ``qᵀx < 0``. A backend may have missed what can be proved; what it claims without that there is
    a proof is ``BACKEND_ERROR``.
    """
    layout = data.layout
    proofs = data.q.new_zeros(len(status), sum(layout.sizes))
    checked = status.clone()
    for i, code in enumerate(status.tolist()):
        rows = _rows(data, i)
        for claim in sorted(_FINDERS, key=lambda claim: claim != code):
            if (proof := _FINDERS[claim](*rows)) is not None:
                checked[i], proofs[i] = int(claim), torch.from_numpy(proof).to(proofs)
                break
        else:
            checked[i] = int(Status.BACKEND_ERROR) if code in _FINDERS else code
    return checked, proofs


def unseen(data: Data, samples: int) -> Tensor:
    """Directions in which the objective falls and that neither ``P`` nor a row sees; zero where there are none."""
    rays = data.q.new_zeros(samples, data.layout.n)
    for i in range(samples):
        P, q, _, _, C, d = _rows(data, i)
        if (proof := _ray(P, q, C, d, C[:0], d[:0])) is not None:
            rays[i] = torch.from_numpy(proof[: data.layout.n]).to(rays)
    return rays


def _rows(data: Data, i: int) -> tuple[Any, ...]:
    """``P, q, A, b, C, d`` of one sample; matrices are SciPy's where one of them is sparse."""
    one = data.rows(torch.tensor([i], device=data.q.device))
    return _sparse_rows(one) if data.sparse else _dense_rows(one)


def _sparse_rows(one: Data) -> tuple[Any, ...]:
    ((P, A, G),) = samples_of(one.all_sparse(), 1)
    b = one.q.new_zeros(0) if one.b is None else one.b
    C = constraints(None, G, np.arange(one.layout.inequalities), one)
    A = _zeros(0, one.layout.n, C) if A is None else A
    q, sides, d = (t.reshape(-1).cpu().numpy() for t in (one.q, b, one.limits))
    return P, q, A, sides, C, d


def _dense_rows(one: Data) -> tuple[Array, ...]:
    n = one.layout.n
    eye = torch.eye(n, dtype=one.q.dtype, device=one.q.device)
    P = eye * 0 if one.P is None else one.P.reshape(n, n)
    A = eye[:0] if one.A is None else one.A.reshape(-1, n)
    b = eye[0, :0] if one.b is None else one.b.reshape(-1)
    C = one.products(eye).mT
    d = one.limits.reshape(-1)
    return tuple(t.cpu().numpy() for t in (P, one.q.reshape(-1), A, b, C, d))


def _farkas(P: Any, q: Array, A: Any, b: Array, C: Any, d: Array) -> Array | None:
    """The multipliers of the closest feasible problem, ``min ½‖e‖²`` with ``Cx - e ≤ d`` and ``Ax - f = b``."""
    n, rows, equations = len(q), len(d), len(b)
    finite = np.isfinite(d)
    size = n + rows + equations
    none, slacks = _zeros(n, n, C), _eye(rows + equations, C)
    weight = _stacked([[none, _zeros(n, rows + equations, C)], [_zeros(rows + equations, n, C), slacks]])
    inequalities = _stacked([[C, -slacks[:rows]]])[finite]
    equalities = _stacked([[A, -slacks[rows:]]])
    found = _piqp(weight, np.zeros(size), equalities, b, inequalities, d[finite])
    if found is None:
        return None
    _, y, positive = found
    z = np.zeros(rows)
    z[finite] = np.maximum(positive, 0)
    scale = max(np.abs(y).max(initial=0), z.max(initial=0))
    if scale == 0:
        return None
    y, z = y / scale, z / scale
    sides, rest = np.where(finite, d, 0), np.abs(A.T @ y + C.T @ z).sum()
    value, size = b @ y + sides @ z, np.abs(b) @ np.abs(y) + np.abs(sides) @ z
    # A point that satisfies all rows would have entries of at least -value / rest.
    proved = value < -ROUNDING * size and -value > FAR * rest * max(_reach(A, b), _reach(C, sides))
    return np.r_[np.zeros(n), y, z] if proved else None


def _reach(rows: Any, sides: Array) -> Any:
    """The largest distance from zero to where a row holds."""
    length = _lengths(rows)
    return np.divide(np.abs(sides), length, out=np.zeros(len(length)), where=length > 0).max(initial=0)


def _ray(P: Any, q: Array, A: Any, b: Array, C: Any, d: Array) -> Array | None:
    """A direction along which nothing is in the way and the objective falls."""
    C = C[np.isfinite(d)]
    for x in _steepest(*map(_dense, (P, q, A, C))) if len(q) <= FEW else _shortest(P, q, A, C):
        if not np.abs(x).max() > 0:
            return None
        x = x / np.abs(x).max()
        falls = -q @ x
        stays = all((_lengths(M) * TOLERANCE >= step).all() for M, step in ((A, np.abs(A @ x)), (C, C @ x)))
        # Where there is curvature, the objective falls up to the length falls / xᵀPx; but not what is within rounding.
        curvature = x @ P @ x - 4 * EPS * (np.abs(x) @ (abs(P) @ np.abs(x)))
        if stays and falls > ROUNDING * np.abs(q).max() and falls >= ENDLESS * curvature:
            proof: Array = np.r_[x, np.zeros(len(b) + len(d))]
            return proof
    return None


def _dense(block: Any) -> Array:
    array: Array = block if isinstance(block, np.ndarray) else block.toarray()
    return array


def _steepest(P: Array, q: Array, A: Array, C: Array) -> Iterator[Array]:
    """The projection of ``-q`` on the directions without an obstacle, among those that ``P`` and ``A`` don't see.

    Again where nearly all of it is in the way of rows: among directions that these rows don't see either.
    """
    for _ in range(ATTEMPTS):
        rows = np.concatenate([P / max(np.abs(P).max(), TINY), A / np.maximum(_lengths(A), TINY)[:, None]])
        _, sizes, turned = np.linalg.svd(rows)
        basis = turned[int((sizes > FLAT * sizes[0]).sum()) :].T
        slope = basis.T @ q
        if not basis.size or not np.abs(slope).max() > ROUNDING * np.abs(q).max():
            return
        across = C @ basis
        across = across / np.maximum(_lengths(across), TINY)[:, None]
        none = np.zeros((0, basis.shape[1])), np.zeros(0)
        found = _piqp(np.eye(basis.shape[1]), slope / np.abs(slope).max(), *none, across, np.zeros(len(C)))
        if found is None:
            return
        x, _, z = found
        yield basis @ x
        held = z > -across @ x
        A, C = np.concatenate([A, C[held]]), C[~held]


def _shortest(P: Any, q: Array, A: Any, C: Any) -> Iterator[Array]:
    """The shortest direction without an obstacle along which the objective falls by one."""
    n = len(q)
    flat, target = _stacked([[P], [A], [q[None]]]), np.r_[np.zeros(n + A.shape[0]), -1.0]
    found = _piqp(_eye(n, C), np.zeros(n), flat, target, C, np.zeros(C.shape[0]))
    if found is not None:
        yield found[0]


def _eye(n: int, like: Any) -> Any:
    return np.eye(n) if isinstance(like, np.ndarray) else type(like)((np.ones(n), (np.arange(n),) * 2), (n, n))


def _zeros(rows: int, columns: int, like: Any) -> Any:
    return np.zeros((rows, columns)) if isinstance(like, np.ndarray) else type(like)((rows, columns))


def _stacked(blocks: list[list[Any]]) -> Any:
    from scipy.sparse import bmat

    dense = all(isinstance(block, np.ndarray) for row in blocks for block in row)
    return np.block(blocks) if dense else bmat(blocks, format="csr")


def _lengths(rows: Any) -> Array:
    squares = (rows * rows if isinstance(rows, np.ndarray) else rows.multiply(rows)).sum(axis=1)
    lengths: Array = np.sqrt(np.asarray(squares).reshape(-1))
    return lengths


def _piqp(P: Any, q: Array, A: Any, b: Array, G: Any, h: Array) -> tuple[Array, Array, Array] | None:
    try:
        import piqp
    except ModuleNotFoundError as error:
        raise MissingBackendError("piqp", "qp") from error
    solver = piqp.DenseSolver() if isinstance(P, np.ndarray) else piqp.SparseSolver()
    solver.settings.eps_abs = solver.settings.eps_rel = 1e-9
    P, A, G = (m if isinstance(m, np.ndarray) else m.tocsc() for m in (P, A, G))
    solver.setup(P, q, A, b, G, None, h, None, None)
    if solver.solve() != piqp.PIQP_SOLVED:
        return None
    found = solver.result
    return found.x, found.y, found.z_u


_FINDERS = {Status.INFEASIBLE: _farkas, Status.UNBOUNDED: _ray}
