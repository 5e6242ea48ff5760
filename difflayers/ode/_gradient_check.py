"""How much of a gradient is error: beside that of a solve with a tenth of the tolerances."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from difflayers._monitor import watch
from difflayers._solution import Solution, Status
from difflayers.errors import ConvergenceWarning, SolverError
from difflayers.ode._call import Call
from difflayers.ode._gradient import first_order


def check_gradient(
    call: Call, params: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[int], found: Sequence[Tensor | None]
) -> None:
    """Raise or warn, as ``call.on_failure`` says, where gradients differ by more than ``call.check``."""

    def compare() -> Solution:
        tighter, solution = _tighter(call, params)
        gradients = first_order(tighter, solution.value, params, cotangent, wanted)
        difference = _differences(found, gradients, wanted, call.problem.samples)
        ok = solution.status.reshape(-1) == Status.SUCCESS
        failed_before = call.failed and not bool(ok.all())
        difference = torch.where(ok | failed_before, difference, torch.inf)
        status = torch.where(difference <= (call.check or 0.0), int(Status.SUCCESS), int(Status.STALLED))
        stats = {"difference": difference, "evaluations": solution.stats["evaluations"].reshape(-1)}
        return Solution(cotangent, status.to(torch.int8), stats)

    _report(call, watch("adjoint", call.solver, compare))


def _tighter(call: Call, params: Sequence[Tensor]) -> tuple[Call, Solution]:
    solver: Any = call.solver
    solver = replace(solver, rtol=solver.rtol / 10, atol=solver.atol / 10)
    own = Call(call.problem, solver, "ignore", call.states, False, call.keep_stages, call.stage_parallel)
    with torch.no_grad():
        return own, own.run([p.detach() for p in params])


def _differences(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], wanted: Sequence[int], samples: int
) -> Tensor:
    """Relative, the largest of that in the start, by sample, and that in everything shared."""
    largest = torch.zeros(samples, dtype=torch.float64)
    for i, one, other in zip(wanted, ours, theirs, strict=True):
        if one is None or other is None:
            continue
        rows = samples if i == 0 else 1
        far = torch.linalg.vector_norm((one - other).reshape(rows, -1), dim=1)
        size = torch.linalg.vector_norm(other.reshape(rows, -1), dim=1)
        relative = torch.where(far == 0, 0, far / size).double()
        largest = torch.maximum(largest.to(relative.device), relative.nan_to_num(nan=torch.inf))
    return largest


def _report(call: Call, solution: Solution) -> None:
    apart = (~solution.ok).nonzero().squeeze(1)
    if call.on_failure == "ignore" or not len(apart):
        return
    largest = float(solution.stats["difference"].max())
    message = (
        f"CheckpointedAdjoint: in {len(apart)} of {solution.status.numel()} samples ({apart[:8].tolist()}) the "
        f"gradient differs by up to {largest:.2g} of its size from that of a solve with a tenth of the tolerances, "
        f"more than check={call.check:g}; tighten rtol and atol of {type(call.solver).__name__}, or shorten the span, "
        "with which gradients of unstable systems grow"
    )
    if call.on_failure == "raise":
        raise SolverError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=2)
