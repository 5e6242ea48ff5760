"""Whether stability rules the steps, not accuracy: what explicit methods can tell of stiffness."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from difflayers._solution import OnFailure
from difflayers.errors import ConvergenceWarning
from difflayers.ode._methods import AnyStages
from difflayers.ode._stages import Stages, Time, TracedStages

EVERY = 10  # accepted steps of which one is looked at
MANY = 200  # steps at the border from which on a gradient is doubted


def tells(stages: AnyStages) -> bool:
    """Whether two stages of a method are at the end of the step, which it takes to tell stiffness from movement."""
    tableau = stages.tableau
    return isinstance(stages, Stages | TracedStages) and tableau.c[tableau.stages - 1] == 1


def at_border(stages: AnyStages, y: Tensor, end: Tensor, h: Time, rows: torch.Size) -> Tensor:
    """Which samples the last step, from ``y`` to ``end``, took to the border of stability, ``(samples,)``.

    Slopes at two states near the end tell how fast their difference decays (Hairer, Wanner 1996, section IV.2).
    """
    if not isinstance(stages, Stages | TracedStages):
        raise TypeError(f"steps of {type(stages).__name__} have no border of stability")
    near, slope, after = stages.near_end(y, h)
    apart = torch.linalg.vector_norm((end.detach() - near).reshape(rows), dim=1)
    change = torch.linalg.vector_norm((after - slope).reshape(rows), dim=1)
    length = h.abs().squeeze(1) if isinstance(h, Tensor) else abs(h)
    there: Tensor = change * length > 0.95 * stages.tableau.damped * apart
    return there


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
