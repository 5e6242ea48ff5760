"""Functions: state the problem, get the solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from difflayers._adjoint import Adjoint
from difflayers._areas import available_solvers, resolve
from difflayers._arguments import Arguments
from difflayers._arrays import check_devices, to_tensors, uses_numpy
from difflayers._autodiff import Autocast, in_functorch, without_autocast
from difflayers._problem import check_independence
from difflayers._progress import showing
from difflayers._solution import OnFailure, Solution, in_shape, to_numpy
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.ode._algebraic import check_consistent, mass_rows
from difflayers.ode._backsolve import BacksolveAdjoint
from difflayers.ode._checkpointed import CheckpointedAdjoint
from difflayers.ode._event_solve import Happened, per_event, solve_with_events
from difflayers.ode._events import Event, event_parameters, events_of
from difflayers.ode._explicit import OneStepSolver
from difflayers.ode._problem import IN_PLACE, InitialValueProblem
from difflayers.ode._state import State
from difflayers.ode._times import filled, output_times

# What was checked of a module. A function may be another one in every call, as what it closes over changes.
_promises: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ODESolution(Solution):
    """The states at the output times; ``value`` is :attr:`ys`. NaN from where a sample failed.

    ``stats`` has, for every sample, ``steps`` that were tried, of which ``accepted`` and ``rejected``, ``evaluations``
    of ``fn``, the ``time`` that the solve got to, and how many ``outputs`` lie before it. Our solvers also count the
    accepted steps at the border of their stability, to the nearest ten: where they are most of the steps, the problem
    is ``stiff``; only explicit methods that choose their steps can tell. With events it also has the
    number of the ``event`` that ended a sample, -1 if none did, and whether one was met ``grazing``: so flatly that
    errors within the tolerance decide whether it is met, and derivatives of its time are large or infinite.

    For one event the attributes below are tensors, for a sequence of events tuples with one for each.

    Attributes:
        t: the output times, ``(T,)`` or ``(*batch, T)``, the latter with NaN after the last one of a sample.
        event_t: when an event was met: ``(*batch,)`` if it is terminal; otherwise ``(*batch, K)``, first to last, with
            ``K`` the largest number of times that any sample met it. NaN where it wasn't; in the dtype of ``t``, or of
            ``y0`` where ``t`` is a list of numbers.
        event_y: the states then, ``(*batch, ...)`` or ``(K, *batch, ...)``, in the structure of ``y0``; NaN likewise.
        event_count: how many times a sample met it, ``(*batch,)``.
    """

    t: Any = None
    event_t: Any = None
    event_y: Any = None
    event_count: Any = None

    @property
    def ys(self) -> Any:
        """The states, ``(T, *batch, ...)``, in the structure of ``y0``."""
        return self.value

    def numpy(self) -> ODESolution:
        """The same with NumPy arrays, detached, on the CPU."""
        plain = super().numpy()
        own = (to_numpy(one) for one in (self.t, self.event_t, self.event_y, self.event_count))
        return ODESolution(plain.value, plain.status, plain.stats, plain.state, *own)


def odeint(
    fn: Callable[..., Any],
    y0: Any,
    t: Any,
    args: Sequence[Any] = (),
    *,
    batch_dims: int = 0,
    solver: str | Solver = "dopri5",
    adjoint: Adjoint | None = None,
    event: Any = None,
    mass: Any = None,
    on_failure: OnFailure = "raise",
    progress: bool = False,
) -> ODESolution:
    """Solve ``dy/dt = fn(t, y, *args)`` with ``y(t[0]) = y0``; differentiable in ``y0``, ``t`` and ``args``.

    Args:
        fn: a function or ``nn.Module``, whose parameters are then differentiated too; returns what is shaped like
            ``y``. It gets ``t`` as one number where all samples step together, otherwise shaped ``(*batch, 1, …)`` to
            broadcast over ``y`` (over its first leaf, if it is a tree).
        y0: the state at ``t[0]``, ``(*batch, ...)``, real or complex: a tensor, an array (then the answer is one), or
            a pytree of them.
        t: output times, increasing or decreasing, ``(T,)``; ``(*batch, T)`` gives every sample its own, and its own
            steps; its rows may be padded with NaN after the last time of a sample, and a list of tensors, one ``(T,)``
            for every sample of one batch dimension, is padded here. Outputs are NaN likewise. Equal times are fine.
        args: further arguments of ``fn``; pytrees of tensors or arrays.
        batch_dims: leading dimensions of ``y0`` that index independent systems; 0 is one system of any shape. One
            product shows whether they are: in every call, of a module in the first one with a shape of ``y0``.
        solver: a solver object, or the name of one with its defaults.
        adjoint: the derivative rule; None is :class:`CheckpointedAdjoint` for solvers whose steps are known, and
            :class:`BacksolveAdjoint` for others.
        event: what to look for: an :class:`Event`, a callable ``fn(t, y, *args)`` whose first zero ends a sample, or a
            sequence of these. Outputs after the end are NaN. An event that isn't met is no failure.
        mass: ``M`` of ``M dy/dt = fn(t, y, *args)``, constant, over the ``n`` numbers of a sample in their order:
            ``(n, n)``, or ``(*batch, n, n)``. It may be singular if the algebraic equations that are left determine the
            rest of the state (index 1) and ``y0`` satisfies them, see :func:`consistent_initial`. For :class:`Rodas`
            and :class:`Kvaerno5`; differentiable, but for its rank.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``: a sample that fails is NaN from there on.
        progress: whether to show a bar; see :func:`difflayers.progress`.

    Raises:
        ProblemError: shapes, dtypes or names don't fit, or ``t`` isn't monotone.
        SolverError: a sample failed and ``on_failure`` is ``"raise"``.

    >>> import torch
    >>> from difflayers.ode import odeint
    >>> rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> ys = odeint(lambda t, y, rate: -rate * y, y0, t, (rate,)).ys
    >>> ys.shape, round(ys[-1, 0].item(), 5)
    (torch.Size([2, 2]), 0.36788)
    >>> ys[-1, 0].backward()
    >>> round(rate.grad.item(), 5)
    -0.36788
    """
    return showing(
        progress, lambda: integrate(fn, y0, t, args, batch_dims, solver, adjoint, event, on_failure, mass=mass)
    )


def integrate(
    fn: Callable[..., Any],
    y0: Any,
    t: Any,
    args: Sequence[Any],
    batch_dims: int,
    solver: str | Solver,
    adjoint: Adjoint | None,
    event: Any,
    on_failure: OnFailure,
    checked: set[Any] | None = None,
    mass: Any = None,
    listed: bool = False,
) -> ODESolution:
    """:func:`odeint`, which remembers in ``checked`` what it needn't check again; ``listed`` times have no dtype."""
    events = events_of(event)
    numpy = uses_numpy(y0, (t, args))
    y0 = to_tensors(y0)
    state = State.of(y0, batch_dims)
    start = state.pack(y0)
    args = to_tensors(tuple(args), start)
    given = output_times(t, state, start)
    times, asked = filled(given)
    arguments, tensors = Arguments.of(fn, args)
    if mass is not None:
        tensors = (*tensors, mass_rows(mass, state, start))
    check_devices([*tensors, *event_parameters(events)], start)
    autocast = Autocast.current(start.device)
    problem = InitialValueProblem(fn, state, arguments, autocast, massive=mass is not None)
    chosen, rule = paired(problem, solver, adjoint)
    with without_autocast(start.device):
        _check_promise(problem, start, times, tensors, checked)
        if mass is not None:
            check_consistent(problem, start, times, tensors, chosen)
        params = (start, times, *tensors)
        if events:
            found, happened = solve_with_events(problem, chosen, rule, events, params, on_failure)
        else:
            found = rule.apply(problem, chosen, params, start.detach(), on_failure)
    solution = _as_given(found if asked is None else _masked(found, asked), state, given)
    if events:
        dtype = start.dtype if listed or isinstance(t, list | tuple) else given.dtype
        solution = _with_events(solution, state, happened, events, not isinstance(event, Sequence), dtype)
    return solution.numpy() if numpy else solution


