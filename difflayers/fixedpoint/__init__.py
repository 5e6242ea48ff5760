"""Roots ``F(z) = 0``, fixed points ``z = f(z)``, least values of ``f(z)``, and deep equilibrium layers on them.

The gradient is that of the condition: one linear system in its Jacobian, whatever found the answer.

>>> import torch
>>> from difflayers.fixedpoint import fixed_point
>>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
>>> z = fixed_point(lambda z, a: (z + a / z) / 2, torch.ones_like(a), (a,)).value  # z = √a
>>> z.backward()
>>> round(z.item(), 6), round(a.grad.item(), 6)
(1.414214, 0.353553)
"""

from difflayers._solver import Solver
from difflayers.fixedpoint._api import fixed_point, least_squares, minimize, root
from difflayers.fixedpoint._broyden import Broyden
from difflayers.fixedpoint._cells import TransformerCell
from difflayers.fixedpoint._deq import DEQ, Equilibrium
from difflayers.fixedpoint._descent import LBFGS
from difflayers.fixedpoint._heads import ClassificationHead, SegmentationHead
from difflayers.fixedpoint._iterations import Anderson, Picard
from difflayers.fixedpoint._least_squares import LeastSquaresProblem
from difflayers.fixedpoint._minimize import MinimizeProblem
from difflayers.fixedpoint._monotone import MonotoneConvDEQ, MonotoneDEQ
from difflayers.fixedpoint._multiscale import MultiscaleDEQ
from difflayers.fixedpoint._newton import Newton
from difflayers.fixedpoint._problem import FixedPointProblem
from difflayers.fixedpoint._scipy import ScipyRoot
from difflayers.fixedpoint._scipy_minimize import ScipyLeastSquares, ScipyMinimize
from difflayers.fixedpoint._spectrum import spectral_radius
from difflayers.fixedpoint._splitting import ForwardBackward, PeacemanRachford
from difflayers.fixedpoint._trust import Dogleg, LevenbergMarquardt

SOLVERS: dict[str, type[Solver]] = {
    "anderson": Anderson,
    "broyden": Broyden,
    "dogleg": Dogleg,
    "lbfgs": LBFGS,
    "lm": LevenbergMarquardt,
    "newton": Newton,
    "picard": Picard,
    "scipy": ScipyRoot,
    "scipy_least_squares": ScipyLeastSquares,
    "scipy_minimize": ScipyMinimize,
}

__all__ = [
    "DEQ",
    "LBFGS",
    "Anderson",
    "Broyden",
    "ClassificationHead",
    "Dogleg",
    "Equilibrium",
    "FixedPointProblem",
    "ForwardBackward",
    "LeastSquaresProblem",
    "LevenbergMarquardt",
    "MinimizeProblem",
    "MonotoneConvDEQ",
    "MonotoneDEQ",
    "MultiscaleDEQ",
    "Newton",
    "PeacemanRachford",
    "Picard",
    "ScipyLeastSquares",
    "ScipyMinimize",
    "ScipyRoot",
    "SegmentationHead",
    "TransformerCell",
    "fixed_point",
    "least_squares",
    "minimize",
    "root",
    "spectral_radius",
]
