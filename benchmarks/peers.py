"""torchdeq 0.1.0, behind the signature that all methods of the fixed-point benchmark have: ``method(case) -> solve``.

``solve() -> z`` finds the case's fixed point, with ``z`` on the graph of the cell's weights. What is made once per
layer is made before. Its functions are closures; they are given the same cell and the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _cells import Case
from torch import Tensor

Method = Callable[[Case], Callable[[], Tensor]]

SOLVERS = ("fixed_point_iter", "anderson", "broyden")


def torchdeq_exact() -> dict[str, Method]:
    """Its solvers with implicit differentiation, at one relative tolerance forward and backward."""
    return {f"torchdeq {solver}": lambda case, solver=solver: _exact(case, solver) for solver in SOLVERS}


def torchdeq_approximate() -> dict[str, Method]:
    """What ``get_deq()`` does unless told otherwise: 40 iterations at 1e-3, gradient of the last one."""
    return {"torchdeq get_deq()": lambda case: _torchdeq(case)}


def _exact(case: Case, solver: str) -> Callable[[], Tensor]:
    # Broyden's method needs few steps, and allocates memory for all of them beforehand.
    steps = 100 if solver == "broyden" else case.steps
    return _torchdeq(
        case,
        ift=True,
        f_solver=solver,
        b_solver=solver,
        f_tol=case.tolerance,
        b_tol=case.tolerance,
        f_stop_mode="rel",
        b_stop_mode="rel",
        f_max_iter=steps,
        b_max_iter=steps,
    )


def _torchdeq(case: Case, **options: Any) -> Callable[[], Tensor]:
    from torchdeq import get_deq

    deq = get_deq(**options)
    deq.train()

    def solve() -> Tensor:
        states, _ = deq(lambda z: case.cell(z, case.x), case.z0)
        answer: Tensor = states[-1]
        return answer

    return solve
