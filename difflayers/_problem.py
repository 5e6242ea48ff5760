"""What must hold at the answer: equations and shapes, no numerics."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from difflayers._arrays import Packing
from difflayers._autodiff import Pullback, in_functorch, pull
from difflayers._solution import Explain, Solution
from difflayers.errors import ProblemError
from difflayers.linear import JacobianOperator, LinearOperator, Property

Form = Literal["root", "fixed_point", "minimize", "least_squares", "qp", "cone", "ode", "dae"]


class Residual:
    """``z -> F(z)`` for bound parameters. Remembers its last evaluation, so asking twice at one ``z`` costs once.

    Attributes:
        problem: the problem that it came from.
        evaluations: how often it was evaluated.
        active: the samples that a loop is still working on, or None for all.
        pullback: the pullback at the answer, where somebody has linearized there already.
        within: how :meth:`inside` reaches the residual that this one is made from, if it is made from another.
    """

    def __init__(self, fn: Callable[[Any], Any], problem: Problem) -> None:
        self._fn, self.problem = fn, problem
        self.evaluations = 0
        self.active: Tensor | None = None
        self.pullback: Pullback | None = None
        self.within: Callable[..., Any] | None = None
        self._point: Any = None
        self._value: Any = None
        self._linearization: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, z: Any) -> Any:
        if z is not self._point:
            self._point, self._value = z, self._fn(z)
            self.evaluations += 1
        return self._value

    def remember(self, z: Any, value: Any) -> Residual:
        """Take ``F(z)`` from somebody who evaluated it already."""
        self._point, self._value = z, value
        return self

    def move(self, z: Any) -> None:
        """Take ``z``, an equal of where it was evaluated last, for that point."""
        self._point = z

    def jacobian(self, z: Tensor) -> LinearOperator:
        """``∂F/∂z`` at ``z``."""
        return self.problem.jacobian(self, z)

    def untracked(self, z: Any) -> Any:
        """``F(z)`` without remembering or counting: for derivatives."""
        return self._fn(z)

    def rows(self, z: Tensor) -> Tensor:
        """``z``, or what is shaped like it, as rows ``(samples, n)``."""
        return z.reshape(z.shape[: self.problem.batch_dims].numel(), -1)

    def equations(self, z: Tensor) -> Tensor:
        """What is to vanish, or be small, as rows ``(samples, m)``: ``F(z)`` unless ``F`` is derived from it."""
        return self.rows(self(z))

    def objective(self, z: Tensor) -> Tensor:
        """What is to be least, ``(*batch,)``: ``½‖F(z)‖²`` unless ``F`` is the gradient of something."""
        return self.equations(z).square().sum(-1).reshape(z.shape[: self.problem.batch_dims]) / 2

    def linearization(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The equations at ``z`` and their Jacobian, ``(samples, m, n)``; remembered."""
        if self._linearization is None or self._linearization[0] is not z:
            self._linearization = z, *self._linearize(z)
        return self._linearization[1:]

    def _linearize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.equations(z), self.jacobian(z).dense

    def raw(self, z: Any) -> Any:
        """What the user's function gives at ``z``, which is ``F(z)`` unless ``F`` is derived from it."""
        return self._fn(z)

    def inside(self, fn: Callable[..., Any], *tensors: Tensor) -> Any:
        """``fn(residual, *tensors)`` for the residual that the problem itself bound, with what that one knows.

        For solvers that need more of a problem than its residual. Where a problem is vmapped, so is ``fn``: its tensors
        and results then have one more leading dimension.
        """
        return fn(self, *tensors) if self.within is None else self.within(fn, *tensors)

    def packed(self, packing: Packing) -> Callable[[Tensor], Tensor]:
        """:meth:`raw` as a function of one packed unknown."""
        return lambda z: packing.pack(self.raw(packing.unpack(z)))


