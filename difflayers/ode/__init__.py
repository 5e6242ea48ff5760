"""Initial value problems: ``dy/dt = f(t, y)``, solved and differentiated.

The gradient is that of the discrete solution: accepted steps are kept, and run once more in ``backward``. Solvers that
don't tell their steps get that of a second solve, backward in time.

>>> import torch
>>> from difflayers.ode import odeint
>>> t = torch.linspace(0, 1, 3, dtype=torch.float64)
>>> odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), t).ys.squeeze(1)
tensor([1.0000, 0.6065, 0.3679], dtype=torch.float64)
"""

from difflayers._solver import Solver
from difflayers.ode._algebraic import consistent_initial
from difflayers.ode._api import ODESolution, odeint
from difflayers.ode._backsolve import BacksolveAdjoint
from difflayers.ode._checkpointed import CheckpointedAdjoint
from difflayers.ode._events import Event
from difflayers.ode._explicit import RK4, AdaptiveSolver, Bosh3, Dopri5, Dopri8, Euler, FixedStepSolver, Midpoint, Tsit5
from difflayers.ode._layer import ODELayer
from difflayers.ode._problem import InitialValueProblem
from difflayers.ode._scipy_ivp import ScipyIVP
from difflayers.ode._stiff import Kvaerno5, Rodas
from difflayers.ode._torchdiffeq import TorchDiffEq

SOLVERS: dict[str, type[Solver]] = {
    "bosh3": Bosh3,
    "dopri5": Dopri5,
    "dopri8": Dopri8,
    "euler": Euler,
    "kvaerno5": Kvaerno5,
    "midpoint": Midpoint,
    "rk4": RK4,
    "rodas": Rodas,
    "scipy": ScipyIVP,
    "torchdiffeq": TorchDiffEq,
    "tsit5": Tsit5,
}

__all__ = [
    "RK4",
    "AdaptiveSolver",
    "BacksolveAdjoint",
    "Bosh3",
    "CheckpointedAdjoint",
    "Dopri5",
    "Dopri8",
    "Euler",
    "Event",
    "FixedStepSolver",
    "InitialValueProblem",
    "Kvaerno5",
    "Midpoint",
    "ODELayer",
    "ODESolution",
    "Rodas",
    "ScipyIVP",
    "TorchDiffEq",
    "Tsit5",
    "consistent_initial",
    "odeint",
]
