"""Ways to solve and differentiate a case, ours and others', behind one signature: ``method(case) -> Run``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _ode_problems import MLP, Case, Solve
from torch import Tensor

from difflayers import Solver
from difflayers._adjoint import Adjoint
from difflayers.ode import Dopri5, odeint


@dataclass
class Run:
    """A case and a method. ``gradient()`` is forward and backward, ``forward()`` numbers only.

    ``solve`` is None for what torch has no part in.
    """

    forward: Callable[[], object]
    gradient: Callable[[], Tensor]
    solve: Solve | None = None


Method = Callable[[Case], Run]


def on_tape(case: Case, solve: Solve) -> Run:
    """The run of a torch function ``(y0, args) -> ys``."""

    def forward() -> Tensor:
        with torch.no_grad():
            return solve(case.y0, case.args)

    return Run(forward, lambda: case.gradient(solve), solve)


@dataclass(frozen=True)
class Ours:
    """``odeint`` with the case's tolerances."""

    kind: type[Any] = Dopri5
    adjoint: Adjoint | None = None
    per_sample: bool = False
    compile: bool = False

    def solver(self, case: Case) -> Solver:
        options = {"per_sample": self.per_sample, "compile": self.compile}
        made: Solver = self.kind(rtol=case.rtol, atol=case.atol, **options)
        return made

    def solution(self, case: Case, y0: Tensor, args: Sequence[Tensor]) -> Any:
        options: dict[str, Any] = {"batch_dims": 1, "solver": self.solver(case), "adjoint": self.adjoint}
        return odeint(case.field, y0, case.t, args, **options)

    def __call__(self, case: Case) -> Run:
        return on_tape(case, lambda y0, args: self.solution(case, y0, args).ys)


def torchdiffeq_tape(case: Case) -> Run:
    import torchdiffeq

    def solve(y0: Tensor, args: Sequence[Tensor]) -> Tensor:
        return torchdiffeq.odeint(_closed(case, args), y0, case.t, rtol=case.rtol, atol=case.atol, method="dopri5")

    return on_tape(case, solve)


def torchdiffeq_adjoint(case: Case, seminorm: bool = False) -> Run:
    import torchdiffeq

    def solve(y0: Tensor, args: Sequence[Tensor]) -> Tensor:
        return torchdiffeq.odeint_adjoint(
            _closed(case, args), y0, case.t, rtol=case.rtol, atol=case.atol, method="dopri5",
            adjoint_params=(*args, *case.shared), adjoint_options={"norm": "seminorm"} if seminorm else None,
        )  # fmt: skip

    return on_tape(case, solve)


def torchode_tape(case: Case) -> Run:
    import torchode

    times = case.t.repeat(len(case.y0), 1)

    def solve(y0: Tensor, args: Sequence[Tensor]) -> Tensor:
        term = torchode.ODETerm(_closed(case, args))
        control = torchode.IntegralController(atol=case.atol, rtol=case.rtol, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
        ys: Tensor = solver.solve(torchode.InitialValueProblem(y0=y0, t_eval=times)).ys
        return ys.transpose(0, 1)

    return on_tape(case, solve)


def diffrax_compiled(case: Case) -> Run:
    """All of it one XLA program; compiled before it is measured."""
    # With two cores and this left out, XLA's thread pool waits for itself.
    os.environ.setdefault("NPROC", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax

    jax.config.update("jax_enable_x64", True)
    import diffrax
    import jax.numpy as jnp

    array = lambda x: jnp.asarray(x.detach().numpy())  # noqa: E731
    times, weights = array(case.t), array(case.weights)
    start = [array(x) for x in (case.y0, *case.args, *case.shared)]
    field = _mlp_in_jax if isinstance(case.field, MLP) else _lotka_volterra_in_jax
    control = diffrax.PIDController(rtol=case.rtol, atol=case.atol)
    saved = diffrax.SaveAt(ts=times)

    def solve(leaves: list[Any]) -> Any:
        y0, *others = leaves
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Dopri5(), times[0], times[-1], None, y0, others,
            saveat=saved, stepsize_controller=control,
        )  # fmt: skip
        return solution.ys

    def loss(leaves: list[Any]) -> Any:
        ys = solve(leaves)
        return ((ys * weights).sum() + (ys * ys).sum() / 2) / case.y0.numel()

    forward, gradient = jax.jit(solve), jax.jit(jax.grad(loss))

    def flat() -> Tensor:
        return torch.from_numpy(np.concatenate([np.asarray(g).ravel() for g in gradient(start)]))

    return Run(lambda: forward(start).block_until_ready(), flat)


def _mlp_in_jax(t: Any, y: Any, weights: list[Any]) -> Any:
    import jax.numpy as jnp

    first, first_bias, second, second_bias = weights
    return jnp.tanh(y @ first.T + first_bias) @ second.T + second_bias


def _lotka_volterra_in_jax(t: Any, y: Any, args: list[Any]) -> Any:
    import jax.numpy as jnp

    a, b, c, d = args[0].T
    prey, predators = y.T
    met = prey * predators
    return jnp.stack([a * prey - b * met, c * met - d * predators], axis=-1)


def _closed(case: Case, args: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, y: case.field(t, y, *args)


ADJOINT, TAPE = "torchdiffeq odeint_adjoint", "torchdiffeq odeint"
PEERS: dict[str, tuple[Method, str]] = {
    ADJOINT: (torchdiffeq_adjoint, "torchdiffeq"),
    "torchdiffeq odeint_adjoint, seminorm": (lambda case: torchdiffeq_adjoint(case, seminorm=True), "torchdiffeq"),
    TAPE: (torchdiffeq_tape, "torchdiffeq"),
    "torchode, autodiff": (torchode_tape, "torchode"),
    "diffrax, compiled": (diffrax_compiled, "diffrax"),
}


def installed() -> dict[str, Method]:
    return {name: method for name, (method, module) in PEERS.items() if importlib.util.find_spec(module)}


def missing() -> list[str]:
    return [name for name, (_, module) in PEERS.items() if not importlib.util.find_spec(module)]