class Problem(ABC):
    """A condition ``F(z, params) = 0`` per sample.

    Attributes:
        batch_dims: how many leading dimensions of ``z`` index independent problems.
        properties: what is known of ``∂F/∂z``; see :data:`difflayers.linear.Property`.
        form: the function that poses such a problem; solvers say which forms they serve.
        advice: solvers for this form, for messages.
    """

    batch_dims: int
    properties: frozenset[Property]
    form: ClassVar[Form] = "root"
    advice: ClassVar[str] = "Newton() or CallableSolver(...)"
    residual_type: ClassVar[type[Residual]] = Residual  # made from raw functions: those of a packed or vmapped unknown
    precision: torch.dtype | None = None  # what the residual is evaluated in, if not in the dtype of the unknown
    closed: ClassVar[bool] = False  # whether the residual depends on nothing but its parameters, as far as gradients go
    points: int = 0  # how many leading params are points (*batch, *event) like z, so that vmap must batch them with it

    @abstractmethod
    def bind(self, *params: Any) -> Residual:
        """The residual for these parameters; what doesn't depend on ``z`` is evaluated here, once."""

    def check(self, params: Sequence[Any], init: Any) -> None:
        """Raise :class:`~difflayers.errors.ProblemError`, naming sizes, if the problem can't be posed."""
        self.bind(*params)(init)

    def jacobian(self, residual: Residual, z: Tensor) -> LinearOperator:
        """``∂F/∂z`` at ``z``, by autodiff products unless the problem knows better."""
        return JacobianOperator(residual.untracked, z, self.batch_dims, self.properties, residual.pullback)

    def pullback(
        self, residual: Residual, z: Tensor, wanted: Sequence[int]
    ) -> Callable[[Tensor], Sequence[Tensor | None]] | None:
        """``u -> (∂F/∂param)ᵀu`` for the wanted params, where the problem knows better than autodiff; else None.

        For first derivatives: ``residual`` is bound to the params, and nothing is differentiated through.
        """
        return None

    def explain(self, solution: Solution) -> Explain | None:
        """What to say of samples that failed, where that depends on the problem."""
        return None

    def started(self, z: Tensor, value: Tensor) -> Problem:
        """The same condition, with ``F(z)`` known for the parameters that it will be bound to; may ignore it."""
        return self

    def part(self, params: Sequence[Any], rows: Tensor, samples: int) -> Residual | None:
        """The residual of some of the ``samples`` alone, or None if nobody knows how to divide the parameters."""
        return None

    def vmapped(self, in_dims: tuple[int | None, ...], randomness: str) -> Problem:
        """The same condition with one more leading batch dimension; ``in_dims`` says which params have it."""
        return _Vmapped(self, in_dims, randomness)


@dataclass(frozen=True)
class RootProblem(Problem):
    """``residual(z, *params) = 0``.

    Args:
        residual: a function or ``nn.Module`` of ``(z, *params)`` that returns what must vanish, shaped like ``z``.
            ``z`` and ``params`` may be pytrees. The parameters of a module are differentiated without being passed;
            tensors that a function merely closes over get first derivatives only.
        batch_dims: leading dimensions of ``z`` that index independent problems; a promise by the caller.
        properties: what is known of the Jacobian; see :data:`difflayers.linear.Property`.
    """

    residual: Callable[..., Any]
    batch_dims: int = 0
    properties: frozenset[Property] = frozenset()
    shared: ClassVar[int] = 0  # how many leading arguments belong to all samples alike

    def bind(self, *params: Any) -> Residual:
        return Residual(lambda z: matched(self.residual(z, *params), z, "residual"), self)

    @property
    def function(self) -> Callable[..., Any]:
        """The user's callable."""
        return self.residual

    def with_function(self, function: Callable[..., Any]) -> RootProblem:
        """The same problem around another callable."""
        return replace(self, residual=function)

    def check(self, params: Sequence[Any], init: Any) -> None:
        """Evaluate once, which checks shapes, and test the promise that ``batch_dims`` is.

        Raises:
            ProblemError: a sample's residual depends on another sample's unknown.
        """
        if self.batch_dims and not in_functorch():
            check_independence(self.bind(*params).raw, init, self.batch_dims)


@dataclass(frozen=True)
class DerivedProblem(Problem):
    """The condition of another problem, posed otherwise."""

    base: Problem

    @property
    def batch_dims(self) -> int:  # type: ignore[override]
        return self.base.batch_dims

    @property
    def properties(self) -> frozenset[Property]:  # type: ignore[override]
        return self.base.properties

    @property
    def form(self) -> Form:  # type: ignore[override]
        return self.base.form

    @property
    def residual_type(self) -> type[Residual]:  # type: ignore[override]
        return self.base.residual_type