def paired(problem: InitialValueProblem, solver: str | Solver, adjoint: Adjoint | None) -> tuple[Solver, Adjoint]:
    """The solver that was meant, and the derivative rule for it.

    Raises:
        TypeError: one of them can't serve; the message says why.
    """
    chosen = resolve(solver, available_solvers("ode"))
    rule = adjoint or (CheckpointedAdjoint() if isinstance(chosen, OneStepSolver) else BacksolveAdjoint())
    if reason := chosen.supports(problem) or rule.supports(problem, chosen):
        raise TypeError(f"{chosen!r} and {rule!r} can't serve here: {reason}")
    return chosen, rule


def _check_promise(
    problem: InitialValueProblem, start: Tensor, times: Tensor, tensors: Sequence[Tensor], checked: set[Any] | None
) -> None:
    """That samples are independent, as batch_dims says."""
    if in_functorch() or not problem.state.batch:
        return
    function = problem.function
    key = (start.shape, tuple(m.training for m in function.modules()) if isinstance(function, nn.Module) else ())
    if checked is None and isinstance(function, nn.Module) and type(function).__hash__ is object.__hash__:
        checked = _promises.setdefault(function, set())
    if checked is not None and key in checked:
        return
    t = times.detach()[..., :1] if times.dim() > 1 else times.detach()[0]
    # A module with its own parameters is called as it is, which takes a third of the time.
    evaluate = problem.evaluator([p if isinstance(p, nn.Parameter) else p.detach() for p in tensors])
    try:
        check_independence(lambda rows: evaluate(t.to(start.dtype), rows), start.detach(), 1)
    except RuntimeError as error:
        if "in-place operation" in str(error):
            raise ProblemError(IN_PLACE) from error
        raise
    if checked is not None:
        checked.add(key)


