"""The accepted steps once more, on the graph of whatever they depend on: derivatives of every order, in every mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from difflayers.ode._linearization import flow
from difflayers.ode._mesh import Mesh, Step
from difflayers.ode._methods import swept_implicit, traced_stages_of
from difflayers.ode._orders import limited
from difflayers.ode._stages import Evaluate, Time, combined, mixed, stage_time
from difflayers.ode._tableaus import RK4, Coefficients, ImplicitTableau, Tableau, coefficients

Sweep = Callable[
    [Tableau, Evaluate, Time, Time, Tensor, Tensor, Sequence[Tensor], list["Tensor | None"]], Tensor
]  # what swept() is


def replay(tableau: Tableau, evaluate: Evaluate, mesh: Mesh, y0: Tensor, t: Tensor | None) -> Tensor:
    """The outputs ``(samples, T, n)``; zeros where the solve didn't get to. ``t``: output times that move, or None.

    Steps are constants. A moving time moves its end along the flow: the start is carried from ``t₀`` to the first
    step, an output from where a step made it to its time.
    """
    y = y0 if t is None else moved(evaluate, mesh.times[0], y0, t[0], start=True)
    # Times equal to the first one have the start itself.
    values: list[Tensor | None] = [y if time == mesh.times[0] else None for time in mesh.times]
    for step in mesh.steps:
        y, made = retraced(tableau, evaluate, step, y)
        for (index, _), value in zip(step.outputs, made, strict=True):
            values[index] = value
    zero = torch.zeros_like(y0)
    found = [zero if value is None else value for value in values]
    if t is not None:
        found = [
            value if values[i] is None else moved(evaluate, mesh.times[i], value, t[i]) for i, value in enumerate(found)
        ]
    return torch.stack([y0, *found[1:]], dim=-2)


def retraced(tableau: Tableau, evaluate: Evaluate, step: Step, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The state after a step, and its outputs."""
    stages = traced_stages_of(tableau, evaluate, y)
    stages.start(step.t, y)
    end = stages.advanced(step.t, y, step.h)
    outputs = [end if s == 1 else stages.inside(step.t, y, step.h, s) for _, s in step.outputs]
    if step.alive is not None:
        alive = step.alive.expand(-1, y.numel() // len(step.alive)).reshape(y.shape)
        end = torch.where(alive, end, y)
    return end, outputs


def moved(evaluate: Evaluate, fixed: Time, y: Tensor, time: Tensor, start: bool = False) -> Tensor:
    """An output carried by the flow to its time, or the start from its time; both are where they were already.

    The value is that of ``y``; what comes are the derivatives in ``time``, which is as many as the method has orders.
    """
    evaluate = flow(evaluate)
    h = torch.as_tensor(fixed - time if start else time - fixed).to(y.dtype)
    h = limited(h, RK4.order, "output times")
    t = time if start else fixed
    slopes = [evaluate(stage_time(t, 0.0, h, y), y)]
    for row, c in zip(RK4.rows[:-1], RK4.c[1:], strict=False):
        slopes.append(evaluate(stage_time(t, c, h, y), mixed(y, slopes, row, h)))
    return mixed(y, slopes, RK4.b, h)


def pulled(
    tableau: Tableau,
    evaluate: Evaluate,
    step: Step,
    y: Tensor,
    adjoint: Tensor,
    cotangents: Sequence[Tensor],
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
    given: Tensor | None = None,
    handed_on: bool = False,
    sweep: Sweep | None = None,
) -> Tensor:
    """The cotangent of a step's start, for ``adjoint`` of its end and cotangents of its outputs.

    ``gradients`` of what is ``wanted`` are added to. Every slope is a tape of its own, so that what is between them are
    products in buffers instead of a graph. The slope at the end of a step is the first one of the next: where outputs
    need it, its cotangent may be ``handed_on`` to that step, which is ``given`` it. Another :func:`swept` may serve as
    ``sweep``.
    """
    inside = [(s, g) for (_, s), g in zip(step.outputs, cotangents, strict=True) if s != 1]
    for (_, s), cotangent in zip(step.outputs, cotangents, strict=True):
        adjoint = adjoint + cotangent if s == 1 else adjoint
    stages = tableau.total if inside and not handed_on else tableau.stages
    known = coefficients(tableau, y.dtype, y.device)
    sources = torch.stack([adjoint, *[g for _, g in inside]]).flatten(1)
    weights = sources.new_zeros(len(sources), stages)
    weights[0, : tableau.stages] = known.b
    for row, (s, _) in zip(weights[1:], inside, strict=True):
        row.copy_(torch.from_numpy(tableau.weights(s)[:stages]))
    direct = torch.mm(weights.t(), sources).view(stages, *y.shape).mul_(step.h)
    if given is not None:
        direct[0] += given
    start = (sweep or swept)(tableau, evaluate, step.t, step.h, y, direct, wanted, gradients)
    return start.add_(sources.sum(0).view(y.shape))


def owed(tableau: Tableau, step: Step, cotangents: Sequence[Tensor]) -> Tensor | None:
    """The cotangent that the outputs of a step give to the slope at its end."""
    total = None
    for (_, s), cotangent in zip(step.outputs, cotangents, strict=True):
        if s != 1:
            part = cotangent * (step.h * float(tableau.weights(s)[-1]))
            total = part if total is None else total + part
    return total


def swept(
    tableau: Tableau,
    evaluate: Evaluate,
    t: Time,
    h: Time,
    y: Tensor,
    direct: Tensor,
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
) -> Tensor:
    """What the stages of a step give to its start, for the cotangents that slopes have from outside, ``direct``."""
    if isinstance(tableau, ImplicitTableau):
        return swept_implicit(tableau, evaluate, t, h, y, direct, wanted, gradients)
    known = coefficients(tableau, y.dtype, y.device)
    tapes = tapes_of(evaluate, known, tableau.c[: len(direct)], t, h, y)
    back = torch.empty_like(direct)
    for i in range(len(tapes) - 1, -1, -1):
        leaf, slope = tapes[i]
        later = back[i + 1 :].flatten(1)
        cotangent = combined(direct[i], later, known.columns[i][: len(later)], h) if len(later) else direct[i]
        _pull_one(leaf, slope, cotangent, back[i], wanted, gradients)
    return back.sum(0)


def tapes_of(
    evaluate: Evaluate, known: Coefficients, c: Sequence[float], t: Time, h: Time, y: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The points of the stages, and their slopes as functions of them."""
    slopes = y.new_empty(len(c), y.numel())
    tapes = []
    for i, where in enumerate(c):
        leaf = (combined(y, slopes[:i], known.rows[i], h) if i else y.detach()).requires_grad_()
        with torch.enable_grad():
            slope = evaluate(stage_time(t, where, h, y), leaf)
        slopes[i].copy_(slope.detach().view(-1))
        tapes.append((leaf, slope))
    return tapes


def _pull_one(
    leaf: Tensor,
    slope: Tensor,
    cotangent: Tensor,
    result: Tensor,
    wanted: Sequence[Tensor],
    gradients: list[Tensor | None],
) -> None:
    if not slope.requires_grad:
        result.zero_()
        return
    found: list[Tensor | None] = list(torch.autograd.grad(slope, [leaf, *wanted], cotangent, allow_unused=True))
    pulled = found.pop(0)
    if pulled is None:
        result.zero_()
    else:
        result.copy_(pulled)
    for index, gradient in enumerate(found):
        if gradient is not None:
            total = gradients[index]
            # The first one may be anybody's memory, such as an expanded cotangent's.
            gradients[index] = gradient.clone() if total is None else total.add_(gradient)
