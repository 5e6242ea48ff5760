"""The steps that a solve accepted, which is what its derivatives run along."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class Mesh:
    """Accepted steps in order.

    Args:
        states: how many states may be kept; None for one per step. When there are more, every other one is dropped, so
            that those that stay are evenly spread.
    """

    states: int | None = None
    keep_stages: bool = False
    times: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _every: int = 1

    def add(self, step: Step) -> None:
        if len(self.steps) % self._every:
            step.y = None
        self.steps.append(step)
        if self.states is not None and len(self.steps) > self.states * self._every:
            self._every *= 2
            for index, old in enumerate(self.steps):
                if index % self._every:
                    old.y = None

    @property
    def segments(self) -> list[list[Step]]:
        """Runs of steps of which the first one has a state."""
        found: list[list[Step]] = []
        for step in self.steps:
            if step.y is not None:
                found.append([])
            found[-1].append(step)
        return found
