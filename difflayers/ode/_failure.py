"""What to say of solves that didn't get to the end."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from difflayers._solution import Status

_STIFF = "most steps were as short as stability asks of an explicit method; the problem is stiff, try Rodas()"
_MESSAGES = {
    Status.MAX_STEPS: "ran out of steps; raise max_steps, loosen rtol, or try Rodas(), in case the problem is stiff",
    Status.STALLED: "steps became too short to get further; the solution may blow up there, or fn jumps: end t before, "
    "loosen rtol, or try Rodas(), in case the problem is stiff",
    Status.NONFINITE: "NaN or infinity; the solution may leave there where fn is defined, or blow up: end t before, "
    "and check the inputs of this sample",
}


def explained(status: Status, stats: Mapping[str, Tensor], failed: Tensor) -> str:
    """What happened to these samples, and when; a time is the last one at which there was a state."""
    times = stats["time"][failed]
    first, last = (f"{float(time):.6g}" for time in (times.min(), times.max()))
    message = _STIFF if _is_stiff(status, stats, failed) else _MESSAGES.get(status, status.message)
    return f"after t = {first if first == last else f'{first} to {last}'}, {message}"


def _is_stiff(status: Status, stats: Mapping[str, Tensor], failed: Tensor) -> bool:
    """Whether stability ruled the steps of all of them."""
    if status == Status.NONFINITE or "stiff" not in stats:
        return False
    return bool((stats["stiff"][failed] > 0.5 * stats["accepted"][failed]).all())
