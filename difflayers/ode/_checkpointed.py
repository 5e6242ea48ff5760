"""The gradient of the discrete solution: accepted steps are kept, and run once more when a derivative asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._adjoint import Adjoint
from difflayers._arrays import finite
from difflayers._autodiff import (
    batch_levels,
    in_functorch,
    is_legacy_batched,
    is_tracked,
    over_legacy_batch,
    primal,
    pull,
    push,
    without_autocast,
)
from difflayers._problem import Problem, closure_names
from difflayers._solution import OnFailure, Solution
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.ode._along import along
from difflayers.ode._call import Call, with_dimension
from difflayers.ode._explicit import AdaptiveSolver, OneStepSolver
from difflayers.ode._gradient import first_order, keeps_stages
from difflayers.ode._gradient_check import check_gradient
from difflayers.ode._mesh import RowMesh
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._stability import warn_of_stiffness
from difflayers.ode._tangents import Tangents


@dataclass(frozen=True)
class CheckpointedAdjoint(Adjoint):
    """The derivative of the discrete solution, exact to rounding: no second solve, no second error.

    The forward solve keeps the state at the start of every accepted step; ``backward`` runs each of them once more
    with its vector-Jacobian products (Zhuang et al. 2020, ICML, "Adaptive checkpoint adjoint"). Step sizes count as
    constants: how the controller would have chosen others isn't differentiated. Derivatives of first order in reverse
    mode take the memory of one step besides the states, forward mode likewise; derivatives of higher order, and those
    under ``torch.func``, build the tape of all accepted steps. Where an explicit method met stiffness, ``backward`` has
    a :class:`~difflayers.errors.ConvergenceWarning` unless ``check`` tells how far off that is.

    Args:
        states: how many states may be kept; None for one per step. With fewer, segments between them are run once more
            to get the others: about the square root of the number of steps costs the least memory.
        stage_parallel: whether ``backward`` evaluates the stages of all steps at once and forms their Jacobians, which
            takes as many products as a sample has numbers, and the slopes of every step in memory. None does where that
            was measured to be faster, for few small samples. Where all step together this runs the right-hand side
            under ``torch.func.vmap``, and None falls back where it can't; where samples have their own steps it is
            called with a large batch, if the solve has shown that samples can be evaluated without the others.
        check: how much the gradient of an adaptive solver may differ from that of a solve with a tenth of the
            tolerances, relative to its size; for every sample in the gradient of its start, and in each that samples
            share. ``backward`` then takes both, three times as long or more, and raises or warns where they are further
            apart, as ``on_failure`` says: the gradient of a discrete solution is exact, but can be far from that of the
            exact solution while the solution itself is fine. Gradients of first order are checked, outside
            ``torch.func``.
    """

    states: int | None = None
    stage_parallel: bool | None = None
    check: float | None = None

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if problem.form not in ("ode", "dae") or not isinstance(solver, OneStepSolver):
            return f"it runs steps of the solvers of difflayers.ode once more, which {type(solver).__name__} isn't"
        if self.stage_parallel and not solver.explicit:
            return "stages in parallel are for explicit methods; leave stage_parallel=None"
        if self.check is not None and not solver.adaptive:
            return "check= compares with tighter tolerances, which a method of fixed step doesn't have"
        return None

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        if not isinstance(problem, InitialValueProblem) or not isinstance(solver, OneStepSolver):
            raise TypeError(f"{self!r} can't serve here: {self.supports(problem, solver)}")
        wanted = torch.is_grad_enabled() and (in_functorch() or any(p.requires_grad for p in params))
        kept = self.states if wanted else 0
        call = Call(problem, solver, on_failure, kept, in_functorch(), wanted and self._parallel(solver, params))
        call.stage_parallel, call.check = self.stage_parallel, self.check
        closes_over = _looks_ahead(call, params)
        if self.check is not None and (closes_over or not isinstance(solver, AdaptiveSolver)):
            raise ProblemError("check= is for equations without events, and fn with all that it needs as arguments")
        if not (wanted or closes_over or in_functorch()) and torch.autograd.forward_ad._current_level < 0:
            with torch.no_grad():
                return call.run(params)
        value, status, *stats = _solve(call, *params)
        solution = Solution(value, status, dict(zip(call.names, stats, strict=False)))
        if closes_over:
            mesh = call.mesh
            columns = mesh.columns() if isinstance(mesh, RowMesh) else ()
            run = along(problem, solver.tableau, mesh, columns, params, params[1].requires_grad)
            solution = replace(solution, value=torch.where(_there(value, solution.stats["outputs"]), run, torch.nan))
        return solution

    def _parallel(self, solver: OneStepSolver, params: Sequence[Tensor]) -> bool:
        """Whether slopes are kept for it."""
        small = solver.explicit and self.states is None and keeps_stages(params[0])
        return small if self.stage_parallel is None else self.stage_parallel


class _Integrate(torch.autograd.Function):
    """``(y0, t, *params) -> (values, status, *stats)``."""

    @staticmethod
    def forward(call: Call, *params: Tensor) -> tuple[Tensor, ...]:
        solution = call.run(params)
        # Forward mode wants the layout of the tangent.
        return (
            solution.value.contiguous(),
            solution.status,
            *solution.stats.values(),
            *call.columns(params[0].shape[:-1]),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *params = inputs
        value, *rest = output
        ctx.call = call
        ctx.mark_non_differentiable(*rest)
        stats, columns = rest[1 : 1 + len(call.names)], rest[1 + len(call.names) :]
        kept = (value, stats[call.names.index("outputs")], *params, *columns)
        ctx.count = len(params)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        value, outputs, *kept = ctx.saved_tensors
        params, columns = kept[: ctx.count], kept[ctx.count :]
        wanted = [i for i in range(len(params)) if ctx.needs_input_grad[i + 1]]

        def rule(cotangent: Tensor) -> list[Tensor | None]:
            return _cotangents(ctx.call, value, outputs, params, columns, cotangent, wanted)

        gradients = over_legacy_batch(rule, cotangent) if is_legacy_batched(cotangent) else rule(cotangent)
        return (None, *gradients)

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> tuple[Any, ...]:
        # As in the algebraic families: torch switches forward mode off in here, and enclosing transforms need it.
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            _, outputs, *kept = [primal(t) for t in ctx.saved_tensors]
            params, columns = kept[: ctx.count], kept[ctx.count :]
            tangent = _pushed(ctx.call, outputs, params, columns, tangents)
        return (tangent, *[None] * (1 + len(ctx.call.names) + len(columns)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Call, *params: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        widened, in_batch = with_dimension(info.batch_size, in_dims[1:], params)
        problem = call.problem.mapped(info.batch_size, in_batch, info.randomness)
        output = _solve(replace(call, problem=problem), *widened)
        return output, (0,) * len(output)


def _solve(call: Call, *params: Tensor) -> tuple[Tensor, ...]:
    output: tuple[Tensor, ...] = _Integrate.apply(call, *params)  # type: ignore[no-untyped-call]
    return output


def _there(value: Tensor, outputs: Tensor) -> Tensor:
    """Which outputs a solve got to, ``(samples, T, 1)``."""
    return (torch.arange(value.shape[-2], device=value.device) < outputs[..., None])[..., None]


def _cotangents(
    call: Call,
    value: Tensor,
    outputs: Tensor,
    params: Sequence[Tensor],
    columns: Sequence[Tensor],
    cotangent: Tensor,
    wanted: Sequence[int],
) -> list[Tensor | None]:
    """The gradient of every parameter in ``wanted``, None for the others."""
    cotangent = torch.where(_there(value, outputs), cotangent, 0)
    found: Sequence[Tensor | None] = ()
    if wanted:
        if call.check is None:
            warn_of_stiffness(call.stiff[-1], call.on_failure)
        with without_autocast(value.device), _tolerating_failure(call):
            if torch.is_grad_enabled() or in_functorch():
                chosen = [params[i] for i in wanted]
                found = pull(_replayed(call, params, columns, wanted), chosen)(cotangent)
            else:
                found = first_order(call, value, params, cotangent, wanted)
                if call.check is not None:
                    check_gradient(call, params, cotangent, wanted, found)
    gradients: list[Tensor | None] = [None] * len(params)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def _replayed(
    call: Call, params: Sequence[Tensor], columns: Sequence[Tensor], chosen: Sequence[int]
) -> Callable[..., Tensor]:
    """The solution along the accepted steps as a function of the chosen parameters."""
    mesh = call.mesh
    columns = mesh.columns() if isinstance(mesh, RowMesh) and not columns else columns

    def run(*values: Tensor) -> Tensor:
        everything = list(params)
        for i, value in zip(chosen, values, strict=True):
            everything[i] = value
        moves = 1 in chosen or is_tracked(everything[1])
        return along(call.problem, call.solver.tableau, mesh, columns, everything, moves)

    return run


def _pushed(
    call: Call, outputs: Tensor, params: Sequence[Tensor], columns: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """The tangent of the outputs, step by step along the accepted ones."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
    with without_autocast(params[0].device):
        if isinstance(call.mesh, RowMesh):
            chosen, directions = [params[i] for i in moving], [tangents[i] for i in moving]
            tangent = push(_replayed(call, params, columns, moving), chosen, directions)  # type: ignore[arg-type]
            return torch.where(_there(tangent, outputs), tangent, 0)
        followed = [i for i in moving if i > 1]
        run = Tangents(call, params, followed, [tangents[i] for i in followed])  # type: ignore[misc]
        tangent = run.run(tangents[0], tangents[1])
    return torch.where(_there(tangent, outputs), tangent, 0)


