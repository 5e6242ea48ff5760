"""The gradient of the discrete solution: accepted steps are kept, and run once more when a derivative asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._adjoint import Adjoint
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
from difflayers._monitor import watch
from difflayers._problem import Problem, closure_names
from difflayers._solution import OnFailure, Solution, Status, check_status
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.ode._along import along
from difflayers.ode._explicit import ExplicitSolver
from difflayers.ode._mesh import Mesh, RowMesh
from difflayers.ode._parallel import parallel_gradient
from difflayers.ode._parallel_rows import ParallelRows
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._replay import moved, pulled, retraced
from difflayers.ode._row_replay import RowGradient, row_time_gradient

# Numbers of the state, and of the propagators of one step, up to which stages in parallel were faster than steps.
_FEW, _SMALL = 256, 3000
# The latter where samples have their own steps, for the samples that a step has on average.
_SMALL_ROWS = 6000


@dataclass(frozen=True)
class CheckpointedAdjoint(Adjoint):
    """The derivative of the discrete solution, exact to rounding: no second solve, no second error.

    The forward solve keeps the state at the start of every accepted step; ``backward`` runs each of them once more
    with its vector-Jacobian products (Zhuang et al. 2020, ICML, "Adaptive checkpoint adjoint"). Step sizes count as
    constants: how the controller would have chosen others isn't differentiated. Derivatives of first order in reverse
    mode take the memory of one step besides the states, forward mode likewise; derivatives of higher order, and those
    under ``torch.func``, build the tape of all accepted steps.

    Args:
        states: how many states may be kept; None for one per step. With fewer, segments between them are run once more
            to get the others: about the square root of the number of steps costs the least memory.
        stage_parallel: whether ``backward`` evaluates the stages of all steps at once and forms their Jacobians, which
            takes as many products as a sample has numbers, and the slopes of every step in memory. None does where that
            was measured to be faster, for few small samples. Where all step together this runs the right-hand side
            under ``torch.func.vmap``, and None falls back where it can't; where samples have their own steps it is
            called with a large batch, if the solve has shown that samples can be evaluated without the others.
    """

    states: int | None = None
    stage_parallel: bool | None = None

    def __post_init__(self) -> None:
        if self.states is not None and self.states < 1:
            raise ProblemError(f"states must be at least 1, got {self.states}")

    def supports(self, problem: Problem, solver: Solver) -> str | None:
        if problem.form != "ode" or not isinstance(solver, ExplicitSolver):
            return f"it runs steps of the solvers of difflayers.ode once more, which {type(solver).__name__} isn't"
        return None

    def apply(
        self, problem: Problem, solver: Solver, params: Sequence[Tensor], init: Tensor, on_failure: OnFailure = "raise"
    ) -> Solution:
        if not isinstance(problem, InitialValueProblem) or not isinstance(solver, ExplicitSolver):
            raise TypeError(f"{self!r} can't serve here: {self.supports(problem, solver)}")
        call = _Call(problem, solver, on_failure, self.states, in_functorch(), self._parallel(params))
        call.stage_parallel = self.stage_parallel
        closes_over = _looks_ahead(call, params)
        value, status, *stats = _solve(call, *params)
        solution = Solution(value, status, dict(zip(call.names, stats, strict=False)))
        if closes_over:
            mesh = call.mesh
            columns = mesh.columns() if isinstance(mesh, RowMesh) else ()
            run = along(problem, solver.tableau, mesh, columns, params, params[1].requires_grad)
            solution = replace(solution, value=torch.where(_there(value, solution.stats["outputs"]), run, torch.nan))
        return solution

    def _parallel(self, params: Sequence[Tensor]) -> bool:
        """Whether slopes are kept for it."""
        if self.stage_parallel is False or not torch.is_grad_enabled():
            return False
        numbers, n = params[0].numel(), params[0].shape[-1]
        small = self.states is None and numbers <= _FEW and numbers * (n + 1) <= _SMALL
        return self.stage_parallel is True or small


@dataclass
class _Call:
    """One solve, with what its derivatives need to know."""

    problem: InitialValueProblem
    solver: ExplicitSolver
    on_failure: OnFailure
    states: int | None
    transformed: bool = False  # whether a transform may need the mesh as tensors of its own
    keep_stages: bool = False
    stage_parallel: bool | None = None
    slope: Tensor | None = None  # at the start, where it was evaluated already
    failures: list[bool] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    meshes: list[Mesh | RowMesh] = field(default_factory=list)  # shared with the calls that transforms make of this one

    @property
    def mesh(self) -> Mesh | RowMesh:
        return self.meshes[-1]

    @property
    def failed(self) -> bool:
        """Whether any sample has."""
        return self.failures[-1]

    def columns(self, batch: Sequence[int]) -> list[Tensor]:
        """The mesh as tensors, where a transform may need them and samples have their own."""
        if not self.transformed or not isinstance(self.mesh, RowMesh):
            return []
        return [column.reshape(*batch, column.shape[-1]) for column in self.mesh.columns()]

    def run(self, params: Sequence[Tensor]) -> Solution:
        mesh = self.solver.mesh(params[1], self.states, self.keep_stages)
        slope, self.slope = self.slope, None
        solution = watch("forward", self.solver, lambda: self.solver.march(self.problem, params, mesh, slope))
        self.meshes.append(mesh)
        self.failures.append(not bool((solution.status == Status.SUCCESS).all()))
        self.names[:] = solution.stats
        return check_status(solution, self.on_failure)


class _Integrate(torch.autograd.Function):
    """``(y0, t, *params) -> (values, status, *stats)``."""

    @staticmethod
    def forward(call: _Call, *params: Tensor) -> tuple[Tensor, ...]:
        solution = call.run(params)
        return solution.value, solution.status, *solution.stats.values(), *call.columns(params[0].shape[:-1])

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
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: _Call, *params: Tensor
    ) -> tuple[tuple[Tensor, ...], Any]:
        _, start, times, *dims = in_dims
        moved = [p if d is None else p.movedim(d, 0) for p, d in zip(params, in_dims[1:], strict=True)]
        if start is None:
            moved[0] = moved[0].unsqueeze(0).repeat(info.batch_size, *[1] * moved[0].dim())
        shared = params[1].dim() == (1 if times is None else 2)
        if times is not None and shared:
            moved[1] = moved[1][(slice(None), *[None] * (moved[0].dim() - 2))].expand(*moved[0].shape[:-1], -1)
        elif times is None and not shared:
            moved[1] = moved[1].expand(*moved[0].shape[:-1], -1)
        in_batch = tuple(None if d is None else 0 for d in dims)
        problem = call.problem.mapped(info.batch_size, in_batch, info.randomness)
        output = _solve(replace(call, problem=problem), *moved)
        return output, (0,) * len(output)


def _solve(call: _Call, *params: Tensor) -> tuple[Tensor, ...]:
    output: tuple[Tensor, ...] = _Integrate.apply(call, *params)  # type: ignore[no-untyped-call]
    return output


def _by_row(value: Tensor) -> Tensor:
    """Values ``(*batch, T, n)`` with one batch dimension."""
    return value.reshape(value.shape[:-2].numel(), *value.shape[-2:])


def _there(value: Tensor, outputs: Tensor) -> Tensor:
    """Which outputs a solve got to, ``(samples, T, 1)``."""
    return (torch.arange(value.shape[-2], device=value.device) < outputs[..., None])[..., None]


def _cotangents(
    call: _Call,
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
        with without_autocast(value.device), _tolerating_failure(call):
            if torch.is_grad_enabled() or in_functorch():
                chosen = [params[i] for i in wanted]
                found = pull(_replayed(call, params, columns, wanted), chosen)(cotangent)
            else:
                found = _step_by_step(call, value, params, cotangent, wanted)
    gradients: list[Tensor | None] = [None] * len(params)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def _replayed(
    call: _Call, params: Sequence[Tensor], columns: Sequence[Tensor], chosen: Sequence[int]
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


def _step_by_step(
    call: _Call, value: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
) -> list[Tensor | None]:
    """The gradient of first order, with the memory of one step."""
    _, t, *tensors = params
    mesh, tableau, evaluate = call.mesh, call.solver.tableau, call.problem.evaluator(tensors)
    if isinstance(mesh, RowMesh):
        g = _by_row(cotangent)
        adjoint, others = _by_rows(call, mesh, tensors, [i - 2 for i in wanted if i > 1], g)
        adjoint = adjoint + (g[:, 1:] * (mesh.times[:, 1:] == mesh.times[:, :1])[..., None]).sum(1)
        times = row_time_gradient(evaluate, mesh, _by_row(value), g, adjoint) if 1 in wanted else None
        return _in_order(wanted, adjoint + g[:, 0], times, others, params)
    followed = [params[i] for i in wanted if i > 1]
    if (found := _all_at_once(call, mesh, tensors, followed, _by_row(cotangent))) is not None:
        start, others = found
        start = start + _equal_to_first(mesh, _by_row(cotangent))
        by_output = list(_by_row(cotangent).unbind(1))
        times = _time_gradient(evaluate, mesh, value, t, by_output, start) if 1 in wanted else None
        return _in_order(wanted, start + by_output[0], times, others, params)
    native = call.problem.native
    by_output = [one.reshape(native) for one in _by_row(cotangent).unbind(1)]
    gradients: list[Tensor | None] = [None] * len(followed)
    adjoint = torch.zeros_like(by_output[0])
    for segment in reversed(mesh.segments):
        for step, y in reversed(list(_states(tableau, evaluate, segment))):
            own = [by_output[index] for index, _ in step.outputs]
            adjoint = pulled(tableau, evaluate, step, y, adjoint, own, followed, gradients)
    adjoint = adjoint + _equal_to_first(mesh, _by_row(cotangent)).view(native)
    times = _time_gradient(evaluate, mesh, value, t, by_output, adjoint) if 1 in wanted else None
    return _in_order(wanted, adjoint + by_output[0], times, gradients, params)


def _by_rows(
    call: _Call, mesh: RowMesh, tensors: Sequence[Tensor], followed: Sequence[int], cotangent: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient where samples have their own steps: in parallel, or step by step."""
    tableau, n = call.solver.tableau, cotangent.shape[-1]
    mean = sum(len(step.rows) for step in mesh.steps) / max(len(mesh.steps), 1)
    small = mean * n * (n + 1) <= _SMALL_ROWS and call.states is None
    wished = call.stage_parallel is True or (call.stage_parallel is None and small)
    if wished and mesh.divisible and not call.failed and all(step.y is not None for step in mesh.steps):
        pairs = ParallelRows(call.problem, tableau, tensors, followed)
        return pairs.run(mesh, cotangent), pairs.gradients
    rows = RowGradient(call.problem, tableau, mesh, tensors, followed)
    return rows.run(cotangent), rows.gradients


