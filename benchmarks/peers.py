"""Other packages behind one signature: ``solve(fn, params, z0) -> z``, with ``z`` on the graph of ``params``.

torchdeq 0.1.0. Its functions are closures; they are given the same cell and the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Solve = Callable[[Callable[..., Tensor], Sequence[Tensor], Tensor], Tensor]

# As many as they could need; Broyden's method needs few and allocates memory for all of them beforehand.
_TORCHDEQ_STEPS = {"fixed_point_iter": 300, "anderson": 300, "broyden": 100}


def torchdeq_exact(tolerance: float) -> dict[str, Solve]:
    """Its solvers with implicit differentiation, at one relative tolerance forward and backward."""
    return {
        f"torchdeq {solver}": _torchdeq(
            ift=True,
            f_solver=solver,
            b_solver=solver,
            f_tol=tolerance,
            b_tol=tolerance,
            f_stop_mode="rel",
            b_stop_mode="rel",
            f_max_iter=steps,
            b_max_iter=steps,
        )
        for solver, steps in _TORCHDEQ_STEPS.items()
    }


def torchdeq_approximate() -> dict[str, Solve]:
    """What ``get_deq()`` does unless told otherwise: 40 iterations at 1e-3, gradient of the last one."""
    return {"torchdeq get_deq()": _torchdeq()}


def _torchdeq(**options: Any) -> Solve:
    from torchdeq import get_deq

    deq = get_deq(**options)
    deq.train()

    def solve(fn: Callable[..., Tensor], params: Sequence[Tensor], z0: Tensor) -> Tensor:
        states, _ = deq(lambda z: fn(z, *params), z0)
        answer: Tensor = states[-1]
        return answer

    return solve