def _tolerating_failure(call: Call) -> AbstractContextManager[Any]:
    """A tape on which samples that have failed can't poison the others: zero times NaN is NaN."""
    if not call.failed or in_functorch():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(finite, lambda t: t)


def _looks_ahead(call: Call, params: Sequence[Tensor]) -> bool:
    """Whether ``fn`` closes over tensors that want gradients; the evaluation that it takes isn't lost.

    Raises:
        ProblemError: in forward mode or under a ``torch.func`` transform, where such a tensor can't be reached.
    """
    y0, t = params[:2]
    if not torch.is_grad_enabled() or y0.numel() == 0:
        return False
    names = closure_names(call.problem.function)
    start = t.detach()[..., :1] if t.dim() > 1 else t.detach()[0]
    with without_autocast(y0.device):
        slope = call.problem.evaluator([p.detach() for p in params[2:]])(start.to(y0.dtype), y0.detach())
    known = batch_levels(y0).union(*map(batch_levels, params))
    wrapped = in_functorch() and bool(names)
    if not wrapped and not is_tracked(slope) and batch_levels(slope) <= known:
        call.slope = None if in_functorch() else slope.detach()
        return False
    if in_functorch() or not slope.requires_grad:
        raise ProblemError(
            f"fn closes over {', '.join(map(repr, names)) or 'a tensor'}, which belongs to forward mode or to a "
            "torch.func transform; pass it as an argument: fn(t, y, *args) and args=(...)"
        )
    return True
