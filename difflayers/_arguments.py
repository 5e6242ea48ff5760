"""A callable's module parameters and arguments as a row of tensors, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Fixed:
    """An argument that isn't a tensor."""

    value: Any


@dataclass(frozen=True)
class Arguments:
    """How the tensors lie in a row, module parameters first."""

    structure: pytree.TreeSpec
    fixed: tuple[Fixed | None, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], params: Sequence[Any]) -> tuple[Arguments, tuple[Tensor, ...]]:
        """The layout for a callable with these arguments, and its tensors."""
        module = dict(function.named_parameters()) if isinstance(function, nn.Module) else {}
        leaves, structure = pytree.tree_flatten((module, tuple(params)))
        fixed = tuple(None if isinstance(leaf, Tensor) else Fixed(leaf) for leaf in leaves)
        return cls(structure, fixed), tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def unflatten(self, tensors: Sequence[Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """The module's parameters by name, and the arguments."""
        found = iter(tensors)
        leaves = [next(found) if fixed is None else fixed.value for fixed in self.fixed]
        return pytree.tree_unflatten(leaves, self.structure)  # type: ignore[no-any-return]


def with_parameters(function: Callable[..., Any], parameters: dict[str, Tensor]) -> Callable[..., Any]:
    """The callable with these parameters in place of its own, if it is a module."""
    if not isinstance(function, nn.Module) or _holds(function, parameters):
        return function
    return functools.partial(_functional, function, parameters)


def _holds(module: nn.Module, params: dict[str, Tensor]) -> bool:
    """Whether these are the module's own parameters right now: calling it as it is saves the swap per evaluation."""
    return all(own is given for own, given in zip(module.parameters(), params.values(), strict=True))


def _functional(module: nn.Module, params: dict[str, Tensor], *args: Any) -> Any:
    return torch.func.functional_call(module, params, args)
