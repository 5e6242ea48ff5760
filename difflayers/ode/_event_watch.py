"""Looking for events along a solve: where signs change is noted, and the times are found when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from difflayers.ode._event_root import bracketed_root
from difflayers.ode._events import Event
from difflayers.ode._problem import Evaluate
from difflayers.ode._stages import weights_at
from difflayers.ode._tableaus import Tableau

# A signal is zero at the start if, at the rate of the first step, it takes less than so many units in the last place of
# the whole time to get there.
_ROUNDING = 256


@dataclass
class Brackets:
    """Parts of steps in which the sign of an event's function changes, in the order of time.

    Attributes:
        sample: of which sample, and
        event: which event.
        step: the number of the step.
        t: where the step starts, and
        h: how long it is; columns, signed.
        y: the state at its start.
        slopes: its stages, ``(brackets, stages, n)``.
        low: the start of the part, as a place in the step, and
        high: its end.
        at_low: the values there, and
        at_high: at the end.
        scale: the largest value in the whole step.
    """

    sample: Tensor
    event: Tensor
    step: Tensor
    t: Tensor
    h: Tensor
    y: Tensor
    slopes: Tensor
    low: Tensor
    high: Tensor
    at_low: Tensor
    at_high: Tensor
    scale: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Brackets]) -> Brackets:
        return cls(*[torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)])

    def __getitem__(self, chosen: Tensor) -> Brackets:
        return Brackets(*[getattr(self, field.name)[chosen] for field in fields(self)])

    def state(self, tableau: Tableau, s: Tensor) -> Tensor:
        """The states at the places ``s`` in their steps."""
        weights = weights_at(tableau, s, self.y)
        own = torch.bmm(weights.unsqueeze(1), self.slopes).squeeze(1)
        return torch.addcmul(self.y, self.h.to(self.y.dtype), own)

    def time(self, s: Tensor) -> Tensor:
        """The times there, a column."""
        return self.t + s[:, None] * self.h


class Lookout:
    """What the loops tell their accepted steps to.

    Args:
        events: the events.
        evaluate: their functions, ``(times (samples, 1), rows) -> (samples, events)``.
        tableau: the method.
        t: where the samples start, a column.
        span: how long they may go on, likewise.
        y: the states there.
    """

    def __init__(
        self, events: Sequence[Event], evaluate: Evaluate, tableau: Tableau, t: Tensor, span: Tensor, y: Tensor
    ) -> None:
        self.events, self.evaluate, self.tableau, self.span = events, evaluate, tableau, span
        self.start, self.origin = t, y
        self.parts = max(event.parts for event in events)
        self.direction = torch.tensor([event.direction for event in events], device=y.device)
        self.terminal = torch.tensor([event.terminal for event in events], device=y.device)
        self.brackets: list[Brackets] = []
        self._t, self._y = t.clone(), y.clone()
        self._value: Tensor | None = None
        self._everybody = torch.arange(len(y), device=y.device)
        self._fresh: Tensor | None = torch.ones(len(y), 1, dtype=torch.bool, device=y.device)
        self._step = -1

    def __call__(
        self, stages: Any, t: float | Tensor, h: float | Tensor, y: Tensor, end: Tensor, rows: Tensor | None,
        moved: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """Which samples end in this step, None if none does."""
        self._step += 1
        if self._value is None:
            self._value = self.evaluate(self._t, self._y)
        who = self._everybody if rows is None else rows
        time, length = (x if isinstance(x, Tensor) else self._t.new_full((len(who), 1), x) for x in (t, h))
        values = [self._value if rows is None else self._value[who]]
        for part in range(1, self.parts):
            s = part / self.parts
            values.append(self._signals(who, time + s * length, stages.inside(t, y, h, s)))
        values.append(self._signals(who, time + length, end))
        seen = torch.stack(values)
        live = None if moved is None else moved.reshape(-1, 1)
        if self._fresh is not None:
            seen = self._started(self._fresh, who, live, length, seen)
        last = values[-1] if live is None else torch.where(live, values[-1], values[0])
        self._value = last if rows is None else self._value.index_copy(0, who, last)
        # Most steps end here: nothing is zero, and no sign changes.
        if not bool((seen[:-1] * seen[1:] <= 0).any()):
            return None
        crossed = self._crossed(seen)
        crossed = crossed if live is None else crossed & live
        if not bool(crossed.any()):
            return None
        if self.parts == 1:
            stages.inside(t, y, h, 0.5)  # makes the stages that the interpolant needs
        slopes = stages.slopes.reshape(len(stages.slopes), len(who), -1)
        self._note(crossed, seen, who, time, length, y.reshape(len(who), -1), slopes)
        return crossed[..., self.terminal].any(-1).any(0)

    def _signals(self, who: Tensor, t: Tensor, y: Tensor) -> Tensor:
        y = y.reshape(len(who), -1)
        if len(who) == len(self._y):
            return self.evaluate(t, y)
        # Everybody is evaluated: nobody has shown that events can be divided.
        self._t[who], self._y[who] = t, y
        return self.evaluate(self._t, self._y)[who]

    def _started(self, everybody: Tensor, who: Tensor, live: Tensor | None, h: Tensor, seen: Tensor) -> Tensor:
        """The values, with zero where a sample starts at an event."""
        fresh = everybody[who]
        rate = (seen - seen[0]).abs().amax(0) / h.abs().to(seen.dtype)
        small = _ROUNDING * torch.finfo(seen.dtype).eps * rate * self.span[who].abs().to(seen.dtype)
        seen[0] = torch.where(fresh & (seen[0].abs() <= small), 0, seen[0])
        gone = h != 0 if live is None else live & (h != 0)
        everybody[who] = fresh & ~gone
        self._fresh = everybody if bool(everybody.any()) else None
        return seen

    def _crossed(self, seen: Tensor) -> Tensor:
        """Where the sign changes in a direction that counts, ``(parts, samples, events)``."""
        sign = seen.sign()
        before, after = sign[:-1], sign[1:]
        counts = (self.direction == 0) | (self.direction == -before)
        return (before != 0) & (before * after <= 0) & counts

    def _note(
        self, crossed: Tensor, seen: Tensor, who: Tensor, t: Tensor, h: Tensor, y: Tensor, slopes: Tensor
    ) -> None:
        part, row, event = crossed.nonzero(as_tuple=True)
        low = part.double() / self.parts
        self.brackets.append(
            Brackets(
                who[row],
                event,
                torch.full_like(row, self._step),
                t[row].double(),
                h[row].double(),
                y[row],
                slopes[:, row].transpose(0, 1),
                low,
                low + 1 / self.parts,
                seen[part, row, event],
                seen[part + 1, row, event],
                seen.abs().amax(0)[row, event],
            )
        )

    def locate(self) -> list[Found]:
        """What was met, one for every event and every time that a sample meets it."""
        if not self.brackets:
            return []
        everything = Brackets.joined(self.brackets)
        found = []
        for event in range(len(self.events)):
            own = everything[everything.event == event]
            number = _ranks(own.sample)
            for k in range(int(number.max()) + 1 if len(number) else 0):
                found.append(self._found(event, own[number == k]))
        return found

    def _found(self, event: int, own: Brackets) -> Found:
        def signal(s: Tensor) -> Tensor:
            t, y = self.everywhere(own.sample, own.time(s), own.state(self.tableau, s))
            return self.evaluate(t, y)[own.sample, event]

        eps = 2 * torch.finfo(own.y.dtype).eps
        s = bracketed_root(signal, own.low, own.high, own.at_low, own.at_high, eps)
        return Found(event, own, s, own.time(s), own.state(self.tableau, s))

    def everywhere(self, sample: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Times and states of everybody, those not in ``sample`` at their start."""
        times, states = self.start.clone(), self.origin.clone()
        times[sample], states[sample] = t, y
        return times, states


@dataclass
class Found:
    """Where some samples meet an event, each once.

    Attributes:
        event: which event.
        brackets: what is known of the steps.
        s: the places in them.
        t: the times, a column.
        y: the states.
    """

    event: int
    brackets: Brackets
    s: Tensor
    t: Tensor
    y: Tensor


def _ranks(sample: Tensor) -> Tensor:
    """How many times every entry's sample came before."""
    order = sample.argsort(stable=True)
    place = torch.arange(len(sample), device=sample.device)
    ordered = sample[order]
    first = torch.searchsorted(ordered, ordered)
    ranks = torch.empty_like(place)
    ranks[order] = place - first
    return ranks
