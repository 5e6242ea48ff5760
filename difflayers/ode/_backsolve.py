"""The continuous adjoint: a second solve, backward in time, for any solver's forward values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difflayers._adjoint import Adjoint
from difflayers._arrays import finite
from difflayers._autodiff import in_functorch, is_legacy_batched, is_tracked, without_autocast
from difflayers._monitor import watch
from difflayers._problem import Problem, closure_names
from difflayers._solution import OnFailure, Solution, Status, check_status
from difflayers._solver import Solver
from difflayers.errors import ConvergenceWarning, ProblemError, SolverError
from difflayers.ode._along import by_row
from difflayers.ode._backward import Backward
from difflayers.ode._problem import InitialValueProblem

_ADVICE = "for more, use CheckpointedAdjoint() with a solver such as Dopri5()"


@dataclass(frozen=True)
class BacksolveAdjoint(Adjoint):
    """The continuous adjoint (Chen et al. 2018, NeurIPS): the state and its adjoint are solved backward in time.

    Works with any solver, whatever happens inside it, and keeps nothing but the outputs: ``backward`` starts from the
    stored state of every output time and integrates to the one before, by :class:`Dopri5`, all samples together. The
    gradient is that of the exact solution, up to the errors of both solves. It is wrong where the backward trajectory
    doesn't come back to where the forward one was, as after strong damping, on stiff problems and in chaos. So the two
    are compared at every output time, between which nobody looks: if they are further apart than ``drift`` times the
    tolerance, ``backward`` raises :class:`~difflayers.errors.SolverError` or warns, as ``on_failure`` says. More output
    times make the backward solve start afresh more often. Gives first derivatives only, in reverse mode, of ``y0``,
    ``t``, arguments and module parameters.

    Args:
        rtol: relative tolerance of the backward solve; None is that of the forward solver, or 1e-6 if it has none.
        atol: absolute tolerance likewise; None is that of the forward solver, or 1e-8.
        seminorm: whether integrals for the gradients of arguments and module parameters have no say in the steps, as
            nothing depends on them (Kidger et al. 2021, ICML).
        drift: how many times the tolerance, the looser one of both solves, the trajectories may part; a method of fixed
            step has none, which counts as 1e-3.
        max_steps: steps tried between two output times before the backward solve is given up; its gradient is NaN.
    """

    rtol: float | None = None
    atol: float | None = None
    seminorm: bool = True
    drift: float = 20.0
    max_steps: int = 10_000

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if problem.form == "dae":
            return "the adjoint of an equation with a mass matrix isn't there; use CheckpointedAdjoint()"
        if problem.form != "ode":
            return f"it solves initial value problems backward, and this is {problem.form}; use ImplicitAdjoint()"
        return None

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        if not isinstance(problem, InitialValueProblem):
            raise TypeError(f"{self!r} can't serve here: {self.supports(problem, solver)}")
        if in_functorch():
            raise ProblemError(f"BacksolveAdjoint gives first derivatives by backward(), not torch.func; {_ADVICE}")
        _refuse_closures(problem, params)
        call = _Call(self, problem, solver, on_failure)
        value, status, *stats = _Backsolve.apply(call, *params)  # type: ignore[no-untyped-call]
        return Solution(value, status, dict(zip(call.names, stats, strict=True)))

    def tolerances(self, solver: Solver) -> tuple[float, float]:
        """Those of the backward solve."""
        rtol, atol = _tolerances(solver)
        return (rtol or 1e-6) if self.rtol is None else self.rtol, (atol or 1e-8) if self.atol is None else self.atol


@dataclass
class _Call:
    """One solve, and what its derivative needs to know."""

    adjoint: BacksolveAdjoint
    problem: InitialValueProblem
    solver: Solver
    on_failure: OnFailure
    failed: bool = False
    names: list[str] = field(default_factory=list)

    def run(self, params: Sequence[Tensor]) -> Solution:
        solution = watch("forward", self.solver, lambda: self.solver.solve(self.problem, params, params[0]))
        self.names[:] = solution.stats
        self.failed = not bool(solution.ok.all())
        return check_status(solution, self.on_failure, explain=self.problem.explain(solution))

    def gradients(
        self, value: Tensor, outputs: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
    ) -> list[Tensor]:
        """The gradient of every parameter in ``wanted``, after looking whether the trajectories parted."""
        adjoint, problem = self.adjoint, self.problem
        rtol, atol = adjoint.tolerances(self.solver)
        run = Backward(problem, (rtol, atol, adjoint.max_steps, adjoint.seminorm), value, outputs, params, wanted)
        # A tape on which samples that have failed can't poison the others: zero times NaN is NaN.
        hooks = torch.autograd.graph.saved_tensors_hooks(finite, lambda t: t) if self.failed else nullcontext()
        # Nobody knows the error of a method of fixed step.
        forward = _tolerances(self.solver) if getattr(self.solver, "adaptive", True) else (1e-3, 1e-3)
        allowed = max(rtol, forward[0]), max(atol, forward[1])

        def solve() -> Solution:
            found = run.run(cotangent)
            gap = run.gap(*allowed)
            status = torch.where(gap <= adjoint.drift, int(Status.SUCCESS), int(Status.STALLED)).to(torch.int8)
            return Solution(found, status, run.stats | {"gap": gap})

        with without_autocast(value.device), hooks:
            solution = watch("adjoint", run.engine, solve)
        self._report(solution)
        found: list[Tensor] = solution.value
        return found

    def _report(self, solution: Solution) -> None:
        parted = (~solution.ok).nonzero().squeeze(1)
        if self.on_failure == "ignore" or not len(parted):
            return
        gap = float(solution.stats["gap"].max())
        far = f"up to {gap:.2g} times the tolerance" if gap < torch.inf else "and the backward solve broke down"
        message = (
            f"BacksolveAdjoint: in {len(parted)} of {solution.status.numel()} samples ({parted[:8].tolist()}) the "
            f"backward trajectory parted from the forward one, {far}; the gradient can be wrong by much more. Use "
            "CheckpointedAdjoint() with a solver such as Dopri5(), whose gradient is that of the forward solve, ask "
            "for output times in between, or tighten rtol and atol of the solver"
        )
        if self.on_failure == "raise":
            raise SolverError(message, solution)
        warnings.warn(message, ConvergenceWarning, stacklevel=2)


class _Backsolve(torch.autograd.Function):
    """``(y0, t, *params) -> (values, status, *stats)``."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *params: Tensor) -> tuple[Tensor, ...]:
        solution = call.run(params)
        rest = (solution.status, *solution.stats.values())
        ctx.call = call
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(solution.value, solution.stats["outputs"], *params)
        return solution.value, *rest

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_legacy_batched(cotangent):
            what = "second derivatives (create_graph)" if torch.is_grad_enabled() else "is_grads_batched"
            raise ProblemError(f"BacksolveAdjoint gives first derivatives only, without {what}; {_ADVICE}")
        value, outputs, *params = ctx.saved_tensors
        wanted = [i for i in range(len(params)) if ctx.needs_input_grad[i + 1]]
        gradients: list[Tensor | None] = [None] * len(params)
        for i, found in zip(
            wanted, ctx.call.gradients(by_row(value), outputs.reshape(-1), params, cotangent, wanted), strict=True
        ):
            gradients[i] = found
        return (None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise ProblemError(f"BacksolveAdjoint has no forward mode; {_ADVICE}")


def _tolerances(solver: Solver) -> tuple[float, float]:
    """Those of a forward solver, zero where it has none."""
    if not getattr(solver, "adaptive", True):
        return 0.0, 0.0
    return getattr(solver, "rtol", 0.0), getattr(solver, "atol", 0.0)


def _refuse_closures(problem: InitialValueProblem, params: Sequence[Tensor]) -> None:
    """Raise where ``fn`` closes over tensors that want gradients, which wouldn't get any."""
    y0, t = params[:2]
    if not torch.is_grad_enabled() or y0.numel() == 0:
        return
    start = t.detach()[..., :1] if t.dim() > 1 else t.detach()[0]
    slope = problem.evaluator([p.detach() for p in params[2:]])(start.to(y0.dtype), y0.detach())
    if is_tracked(slope):
        names = ", ".join(map(repr, closure_names(problem.function))) or "a tensor"
        raise ProblemError(
            f"fn closes over {names}, which wants a gradient, but BacksolveAdjoint gives one only to arguments and "
            f"module parameters; pass it as an argument: fn(t, y, *args) and args=(...)"
        )
