"""The closest problem that has a solution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflayers._solution import OnFailure
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.qp._api import solve_qp


class Sides(NamedTuple):
    """Right-hand sides of ``Gx ≤ h`` and ``Ax = b`` that some ``x`` satisfies; None where there are no such rows."""

    h: Tensor | None
    b: Tensor | None


def closest_feasible(
    G: Tensor | None = None,
    h: Tensor | None = None,
    A: Tensor | None = None,
    b: Tensor | None = None,
    lb: Tensor | None = None,
    ub: Tensor | None = None,
    *,
    solver: str | Solver = "auto",
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> Sides:
    """The right-hand sides nearest to ``h`` and ``b`` for which constraints can be satisfied, differentiable.

    ``min ½‖e‖² + ½‖f‖²`` subject to ``Gx ≤ h + e``, ``Ax = b + f``, ``lb ≤ x ≤ ub``; what comes out is ``h + e`` and
    ``b + f``. A problem that is feasible stays as it is. :func:`solve_qp` with these sides has an answer wherever the
    bounds leave one, which is how Bambade, Schramm, Taylor, Carpentier (2024, ICLR, "Leveraging augmented-Lagrangian
    techniques for differentiating over infeasible quadratic programs in machine learning") train through problems that
    aren't feasible yet. Shapes, batches, ``on_failure`` and ``progress`` as in :func:`solve_qp`.

    Raises:
        ProblemError: there is neither ``G`` nor ``A``, or sizes don't fit.

    >>> import torch
    >>> from difflayers.qp import closest_feasible, solve_qp
    >>> G, h = torch.tensor([[1.0], [-1.0]]), torch.tensor([-1.0, -2.0])  # x ≤ -1 and x ≥ 2
    >>> sides = closest_feasible(G, h)
    >>> sides.h
    tensor([ 0.5000, -0.5000])
    >>> solve_qp(torch.eye(1), torch.zeros(1), G, sides.h).x
    tensor([0.5000])
    """
    rows = [(matrix, side) for matrix, side in ((G, h), (A, b)) if matrix is not None and side is not None]
    if not rows:
        raise ProblemError("there is nothing to move: pass G and h, or A and b")
    like, n = rows[0][0], rows[0][0].shape[-1]
    counts = [side.shape[-1] for _, side in rows]
    blocks, before = [], 0
    for (matrix, side), count in zip(rows, counts, strict=True):
        eye = torch.zeros(count, sum(counts), dtype=like.dtype, device=like.device)
        eye[:, before : before + count] = -torch.eye(count, dtype=like.dtype, device=like.device)
        blocks.append((torch.cat([matrix, eye.expand(*matrix.shape[:-1], -1)], dim=-1), side))
        before += count
    weight = torch.diag(torch.cat([like.new_zeros(n), like.new_ones(before)]))
    inequalities = blocks[0] if G is not None else (None, None)
    equations = blocks[-1] if A is not None else (None, None)
    bounds = [_padded(bound, before, free) for bound, free in ((lb, -torch.inf), (ub, torch.inf))]
    found = solve_qp(
        weight, like.new_zeros(n + before), *inequalities, *equations, *bounds,
        solver=solver, on_failure=on_failure, progress=progress,
    )  # fmt: skip
    moves = found.x[..., n:].split(counts, dim=-1)
    moved = [side + move for (_, side), move in zip(rows, moves, strict=True)]
    return Sides(moved[0] if G is not None else None, moved[-1] if A is not None else None)


def _padded(bound: Tensor | None, count: int, free: float) -> Tensor | None:
    return None if bound is None else torch.cat([bound, bound.new_full((*bound.shape[:-1], count), free)], dim=-1)
