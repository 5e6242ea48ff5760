"""A failure on purpose: what a problem without a solution says."""

from __future__ import annotations

import torch
from torch import Tensor

from difflayers import Status
from difflayers.demo._row import float64
from difflayers.qp import closest_feasible, solve_qp


def infeasible() -> str:
    """``x ≤ -1`` and ``x ≥ 1``: status, proof, advice; and a healthy sample beside it, which isn't disturbed."""
    with float64():
        P, q, G = torch.eye(1), torch.zeros(1, requires_grad=True), torch.tensor([[1.0], [-1.0]])
        h = torch.tensor([[-1.0, -1.0], [2.0, 3.0]])
        solution = solve_qp(P, q, G, h, on_failure="ignore")
        solution.x[1].sum().backward()
        status = Status(int(solution.status[0]))
        weights = solution.stats["certificate"][0, 1:]
        sides = closest_feasible(G, h[0])
    return (
        f"x <= -1 and x >= 1: {status.name}, {status.message}. The proof: rows times {_listed(weights)} add up to "
        f"0 <= {float(h[0] @ weights):.2g}. x is {float(solution.x[0].detach())}, its gradient zero; the sample beside "
        f"it is {Status(int(solution.status[1])).name}. The closest problem that has a solution, from "
        f"closest_feasible(), has h = {_listed(sides.h)}."
    )


def _listed(vector: Tensor | None) -> str:
    return "()" if vector is None else f"({', '.join(f'{value:.3f}' for value in (vector + 0).tolist())})"
