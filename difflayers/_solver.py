"""How answers are found: the one masked loop for batched solvers, the one loop over samples for the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from difflayers._arrays import default_tolerance, sample_norm, widen
from difflayers._options import check_options
from difflayers._problem import Form, Problem, Residual
from difflayers._progress import counted
from difflayers._run import Run
from difflayers._solution import OnFailure, Solution, Status, has_answer
from difflayers.linear import LinearOperator

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")


class Solver(ABC):
    """Finds ``z`` with ``F(z) = 0`` from ``init``; a frozen dataclass of tolerances and options.

    ``value`` may be anything finite where a sample has no answer: whoever calls masks it by status.

    Attributes:
        serves: the forms of problems that it can solve.
        traceable: whether autograd can follow all of its steps, so that they can be unrolled.
    """

    serves: ClassVar[frozenset[Form]] = frozenset({"root", "fixed_point", "minimize", "least_squares"})
    traceable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def supports(self, problem: Problem) -> str | None:
        """Why this solver can't serve, or None."""
        if problem.form in self.serves:
            return None
        name = type(self).__name__
        return f"{name} serves {', '.join(sorted(self.serves))}, not {problem.form}; use {problem.advice}"

    @abstractmethod
    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        """The solution for ``init`` of shape ``(*batch, *event)``."""

    def doubt(self, solution: Solution, on_failure: OnFailure) -> None:
        """Warn of what makes a gradient through the steps of a solution doubtful, where it is known."""
        return

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative accuracy of its answers, to which the linear systems behind derivatives are held too."""
        return default_tolerance(dtype)


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """A batched iteration with per-sample tolerance, masks, status and statistics.

    A sample is done at ``‖F(z)‖ <= atol + rtol · scale``: ``scale`` is ``‖z‖`` for fixed-point problems (the relative
    residual of the field) and ``‖F(init)‖`` for others. It then stands still while the others go on.

    Args:
        rtol: relative tolerance; None is what the dtype allows with some room (4e-11 in float64, 2e-5 in float32).
        atol: absolute tolerance; None likewise.
        max_steps: steps before a sample is ``MAX_STEPS``.
        patience: steps without a new best residual before a sample is ``STALLED``.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 200
    patience: int = field(default=50, kw_only=True)
    traceable: ClassVar[bool] = True
    # Whether every tensor of its state has the samples first, so that some of them can go on alone.
    divisible: ClassVar[bool] = False
    # Whether a step leaves the samples that aren't active where they are, so that the loop needn't.
    masked: ClassVar[bool] = False

    @abstractmethod
    def init(self, residual: Residual, z: Tensor) -> Any:
        """What the iteration remembers between steps."""

    @abstractmethod
    def step(self, residual: Residual, z: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next iterate of every sample. ``residual(z)`` is remembered and costs nothing here."""

    def tolerance(self, dtype: torch.dtype) -> float:
        return default_tolerance(dtype) if self.rtol is None else max(self.rtol, default_tolerance(dtype))

    def inverse(self, residual: Residual, z: Tensor, state: Any) -> LinearOperator | None:
        """What the iteration learnt of the inverse of the Jacobian on its way to ``z``, or None."""
        return None

    def error(self, residual: Residual, z: Tensor) -> Tensor:
        """What falls below the tolerance at the answer, ``(*batch,)``."""
        return sample_norm(residual(z).detach(), residual.problem.batch_dims)

    def merit(self, residual: Residual, z: Tensor, error: Tensor) -> Tensor:
        """What decides which iterate is the best, ``(*batch,)``; the error, unless a step decreases something else."""
        return error

    def failure(self, state: Any) -> Tensor | None:
        """The :class:`Status` of samples that the last step gave up on, SUCCESS for others; None for no sample."""
        return None

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if init.numel() == 0:
            return empty_solution(init, problem.batch_dims)
        run = Run(self, problem, params, init)
        state = self.init(run.residual, init)
        while run.going and run.count < self.max_steps:
            state = run.shrink(state)
            run.residual.active = run.active
            proposal, state = self.step(run.residual, run.z, state)
            run.advance(proposal, self.failure(state))
        return run.solution(state)


@dataclass(frozen=True)
class HostResult:
    """What a host routine found for one sample; ``x`` as it was given."""

    x: Array
    status: Status
    steps: int = 0


class HostResidual:
    """One sample's residual ``F`` as a NumPy function, its Jacobian, and what is behind them.

    Of a minimization ``F`` is the gradient, its Jacobian the Hessian, and :meth:`objective` what is to be minimized. Of
    least squares :meth:`equations` are the residuals, whose squares sum up to twice the objective. Asking for several
    of them at one point costs one evaluation, if ``F`` comes first.

    Attributes:
        dtype: what it is evaluated in.
        raised: the exception that the residual itself raised, if any: that one is the user's to see.
    """

    def __init__(self, residual: Residual, z: Tensor, sample: int) -> None:
        self._residual, self._z, self._sample = residual, z, sample
        self._before = residual.evaluations
        self._last: tuple[Array, Tensor] | None = None
        self.dtype = residual.problem.precision or z.dtype
        self.raised: Exception | None = None

    @property
    def evaluations(self) -> int:
        """How often it was evaluated."""
        return self._residual.evaluations - self._before

    def __call__(self, x: Array) -> Array:
        return self._guarded(lambda z: self._own(self._residual.rows(self._residual(z))).reshape(x.shape), x)

    def jacobian(self, x: Array) -> Array:
        """``∂F/∂x``, ``(n, n)``, by ``n`` vector-Jacobian products."""
        return self._guarded(lambda z: self._own(self._residual.jacobian(z).dense), x)

    def objective(self, x: Array) -> float:
        """What is to be least: of a minimization its objective, of others half the sum of squared equations."""
        return self._guarded(lambda z: float(self._own(self._residual.objective(z).reshape(-1))), x)

    def equations(self, x: Array) -> Array:
        """What is to vanish, or be small, ``(m,)``: of least squares the residuals, of others ``F``."""
        return self._guarded(lambda z: self._own(self._residual.equations(z)), x)

    def linearization(self, x: Array) -> tuple[Array, Array]:
        """The equations and their Jacobian, ``(m,)`` and ``(m, n)``."""
        return self._guarded(lambda z: tuple(map(self._own, self._residual.linearization(z))), x)  # type: ignore[return-value]

    def _place(self, x: Array) -> Tensor:
        # Which parameters are batched is the callable's secret, so one sample is solved inside the whole batch.
        if self._last is None or not np.array_equal(self._last[0], x):
            rows = self._residual.rows(self._z).clone()
            rows[self._sample] = torch.as_tensor(np.asarray(x), dtype=rows.dtype, device=rows.device).reshape(-1)
            self._last = np.array(x), rows.reshape(self._z.shape)
        return self._last[1]

    def _own(self, rows: Tensor) -> Array:
        return _host(rows[self._sample])

    def _guarded(self, evaluate: Callable[[Tensor], T], x: Array) -> T:
        try:
            with torch.no_grad():
                return evaluate(self._place(x))
        except Exception as error:
            self.raised = error
            raise


@dataclass(frozen=True)
class HostSolver(Solver):
    """Solves one sample at a time on the host, in NumPy.

    A result is ``SUCCESS`` only if its residual confirms it: ``‖F(x)‖ <= √rtol · ‖F(x0)‖`` or
    ``‖F(x)‖ <= rtol · (1 + ‖x0‖)``; otherwise it is ``STALLED``, whatever the routine says.
    """

    @abstractmethod
    def solve_sample(self, fn: HostResidual, x0: Array) -> HostResult:
        """The answer for one sample; ``x0`` and the result have the shape of one sample."""

    def accuracy(self, dtype: torch.dtype) -> float:
        """The ``rtol`` against which results are confirmed."""
        return max(default_tolerance(dtype), 1e-8)

    def confirms(self, fn: HostResidual, x: Array, x0: Array, first: float) -> bool:
        """Whether ``x`` is an answer; ``first`` was the norm of the residual at the start ``x0``."""
        # Not relative to x: one that runs away would confirm itself.
        rtol = self.accuracy(fn.dtype)
        return bool(host_norm(fn(x)) <= max(rtol**0.5 * first, rtol * (1 + host_norm(x0))))

    def solve(self, problem: Problem, params: Sequence[Any], init: Tensor) -> Solution:
        if init.numel() == 0:
            return empty_solution(init, problem.batch_dims)
        residual = problem.bind(*params)
        batch, event = init.shape[: problem.batch_dims], init.shape[problem.batch_dims :]
        starts = _host(init).reshape(-1, *event)
        results = [self._solve_one(residual, init, i, x0) for i, x0 in enumerate(counted(starts, len(starts)))]
        value = torch.as_tensor(np.stack([x for x, *_ in results]), dtype=init.dtype, device=init.device)
        columns = [
            torch.tensor(column, device=init.device).reshape(batch) for column in list(zip(*results, strict=True))[1:]
        ]
        status, steps, evaluations, norm = columns
        stats = {"steps": steps, "evaluations": evaluations, "residual": norm}
        return Solution(value.reshape(init.shape), status.to(torch.int8), stats)

    def _solve_one(
        self, residual: Residual, init: Tensor, sample: int, x0: Array
    ) -> tuple[Array, int, int, int, float]:
        fn = HostResidual(residual, init, sample)
        first = host_norm(fn(x0))
        if not np.isfinite(first):
            return np.nan_to_num(x0), int(Status.NONFINITE), 0, 1, first
        result = self.solve_sample(fn, x0.copy())
        x = np.asarray(result.x, dtype=x0.dtype).reshape(x0.shape)
        norm = host_norm(fn(x))
        # Some functions are finite at infinity, which in the dtype of the unknown begins where it overflows.
        if not (np.isfinite(norm) and (np.abs(x) <= torch.finfo(init.dtype).max).all()):
            status = Status.NONFINITE if result.status.has_answer else result.status
            return x0, int(status), result.steps, fn.evaluations, norm
        return x, int(self._judged(fn, x, x0, first, result.status)), result.steps, fn.evaluations, norm

    def _judged(self, fn: HostResidual, x: Array, x0: Array, first: float, status: Status) -> Status:
        if status is Status.SUCCESS:
            return status if self.confirms(fn, x, x0, first) else Status.STALLED
        # A routine asked for more than rounding allows calls the best possible answer a failure.
        perfect = host_norm(fn(x)) <= default_tolerance(fn.dtype) * max(first, host_norm(x0))
        return Status.SUCCESS if status in (Status.STALLED, Status.MAX_STEPS) and perfect else status


@dataclass(frozen=True)
class CallableSolver(HostSolver):
    """Any routine that can call a residual: ``fn(residual, z0) -> z``, in NumPy, one sample at a time.

    ``residual`` is a function of one array shaped like ``z0``, with ``residual.jacobian(z)`` of shape ``(n, n)``. Of a
    minimization it is the gradient, and there is ``residual.objective(z)``; of least squares there is
    ``residual.linearization(z)``, the residuals and their Jacobian; see :class:`HostResidual`. Exceptions of ``fn`` are
    the caller's to see. Whether its answer is one is checked; see :class:`HostSolver`.

    Args:
        fn: the routine.
        rtol: the accuracy that its answers are held to; None is 1e-8, or what the dtype allows.
    """

    fn: Callable[[HostResidual, Array], Array]
    rtol: float | None = None

    def accuracy(self, dtype: torch.dtype) -> float:
        return super().accuracy(dtype) if self.rtol is None else self.rtol

    def solve_sample(self, fn: HostResidual, x0: Array) -> HostResult:
        return HostResult(self.fn(fn, x0), Status.SUCCESS)


def narrowed(value: Tensor, status: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Answers ``(samples, n)`` in the dtype, and their statuses: ``NONFINITE`` where they overflow."""
    value = value.to(dtype)
    if dtype == torch.float64:
        return value, status
    lost = has_answer(status) & ~value.isfinite().all(-1)
    return value, torch.where(lost, int(Status.NONFINITE), status)


def mask_failed(value: Tensor, status: Tensor) -> Tensor:
    """NaN, with zero gradient, where a sample has no answer."""
    return torch.where(widen(has_answer(status), value), value, torch.nan)


def host_norm(x: Array) -> float:
    """The Euclidean norm; infinite where its square is."""
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(x))


def _host(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().to(torch.float64).numpy()
    return array


def empty_solution(init: Tensor, batch_dims: int) -> Solution:
    batch = init.shape[:batch_dims]
    counts = torch.zeros(batch, dtype=torch.int64, device=init.device)
    stats = {"steps": counts, "evaluations": counts, "residual": init.new_zeros(batch)}
    return Solution(init.clone(), counts.to(torch.int8), stats)
