"""Whether stability rules the steps, not accuracy: what explicit methods can tell of stiffness."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from difflayers._autodiff import in_functorch, is_tracked
from difflayers._solution import OnFailure, Solution
from difflayers.errors import ConvergenceWarning
from difflayers.ode._methods import AnyStages
from difflayers.ode._stages import Stages, Time, TracedStages, stage_time

EVERY = 10  # accepted steps of which one is looked at
MANY = 200  # steps at the border from which on a gradient is doubted


def tells(stages: AnyStages) -> bool:
    """Whether a method has a border of stability."""
    return isinstance(stages, Stages | TracedStages)


def at_border(stages: AnyStages, t: Time, y: Tensor, end: Tensor, h: Time, rows: torch.Size) -> Tensor:
    """Which samples the last step, from ``y`` at ``t`` to ``end``, took to the border of stability, ``(samples,)``.

    Slopes at two states at the end tell how fast their difference decays (Hairer, Wanner 1996, section IV.2).
    """
    if not isinstance(stages, Stages | TracedStages):
        raise TypeError(f"steps of {type(stages).__name__} have no border of stability")
    near, slope, after = _two_at_end(stages, t, y, end.detach(), h)
    apart = torch.linalg.vector_norm((end.detach() - near).reshape(rows), dim=1)
    change = torch.linalg.vector_norm((after - slope).reshape(rows), dim=1)
    length = h.abs().squeeze(1) if isinstance(h, Tensor) else abs(h)
    there: Tensor = change * length > 0.95 * stages.tableau.damped * apart
    return there


def _two_at_end(
    stages: Stages | TracedStages, t: Time, y: Tensor, end: Tensor, h: Time
) -> tuple[Tensor, Tensor, Tensor]:
    """Another state at the end of the step, with its slope, and the slope of ``end``."""
    tableau = stages.tableau
    if tableau.c[tableau.stages - 1] == 1:
        return stages.near_end(y, h)
    # No other stage is at the end: the embedded solution is, at the price of an evaluation.
    with torch.no_grad():
        (error,) = stages.estimates()
        near = end - (h.to(y.dtype) if isinstance(h, Tensor) else h) * error.view_as(end)
        stages.evaluations += 1
        return near, stages.evaluate(stage_time(t, 1.0, h, y), near), stages.slopes[tableau.stages].view_as(end)


def doubt_unrolled(solution: Solution, on_failure: OnFailure) -> None:
    """Have a gradient through the steps of a solution warn as :func:`warn_of_stiffness`; in other modes, warn now."""
    value, stiff = solution.value, solution.stats["stiff"]
    steps = int(stiff.max()) if stiff.numel() else 0
    if steps < MANY or not is_tracked(value):
        return
    if value.requires_grad and not in_functorch():
        value.register_hook(lambda _: warn_of_stiffness(steps, on_failure))
    else:
        warn_of_stiffness(steps, on_failure)


def warn_of_stiffness(steps: int, on_failure: OnFailure) -> None:
    """Warn where a gradient goes through so many such steps: the error that a step damps, its tangent may magnify."""
    if steps < MANY or on_failure == "ignore":
        return
    warnings.warn(
        f"the problem is stiff: an explicit method made about {steps} steps at the border of its stability, where "
        "gradients can be far off though the solution is right; try Rodas(), or see how far by "
        "CheckpointedAdjoint(check=...)",
        ConvergenceWarning,
        stacklevel=2,
    )
