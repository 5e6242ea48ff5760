"""What methods answer when they are asked for a gradient that is easy to get wrong."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _ode_gradients import Gradient
from torch import Tensor

from difflayers import UnrolledAdjoint
from difflayers._adjoint import Adjoint
from difflayers.errors import ConvergenceWarning, SolverError
from difflayers.ode import (
    BacksolveAdjoint,
    Bosh3,
    CheckpointedAdjoint,
    Dopri5,
    Dopri8,
    Kvaerno5,
    Rodas,
    ScipyIVP,
    TorchDiffEq,
    Tsit5,
    odeint,
)

Solve = Callable[[Gradient, Tensor, Tensor], Tensor]
PATIENCE = 10  # seconds of processor time


@dataclass(frozen=True)
class Outcome:
    """``error`` is None where somebody says that there is no gradient, in the words of ``flag``."""

    error: float | None
    flag: str = ""
    silent: bool = False


class _Hung(Exception):
    pass


def bad(problem: Gradient, solve: Solve) -> Outcome:
    """The error of the gradient, or how the lack of one was told."""
    signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            gradient = problem.of(lambda y0, p: solve(problem, y0, p))
    except _Hung:
        return Outcome(None, f"more than {PATIENCE} s", silent=True)
    except (SolverError, ConvergenceWarning):
        return Outcome(None, "flagged")
    except (AssertionError, RuntimeError) as error:
        return Outcome(None, f"{type(error).__name__}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    error = problem.error(gradient) if problem.exists else torch.inf
    return Outcome(error, silent=not error <= 10 * problem.rtol)


def cell(outcome: Outcome) -> str:
    text = outcome.flag if outcome.error is None else f"{outcome.error:.0e}"
    return f"{text}!" if outcome.silent else text


def _ring(*_: Any) -> None:
    raise _Hung


def ours(kind: Callable[..., Any], adjoint: Adjoint | None = None, check: bool = False) -> Solve:
    """``check`` asks for half of what is allowed: the solve that it compares with has an error, too."""

    def solve(problem: Gradient, y0: Tensor, p: Tensor) -> Tensor:
        solver = kind(rtol=problem.rtol, atol=problem.atol)
        rule = CheckpointedAdjoint(check=5 * problem.rtol) if check else adjoint
        ys: Tensor = odeint(problem.field, y0, problem.t, (p,), solver=solver, adjoint=rule).ys
        return ys

    return solve


def _torchdiffeq(name: str, problem: Gradient, y0: Tensor, p: Tensor) -> Tensor:
    import torchdiffeq

    def field(t: Tensor, y: Tensor) -> Tensor:
        return problem.field(t, y, p)

    options: dict[str, Any] = {"adjoint_params": (p,)} if name == "odeint_adjoint" else {}
    t = torch.tensor(problem.t, dtype=torch.float64)
    run = getattr(torchdiffeq, name)
    ys: Tensor = run(field, y0, t, rtol=problem.rtol, atol=problem.atol, method="dopri5", **options)
    return ys


_KINDS: dict[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in (Bosh3, Dopri5, Tsit5, Dopri8, Rodas, Kvaerno5)},
    "Dopri5, per sample": partial(Dopri5, per_sample=True),
}
CHECKED: dict[str, Solve] = {name: ours(kind, check=True) for name, kind in _KINDS.items()}
METHODS: dict[str, Solve] = {
    **{name: ours(kind) for name, kind in _KINDS.items()},
    "Dopri5, UnrolledAdjoint": ours(Dopri5, UnrolledAdjoint()),
    "Dopri5, BacksolveAdjoint": ours(Dopri5, BacksolveAdjoint()),
    "TorchDiffEq": ours(TorchDiffEq),
    "ScipyIVP, RK45": ours(ScipyIVP),
    "ScipyIVP, LSODA": ours(partial(ScipyIVP, "LSODA")),
}
THEIRS: dict[str, Solve] = {
    "odeint_adjoint": partial(_torchdiffeq, "odeint_adjoint"),
    "odeint": partial(_torchdiffeq, "odeint"),
}
