"""The gradient of first order along accepted steps: step by step, or many stages at once where that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difflayers.ode._along import by_row
from difflayers.ode._call import Call
from difflayers.ode._compiled import CompiledSweep
from difflayers.ode._linearization import flow
from difflayers.ode._mesh import Mesh, RowMesh
from difflayers.ode._parallel import parallel_gradient
from difflayers.ode._parallel_rows import ParallelRows
from difflayers.ode._replay import owed, pulled, retraced
from difflayers.ode._row_replay import RowGradient, row_time_gradient

# Numbers of the state, and of the propagators of one step, up to which stages in parallel were faster than steps.
_FEW, _SMALL = 256, 3000
# The latter where samples have their own steps, for the samples that a step has on average.
_SMALL_ROWS = 6000


def keeps_stages(rows: Tensor) -> bool:
    """Whether a joint solve of these should keep its slopes, for stages in parallel."""
    numbers, n = rows.numel(), rows.shape[-1]
    return numbers <= _FEW and numbers * (n + 1) <= _SMALL


def first_order(
    call: Call, value: Tensor, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int]
) -> list[Tensor | None]:
    """The gradient of first order, with the memory of one step."""
    _, t, *tensors = params
    mesh, tableau, evaluate = call.mesh, call.solver.tableau, call.problem.evaluator(tensors)
    if isinstance(mesh, RowMesh):
        g = by_row(cotangent)
        adjoint, others = _by_rows(call, mesh, tensors, [i - 2 for i in wanted if i > 1], g)
        adjoint = adjoint + (g[:, 1:] * (mesh.times[:, 1:] == mesh.times[:, :1])[..., None]).sum(1)
        times = row_time_gradient(evaluate, mesh, by_row(value), g, adjoint) if 1 in wanted else None
        return _in_order(wanted, adjoint + g[:, 0], times, others, params)
    followed = [params[i] for i in wanted if i > 1]
    if (found := _all_at_once(call, mesh, tensors, followed, by_row(cotangent))) is not None:
        start, others = found
        start = start + _equal_to_first(mesh, by_row(cotangent))
        by_output = list(by_row(cotangent).unbind(1))
        times = _time_gradient(evaluate, mesh, value, t, by_output, start) if 1 in wanted else None
        return _in_order(wanted, start + by_output[0], times, others, params)
    native = call.solver.layout(call.problem)
    by_output = [one.reshape(native) for one in by_row(cotangent).unbind(1)]
    gradients: list[Tensor | None] = [None] * len(followed)
    adjoint = torch.zeros_like(by_output[0])
    made = [[by_output[index] for index, _ in step.outputs] for step in mesh.steps]
    # The slope at the end is the first one of the next step, unless that one starts from elsewhere.
    shares = tableau.total == tableau.stages + 1 and not call.failed
    number = len(mesh.steps)
    # Compiled products have no tape that samples which have failed could be kept from.
    compiles = call.solver.compile and not call.failed
    sweep = CompiledSweep(call.problem, tensors, [i - 2 for i in wanted if i > 1]) if compiles else None
    for segment in reversed(mesh.segments):
        for step, y in reversed(list(_states(tableau, evaluate, segment))):
            number -= 1
            given = owed(tableau, mesh.steps[number - 1], made[number - 1]) if shares and number else None
            handed_on = shares and number + 1 < len(mesh.steps)
            adjoint = pulled(
                tableau, evaluate, step, y, adjoint, made[number], followed, gradients, given, handed_on, sweep
            )  # fmt: skip
    adjoint = adjoint + _equal_to_first(mesh, by_row(cotangent)).view(native)
    times = _time_gradient(evaluate, mesh, value, t, by_output, adjoint) if 1 in wanted else None
    return _in_order(wanted, adjoint + by_output[0], times, gradients, params)


def _by_rows(
    call: Call, mesh: RowMesh, tensors: Sequence[Tensor], followed: Sequence[int], cotangent: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient where samples have their own steps: in parallel, or step by step."""
    tableau, n = call.solver.tableau, cotangent.shape[-1]
    mean = sum(len(step.rows) for step in mesh.steps) / max(len(mesh.steps), 1)
    small = mean * n * (n + 1) <= _SMALL_ROWS and call.states is None and call.solver.explicit
    wished = call.stage_parallel is True or (call.stage_parallel is None and small)
    if wished and mesh.divisible and not call.failed and all(step.y is not None for step in mesh.steps):
        pairs = ParallelRows(call.problem, tableau, tensors, followed)
        return pairs.run(mesh, cotangent), pairs.gradients
    rows = RowGradient(call.problem, tableau, mesh, tensors, followed)
    return rows.run(cotangent), rows.gradients


def _all_at_once(
    call: Call, mesh: Mesh, tensors: Sequence[Tensor], followed: Sequence[Tensor], cotangent: Tensor
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
    rows = by_row(value)

    def along(index: int, cotangent: Tensor) -> Tensor:
        time = torch.scalar_tensor(mesh.times[index], dtype=value.dtype, device=value.device)
        speed: Tensor = flow(evaluate)(time, rows[:, index].reshape(cotangent.shape))
        return (speed * cotangent).nan_to_num(nan=0.0).sum()

    parts = [-along(0, adjoint), *[along(i, by_output[i]) for i in range(1, len(by_output))]]
    return torch.stack(parts).to(t.dtype)
