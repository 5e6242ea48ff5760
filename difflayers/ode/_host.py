"""Right-hand sides for routines that aren't ours: counted, bounded, and with their own exceptions kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from difflayers._solution import Solution, Status
from difflayers.ode._problem import Evaluate, InitialValueProblem


class TooManyEvaluations(Exception):
    """A routine asked more often than it may."""


class Field:
    """The right-hand side of rows ``(samples, n)``, for somebody else's loop.

    Attributes:
        evaluations: how often it was evaluated.
        raised: the exception that the user's function raised, if any: that one is the user's to see.
        time: where it was evaluated last, and
        finite: whether that gave numbers.
    """

    def __init__(self, evaluate: Evaluate, limit: int, own_time: bool) -> None:
        self._evaluate, self._limit, self._own_time = evaluate, limit, own_time
        self.evaluations = 0
        self.raised: Exception | None = None
        self._value: Tensor | None = None

    def __call__(self, t: Tensor, rows: Tensor) -> Tensor:
        if self.evaluations >= self._limit:
            raise TooManyEvaluations
        self.evaluations += 1
        self._value = self.untracked(t, rows)
        return self._value

    def untracked(self, t: Tensor, rows: Tensor) -> Tensor:
        """The same without counting: for Jacobians."""
        try:
            return self._evaluate(t.expand(rows.shape[0], 1) if self._own_time else t, rows)
        except Exception as error:
            self.raised = error
            raise

    @property
    def finite(self) -> bool:
        """Whether the last evaluation gave numbers."""
        return self._value is None or bool(self._value.isfinite().all())


def fields(
    problem: InitialValueProblem, tensors: Sequence[Tensor], y0: Tensor, t0: Tensor, limit: int
) -> Callable[[int], Field]:
    """The right-hand side of one sample alone, as rows ``(1, n)``.

    Samples that can't be divided are evaluated in the midst of the others, which stand still.
    """
    own_time = bool(problem.state.batch)
    whole = problem.evaluator(tensors)

    def alone(sample: int) -> Field:
        rows = torch.tensor([sample], device=y0.device)
        divided = problem.divided(tensors, rows) if problem.samples > 1 else None
        part = None if divided is None else problem.evaluator(divided[0])
        if part is not None and _agrees(part, whole, y0, t0, sample):
            return Field(part, limit, own_time)

        def among(t: Tensor, row: Tensor) -> Tensor:
            everybody = y0.index_copy(0, rows, row)
            return whole(t.expand(len(y0), 1) if own_time else t, everybody)[sample : sample + 1]

        return Field(among if problem.samples > 1 else whole, limit, own_time)

    return alone


def _agrees(part: Evaluate, whole: Evaluate, y0: Tensor, t0: Tensor, sample: int) -> bool:
    """Whether a part is there what it is here: which arguments go with the samples, shapes only suggest."""
    if not y0.numel():
        return True
    t = t0.to(y0.dtype).expand(len(y0)).reshape(-1, 1)
    try:
        one, here = part(t[sample : sample + 1], y0[sample : sample + 1]), whole(t, y0)[sample : sample + 1]
    except Exception:  # whatever a callable does with batch sizes that it wasn't written for
        return False
    allowed = torch.finfo(y0.dtype).eps ** (2 / 3) * (1 + here.abs().max())
    return bool((one - here).abs().max() <= allowed)


class Outcome:
    """What came of every sample, filled in by whoever solves it."""

    def __init__(self, y0: Tensor, times: Tensor) -> None:
        samples, count = y0.shape[0], times.shape[-1]
        self.value = y0.unsqueeze(1).repeat(1, count, 1)
        self.value[:, 1:] = torch.nan
        self.status = torch.zeros(samples, dtype=torch.int8, device=y0.device)
        names = ("evaluations", "outputs")
        self.stats = {name: torch.zeros(samples, dtype=torch.int64, device=y0.device) for name in names}
        start = times[..., 0].to(y0.device, torch.float64)
        self.stats["time"] = start.expand(samples).clone()

    def put(self, rows: slice, made: Tensor, status: Status, evaluations: int, time: float) -> None:
        """``made`` outputs ``(rows, k, n)`` of these samples; whatever isn't finite ends them."""
        count = made.shape[1]
        there = made.isfinite().all(-1).cumprod(1).bool()
        outputs = there.sum(1)
        self.value[rows, :count] = torch.where(there[..., None], made, torch.nan)
        broken = (outputs < count) & (torch.full_like(outputs, int(status)) == Status.SUCCESS)
        self.status[rows] = torch.where(broken, int(Status.NONFINITE), int(status)).to(torch.int8)
        self.stats["outputs"][rows] = outputs
        self.stats["evaluations"][rows] += evaluations
        self.stats["time"][rows] = time

    def solution(self, batch: torch.Size) -> Solution:
        stats = {name: stat.reshape(batch) for name, stat in self.stats.items()}
        return Solution(self.value.reshape(*batch, *self.value.shape[1:]), self.status.reshape(batch), stats)
