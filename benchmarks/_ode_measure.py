"""Time, tape and accuracy of methods on one case, and the floor under them; see ``README.md`` for what is what."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _measure import INF, stopwatch
from _ode_peers import Method, Ours, Run
from _ode_problems import Case
from torch import Tensor


@dataclass
class Result:
    """One method on one case; CPU seconds, bytes that wait for ``backward``."""

    gradient_error: float
    forward: float = INF
    total: float = INF
    tape: int | None = None


@dataclass
class Comparison:
    """Methods on one case, and those that didn't run, with the reason."""

    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def compare(case: Case, methods: Mapping[str, Method], repetitions: int, seconds: float) -> Comparison:
    """All methods, taking turns; a slow one leaves the round after as many ``seconds``."""
    comparison, runs, spent = Comparison(), {}, dict.fromkeys(methods, 0.0)
    for name, method in methods.items():
        try:
            run = method(case)
            run.forward()
            comparison.results[name] = Result(case.error(run.gradient()), tape=tape(run, case))
            runs[name] = run, calls(run.forward), calls(run.gradient)
        except Exception as error:  # a peer that can't do this case is left out of it
            comparison.failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    for turn in range(repetitions):
        for name, (run, forward, total) in runs.items():
            if turn < 2 or spent[name] < seconds:
                spent[name] += _once(comparison.results[name], run, forward, total)
    return comparison


def _once(result: Result, run: Run, forward: int, total: int) -> float:
    one, both = stopwatch(run.forward, forward), stopwatch(run.gradient, total)
    result.forward, result.total = min(result.forward, one), min(result.total, both)
    return one * forward + both * total


def calls(run: Callable[[], object], seconds: float = 0.02) -> int:
    """How many calls a clock can tell."""
    return max(1, min(50, round(seconds / max(stopwatch(run), 1e-6))))


def tape(run: Run, case: Case) -> int | None:
    """Bytes that a solve on the graph keeps for ``backward``, besides its arguments and its answer."""
    if run.solve is None:
        return None
    leaves = case.leaves()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = {t.untyped_storage().data_ptr() for t in (*_alive(), *case.shared)}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ys = run.solve(leaves[0], leaves[1 : 1 + len(case.args)])
    for tensor in _alive():
        note(tensor)
    before.add(ys.untyped_storage().data_ptr())
    return sum(size for place, size in saved.items() if place not in before)


def _alive() -> list[Tensor]:
    gc.collect()
    # type(), because isinstance() asks objects that answer with a warning.
    plain = [t for t in gc.get_objects() if type(t) is Tensor and t.layout == torch.strided]
    # Compilers keep some of those that they traced with, which have no memory.
    return [t for t in plain if not torch._C._functorch.is_functorch_wrapped_tensor(t)]


@dataclass(frozen=True)
class Floor:
    """CPU seconds of the evaluations and vjps that a solve needs, in eager torch, and of nothing else."""

    forward: float
    total: float


def floor(case: Case, ours: Ours, repetitions: int) -> Floor:
    """Of our solve: as many evaluations as it takes, and with recomputation the stages of every accepted step."""
    stats = ours.solution(case, case.y0, case.args).stats
    # Stages of the tableau; the slope at the end belongs to the next step.
    stages = ours.kind.tableau.stages
    evaluations = float(stats["evaluations"].double().mean())
    again = stages * float(stats["accepted"].double().mean())
    one, pulled = _evaluation(case, repetitions)
    return Floor(evaluations * one, evaluations * one + again * pulled)


def _evaluation(case: Case, repetitions: int) -> tuple[float, float]:
    """CPU seconds of one evaluation of the batch, and of one with its vjp."""
    t = case.t[0]

    def plain() -> Tensor:
        with torch.no_grad():
            value: Tensor = case.field(t, case.y0, *case.args)
            return value

    def pulled() -> Any:
        leaves = [*[x.detach().requires_grad_() for x in (case.y0, *case.args)], *case.shared]
        value = case.field(t, *leaves[: 1 + len(case.args)])
        return torch.autograd.grad(value, leaves, value.detach())

    return least(plain, repetitions), least(pulled, repetitions)


def least(run: Callable[[], object], repetitions: int) -> float:
    """The least CPU seconds of a call."""
    run()
    count = calls(run)
    return min(stopwatch(run, count) for _ in range(repetitions))
