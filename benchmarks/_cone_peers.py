"""cvxpylayers, behind the signature that all methods here have: ``method(case) -> run``.

``run() -> (variables, gradients)`` solves the case and differentiates ``sum(cotangent * variable)`` in all parameters.
The layer is made before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from _cone_problems import Case
from torch import Tensor

Run = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor | None]]]
Method = Callable[[Case], Run]


@dataclass(frozen=True)
class Peer:
    """Another package; without the modules it ``needs`` it is left out."""

    method: Method
    needs: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        return [module for module in self.needs if find_spec(module) is None]


def differentiated(case: Case, layer: Callable[..., Sequence[Tensor]], **options: Any) -> Run:
    """A layer's call and its gradients by backpropagation."""
    values = [value.clone().requires_grad_() for value in case.values]

    def run() -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        found = layer(*values, **options)
        loss = sum((c * variable).sum() for c, variable in zip(case.cotangents, found, strict=True))
        return found, torch.autograd.grad(loss, values, allow_unused=True)

    return run


def default(case: Case) -> Run:
    return _cvxpylayer(case, case.problem)


def with_clarabel(case: Case) -> Run:
    return _cvxpylayer(case, case.problem, solve_method="Clarabel")


def with_moreau(case: Case) -> Run:
    return _cvxpylayer(case, case.without_bounds or case.problem, solver="MOREAU")


def _cvxpylayer(case: Case, problem: Any, solver: str | None = None, **solver_args: Any) -> Run:
    from cvxpylayers.torch import CvxpyLayer

    layer = CvxpyLayer(problem, list(case.parameters), list(case.variables), solver=solver, gp=case.gp)
    return differentiated(case, layer, solver_args=solver_args)


DEFAULT, MOREAU = "cvxpylayers 1.2", "Moreau 0.4.1 through cvxpylayers"
PEERS = {
    DEFAULT: Peer(default, ("cvxpylayers", "diffcp", "scs")),
    "cvxpylayers 1.2 with Clarabel": Peer(with_clarabel, ("cvxpylayers", "diffcp", "clarabel")),
    MOREAU: Peer(with_moreau, ("cvxpylayers", "moreau")),
}
