"""Cones of one kind and size, all of them at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from difflayers._autodiff import value_and_jacobian
from difflayers.qp._exponential import exponential_cone, spectrum
from difflayers.qp._power import power_cone
from difflayers.qp.projections._cones import psd, second_order_cone

ROOT2 = 2**0.5
# Up to how many rows of a second-order cone its eigenvectors are one small matrix.
FEW = 16


class Spectrum:
    """Eigenvalues ``(samples, count, size)`` and eigenvectors of symmetric blocks."""

    def __init__(self, values: Tensor, vectors: Tensor) -> None:
        self.values, self.vectors = values, vectors

    def turned(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """``QᵀM`` or ``QM`` for ``M (samples, count, size, k)``, where the columns of ``Q`` are the eigenvectors."""
        return (self.vectors if back else self.vectors.mT) @ rows


class MatrixSpectrum(Spectrum):
    """For symmetric matrices as vectors: eigenvectors are ``qᵢqⱼᵀ + qⱼqᵢᵀ``, and turning is ``VᵀXV``."""

    def __init__(self, values: Tensor, vectors: Tensor, piece: Semidefinite) -> None:
        super().__init__(values, vectors)
        self._piece = piece

    def turned(self, rows: Tensor, *, back: bool = False) -> Tensor:
        V, piece = self.vectors, self._piece
        left = V if back else V.mT
        count, k = rows.shape[-1], piece.k
        X = piece.matrix(rows.mT)  # (samples, count, columns, k, k), symmetric
        # Products with all columns at once: rows of X as one tall matrix, twice.
        half = (X.reshape(*X.shape[:-3], count * k, k) @ left.mT).reshape(X.shape).mT
        full = (half.reshape(*X.shape[:-3], count * k, k) @ left.mT).reshape(X.shape)
        return piece.vector(full).mT


class Reflected(Spectrum):
    """For second-order cones of many rows: a reflection ``I - mmᵀ`` of ``u`` and a rotation of two rows."""

    def __init__(self, values: Tensor, mirror: Tensor, pair: Tensor) -> None:
        self.values, self._mirror, self._pair = values, mirror, pair

    def turned(self, rows: Tensor, *, back: bool = False) -> Tensor:
        turned = rows.clone()
        steps = (self._rotate, self._reflect) if back else (self._reflect, self._rotate)
        for step in steps:
            step(turned, back)
        return turned

    def _reflect(self, rows: Tensor, back: bool) -> None:
        m, u = self._mirror.unsqueeze(-1), rows[..., 1:, :]
        u -= m * (m.mT @ u)

    def _rotate(self, rows: Tensor, back: bool) -> None:
        rows[..., :2, :] = (self._pair.mT if back else self._pair) @ rows[..., :2, :]


class Piece(ABC):
    """Cones of one kind and size; ``index (count, size)`` are their rows, counted from the first curved one."""

    def __init__(self, index: Tensor) -> None:
        self.index = index
        first, flat = int(index[0, 0]), index.flatten()
        # Rows that follow one another are a view.
        self._first = first if torch.equal(flat, torch.arange(first, first + len(flat))) else None

    def take(self, rows: Tensor, dim: int = -1) -> Tensor:
        """The rows of these cones, with ``dim`` split into two."""
        if self._first is None:
            picked = rows.index_select(dim, self.index.flatten().to(rows.device))
        else:
            picked = rows.narrow(dim, self._first, self.index.numel())
        cones: Tensor = picked.unflatten(dim, self.index.shape)
        return cones

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """The nearest point of the dual cone, ``(*batch, count, size)``."""

    @abstractmethod
    def spectrum(self, v: Tensor, y: Tensor) -> Spectrum:
        """Of the derivative of :meth:`project` at ``v (samples, count, size)``, where it is ``y``."""


class SecondOrder(Piece):
    """Second-order cones."""

    def project(self, v: Tensor) -> Tensor:
        return torch.relu(v) if v.shape[-1] == 1 else second_order_cone(v)

    def spectrum(self, v: Tensor, y: Tensor) -> Spectrum:
        """Eigenvectors ``(1, ±u/‖u‖)/√2`` and ``(0, e)`` for ``e`` orthogonal to ``u``."""
        t, u = v[..., 0], v[..., 1:]
        if not u.shape[-1]:
            return Spectrum((t >= 0).to(v).unsqueeze(-1), torch.ones_like(v).unsqueeze(-1))
        size = torch.linalg.vector_norm(u, dim=-1)
        inside, polar = size <= t, size <= -t
        ratio = (t + size) / (2 * torch.where(size > 0, size, 1))
        middle = torch.where(inside, 1, torch.where(polar, 0, ratio)).unsqueeze(-1).expand_as(v).clone()
        between = ~(inside | polar)
        middle[..., :1] = torch.where(between, 1, middle[..., 0]).unsqueeze(-1)
        middle[..., 1:2] = torch.where(between.unsqueeze(-1), 0, middle[..., 1:2])
        basis = _reflected(middle, u, size)
        if v.shape[-1] > FEW:
            return basis
        eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device).expand(*v.shape, -1)
        return Spectrum(middle, basis.turned(eye, back=True))


def _reflected(values: Tensor, u: Tensor, size: Tensor) -> Reflected:
    """By a Householder reflection, which takes the first axis to ``∓u/‖u‖``."""
    unit = u / torch.where(size > 0, size, 1).unsqueeze(-1)
    first = unit[..., 0] + (size == 0)
    sign = torch.where(first >= 0, 1, -1).to(u)
    mirror = torch.cat([(first + sign).unsqueeze(-1), unit[..., 1:]], dim=-1)
    mirror = mirror * (ROOT2 / torch.linalg.vector_norm(mirror, dim=-1, keepdim=True))
    ones = torch.ones_like(sign)
    pair = torch.stack([torch.stack([ones, -sign], dim=-1), torch.stack([ones, sign], dim=-1)], dim=-2)
    return Reflected(values, mirror, pair / ROOT2)


class Semidefinite(Piece):
    """Positive semidefinite matrices of order ``k``."""

    def __init__(self, index: Tensor, k: int) -> None:
        super().__init__(index)
        self.k = k

    def project(self, v: Tensor) -> Tensor:
        return self.vector(psd(self.matrix(v)))

    def spectrum(self, v: Tensor, y: Tensor) -> Spectrum:
        values, Q = torch.linalg.eigh(self.matrix(v))
        rounding = self.k * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        rows, columns = self._triangle
        one, other = values[..., rows], values[..., columns]
        high, low = (values > rounding)[..., rows], (values > rounding)[..., columns]
        across = high != low
        ratio = torch.maximum(one, other) / torch.where(across, (one - other).abs(), 1)
        D = torch.where(across, ratio, (high & low).to(v.dtype))
        return MatrixSpectrum(D, Q, self)

    @cached_property
    def _triangle(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the upper triangle, column by column."""
        columns, rows = torch.tril_indices(self.k, self.k)
        return rows, columns

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Where each entry of the matrix is in the vector, and what it is multiplied by there."""
        rows, columns = self._triangle
        places = torch.zeros(self.k, self.k, dtype=torch.int64)
        places[rows, columns] = places[columns, rows] = torch.arange(len(rows))
        scale = torch.full((self.k, self.k), 1 / ROOT2, dtype=torch.float64)
        return places, scale.fill_diagonal_(1)

    def matrix(self, v: Tensor) -> Tensor:
        """Symmetric matrices ``(..., k, k)`` from their vectors."""
        places, scale = self._places
        return v[..., places.to(v.device)] * scale.to(v)

    def vector(self, X: Tensor) -> Tensor:
        """Vectors ``(..., size)`` from symmetric matrices."""
        rows, columns = self._triangle
        _, scale = self._places
        return X[..., rows, columns] / scale[rows, columns].to(X)


class Exponential(Piece):
    """Exponential cones."""

    def project(self, v: Tensor) -> Tensor:
        return v + exponential_cone(-v)

    def spectrum(self, v: Tensor, y: Tensor) -> Spectrum:
        values, vectors = spectrum(-v, y - v)
        return Spectrum(1 - values, vectors)


class Power(Piece):
    """Power cones."""

    def __init__(self, index: Tensor, exponents: Sequence[float]) -> None:
        super().__init__(index)
        self.exponents = torch.tensor(exponents, dtype=torch.float64)

    def project(self, v: Tensor) -> Tensor:
        return v + power_cone(-v, self.exponents.to(v))

    def spectrum(self, v: Tensor, y: Tensor) -> Spectrum:
        return _by_autodiff(self, v)


def _by_autodiff(piece: Piece, v: Tensor) -> Spectrum:
    D = value_and_jacobian(piece.project, v.detach(), 2)[1].detach().unflatten(0, v.shape[:2])
    values, vectors = torch.linalg.eigh((D + D.mT) / 2)
    return Spectrum(values.clamp(0, 1), vectors)


def pieces(
    second_order: Sequence[int],
    semidefinite: Sequence[int],
    exponential: int,
    power: Sequence[float],
) -> tuple[Piece, ...]:
    """The curved cones, those of one kind and size together."""
    found: list[Piece] = [SecondOrder(torch.stack(index)) for index in _places(0, second_order).values()]
    start = sum(second_order)
    triangles = [k * (k + 1) // 2 for k in semidefinite]
    found += [Semidefinite(torch.stack(index), _order(size)) for size, index in _places(start, triangles).items()]
    start += sum(triangles)
    if exponential:
        found.append(Exponential(torch.arange(start, start + 3 * exponential).reshape(-1, 3)))
    start += 3 * exponential
    if power:
        found.append(Power(torch.arange(start, start + 3 * len(power)).reshape(-1, 3), power))
    return tuple(found)


def _places(start: int, sizes: Sequence[int]) -> dict[int, list[Tensor]]:
    """The rows of the cones of each size."""
    places: dict[int, list[Tensor]] = {}
    for size in sizes:
        places.setdefault(size, []).append(torch.arange(start, start + size))
        start += size
    return places


def _order(triangle: int) -> int:
    return (math.isqrt(8 * triangle + 1) - 1) // 2