def _all_at_once(
    call: _Call, mesh: Mesh, tensors: Sequence[Tensor], followed: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, list[Tensor | None]] | None:
    """The stages of all steps in parallel, where that is possible."""
    if not mesh.keep_stages or call.failed or not mesh.steps:
        return None
    if call.stage_parallel:
        return parallel_gradient(call.problem, call.solver.tableau, mesh, tensors, followed, cotangent)
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_enabled(False)  # operations one by one would take longer than steps
    try:
        return parallel_gradient(call.problem, call.solver.tableau, mesh, tensors, followed, cotangent)
    except Exception:  # whatever a callable does under vmap that it wasn't written for; steps tell if it is wrong
        return None
    finally:
        functorch._set_vmap_fallback_enabled(True)


def _equal_to_first(mesh: Mesh, cotangent: Tensor) -> Tensor:
    """What the start gets from later outputs at its own time."""
    equal = torch.tensor([time == mesh.times[0] for time in mesh.times[1:]], device=cotangent.device)
    return (cotangent[:, 1:] * equal[:, None]).sum(1)


def _in_order(
    wanted: Sequence[int],
    start: Tensor,
    times: Tensor | None,
    others: Sequence[Tensor | None],
    params: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients in the order of what is wanted, in the shapes of the parameters."""
    y0, t = params[:2]
    found = iter(others)
    if times is not None:
        times = (times.sum(0) if times.dim() > t.dim() else times).reshape(t.shape).to(t.dtype)
    return [start.reshape(y0.shape) if i == 0 else times if i == 1 else next(found) for i in wanted]


def _states(tableau: Any, evaluate: Any, segment: Any) -> Iterator[Any]:
    y = segment[0].y
    with torch.no_grad():
        for step in segment:
            yield step, y
            if step is not segment[-1]:
                y = retraced(tableau, evaluate, replace(step, outputs=()), y)[0]


def _time_gradient(
    evaluate: Any, mesh: Mesh, value: Tensor, t: Tensor, by_output: Sequence[Tensor], adjoint: Tensor
) -> Tensor:
    """An output moves along the flow with its time, and against it with that of the start."""
    rows = _by_row(value)

    def along(index: int, cotangent: Tensor) -> Tensor:
        time = torch.scalar_tensor(mesh.times[index], dtype=value.dtype, device=value.device)
        speed: Tensor = evaluate(time, rows[:, index].reshape(cotangent.shape))
        return (speed * cotangent).nan_to_num(nan=0.0).sum()

    parts = [-along(0, adjoint), *[along(i, by_output[i]) for i in range(1, len(by_output))]]
    return torch.stack(parts).to(t.dtype)


def _pushed(
    call: _Call, outputs: Tensor, params: Sequence[Tensor], columns: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """The tangent of the outputs, step by step along the accepted ones."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
    with without_autocast(params[0].device):
        if isinstance(call.mesh, RowMesh):
            chosen, directions = [params[i] for i in moving], [tangents[i] for i in moving]
            tangent = push(_replayed(call, params, columns, moving), chosen, directions)  # type: ignore[arg-type]
            return torch.where(_there(tangent, outputs), tangent, 0)
        followed = [i for i in moving if i > 1]
        run = _Tangents(call, params, followed, [tangents[i] for i in followed])  # type: ignore[misc]
        tangent = run.run(tangents[0], tangents[1])
    return torch.where(_there(tangent, outputs), tangent, 0)


class _Tangents:
    """A tangent runs along the accepted steps, with the memory of one of them."""

    def __init__(
        self, call: _Call, params: Sequence[Tensor], followed: Sequence[int], directions: Sequence[Tensor]
    ) -> None:
        self.call, self.params, self.followed, self.directions = call, params, followed, directions
        self.tableau = call.solver.tableau
        if not isinstance(call.mesh, Mesh):
            raise TypeError("tangents run step by step where all samples step together")
        self.mesh = call.mesh

    def run(self, start: Tensor | None, times: Tensor | None) -> Tensor:
        mesh, y, t = self.mesh, self.params[0], self.params[1]
        # A transform around this one may follow the times.
        moves = times is not None or is_tracked(t)
        times = torch.zeros_like(t) if times is None else times
        first = w = torch.zeros_like(y) if start is None else start
        if moves:
            w, y = self._moved(0, y, w, times[0]), moved(self._evaluate(()), mesh.times[0], y, t[0], start=True)
        values = {i: (y, w) for i, time in enumerate(mesh.times) if time == mesh.times[0]}
        for step in mesh.steps:

            def one(y: Tensor, *tensors: Tensor, step: Any = step) -> Tensor:
                end, made = retraced(self.tableau, self._evaluate(tensors), step, y)
                return torch.stack([end, *made])

            tensors = [self.params[i] for i in self.followed]
            points = one(y, *tensors)
            slopes = push(one, [y, *tensors], [w, *self.directions])
            values |= {i: (points[k], slopes[k]) for k, (i, _) in enumerate(step.outputs, 1)}
            y, w = points[0], slopes[0]
        tangents = []
        for i in range(len(mesh.times)):
            point, tangent = values.get(i, (y, torch.zeros_like(y)))
            if moves and i in values and i:
                tangent = self._moved(i, point, tangent, times[i])
            tangents.append(first if i == 0 else tangent)
        return torch.stack(tangents, dim=-2)

    def _moved(self, index: int, y: Tensor, w: Tensor, direction: Tensor) -> Tensor:
        def one(y: Tensor, time: Tensor, *tensors: Tensor) -> Tensor:
            return moved(self._evaluate(tensors), self.mesh.times[index], y, time, start=index == 0)

        tensors = [self.params[i] for i in self.followed]
        return push(one, [y, self.params[1][index], *tensors], [w, direction, *self.directions])

    def _evaluate(self, tensors: Sequence[Tensor]) -> Any:
        everything = list(self.params)
        for i, tensor in zip(self.followed, tensors, strict=False):
            everything[i] = tensor
        return self.call.problem.evaluator(everything[2:])


def _tolerating_failure(call: _Call) -> AbstractContextManager[Any]:
    """A tape on which samples that have failed can't poison the others: zero times NaN is NaN."""
    if not call.failed or in_functorch():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_finite, lambda t: t)


def _finite(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isfinite(), tensor, 0) if tensor.is_floating_point() or tensor.is_complex() else tensor


def _looks_ahead(call: _Call, params: Sequence[Tensor]) -> bool:
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
