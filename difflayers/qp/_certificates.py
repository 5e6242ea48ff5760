"""Proofs that a problem has no solution: of infeasibility (Farkas) and of unboundedness (a ray)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._solution import Status
from difflayers.errors import MissingBackendError
from difflayers.qp._data import Data

Array = np.ndarray[Any, np.dtype[np.float64]]
TOLERANCE, ROUNDING = 1e-7, 1e-9
# What is this many times longer than the data suggest isn't there.
FAR, ENDLESS = 1e3, 1e12


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


def _rows(data: Data, i: int) -> tuple[Array, ...]:
    """``P, q, A, b, C, d`` of one sample, without rows that bound nothing zero."""
    one = data.rows(torch.tensor([i], device=data.q.device))
    n = one.layout.n
    eye = torch.eye(n, dtype=one.q.dtype, device=one.q.device)
    P = eye * 0 if one.P is None else one.P.reshape(n, n)
    A = eye[:0] if one.A is None else one.A.reshape(-1, n)
    b = eye[0, :0] if one.b is None else one.b.reshape(-1)
    C = one.products(eye).mT
    d = one.limits.reshape(-1)
    return tuple(t.cpu().numpy() for t in (P, one.q.reshape(-1), A, b, C, d))


def _farkas(P: Array, q: Array, A: Array, b: Array, C: Array, d: Array) -> Array | None:
    """The multipliers of the closest feasible problem, ``min ½‖e‖²`` with ``Cx - e ≤ d`` and ``Ax - f = b``."""
    n, rows, equations = len(q), len(d), len(b)
    finite = np.isfinite(d)
    size = n + rows + equations
    weight = np.diag(np.r_[np.zeros(n), np.ones(rows + equations)])
    inequalities = np.hstack([C, -np.eye(rows), np.zeros((rows, equations))])[finite]
    equalities = np.hstack([A, np.zeros((equations, rows)), -np.eye(equations)])
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


def _reach(rows: Array, sides: Array) -> Any:
    """The largest distance from zero to where a row holds."""
    length = np.linalg.norm(rows, axis=1)
    return np.divide(np.abs(sides), length, out=np.zeros(len(length)), where=length > 0).max(initial=0)


def _ray(P: Array, q: Array, A: Array, b: Array, C: Array, d: Array) -> Array | None:
    """The shortest direction along which nothing is in the way and the objective falls by one."""
    n, bounding = len(q), np.isfinite(d)
    flat = np.vstack([P, A, q[None]])
    target = np.r_[np.zeros(n + len(b)), -1.0]
    found = _piqp(np.eye(n), np.zeros(n), flat, target, C[bounding], np.zeros(bounding.sum()))
    if found is None:
        return None
    x = found[0] / max(np.abs(found[0]).max(), 1e-300)
    falls = -q @ x
    stays = all(
        (np.linalg.norm(M, axis=1) * TOLERANCE >= step).all()
        for M, step in ((A, np.abs(A @ x)), (C[bounding], C[bounding] @ x))
    )
    # Where there is curvature, the objective falls up to the length falls / xᵀPx.
    proved = stays and falls > ROUNDING * np.abs(q).max() and falls >= ENDLESS * (x @ P @ x)
    return np.r_[x, np.zeros(len(b) + len(d))] if proved else None


def _piqp(P: Array, q: Array, A: Array, b: Array, G: Array, h: Array) -> tuple[Array, Array, Array] | None:
    try:
        import piqp
    except ModuleNotFoundError as error:
        raise MissingBackendError("piqp", "qp") from error
    solver = piqp.DenseSolver()
    solver.settings.eps_abs = solver.settings.eps_rel = 1e-9
    solver.setup(P, q, A, b, G, None, h, None, None)
    if solver.solve() != piqp.PIQP_SOLVED:
        return None
    found = solver.result
    return found.x, found.y, found.z_u


_FINDERS = {Status.INFEASIBLE: _farkas, Status.UNBOUNDED: _ray}
