"""The steps that a solve accepted, which is what its derivatives run along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass
class Step:
    """One accepted step of all samples together.

    Attributes:
        t: where it starts, and
        h: how long it is; signed. Numbers, or a column with one for every sample.
        outputs: which output times it makes, and where they are inside the step, in ``(0, 1]``.
        y: the state at its start, if it is kept.
        alive: a column that says which samples move, None for all.
        stages: its slopes, if they are kept, ``(stages, samples, n)``.
    """

    t: float | Tensor
    h: float | Tensor
    outputs: tuple[tuple[int, float], ...] = ()
    y: Tensor | None = None
    alive: Tensor | None = None
    stages: Tensor | None = None


class _Stateful(Protocol):
    y: Tensor | None


class Watch(Protocol):
    """What looks at every accepted step."""

    def __call__(
        self,
        stages: Any,
        t: float | Tensor,
        h: float | Tensor,
        y: Tensor,
        end: Tensor,
        rows: Tensor | None,
        moved: Tensor | None,
    ) -> Tensor | None:
        """Which samples end in this step, None if none does; ``rows`` are in it, and ``moved`` those it moves."""


S = TypeVar("S", bound=_Stateful)


class _Thinned(Generic[S]):
    """Accepted steps in order.

    Args:
        states: how many states may be kept; None for one per step. When there are more, every other one is dropped, so
            that those that stay are evenly spread.
    """

    def __init__(self, states: int | None = None) -> None:
        self.states = states
        self.steps: list[S] = []
        self.watch: Watch | None = None
        self._every = 1

    def add(self, step: S) -> None:
        if self.states == 0 or len(self.steps) % self._every:
            step.y = None
        self.steps.append(step)
        if self.states and len(self.steps) > self.states * self._every:
            self._every *= 2
            for index, old in enumerate(self.steps):
                if index % self._every:
                    old.y = None

    @property
    def segments(self) -> list[list[S]]:
        """Runs of steps of which the first one has a state."""
        found: list[list[S]] = []
        for step in self.steps:
            if step.y is not None:
                found.append([])
            found[-1].append(step)
        return found


class Mesh(_Thinned[Step]):
    """Steps that all samples take together.

    Attributes:
        times: output times.
        keep_stages: whether slopes are kept too.
    """

    def __init__(self, states: int | None = None, keep_stages: bool = False) -> None:
        super().__init__(states)
        self.keep_stages = keep_stages
        self.times: list[float] = []


@dataclass
class RowStep:
    """One step of several samples, each from its own time and of its own length; zero where it wasn't accepted.

    Attributes:
        t: where it starts, and
        h: how long it is; columns, signed.
        y: the states at its start, if they are kept.
        rows: which samples of the batch these are.
        kept: which of the samples of the step before these are, None for all.
        row: for every output that it makes, of which of its samples,
        index: which one, and
        s: where inside the step, in ``(0, 1]``.
    """

    t: Tensor
    h: Tensor
    y: Tensor | None
    rows: Tensor
    kept: Tensor | None
    row: Tensor
    index: Tensor
    s: Tensor


class RowMesh(_Thinned[RowStep]):
    """Steps of samples that go at their own pace.

    Attributes:
        times: output times, ``(samples, T)``.
        inside: whether any output lies inside a step.
        divisible: whether some samples alone were shown to be what they are among the others.
    """

    def __init__(self, states: int | None = None) -> None:
        super().__init__(states)
        self.times: Tensor = torch.empty(0)
        self.inside = False
        self.divisible = False

    def columns(self) -> tuple[Tensor, ...]:
        """What a replay needs: times and steps ``(samples, N)``, step and place of every output ``(samples, T)``."""
        t = self.times[:, :1].repeat(1, max(len(self.steps), 1))
        h = torch.zeros_like(t)
        made, place = torch.full_like(self.times, -1, dtype=torch.int64), torch.ones_like(self.times)
        last = self.times[:, 0].clone()  # whoever stands still, stands there
        for number, step in enumerate(self.steps):
            t[:, number] = last
            last[step.rows] = (step.t + step.h)[:, 0]
            t[step.rows, number], h[step.rows, number] = step.t[:, 0], step.h[:, 0]
            made[step.rows[step.row], step.index] = number
            place[step.rows[step.row], step.index] = step.s
        return t, h, made, place, self.times
