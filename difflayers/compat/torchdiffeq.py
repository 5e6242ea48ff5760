"""``odeint``, ``odeint_adjoint`` and ``odeint_event`` with the signatures of torchdiffeq 0.2.5 (Chen 2018).

What differs:

- A solve that fails raises :class:`~difflayers.errors.SolverError`, which says what happened and carries the solution.
- ``odeint`` has the gradient of the accepted steps without a tape of them, unless ``func`` closes over tensors that
  want one: it takes that tape, as there. ``method`` may be a solver of :mod:`difflayers.ode` as well, or its name.
- ``"fehlberg2"``, ``"adaptive_heun"``, ``"explicit_adams"``, ``"implicit_adams"`` and ``"scipy_solver"`` run in
  torchdiffeq and SciPy, and have the continuous adjoint as their gradient in ``odeint`` too.
- ``odeint_adjoint`` integrates backward by ``Dopri5``, and raises where that doesn't come back along the forward
  solution. If ``adjoint_params`` has tensors that aren't parameters of ``func``, the gradient is that of ``odeint``.
  Parameters of ``func`` that aren't in ``adjoint_params`` get theirs too.
- A tuple is measured as one vector, by the root mean square of all its numbers; tolerances are numbers.
- Outputs of methods of fixed step lie at the ends of steps, where torchdiffeq interpolates linearly. The gradient of
  ``t`` is the slope there, not that of the formula of a step.
- Times of events have their whole gradient, in ``odeint`` too, also by what ``event_fn`` depends on. A solve that never
  meets its event says so.
- float32 states have tolerances of at least what rounding allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difflayers import ode
from difflayers._adjoint import Adjoint
from difflayers._solver import Solver
from difflayers.compat._ignored import ignored
from difflayers.compat._ode_methods import number, seminorm_of, solver_of
from difflayers.errors import ProblemError, SolverError

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]

# Where a solve that looks for an event gives up.
_HORIZON = 1e10
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: Any = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
) -> Any:
    """The states at ``t``, ``(T, *y0.shape)``; with ``event_fn`` its time, and the states at the start and then.

    >>> import torch
    >>> from difflayers.compat.torchdiffeq import odeint
    >>> odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]))
    tensor([[1.0000, 1.0000],
            [0.3679, 0.3679]])
    """
    return _solved(func, y0, t, solver_of(method, rtol, atol, options), None, event_fn)


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: Any = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: Any = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """As :func:`odeint`, with the gradient of a second solve, backward in time: memory doesn't grow with the steps."""
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ProblemError("func isn't an nn.Module; say which tensors want gradients, adjoint_params=(...), or ()")
    solver = solver_of(method, rtol, atol, options)
    known = set(func.parameters()) if isinstance(func, nn.Module) else set()
    closes_over = any(p.requires_grad and p not in known for p in adjoint_params or ())
    backward = ode.BacksolveAdjoint(
        rtol=number("adjoint_rtol", rtol if adjoint_rtol is None else adjoint_rtol),
        atol=number("adjoint_atol", atol if adjoint_atol is None else adjoint_atol),
        seminorm=seminorm_of(adjoint_method, adjoint_options),
    )
    return _solved(func, y0, t, solver, None if closes_over else backward, event_fn)


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """When ``event_fn(t, y)`` changes its sign, and the states at ``t0`` and then; ``kwargs`` are the interface's."""
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


def _solved(func: Callable[..., Any], y0: Any, t: Any, solver: Solver, adjoint: Adjoint | None, event_fn: Any) -> Any:
    if callbacks := [name for name in _CALLBACKS if hasattr(func, name)]:
        ignored(f"{', '.join(callbacks)} of func", "difflayers.monitor() tells of solves")
    if event_fn is None:
        return ode.odeint(func, y0, t, solver=solver, adjoint=adjoint).ys
    if len(t) != 2:
        raise ProblemError(f"with event_fn, t must be a start and a time in the direction to look, got {len(t)} times")
    if isinstance(solver, ode.FixedStepSolver) and solver.step_size is None:
        raise ProblemError('events of a method of fixed step need options={"step_size": ...}')
    start, way = t[0].detach(), float((t[1] - t[0]).detach())
    far = torch.stack([t[0], start + math.copysign(_HORIZON, way)])
    event = ode.Event(_First(event_fn, start, y0))
    solution = ode.odeint(func, y0, far, solver=solver, adjoint=adjoint, event=event)
    if not bool(solution.event_count):
        raise SolverError(f"event_fn didn't change its sign until t = {float(far[1].detach()):.0e}", solution)
    return solution.event_t, pytree.tree_map(lambda *ends: torch.stack(ends), y0, solution.event_y)


class _First(nn.Module):
    """Where the first of several numbers changes its sign: the least of them, each times its sign at the start."""

    def __init__(self, fn: Callable[..., Any], t: Tensor, y: Any) -> None:
        super().__init__()
        self.fn = fn
        with torch.no_grad():
            sign = torch.sign(fn(t, y))
        self.sign = torch.where(sign == 0, 1, sign)

    def forward(self, t: Tensor, y: Any) -> Tensor:
        least: Tensor = (self.fn(t, y) * self.sign).min()
        return least
