"""What is done around every projection: arrays, shapes, half precision, autocast, samples that aren't finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers._arrays import at_least_float32, to_tensors
from difflayers._autodiff import in_functorch, without_autocast
from difflayers._solution import to_numpy
from difflayers.errors import ProblemError

Rule = Callable[..., Tensor]
Shape = tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """An argument: its name, its value, and the trailing dimensions that aren't batch, each by a letter.

    ``holds`` says which values make sense, one answer per sample, ``wanted`` says the same in words, and ``instead`` is
    calculated with where they don't.
    """

    name: str
    value: Any
    shape: Shape = ()
    holds: Callable[[Tensor], Tensor] | None = None
    wanted: str = ""
    instead: float = 1.0

    def of(self, value: Tensor) -> Parameter:
        """The same with another value."""
        return Parameter(self.name, value, self.shape, self.holds, self.wanted, self.instead)

    def described(self) -> str:
        return f"{self.name} {tuple(self.value.shape)} as (*batch{''.join(', ' + letter for letter in self.shape)})"


def positive(name: str, value: Any) -> Parameter:
    """One positive number per sample."""
    return Parameter(name, value, (), lambda t: (t > 0) & (t < torch.inf), "positive and finite")


def projected(rule: Rule, x: Any, *parameters: Parameter, shape: Shape = ("n",), dim: int = -1) -> Any:
    """``rule(x, *parameters)``, which gets finite tensors ``(*batch, *shape)`` of at least single precision.

    ``dim`` is the dimension of ``x`` that is last for the rule, if its shape has one dimension.
    """
    arguments, numpy = checked((Parameter("x", x, shape), *parameters), dim)
    x = arguments[0].value
    dim = dim if dim < 0 else dim - x.dim()  # batch dimensions may be added in front
    with without_autocast(x.device):
        moved = x if dim == -1 else x.movedim(dim, -1)
        values = [at_least_float32(t) for t in (moved, *[p.value for p in arguments[1:]])]
        value = _guarded(rule, arguments, values).to(x.dtype)
        value = value if dim == -1 else value.movedim(-1, dim)
    return to_numpy(value) if numpy else value


def checked(arguments: Sequence[Parameter], dim: int = -1) -> tuple[list[Parameter], bool]:
    """The same with tensors as values, and whether the answer goes back to NumPy.

    Raises:
        ProblemError: a type, dtype, device, shape or value doesn't fit.
    """
    point, *rest = [p.value for p in arguments]
    numpy = isinstance(point, (np.ndarray, np.generic))
    if numpy and any(isinstance(value, Tensor) and value.requires_grad for value in rest):
        raise ProblemError("x is a NumPy array, but a parameter requires grad; pass x as a tensor")
    point = to_tensors(point) if numpy else point
    if not isinstance(point, Tensor) or not point.is_floating_point():
        what = str(point.dtype) if isinstance(point, Tensor) else type(point).__name__
        raise ProblemError(f"x must be a tensor or array of real floating point, got {what}; try x.double()")
    first = arguments[0].of(point)
    tensors = [first, *[p.of(_tensor(p, point)) for p in arguments[1:]]]
    _check_sizes(tensors, dim)
    for parameter in tensors[1:]:
        _check_values(parameter)
    return tensors, numpy


def readable() -> bool:
    """Whether Python may look at the values of tensors."""
    return not torch.compiler.is_compiling() and not in_functorch()


def _tensor(parameter: Parameter, x: Tensor) -> Tensor:
    value, name = parameter.value, parameter.name
    if isinstance(value, (int, float)):
        return torch.full((), value, dtype=x.dtype, device=x.device)
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.as_tensor(np.array(value), dtype=x.dtype, device=x.device)
    if not isinstance(value, Tensor):
        raise ProblemError(f"{name} must be a number, a tensor or an array, got {type(value).__name__}")
    if (value.dtype, value.device) != (x.dtype, x.device):
        raise ProblemError(
            f"{name} is {value.dtype} on {value.device}, but x is {x.dtype} on {x.device}; convert one with .to()"
        )
    return value


def _check_sizes(arguments: Sequence[Parameter], dim: int) -> None:
    x = arguments[0]
    for p in arguments:
        if p.value.dim() < len(p.shape):
            raise ProblemError(f"{p.described()} has too few dimensions")
    if x.shape and not -x.value.dim() <= dim < x.value.dim():
        raise ProblemError(f"dim is {dim}, but x has shape {tuple(x.value.shape)}")
    shapes = [p.value.shape for p in arguments]
    if x.shape == ("n",):
        last = dim % x.value.dim()
        shapes[0] = torch.Size([*shapes[0][:last], *shapes[0][last + 1 :], shapes[0][last]])
    sizes: dict[str, tuple[int, Parameter]] = {}
    for p, shape in zip(arguments, shapes, strict=True):
        for letter, size in zip(p.shape, shape[len(shape) - len(p.shape) :], strict=True):
            known, other = sizes.setdefault(letter, (size, p))
            if known != size:
                raise ProblemError(
                    f"{letter} is {known} or {size}: {other.described()}" + ("" if other is p else f", {p.described()}")
                )
    try:
        torch.broadcast_shapes(*[s[: len(s) - len(p.shape)] for s, p in zip(shapes, arguments, strict=True)])
    except RuntimeError as error:
        listed = ", ".join(p.described() for p in arguments)
        raise ProblemError(f"the batch dimensions don't broadcast: {listed}") from error


def _check_values(parameter: Parameter) -> None:
    if parameter.holds is None or not readable():
        return
    value = parameter.value.detach()
    wrong = ~parameter.holds(value) & ~_over_event(value.isnan(), parameter).any(-1)
    if bool(wrong.any()):
        where = f" in sample {tuple(wrong.nonzero()[0].tolist())}" if wrong.dim() else ""
        found = value[tuple(wrong.nonzero()[0])].tolist()
        raise ProblemError(f"{parameter.name} must be {parameter.wanted}, got {found}{where}")


def _over_event(entries: Tensor, parameter: Parameter) -> Tensor:
    """With what isn't batch as one dimension."""
    event = len(parameter.shape)
    return entries.flatten(entries.dim() - event) if event else entries.unsqueeze(-1)


def batch_first(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """What an autograd function's ``vmap`` gets, with the new dimension in front of all."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    ]


def _guarded(rule: Rule, arguments: Sequence[Parameter], values: list[Tensor]) -> Tensor:
    """The rule on samples that are finite and make sense; NaN, whose gradient stops here, for the others."""
    fine: Tensor | bool = True
    clean = []
    for parameter, value in zip(arguments, values, strict=True):
        # Zero times what isn't finite is NaN; two passes where isfinite() takes four.
        good = _over_event(value.detach() * 0, parameter).sum(-1) == 0
        if parameter.holds is not None:
            good = good & parameter.holds(value)
        clean.append(torch.where(good.reshape(good.shape + (1,) * len(parameter.shape)), value, parameter.instead))
        fine = good & fine
    result = rule(*clean)
    wide = fine.reshape(fine.shape + (1,) * len(arguments[0].shape))  # type: ignore[union-attr]
    return torch.where(wide, result, torch.nan)
