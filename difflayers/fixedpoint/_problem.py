"""The fixed-point condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.utils import _pytree as pytree

from difflayers._problem import Form, Residual, RootProblem, matched
from difflayers.linear import Property


@dataclass(frozen=True)
class FixedPointProblem(RootProblem):
    """``residual(z, *params) - z = 0``: here ``residual`` is the map ``f`` whose fixed point is wanted.

    Its Jacobian is ``∂f/∂z - I``, which is what makes Picard, Anderson, Neumann and Identity applicable.
    """

    residual: Callable[..., Any]
    batch_dims: int = 0
    form: ClassVar[Form] = "fixed_point"
    advice: ClassVar[str] = "Anderson(), Picard() or Newton()"
    properties: frozenset[Property] = field(default=frozenset({"fixed_point"}))

    def bind(self, *params: Any) -> Residual:
        def evaluate(z: Any) -> Any:
            value = matched(self.residual(z, *params), z, "the map")
            return pytree.tree_map(lambda v, x: v - x, value, z)

        return Residual(evaluate, self)
