"""Events: what to look for along a solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difflayers._arguments import with_parameters
from difflayers._autodiff import in_functorch
from difflayers._problem import closure_names
from difflayers.errors import ProblemError
from difflayers.ode._problem import Evaluate, InitialValueProblem


@dataclass(frozen=True)
class Event:
    """Where ``fn(t, y, *args)`` changes its sign along a solution.

    Its sign is looked at in several places of every step, and where it changes, the time is found on the solver's
    interpolant to near rounding. Two changes between neighboring places aren't seen. A function that is zero at the
    start, to rounding, has to leave zero before it can be met.

    Args:
        fn: a function or ``nn.Module`` that returns one real number per sample, ``(*batch,)``. It gets ``t`` shaped
            like that, and ``y`` and the further arguments as the right-hand side does; pass as arguments what wants
            gradients, or as parameters of the module.
        terminal: whether the solve of a sample ends where it first meets the event.
        direction: 1 if only changes from negative to positive count, in the direction of integration, -1 if only those
            from positive to negative do, 0 if both do.
        parts: of how many equal parts of a step the ends are looked at; 1 is cheapest.

    >>> from difflayers.ode import Event
    >>> ground = Event(lambda t, y: y[..., 0], direction=-1)
    """

    fn: Callable[..., Any]
    terminal: bool = True
    direction: int = 0
    parts: int = 4

    def __init__(
        self, fn: Callable[..., Any], *, terminal: bool = True, direction: int = 0, parts: int = 4
    ) -> None:  # keywords only, but for fn
        if not callable(fn):
            raise ProblemError(f"an event is a function fn(t, y, *args), got {type(fn).__name__}")
        if direction not in (-1, 0, 1):
            raise ProblemError(f"direction must be -1, 0 or 1, got {direction!r}")
        if parts < 1:
            raise ProblemError(f"parts must be at least 1, got {parts}")
        for name, value in (("fn", fn), ("terminal", terminal), ("direction", direction), ("parts", parts)):
            object.__setattr__(self, name, value)


def events_of(event: Any) -> tuple[Event, ...]:
    """The events that were meant: one or a sequence of them, where a callable alone is a terminal one.

    Raises:
        ProblemError: it is something else.
    """
    if event is None:
        return ()
    if isinstance(event, Event):
        return (event,)
    if callable(event):
        return (Event(event),)
    if not isinstance(event, Sequence):
        raise ProblemError(f"event must be an Event, a callable or a sequence of these, got {type(event).__name__}")
    if not event:
        raise ProblemError("event is an empty sequence; pass None to look for nothing")
    return tuple(one if isinstance(one, Event) else Event(one) for one in event)


def event_parameters(events: Sequence[Event]) -> list[Tensor]:
    """The parameters of events that are modules."""
    return [p for event in events if isinstance(event.fn, nn.Module) for p in event.fn.parameters()]


@dataclass(frozen=True)
class Signals:
    """What events look at, for all samples at once; tensors are those of the problem, then :func:`event_parameters`.

    Args:
        problem: whose states and arguments they get.
        events: the events.
    """

    problem: InitialValueProblem
    events: tuple[Event, ...]

    def evaluator(self, tensors: Sequence[Tensor]) -> Evaluate:
        """``(times (samples, 1), rows) -> (samples, events)`` for these tensors."""
        problem, state, arguments = self.problem, self.problem.state, self.problem.arguments
        _, args = arguments.unflatten(tensors[: problem.count])
        functions = _bound(self.events, tensors[problem.count :])

        def evaluate(t: Tensor, rows: Tensor) -> Tensor:
            y, time = state.unpack(rows), t.reshape(state.batch).to(rows.dtype)
            with problem.autocast():
                values = [fn(time, y, *args) for fn in functions]
            return torch.stack([_checked(value, state.batch, rows) for value in values], dim=-1)

        return evaluate

    def one(self, index: int) -> Signals:
        """Those of one event; its tensors are the problem's and its own."""
        return replace(self, events=self.events[index : index + 1])

    def mapped(self, size: int, in_dims: tuple[int | None, ...], randomness: str) -> Signals:
        """The same with one more leading dimension of samples; ``in_dims`` says which tensors have it."""
        return _MappedSignals(self.problem, self.events, self, size, in_dims, randomness)

    def refuse_closures(self) -> None:
        """Raise where a transform couldn't reach what an event closes over."""
        names = [name for event in self.events for name in closure_names(event.fn)] if in_functorch() else []
        if names:
            raise ProblemError(
                f"an event closes over {', '.join(map(repr, names))}, which a torch.func transform can't follow there; "
                "pass it as an argument: fn(t, y, *args) and args=(...)"
            )


@dataclass(frozen=True)
class _MappedSignals(Signals):
    base: Signals
    size: int
    in_dims: tuple[int | None, ...]
    randomness: str

    def evaluator(self, tensors: Sequence[Tensor]) -> Evaluate:
        def one(t: Tensor, rows: Tensor, *tensors: Tensor) -> Tensor:
            return self.base.evaluator(tensors)(t, rows)

        def evaluate(t: Tensor, rows: Tensor) -> Tensor:
            split = [x.reshape(self.size, -1, x.shape[-1]) for x in (t, rows)]
            values: Tensor = torch.func.vmap(one, (0, 0, *self.in_dims), randomness=self.randomness)(*split, *tensors)
            return values.reshape(len(rows), -1)

        return evaluate


def _bound(events: Sequence[Event], tensors: Sequence[Tensor]) -> list[Callable[..., Any]]:
    """The functions of events, modules with their parameters from this row."""
    found, functions = iter(tensors), []
    for event in events:
        names = [name for name, _ in event.fn.named_parameters()] if isinstance(event.fn, nn.Module) else []
        functions.append(with_parameters(event.fn, {name: next(found) for name in names}))
    return functions


def _checked(value: Any, batch: torch.Size, rows: Tensor) -> Tensor:
    leaves = pytree.tree_leaves(value)
    if len(leaves) != 1 or not isinstance(value, Tensor) or value.is_complex():
        raise ProblemError(f"an event must return one real tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape not in (batch, (*batch, 1)):
        raise ProblemError(
            f"an event returned shape {tuple(value.shape)}, but must return one number per sample, {tuple(batch)}; it "
            "gets t in that shape"
        )
    return value.reshape(rows.shape[0]).to(rows.dtype)
