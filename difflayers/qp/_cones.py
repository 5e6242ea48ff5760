"""Products of cones: which rows are in which, projections on the dual, and the spectra of their derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers.errors import ProblemError, UnknownNameError
from difflayers.qp._cone_pieces import Piece, Reflected, Spectrum, pieces
from difflayers.qp._sparse import Sparse


class Rotation(NamedTuple):
    """The derivative ``D`` of the dual projection, per sample: ``D = Q diag(values) Qᵀ``."""

    values: Tensor  # (samples, rows), between zero and one
    spectra: tuple[Spectrum, ...]  # one for each piece of the curved cones


class Derivative(NamedTuple):
    """``D = B + U diag(w) Uᵀ``, per sample: blocks, and two eigenvectors of every long second-order cone."""

    blocks: Sparse  # (rows, rows)
    vectors: Sparse  # (rows, k)
    weights: Tensor  # (samples, k)


class _Entries(NamedTuple):
    """Of a sparse matrix: places that broadcast to the values, but for their samples."""

    rows: Tensor
    columns: Tensor
    values: Tensor


@dataclass(frozen=True)
class Cones:
    """The cone ``K`` of ``Cx + s = d, s ∈ K``: how many rows, or cones of which sizes, in this order.

    Args:
        zero: rows with ``s = 0``.
        nonnegative: rows with ``s ≥ 0``.
        second_order: sizes ``1 + k`` of cones ``‖(s₁, …, s_k)‖₂ ≤ s₀``.
        semidefinite: orders ``k`` of positive semidefinite matrices, ``k(k + 1)/2`` rows each: the upper triangle,
            column by column, entries off the diagonal times ``√2``.
        exponential: how many cones ``s₁ exp(s₀/s₁) ≤ s₂``, ``s₁ > 0``, of three rows each.
        power: the exponents ``α`` of cones ``s₀^α s₁^(1 - α) ≥ |s₂|``, ``s₀, s₁ ≥ 0``, of three rows each.

    >>> Cones(nonnegative=2, second_order=(3,), semidefinite=(2,)).rows
    8
    """

    zero: int = 0
    nonnegative: int = 0
    second_order: tuple[int, ...] = ()
    semidefinite: tuple[int, ...] = ()
    exponential: int = 0
    power: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("second_order", "semidefinite", "power"):
            try:
                object.__setattr__(self, name, tuple(getattr(self, name)))
            except TypeError as error:
                raise ProblemError(
                    f"{name} must be a sequence, one entry per cone, got {getattr(self, name)}"
                ) from error
        counts = {"zero": (self.zero,), "nonnegative": (self.nonnegative,), "exponential": (self.exponential,)}
        for name, values in counts.items():
            _check_integers(name, values, 0)
        for name in ("second_order", "semidefinite"):
            _check_integers(name, getattr(self, name), 1)
        for exponent in self.power:
            if not 0 < exponent < 1:
                raise ProblemError(f"power has the exponent {exponent}, but exponents are between zero and one")

    @classmethod
    def of(cls, cones: Cones | Mapping[str, Any]) -> Cones:
        """The cones as they are, or from a mapping with these names.

        Raises:
            ProblemError: an unknown name, or a size that makes no sense.
        """
        if isinstance(cones, Cones):
            return cones
        if not isinstance(cones, Mapping):
            raise ProblemError(f"cones must be Cones or a mapping, got {type(cones).__name__}")
        known = tuple(field.name for field in fields(cls))
        for name in cones:
            if name not in known:
                raise UnknownNameError("cone", str(name), known)
        return cls(**cones)

    @property
    def linear(self) -> int:
        """Rows of the zero and nonnegative cones."""
        return self.zero + self.nonnegative

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of every cone after the linear ones."""
        triangles = tuple(k * (k + 1) // 2 for k in self.semidefinite)
        return (*self.second_order, *triangles, *[3] * (self.exponential + len(self.power)))

    @property
    def rows(self) -> int:
        """Of all cones."""
        return self.linear + sum(self.sizes)

    def project(self, v: Tensor) -> Tensor:
        """The nearest point of the dual cone, ``(*batch, rows)``; differentiable to every order.

        By Moreau's decomposition, ``v + Π_K(-v)`` where a cone isn't its own dual.
        """
        parts, curved = [v[..., : self.zero], torch.relu(v[..., self.zero : self.linear])], v[..., self.linear :]
        parts += self._ordered([piece.project(piece.take(curved)).flatten(-2) for piece in self._pieces], -1)
        return torch.cat(parts, dim=-1)

    def rotation(self, v: Tensor, y: Tensor) -> Rotation:
        """The derivative of :meth:`project` at ``v (samples, rows)``, where it is ``y``: by eigenvectors of each cone.

        Rows of curved cones are then no longer rows but eigenvectors, in the same places.
        """
        curved, y = v[:, self.linear :], y[:, self.linear :]
        spectra = tuple(piece.spectrum(piece.take(curved), piece.take(y)) for piece in self._pieces)
        parts = [torch.ones_like(v[:, : self.zero]), (v[:, self.zero : self.linear] > 0).to(v.dtype)]
        parts += self._ordered([spectrum.values.flatten(-2) for spectrum in spectra], -1)
        return Rotation(torch.cat(parts, dim=-1), spectra)

    def turned(self, rotation: Rotation, rows: Tensor, *, back: bool = False) -> Tensor:
        """``Qᵀ M`` for ``M (samples, rows, k)``, or ``Q M``; of the linear rows it is ``M`` itself."""
        if not rotation.spectra:
            return rows
        curved = self.turned_curved(rotation, rows[:, self.linear :], back=back)
        return torch.cat([rows[:, : self.linear], curved], dim=-2) if self.linear else curved

    def turned_curved(self, rotation: Rotation, rows: Tensor, *, back: bool = False) -> Tensor:
        """:meth:`turned` of the rows of curved cones alone."""
        pairs = zip(self._pieces, rotation.spectra, strict=True)
        parts = [spectrum.turned(piece.take(rows, -2), back=back).flatten(-3, -2) for piece, spectrum in pairs]
        (joined,) = self._ordered(parts, -2) or [rows]
        return joined

    def widened(self, sizes: Tensor, first: int) -> Tensor:
        """Sizes of rows, after ``first`` others: of the rows of a curved cone, the largest."""
        parts = list(sizes.split([first + self.linear, *self.sizes], dim=-1))
        return torch.cat([parts[0], *[part.amax(-1, keepdim=True).expand_as(part) for part in parts[1:]]], dim=-1)

    def derivative(self, rotation: Rotation) -> Derivative:
        """``D`` itself."""
        samples, linear, k = len(rotation.values), torch.arange(self.linear), 0
        blocks = [_Entries(linear, linear, rotation.values[:, : self.linear])]
        vectors, weights = [_Entries(linear[:0], linear[:0], rotation.values[:, :0])], [rotation.values[:, :0]]
        for piece, spectrum in zip(self._pieces, rotation.spectra, strict=True):
            rows, values = piece.index + self.linear, spectrum.values
            count, size = rows.shape
            # Of long second-order cones, all eigenvalues but the first two are the same.
            long = isinstance(spectrum, Reflected)
            eye = torch.eye(size, 2 if long else size).to(values).expand(samples, count, -1, -1)
            if long:
                columns = k + torch.arange(2 * count).reshape(count, 1, 2)
                blocks.append(_Entries(rows, rows, values[..., 2:3].expand_as(values)))
                vectors.append(_Entries(rows.unsqueeze(-1), columns, spectrum.turned(eye, back=True)))
                weights.append((values[..., :2] - values[..., 2:3]).flatten(1))
                k += 2 * count
            else:
                block = spectrum.turned(values.unsqueeze(-1) * spectrum.turned(eye), back=True)
                blocks.append(_Entries(rows.unsqueeze(-1), rows.unsqueeze(-2), block))
        return Derivative(_sparse(blocks, self.rows, self.rows), _sparse(vectors, self.rows, k), torch.cat(weights, -1))

    @cached_property
    def _pieces(self) -> tuple[Piece, ...]:
        return pieces(self.second_order, self.semidefinite, self.exponential, self.power)

    def _ordered(self, parts: list[Tensor], dim: int) -> list[Tensor]:
        """What there is of each piece, in the order of rows, as one tensor if there is any."""
        if len(parts) < 2:
            return parts
        joined = torch.cat(parts, dim=dim)
        return [joined if self._order is None else joined.index_select(dim, self._order.to(joined.device))]

    @cached_property
    def _order(self) -> Tensor | None:
        """Where each row is after cones of one kind and size were put together; None where it was."""
        index = torch.cat([piece.index.flatten() for piece in self._pieces])
        inverse = index.argsort()
        return None if torch.equal(inverse, torch.arange(len(index))) else inverse


def _sparse(entries: list[_Entries], rows: int, columns: int) -> Sparse:
    places = [[place.expand(e.values.shape[1:]).flatten() for place in (e.rows, e.columns)] for e in entries]
    indices = torch.stack([torch.cat(parts) for parts in zip(*places, strict=True)])
    values = torch.cat([e.values.flatten(1) for e in entries], dim=-1)
    return Sparse(indices.to(values.device), values, (rows, columns))


def _check_integers(name: str, values: tuple[Any, ...], least: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProblemError(f"{name} has {value!r}, but it must be made of integers of at least {least}")