@dataclass(frozen=True)
class _Vmapped(DerivedProblem):
    in_dims: tuple[int | None, ...]
    randomness: str

    @property
    def batch_dims(self) -> int:  # type: ignore[override]
        return self.base.batch_dims + 1

    def bind(self, *params: Any) -> Residual:
        def evaluate(z: Tensor) -> Tensor:
            one = torch.func.vmap(
                lambda z, *p: self.base.bind(*p).raw(z), (0, *self.in_dims), randomness=self.randomness
            )
            result: Tensor = one(z, *params)
            return result

        def within(fn: Callable[..., Any], *tensors: Tensor) -> Any:
            dims = ((0,) * len(tensors), self.in_dims)
            one = torch.func.vmap(lambda t, p: self.base.bind(*p).inside(fn, *t), dims, randomness=self.randomness)
            return one(tensors, params)

        residual = self.residual_type(evaluate, self)
        residual.within = within
        return residual


def matched(value: Any, z: Any, name: str) -> Any:
    """``value``, after checking that it has the structure, shapes, dtype and device of ``z``."""
    leaves, structure = pytree.tree_flatten(value)
    wanted, wanted_structure = pytree.tree_flatten(z)
    if structure != wanted_structure:
        raise ProblemError(f"{name} returned the structure {structure}, but the unknown has {wanted_structure}")
    return pytree.tree_unflatten([_matched_leaf(v, w, name) for v, w in zip(leaves, wanted, strict=True)], structure)


def _matched_leaf(value: Any, z: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ProblemError(f"{name} returned {type(value).__name__}; write it with torch operations")
    if value.shape != z.shape:
        raise ProblemError(f"{name} returned shape {tuple(value.shape)}, but the unknown has {tuple(z.shape)}")
    if value.device != z.device:
        raise ProblemError(f"{name} returned a tensor on {value.device}, but the unknown is on {z.device}")
    if value.dtype != z.dtype:
        if torch.is_autocast_enabled(z.device.type):
            return value.to(z.dtype)
        raise ProblemError(
            f"{name} returned {value.dtype}, but the unknown is {z.dtype}; convert parameters or init with .to()"
        )
    return value


def check_independence(fn: Callable[[Any], Any], init: Any, batch_dims: int) -> None:
    leaves, structure = pytree.tree_flatten(init)
    samples = leaves[0].shape[:batch_dims].numel()
    if samples < 2 or leaves[0].numel() == 0:
        return

    outputs = 0

    def flat(*parts: Tensor) -> Tensor:
        nonlocal outputs
        value = pytree.tree_leaves(fn(pytree.tree_unflatten(parts, structure)))
        rows = torch.cat([v.reshape(samples, -1) for v in value], dim=1)
        outputs = rows.shape[1]
        return rows

    with torch.no_grad(), _unseen():
        pullback = pull(flat, [leaf.detach() for leaf in leaves])
        cotangent = leaves[0].new_zeros(samples, outputs)
        cotangent[0] = torch.linspace(1, 2, outputs, dtype=cotangent.dtype, device=cotangent.device)
        pulled = pullback(cotangent)
    for leaf in pulled:
        if leaf is None:
            continue
        others = leaf.reshape(samples, -1)[1:]
        if bool(((others != 0) & others.isfinite()).any()):  # a NaN sample shows NaN here, and couples nothing
            raise ProblemError(
                f"batch_dims={batch_dims} promises independent samples, but the residual of sample 0 depends on the "
                "unknown of others (batch statistics? a graph's nodes as rows?); use batch_dims=0, or normalize per "
                "sample"
            )


def _unseen() -> AbstractContextManager[Any]:
    """A checkpoint outside counts what a call saves, and only the first call is checked: so none of it shows.

    There are no hooks where nobody looks, as ``torch.func`` inside of ``fn`` can't have them.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("only to know whether there are any"):
            return nullcontext()
    except RuntimeError:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def closure_names(fn: Any) -> list[str]:
    """Names of the tensors that ``fn`` closes over and that a gradient or a ``torch.func`` transform follows."""
    try:
        variables = inspect.getclosurevars(inspect.unwrap(fn))
    except TypeError:
        return []
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    found = {**variables.globals, **variables.nonlocals}
    return sorted(
        name for name, value in found.items() if any(t.requires_grad or is_wrapped(t) for t in _tensors(value))
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    else:
        yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
