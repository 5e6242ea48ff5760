"""Roots ``F(z) = 0``, fixed points ``z = f(z)``, and deep equilibrium layers on them."""

from difflayers.fixedpoint._api import fixed_point, root
from difflayers.fixedpoint._broyden import Broyden
from difflayers.fixedpoint._deq import DEQ, Equilibrium
from difflayers.fixedpoint._iterations import Anderson, Newton, Picard
from difflayers.fixedpoint._problem import FixedPointProblem
from difflayers.fixedpoint._scipy import ScipyRoot

SOLVERS = {"anderson": Anderson, "broyden": Broyden, "newton": Newton, "picard": Picard, "scipy": ScipyRoot}

__all__ = [
    "DEQ",
    "Anderson",
    "Broyden",
    "Equilibrium",
    "FixedPointProblem",
    "Newton",
    "Picard",
    "ScipyRoot",
    "fixed_point",
    "root",
]
