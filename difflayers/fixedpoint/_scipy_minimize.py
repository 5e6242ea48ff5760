"""Every method of ``scipy.optimize.minimize`` that needs no constraints, and ``scipy.optimize.least_squares``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from difflayers._arrays import default_tolerance
from difflayers._problem import Form
from difflayers._solution import Status
from difflayers._solver import Array, HostResidual, HostResult, HostSolver, host_norm
from difflayers.errors import ProblemError, UnknownNameError
from difflayers.fixedpoint._scipy import host_result, run_scipy

# An objective that fell by this many times its first size, and still isn't level, has no bottom.
_BOTTOMLESS = 1e16


class _Method(NamedTuple):
    """What a method of ``scipy.optimize.minimize`` uses, and how it says that it ran out of steps."""

    derivatives: int
    spent: tuple[int, ...] = (1,)
    limit: str = "maxiter"


_METHODS = {
    "Nelder-Mead": _Method(0, (1, 2)),
    "Powell": _Method(0, (1, 2)),
    "COBYLA": _Method(0, (2, 3)),  # before SciPy 1.16, and since
    "COBYQA": _Method(0, (5, 6)),
    "CG": _Method(1),
    "BFGS": _Method(1),
    "L-BFGS-B": _Method(1),
    "TNC": _Method(1, (3,), "maxfun"),
    "SLSQP": _Method(1, (9,)),
    "Newton-CG": _Method(2),
    "dogleg": _Method(2),
    "trust-ncg": _Method(2),
    "trust-krylov": _Method(2),
    "trust-exact": _Method(2),
    "trust-constr": _Method(2, (0,)),
}


@dataclass(frozen=True)
class ScipyMinimize(HostSolver):
    """``scipy.optimize.minimize`` without constraints, in float64 on the host, with exact gradients and Hessians.

    A result is ``SUCCESS`` only if its gradient confirms it, as for every :class:`~difflayers.HostSolver`, or if the
    objective is as low as its rounding lets anybody see: ``½ gᵀH⁻¹g`` for the gradient ``g`` and the Hessian ``H`` is
    then below ten units in its last place. The latter is where methods end that see no gradient. It is looked at for up
    to ``dense_size`` unknowns. A sample whose objective falls as far as SciPy goes is ``UNBOUNDED``. Like SciPy, one
    that starts at a saddle or a maximum may end there.

    Args:
        method: a method of ``scipy.optimize.minimize``. ``Nelder-Mead``, ``Powell``, ``COBYLA`` and ``COBYQA`` (SciPy
            1.14) use the objective only, and find half the digits; ``Newton-CG``, ``dogleg`` (for convex objectives)
            and those called ``trust-`` use the Hessian.
        rtol: norm of the gradient, relative to that at the start; for methods without gradients, and ``Newton-CG``, the
            last step or region. None is 1e-8, or what the dtype allows.
        max_steps: the method's limit: iterations, but evaluations for ``COBYLA`` and ``TNC``; None is SciPy's default.
    """

    method: str = "BFGS"
    rtol: float | None = None
    max_steps: int | None = None
    serves: ClassVar[frozenset[Form]] = frozenset({"minimize", "least_squares"})
    dense_size: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in _METHODS:
            raise UnknownNameError("method", self.method, tuple(_METHODS))
        if self.method == "COBYQA" and tuple(map(int, version("scipy").split(".")[:2])) < (1, 14):
            raise ProblemError(f"COBYQA needs SciPy 1.14, this is {version('scipy')}; use COBYLA or Nelder-Mead")

    def accuracy(self, dtype: torch.dtype) -> float:
        return max(super().accuracy(dtype), self.rtol or 0.0)

    def confirms(self, fn: HostResidual, x: Array, x0: Array, first: float) -> bool:
        return super().confirms(fn, x, x0, first) or self._level(fn, x)

    def solve_sample(self, fn: HostResidual, x0: Array) -> HostResult:
        from scipy.optimize import minimize

        uses, first, start = _METHODS[self.method], host_norm(fn(x0)), fn.objective(x0)
        options = _tolerances(self.method, self.accuracy(fn.dtype), first, fn.dtype)
        if self.max_steps is not None:
            options[uses.limit] = self.max_steps

        def with_gradient(x: Array) -> tuple[float, Array]:
            gradient = fn(x.reshape(x0.shape)).reshape(-1)
            return fn.objective(x.reshape(x0.shape)), gradient

        result = run_scipy(
            fn,
            lambda: minimize(
                with_gradient if uses.derivatives else lambda x: fn.objective(x.reshape(x0.shape)),
                x0.reshape(-1),
                jac=True if uses.derivatives else None,
                hess=(lambda x: fn.jacobian(x.reshape(x0.shape))) if uses.derivatives > 1 else None,
                method=self.method,
                options=options,
            ),
        )
        return host_result(result, x0, lambda result: self._status(fn, result, x0, start, first))

    def _status(self, fn: HostResidual, result: Any, x0: Array, start: float, first: float) -> Status:
        x = np.reshape(result.x, x0.shape)
        confirmed = self.confirms(fn, x, x0, first)
        if fn.objective(x) < -_BOTTOMLESS * (1 + abs(start)) and not confirmed:
            return Status.UNBOUNDED
        if result.success:
            return Status.SUCCESS
        if result.status in _METHODS[self.method].spent:
            return Status.MAX_STEPS
        # Line searches and models that fail because there is nothing left to gain.
        return Status.SUCCESS if confirmed and self._level(fn, x) else Status.STALLED

    def _level(self, fn: HostResidual, x: Array) -> bool:
        """Whether no point nearby has an objective that is lower by more than its rounding."""
        if x.size > self.dense_size or not np.isfinite(host_norm(fn(x))):
            return False
        gradient, hessian = fn(x).reshape(-1), fn.jacobian(x)
        try:
            root = np.linalg.solve(np.linalg.cholesky(hessian), gradient)
        except np.linalg.LinAlgError:
            return False
        return bool(root @ root / 2 <= 10 * torch.finfo(fn.dtype).eps * abs(fn.objective(x)))


def _tolerances(method: str, rtol: float, first: float, dtype: torch.dtype) -> dict[str, float]:
    """The options that stop a method; the other criteria of the same method are as strict as rounding lets them be."""
    gradient = rtol * first + default_tolerance(dtype)
    eps = torch.finfo(dtype).eps
    step = max(rtol, eps**0.5)
    special: dict[str, dict[str, float]] = {
        "Nelder-Mead": {"xatol": step, "fatol": np.inf},
        "Powell": {"xtol": step, "ftol": eps},
        "COBYLA": {"tol": step},
        "COBYQA": {"final_tr_radius": step},
        "L-BFGS-B": {"gtol": gradient, "ftol": 0.0},
        "TNC": {"gtol": gradient, "ftol": 0.0, "xtol": 0.0},
        "SLSQP": {"ftol": gradient**2},
        "Newton-CG": {"xtol": rtol},
        "trust-constr": {"gtol": gradient, "xtol": eps},
    }
    return special.get(method, {"gtol": gradient})


@dataclass(frozen=True)
class ScipyLeastSquares(HostSolver):
    """``scipy.optimize.least_squares`` without bounds, in float64 on the host, with exact Jacobians.

    For least squares, and for roots, of which it minimizes the squares: a local minimum that is no root is ``STALLED``.

    Args:
        method: ``trf`` and ``dogbox`` are trust-region methods of SciPy's own; ``lm`` is MINPACK's, for at least as
            many residuals as unknowns.
        rtol: norm of the gradient ``Jᵀr``, relative to that at the start; None is 1e-8, or what the dtype allows.
        max_steps: evaluations of the residuals; None is SciPy's default.
        loss: ``linear``. Others (``soft_l1``, ``huber``, ...) minimize something else than ``½‖r‖²``, so the derivative
            of the answer would be that of another problem.
    """

    method: Literal["trf", "dogbox", "lm"] = "trf"
    rtol: float | None = None
    max_steps: int | None = None
    loss: Literal["linear"] = "linear"
    serves: ClassVar[frozenset[Form]] = frozenset({"root", "fixed_point", "least_squares"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("trf", "dogbox", "lm"):
            raise UnknownNameError("method", self.method, ("trf", "dogbox", "lm"))
        if self.loss != "linear":
            raise ProblemError(
                f"loss {self.loss!r} changes what holds at the answer; put the loss into the objective of minimize()"
            )

    def accuracy(self, dtype: torch.dtype) -> float:
        return max(super().accuracy(dtype), self.rtol or 0.0)

    def solve_sample(self, fn: HostResidual, x0: Array) -> HostResult:
        from scipy.optimize import least_squares

        value, jacobian = fn.linearization(x0)
        if self.method == "lm" and value.size < x0.size:
            raise ProblemError(
                f"lm needs as many residuals as unknowns, got {value.size} for {x0.size}; use method='trf'"
            )
        rtol, eps = self.accuracy(fn.dtype), torch.finfo(fn.dtype).eps
        result = run_scipy(
            fn,
            lambda: least_squares(
                lambda x: fn.equations(x.reshape(x0.shape)),
                x0.reshape(-1),
                jac=lambda x: fn.linearization(x.reshape(x0.shape))[1],
                method=self.method,
                # Steps and decreases that rounding hides end it too.
                ftol=4 * eps,
                xtol=4 * eps,
                gtol=max(rtol * float(np.abs(jacobian.T @ value).max()), 4 * eps),
                max_nfev=self.max_steps,
            ),
        )
        return host_result(result, x0, lambda result: Status.SUCCESS if result.success else Status.MAX_STEPS)