def _masked(solution: Solution, asked: Tensor) -> Solution:
    """NaN where a sample has no output time."""
    shape = solution.value.shape
    value = torch.where(asked.reshape((*shape[:-1], 1)), solution.value, torch.nan)
    outputs = torch.minimum(solution.stats["outputs"], asked.sum(-1).reshape(shape[:-2]))
    return replace(solution, value=value, stats={**solution.stats, "outputs": outputs})


def _as_given(solution: Solution, state: State, times: Tensor) -> ODESolution:
    batch = state.batch
    T = solution.value.shape[-2]
    rows = solution.value.transpose(0, 1)
    shaped = replace(in_shape(solution, batch), value=state.unpack(rows, torch.Size((T, *batch))))
    t = times.reshape(batch + times.shape[-1:]) if times.dim() > 1 else times
    return ODESolution(shaped.value, shaped.status, shaped.stats, None, t)


def _with_events(
    solution: ODESolution, state: State, happened: Happened, events: Sequence[Event], alone: bool, dtype: torch.dtype
) -> ODESolution:
    batch = state.batch
    times, states, counts = [], [], []
    for event, (time, y, count) in zip(events, per_event(happened, events), strict=True):
        lead = batch if event.terminal else torch.Size((time.shape[-1], *batch))
        times.append(time.reshape(batch + time.shape[1:]).to(dtype))
        states.append(state.unpack(y if event.terminal else y.transpose(0, 1), lead))
        counts.append(count.reshape(batch))
    found = (times[0], states[0], counts[0]) if alone else (tuple(times), tuple(states), tuple(counts))
    return replace(solution, event_t=found[0], event_y=found[1], event_count=found[2])
