"""Every method of ``scipy.optimize.root``, one sample at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from difflayers._problem import Form
from difflayers._solution import Status
from difflayers._solver import Array, HostResidual, HostResult, HostSolver
from difflayers.errors import UnknownNameError

_STEP_LIMIT = {
    "hybr": "maxfev",
    "lm": "maxiter",
    "df-sane": "maxfev",
    "broyden1": "maxiter",
    "broyden2": "maxiter",
    "anderson": "maxiter",
    "linearmixing": "maxiter",
    "diagbroyden": "maxiter",
    "excitingmixing": "maxiter",
    "krylov": "maxiter",
}
_USES_JACOBIAN = ("hybr", "lm")
# MINPACK's info codes: 2 and 3 of hybrd are limits, 4 and 5 slow progress; 5 of lmder is the limit.
_MINPACK = {"hybr": {2: Status.MAX_STEPS, 3: Status.STALLED}, "lm": {5: Status.MAX_STEPS}}


@dataclass(frozen=True)
class ScipyRoot(HostSolver):
    """``scipy.optimize.root``, in float64 on the host; ``hybr`` and ``lm`` get the exact Jacobian.

    Args:
        method: any method of ``scipy.optimize.root``.
        rtol: SciPy's ``tol``: relative error of ``z`` for ``hybr`` and ``lm``, largest residual for the others; None is
            1e-10.
        max_steps: the method's limit: evaluations for ``hybr``, ``lm`` and ``df-sane``, iterations for the others;
            None is SciPy's default.
    """

    method: str = "hybr"
    rtol: float | None = None
    max_steps: int | None = None
    serves: ClassVar[frozenset[Form]] = frozenset({"root", "fixed_point"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in _STEP_LIMIT:
            raise UnknownNameError("method", self.method, tuple(_STEP_LIMIT))

    def accuracy(self, dtype: torch.dtype) -> float:
        return max(super().accuracy(dtype), self.rtol or 0.0)

    def solve_sample(self, fn: HostResidual, x0: Array) -> HostResult:
        from scipy.optimize import root

        # SciPy's own defaults for the residual reach from 1e-8 to 6e-6; a derivative deserves better.
        tol = 1e-10 if self.rtol is None else self.rtol
        options: dict[str, float] = {} if self.max_steps is None else {_STEP_LIMIT[self.method]: self.max_steps}
        if self.method == "df-sane":
            options |= {"fatol": tol, "ftol": 0.0}
        result = run_scipy(
            fn,
            lambda: root(
                lambda x: fn(x.reshape(x0.shape)).reshape(-1),
                x0.reshape(-1),
                jac=(lambda x: fn.jacobian(x.reshape(x0.shape))) if self.method in _USES_JACOBIAN else None,
                method=self.method,
                tol=None if self.method == "df-sane" else tol,
                options=options,
            ),
        )
        return host_result(result, x0, self._status)

    def _status(self, result: Any) -> Status:
        if result.success:
            return Status.SUCCESS
        if self.method in _MINPACK:
            return _MINPACK[self.method].get(result.status, Status.STALLED)
        return Status.MAX_STEPS


def run_scipy(fn: HostResidual, routine: Callable[[], Any]) -> Any:
    """What a routine of SciPy returns, or None where it broke down; what ``fn`` itself raises is the user's to see."""
    from scipy.linalg import LinAlgWarning
    from scipy.optimize import OptimizeWarning

    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # What they warn of shows in the status.
            warnings.simplefilter("ignore", LinAlgWarning)
            warnings.simplefilter("ignore", OptimizeWarning)
            return routine()
    except (ArithmeticError, ValueError, RuntimeError, np.linalg.LinAlgError):
        if fn.raised is not None:
            raise
        return None


def host_result(result: Any, x0: Array, status: Callable[[Any], Status]) -> HostResult:
    """What SciPy says, as a result for one sample like ``x0``."""
    if result is None:
        return HostResult(x0, Status.BACKEND_ERROR)
    steps = result["nit"] if "nit" in result else result["nfev"]
    return HostResult(np.reshape(result.x, x0.shape), status(result), int(steps))
