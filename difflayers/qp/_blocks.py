"""What problems have in common whose parameters are blocks of data, such as ``P`` and ``q``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self

from torch import Tensor

from difflayers._problem import Problem
from difflayers.linear import Property
from difflayers.qp._data import MATRICES, Data
from difflayers.qp._sparse import Pattern, Sparse


class BlockProblem(Problem):
    """A problem with blocks for parameters; what is a field of it is said there.

    Attributes:
        blocks: which blocks are there, in the order in which they come as parameters.
        batch_dims: how many leading dimensions index samples.
        warm: whether a solve starts from a solution of a similar problem.
        patterns: of the blocks that are sparse, by name; the parameter is then the values.
        maps: which parameters ``vmap`` took a dimension from, innermost first.
        known: the parameters that it will be bound to, off the graph and in float64, where somebody has them already.
    """

    blocks: tuple[str, ...]
    batch_dims: int
    warm: bool
    patterns: Mapping[str, Pattern]
    maps: tuple[tuple[int | None, ...], ...]
    known: Data | None
    properties: frozenset[Property]
    closed: ClassVar[bool] = True

    def data(self, params: Sequence[Tensor]) -> Data:
        """The parameters by name, with all batch dimensions or with none."""
        if self.maps:
            params = [self._aligned(index, param) for index, param in enumerate(params)]
        blocks = dict(zip(self.blocks, params, strict=True))
        return Data.of(blocks | {name: Sparse.on(p, blocks[name]) for name, p in self.patterns.items()})

    def vmapped(self, in_dims: tuple[int | None, ...], randomness: str) -> Self:
        return replace(self, batch_dims=self.batch_dims + 1, maps=(*self.maps, in_dims), known=None)  # type: ignore[type-var]

    def _aligned(self, index: int, param: Tensor) -> Tensor:
        """The parameter with all batch dimensions or with none, as far as ``vmap`` took some from it."""
        name = self.blocks[index]
        event = 2 if name in MATRICES and name not in self.patterns else 1
        levels = [in_dims[index] for in_dims in self.maps]
        return param.reshape(_aligned_shape(tuple(param.shape), levels, event, self.batch_dims))


def _aligned_shape(
    shape: tuple[int, ...], levels: Sequence[int | None], event: int, batch_dims: int
) -> tuple[int, ...]:
    if not levels:
        return shape
    *inner, mapped = levels
    rest = _aligned_shape(shape if mapped is None else shape[1:], inner, event, batch_dims - 1)
    if mapped is None:
        return rest if len(rest) == event else (1, *rest)
    return (shape[0], *[1] * (batch_dims - 1 + event - len(rest)), *rest)
