"""Solve until something happens, with the derivatives of when it does and of the state then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from difflayers._adjoint import Adjoint
from difflayers._arrays import finite
from difflayers._autodiff import in_functorch, is_tracked
from difflayers._monitor import watch
from difflayers._solution import OnFailure, Solution, Status
from difflayers._solver import Solver
from difflayers.ode._call import with_dimension
from difflayers.ode._checkpointed import CheckpointedAdjoint
from difflayers.ode._event_record import Keep, Record, Recorded, search
from difflayers.ode._events import Event, Signals, event_parameters
from difflayers.ode._explicit import OneStepSolver
from difflayers.ode._mass import Massive
from difflayers.ode._orders import limited
from difflayers.ode._problem import Evaluate, InitialValueProblem
from difflayers.ode._replay import moved

# Derivatives of event times are exact up to this order.
_ORDER = 3


@dataclass(frozen=True)
class Happened:
    """When and where events were met, for every slot.

    Attributes:
        event: of which event every slot is.
        time: the times, ``(*batch, S)``, NaN where a slot is empty.
        y: the states ``(*batch, S, n)`` likewise.
    """

    event: list[int]
    time: Tensor
    y: Tensor


@dataclass(frozen=True)
class ClockedProblem(InitialValueProblem):
    """The same problem, where a lone system gets its time as one number, though every sample has its own times."""

    @classmethod
    def of(cls, problem: InitialValueProblem) -> ClockedProblem:
        return cls(**{each.name: getattr(problem, each.name) for each in fields(problem)})

    def evaluator(self, tensors: Sequence[Tensor]) -> Evaluate:
        evaluate = super().evaluator(tensors)
        if self.state.batch:
            return evaluate
        clocked: Evaluate = lambda t, rows: evaluate(t.reshape(()), rows)  # noqa: E731
        return Massive(clocked, evaluate.mass) if isinstance(evaluate, Massive) else clocked


def solve_with_events(
    problem: InitialValueProblem,
    solver: Solver,
    rule: Adjoint,
    events: tuple[Event, ...],
    params: Sequence[Tensor],
    on_failure: OnFailure,
) -> tuple[Solution, Happened]:
    """The outputs ``(*batch, T, n)`` before the first terminal event, NaN after it, and what happened.

    Events are looked for once, off the graph. Then ``rule`` differentiates the states at output times and at those of
    events, as if somebody had asked for them, along the steps that were taken. An event's own time follows from its
    function by the implicit function theorem, and its state follows that time along the flow.
    """
    problem = ClockedProblem.of(problem)
    if not isinstance(solver, OneStepSolver):
        name = type(solver).__name__
        raise TypeError(f"{name} doesn't tell its steps, between which events are; use Dopri5(), or Rodas() if stiff")
    start, times, *tensors = params
    signals, own = Signals(problem, events), event_parameters(events)
    signals.refuse_closures()
    keep = _kept(problem, solver, rule, params)
    call = _Call(problem, solver, signals, keep)
    found = _Found(*_search(call, *[p.detach() for p in (*params, *own)]))
    record = call.records[-1]
    given = times.double().expand(*start.shape[:-1], times.shape[-1])
    everything = torch.cat([given, found.time], -1).gather(-1, found.order)
    everything = everything.flatten() if keep.together else everything
    solution = rule.apply(
        problem, Recorded(solver, call.records), (start, everything, *tensors), start.detach(), on_failure
    )
    with _tolerating(solution):
        value = solution.value.gather(-2, found.rank[..., None].expand_as(solution.value))
        count = times.shape[-1]
        happened = _Follow(problem, signals, start, given, [*tensors], own).run(
            record.slots, found, value[..., count:, :]
        )
    made = (found.rank[..., :count] < solution.stats["outputs"][..., None]).sum(-1)
    stats = {**solution.stats, "outputs": made, "event": found.ended, "grazing": found.grazing}
    return replace(solution, value=value[..., :count, :], stats=stats), happened


def _kept(problem: InitialValueProblem, solver: OneStepSolver, rule: Adjoint, params: Sequence[Tensor]) -> Keep:
    if not isinstance(rule, CheckpointedAdjoint):
        return Keep()
    eager = not in_functorch()
    together = eager and problem.samples == params[1].dim() == 1 and not solver.per_sample
    if not (torch.is_grad_enabled() and (not eager or any(p.requires_grad for p in params))):
        return Keep(together=together)
    return Keep(rule.states, rule._parallel(solver, params), together, rows=solver.explicit and eager)


@dataclass
class _Call:
    """A search, and what came of it; shared with those that transforms make of it."""

    problem: InitialValueProblem
    solver: OneStepSolver
    signals: Signals
    keep: Keep
    records: list[Record] = field(default_factory=list)

    def run(self, params: Sequence[Tensor]) -> Record:
        def solve() -> Solution:
            self.records.append(search(self.solver, self.problem, self.signals, params, self.keep))
            return self.records[-1].solution

        watch("forward", self.solver, solve)
        return self.records[-1]


@dataclass(frozen=True)
class _Found:
    """What a search gives back: columns of a :class:`Record`, ``(*batch, …)``."""

    time: Tensor
    slope: Tensor
    order: Tensor
    rank: Tensor
    ended: Tensor
    grazing: Tensor


class _Search(torch.autograd.Function):
    """``(y0, t, *params) -> what is found``, which has no derivatives; here transforms see a batch as one more."""

    @staticmethod
    def forward(call: _Call, *params: Tensor) -> tuple[Tensor, ...]:
        record, batch = call.run(params), params[0].shape[:-1]
        columns = record.time, record.slope, record.order, record.rank, record.ended, record.grazing
        return tuple(column.reshape(batch + column.shape[1:]) for column in columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * len(_Found.__dataclass_fields__)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: _Call, *params: Tensor
    ) -> tuple[tuple[Tensor, ...], Any]:
        widened, in_batch = with_dimension(info.batch_size, in_dims[1:], params)
        problem = call.problem.mapped(info.batch_size, in_batch[: call.problem.count], info.randomness)
        signals = call.signals.mapped(info.batch_size, in_batch, info.randomness)
        output = _search(replace(call, problem=problem, signals=signals), *widened)
        return output, (0,) * len(output)


def _search(call: _Call, *params: Tensor) -> tuple[Tensor, ...]:
    output: tuple[Tensor, ...] = _Search.apply(call, *params)  # type: ignore[no-untyped-call]
    return output


class _Follow:
    """Times and states of events as functions of what they depend on.

    With ``g`` the event's function along the solution and ``m`` its slope at the time ``t*`` that was found, ``t ← t -
    (g(t) - g(t*)) / m`` starts from ``t*`` and stays there, and every round makes derivatives of one order more exact.
    """

    def __init__(
        self, problem: InitialValueProblem, signals: Signals, start: Tensor, times: Tensor, tensors: list[Tensor],
        own: list[Tensor],
    ) -> None:  # fmt: skip
        self.evaluate = problem.evaluator(tensors)
        self.start, self.times = start.detach(), times.detach()[..., :1]
        self.signals, self.tensors, self.own = signals, tensors, own

    def run(self, slots: Sequence[int], found: _Found, value: Tensor) -> Happened:
        columns = [self._slot(k, event, found, value[..., k, :]) for k, event in enumerate(slots)]
        if not columns:
            return Happened([], found.time, value)
        return Happened(list(slots), torch.stack([t for t, _ in columns], -1), torch.stack([y for _, y in columns], -2))

    def _slot(self, k: int, event: int, found: _Found, y: Tensor) -> tuple[Tensor, Tensor]:
        there = found.time[..., [k]].isfinite()
        fixed = torch.where(there, found.time[..., [k]], self.times)
        slope = torch.where(there, found.slope[..., [k]], 1.0)
        y = torch.where(there, y, self.start)
        time, state = self._followed(self._signal(event), fixed, slope, y, there)
        return torch.where(there, time, torch.nan)[..., 0], torch.where(there, state, torch.nan)

    def _signal(self, event: int) -> Evaluate:
        sizes = [len(event_parameters([one])) for one in self.signals.events]
        first = sum(sizes[:event])
        own = self.own[first : first + sizes[event]]
        return self.signals.one(event).evaluator([*self.tensors, *own])

    def _followed(
        self, signal: Evaluate, fixed: Tensor, slope: Tensor, y: Tensor, there: Tensor
    ) -> tuple[Tensor, Tensor]:
        time, state = fixed, y
        for order in range(_ORDER):
            state = moved(self.evaluate, fixed, y, time) if order else y
            value = signal(time, state).double()
            if not (is_tracked(value) or is_tracked(y)):
                return fixed, y
            time = time - torch.where(there, (value - value.detach()) / slope, 0)
        state = moved(self.evaluate, fixed, y, time)
        return limited(time, _ORDER, "times of events"), limited(state, _ORDER, "states at events")


def _tolerating(solution: Solution) -> AbstractContextManager[Any]:
    """A tape on which samples that have failed can't poison the others: zero times NaN is NaN."""
    if in_functorch() or bool((solution.status == Status.SUCCESS).all()):
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(finite, lambda t: t)


def per_event(happened: Happened, events: Sequence[Event]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Times, states and how many there are, event by event: ``(*batch,)`` or ``(*batch, K)``, states with ``n``."""
    for index, event in enumerate(events):
        chosen = [k for k, which in enumerate(happened.event) if which == index]
        time, y = happened.time[..., chosen], happened.y[..., chosen, :]
        count = time.isfinite().sum(-1)
        yield (time[..., 0], y[..., 0, :], count) if event.terminal else (time, y, count)
