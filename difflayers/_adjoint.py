"""Rules for how the answer moves when the inputs move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from difflayers import linear
from difflayers._arrays import finite
from difflayers._autodiff import (
    batch_levels,
    in_functorch,
    is_tracked,
)
from difflayers._monitor import watch
from difflayers._node import Call, FirstOnly, solved
from difflayers._options import check_options
from difflayers._problem import Problem, closure_names
from difflayers._solution import OnFailure, Solution, check_status, has_answer
from difflayers._solver import Solver, mask_failed
from difflayers.errors import ProblemError


class Adjoint(ABC):
    """A rule for the derivatives of a value that was computed out of autograd's sight."""

    def __post_init__(self) -> None:
        check_options(self)

    @abstractmethod
    def supports(self, problem: Problem, solver: Solver) -> str | None:
        """Why this rule can't serve, or None."""

    @abstractmethod
    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        """The solution, its value on the graph of ``params``."""


@dataclass(frozen=True)
class ImplicitAdjoint(Adjoint):
    """The implicit function theorem: one linear solve per derivative, ``Jᵀu = -g``; memory of one state.

    Args:
        linear_solver: solves ``Jᵀu = -g`` and ``Jw = -b``. Exact ones give derivatives of every order; approximate ones
            (:class:`difflayers.linear.Neumann`, :class:`difflayers.linear.Identity`) give first derivatives only.
    """

    linear_solver: linear.LinearSolver = field(default_factory=linear.Auto)

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if problem.form == "ode":
            return "an initial value problem is no algebraic equation; use ode.CheckpointedAdjoint()"
        return self.linear_solver.supports(problem.properties)

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        init = init.detach()
        hidden, first = _closes_over(problem, params, init)
        learn = torch.is_grad_enabled() and not in_functorch()
        call = Call(problem, solver, self.linear_solver, on_failure, closures=hidden, first=first, learn=learn)
        value, status, *stats = solved(call, init, *params)
        if hidden is not None:
            value = value + self._through_closures(call, value, params)
        if not call.healthy and (in_functorch() or not bool(has_answer(status).all())):
            value = mask_failed(value, status)
        return Solution(value, status, dict(zip(call.stat_names, stats, strict=True)))

    def _through_closures(self, call: Call, value: Tensor, params: Sequence[Tensor]) -> Tensor:
        """Zero, whose first derivatives flow to whatever the residual closes over."""
        fixed = [p.detach() for p in params]
        with torch.enable_grad():
            residual = FirstOnly.apply(call, call.problem.bind(*fixed)(value.detach()))  # type: ignore[no-untyped-call]
        move = solved(call.linear("tangent", value), torch.zeros_like(value), residual, value.detach(), *fixed)[0]
        return move - move.detach()


def _instead(problem: Problem) -> str:
    """What serves where steps can't be unrolled."""
    known = "CheckpointedAdjoint() with a solver such as Dopri5()"
    return known if problem.form in ("ode", "dae") else "ImplicitAdjoint()"


@dataclass(frozen=True)
class UnrolledAdjoint(Adjoint):
    """Backpropagation through the solver's own steps; memory grows with them. For comparison, and for few steps."""

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if not solver.traceable:
            name = type(solver).__name__
            return f"{name} takes steps outside autograd, which can't be unrolled; use {_instead(problem)}"
        return None

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        if any(map(batch_levels, (init, *params))):
            raise ProblemError(
                "UnrolledAdjoint can't be vmapped: the loop that it traces reads which samples are done; give fn the "
                f"batch and batch_dims=1 instead, or use {_instead(problem)}"
            )
        solution = watch("forward", solver, lambda: solver.solve(problem, params, init))
        check_status(solution, on_failure, explain=problem.explain(solution))
        if not bool(has_answer(solution.status).all()):
            # Once more, on a tape on which samples without an answer can't poison the others.
            with torch.autograd.graph.saved_tensors_hooks(finite, lambda t: t):
                value = solver.solve(problem, [finite(p) for p in params], init).value
            solution = replace(solution, value=mask_failed(value, solution.status))
        solver.doubt(solution, on_failure)
        return solution


def _closes_over(problem: Problem, params: Sequence[Tensor], init: Tensor) -> tuple[list[str] | None, Tensor | None]:
    """Names of tensors that the residual closes over and that want gradients (maybe unknown: empty), None if none.

    And the residual at ``init``, which it took to find out.

    Raises:
        ProblemError: in forward mode or under a ``torch.func`` transform, where such a tensor can't be reached.
    """
    if not torch.is_grad_enabled() or init.numel() == 0 or problem.closed:
        return None, None
    names = closure_names(getattr(problem, "function", None))
    output = problem.bind(*[p.detach() for p in params])(init)
    known = batch_levels(init).union(*map(batch_levels, params))
    # Under a transform even a constant is out of reach if it was made inside, since the solve runs below all levels.
    wrapped = in_functorch() and bool(names)
    if not wrapped and not is_tracked(output) and batch_levels(output) <= known:
        return None, None if in_functorch() else output
    if in_functorch() or not output.requires_grad:
        raise ProblemError(
            f"the residual closes over {', '.join(map(repr, names)) or 'a tensor'}, which belongs to forward mode or "
            "to a torch.func transform; pass it as a parameter: residual(z, *params) and args=(...)"
        )
    return names, output.detach()
