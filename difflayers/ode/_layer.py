"""An initial value problem as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from difflayers._adjoint import Adjoint
from difflayers._arguments import Arguments
from difflayers._autodiff import Autocast
from difflayers._progress import showing
from difflayers._solution import OnFailure
from difflayers._solver import Solver
from difflayers.errors import ProblemError
from difflayers.ode._api import ODESolution, integrate, paired
from difflayers.ode._events import events_of
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._state import State
from difflayers.ode._times import as_times


class ODELayer(nn.Module):
    """The solution of ``dy/dt = fn(t, y, *args)`` at given times, as a layer (Chen et al. 2018, NeurIPS).

    Args:
        fn: the right-hand side, called as ``fn(t, y, *args)``; its parameters are the layer's.
        t: output times, as in :func:`odeint`; a buffer that isn't saved, so that it moves with the module.
        solver: a solver object, or the name of one with its defaults.
        adjoint: the derivative rule; None is what suits the solver, as in :func:`odeint`.
        batch_dims: leading dimensions of ``y0`` that index independent samples.
        event: what to look for, as in :func:`odeint`; :meth:`solve` tells when it happened. The parameters of events
            that are modules are the layer's too.
        mass: ``M``, as in :func:`odeint`; a parameter of the layer if it is one, else a buffer that isn't saved.
        on_failure: ``"raise"``, ``"warn"`` or ``"ignore"``: a sample that fails is NaN from there on.

    >>> import torch
    >>> from difflayers.ode import ODELayer
    >>> class Field(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = torch.nn.Linear(2, 2)
    ...     def forward(self, t, y):
    ...         return torch.tanh(self.linear(y))
    >>> ODELayer(Field(), [0.0, 0.5, 1.0])(torch.ones(4, 2)).shape
    torch.Size([3, 4, 2])
    """

    t: Tensor
    mass: Tensor | None

    def __init__(
        self,
        fn: nn.Module,
        t: Any,
        *,
        solver: str | Solver = "dopri5",
        adjoint: Adjoint | None = None,
        batch_dims: int = 0,
        event: Any = None,
        mass: Any = None,
        on_failure: OnFailure = "warn",
    ) -> None:
        super().__init__()
        if not isinstance(fn, nn.Module):
            raise ProblemError(f"fn must be an nn.Module, got {type(fn).__name__}; for a function use odeint()")
        self.fn = fn
        self.register_buffer("t", as_times(t), persistent=False)
        self._listed = isinstance(t, list | tuple)
        state, (arguments, _) = State.of(torch.zeros(()), 0), Arguments.of(fn, ())
        autocast = Autocast.current(self.t.device)
        anything = InitialValueProblem(fn, state, arguments, autocast, massive=mass is not None)
        self.solver, self.adjoint = paired(anything, solver, adjoint)
        self.batch_dims, self.event = batch_dims, event
        modules = [one.fn for one in events_of(event) if isinstance(one.fn, nn.Module)]
        self.event_functions = nn.ModuleList(modules)
        if isinstance(mass, nn.Parameter):
            self.mass = mass
        else:
            self.register_buffer("mass", None if mass is None else torch.as_tensor(mass), persistent=False)
        self.on_failure = on_failure
        self._checked: set[Any] = set()

    def forward(self, y0: Any, *args: Any) -> Any:
        """The states, ``(T, *batch, ...)``, in the structure of ``y0``."""
        return self.solve(y0, *args).ys

    def solve(self, y0: Any, *args: Any, progress: bool = False) -> ODESolution:
        """The solution with status and statistics, on the graph; with a bar if ``progress``."""
        call = _outside_dynamo if torch.compiler.is_compiling() else integrate
        options = (self.batch_dims, self.solver, self.adjoint, self.event, self.on_failure)
        own = (self._checked, self.mass, self._listed)
        return showing(progress, lambda: call(self.fn, y0, self.t, args, *options, *own))

    def extra_repr(self) -> str:
        times, batch = self.t.shape[-1], self.batch_dims
        text = f"times={times}, solver={self.solver!r}, adjoint={self.adjoint!r}, batch_dims={batch}"
        if self.event is not None:
            text += f", event={self.event!r}"
        return text if self.mass is None else f"{text}, mass={tuple(self.mass.shape)}"


# torch.compiler.disable would import the whole of dynamo here; this imports it when called.
_outside_dynamo = _disable_dynamo(integrate)
