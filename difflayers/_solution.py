"""What a solve gives back: a value, and for every sample how it went."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from difflayers._arrays import widen
from difflayers._autodiff import in_functorch, numbers
from difflayers.errors import ConvergenceWarning, SolverError, UnknownNameError

OnFailure = Literal["raise", "warn", "ignore"]
SolutionT = TypeVar("SolutionT", bound="Solution")
Explain = Callable[["Status", Tensor], str]  # what happened to the samples of a mask, and what to try

_LISTED = 8


class Status(IntEnum):
    """How the solve of one sample ended. ``message`` says what happened and what to try."""

    SUCCESS = 0
    MAX_STEPS = 1
    STALLED = 2
    NONFINITE = 3
    INFEASIBLE = 4
    UNBOUNDED = 5
    SINGULAR = 6
    BACKEND_ERROR = 7

    @property
    def message(self) -> str:
        """What happened, and what to try."""
        return _MESSAGES[self]

    @property
    def has_answer(self) -> bool:
        """Whether the value is at least a best iterate; otherwise it is NaN."""
        return self <= Status.STALLED


_MESSAGES = {
    Status.SUCCESS: "converged to the requested tolerance",
    Status.MAX_STEPS: "ran out of steps; raise max_steps, loosen rtol or start closer with init=",
    Status.STALLED: "the residual stopped decreasing; loosen rtol, add damping, try another solver or another init=",
    Status.NONFINITE: "NaN or infinity; check this sample's inputs, then try damping or a closer init=",
    Status.INFEASIBLE: "no point satisfies the constraints; relax them or add slack variables",
    Status.UNBOUNDED: "the objective has no lower bound; add bounds or regularization",
    Status.SINGULAR: "the Jacobian is singular here, so no unique answer or derivative exists; "
    "try another init=, or linear.LeastSquares()",
    Status.BACKEND_ERROR: "the backend failed; see the exception or the backend's own message",
}


@dataclass(frozen=True)
class Solution:
    """The answer of a solve and, for every sample, how it went.

    Attributes:
        value: the unknown, in the structure, dtype and device of ``init``. NaN where a sample has no answer.
        status: int8, shape ``(*batch,)``, values of :class:`Status`.
        stats: tensors of shape ``(*batch,)``: ``steps``, ``evaluations``, ``residual`` and what else the solver counts.
        state: what the solver keeps for whoever continues from here, or None.
    """

    value: Any
    status: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    state: Any = None

    @property
    def ok(self) -> Tensor:
        """Which samples succeeded; bool, shape ``(*batch,)``."""
        return self.status == Status.SUCCESS

    def raise_if_failed(self) -> Solution:
        """This solution, if every sample succeeded.

        Raises:
            SolverError: naming the failed samples.
        """
        return check_status(self, "raise")

    def numpy(self) -> Solution:
        """The same with NumPy arrays, detached, on the CPU."""
        return replace(
            self,
            value=to_numpy(self.value),
            status=to_numpy(self.status),
            stats={key: to_numpy(stat) for key, stat in self.stats.items()},
        )


def in_shape(solution: SolutionT, batch: torch.Size, *names: str) -> SolutionT:
    """A solution of samples in one dimension, in the shape of the batch; ``names`` are attributes like ``value``."""
    if len(batch) == 1:
        return solution

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.reshape(batch + tensor.shape[1:])

    own = {name: shaped(getattr(solution, name)) for name in ("status", *names)}
    return replace(solution, stats={key: shaped(stat) for key, stat in solution.stats.items()}, **own)


def to_numpy(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().cpu().numpy(), tree)


def has_answer(status: Tensor) -> Tensor:
    """The tensor version of :attr:`Status.has_answer`."""
    return status <= Status.STALLED


def restarted(earlier: Solution, fresh: Any) -> Any:
    """The value of an earlier solution, with that of ``fresh`` in samples that have no answer."""
    answered = has_answer(torch.as_tensor(earlier.status))
    if not in_functorch() and bool(answered.all()):
        return earlier.value

    def merged(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.where(widen(answered, value), value, torch.as_tensor(other).to(value))
        return merged(torch.as_tensor(value), other).numpy()

    return pytree.tree_map(merged, earlier.value, fresh)


def describe_failures(status: Tensor, what: str, explain: Explain | None = None) -> str:
    """One line per kind of failure, naming the samples; ``explain`` knows better what is behind it."""
    lines = []
    for code in numbers(status.unique()):
        if code == Status.SUCCESS:
            continue
        samples = [tuple(index) if len(index) != 1 else index[0] for index in numbers((status == code).nonzero())]
        named = ", ".join(map(str, samples[:_LISTED])) + (", ..." if len(samples) > _LISTED else "")
        who = f"{len(samples)} of {status.numel()} samples ({named})" if status.dim() else "the system"
        message = explain(Status(code), status == code) if explain else Status(code).message
        lines.append(f"{what}: {Status(code).name} in {who}: {message}")
    return "\n".join(lines)


def check_status(
    solution: Solution,
    on_failure: OnFailure,
    what: str = "solve",
    error: type[SolverError] = SolverError,
    explain: Explain | None = None,
) -> Solution:
    """This solution, after raising or warning about failed samples as ``on_failure`` says."""
    if on_failure not in ("raise", "warn", "ignore"):
        raise UnknownNameError("on_failure", str(on_failure), ("raise", "warn", "ignore"))
    if on_failure == "ignore" or bool((torch.as_tensor(solution.status) == Status.SUCCESS).all()):
        return solution
    message = describe_failures(torch.as_tensor(solution.status), what, explain)
    if on_failure == "raise":
        raise error(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return solution
