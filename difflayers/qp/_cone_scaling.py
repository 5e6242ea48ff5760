"""A cone program in units in which its numbers are about one: the same problem, in which residuals mean something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difflayers.qp._cone_factor import constraints
from difflayers.qp._cones import Cones
from difflayers.qp._data import Data, Matrix
from difflayers.qp._scaling import equilibrated, largest_in, objective_size, power_of_two, scaled
from difflayers.qp._sparse import Sparse

# Within this factor of one nothing needs scaling.
MODERATE = 100.0


@dataclass(frozen=True, eq=False)
class Units:
    """Powers of two, so that it is the same problem to the last bit; each ``(samples, ...)``.

    The program is that of ``u`` with ``x = bDu``: of ``aDPD``, ``aDq/b``, ``ECD``, ``Ed/b`` and the same cones.

    Attributes:
        columns: ``D``, of the unknowns.
        rows: ``E``, the same for all rows of a curved cone.
        size: ``b``, of ``d``.
        objective: ``a``, one over its size.
    """

    columns: Tensor
    rows: Tensor
    size: Tensor
    objective: Tensor

    @classmethod
    def of(cls, data: Data, cones: Cones, needed: Tensor) -> Units:
        """By Ruiz's equilibration, from data off the graph; of samples that aren't ``needed`` all are one."""
        samples, needed = len(needed), needed[:, None]
        C, d = constraints(data)
        count = torch.tensor([1] * cones.linear + list(cones.sizes), device=d.device)
        cone = torch.arange(len(count), device=d.device).repeat_interleave(count)

        def shared(sizes: Tensor) -> Tensor:
            return _mean(sizes, cone)

        D = torch.where(needed, equilibrated(data, samples, shared), 1)
        lengths = shared(largest_in(scaled(C, D.new_ones(1), D), -1)).expand(samples, -1)
        E = torch.where(needed, 1 / power_of_two(lengths), 1)
        P, q = None if data.P is None else scaled(data.P, D, D), data.q * D
        b = torch.where(needed, power_of_two(_typical(P, q, E * d)), 1)
        a = torch.where(needed, 1 / power_of_two(objective_size(replace(data, P=P, q=q / b)))[:, None], 1)
        return cls(D, E, b, a)

    @property
    def x(self) -> Tensor:
        """What ``u`` is multiplied by."""
        return self.size * self.columns

    @property
    def s(self) -> Tensor:
        """What slacks are multiplied by."""
        return self.size / self.rows

    @property
    def y(self) -> Tensor:
        """What multipliers are multiplied by."""
        return self.size * self.rows / self.objective

    def applied(self, blocks: Mapping[str, Matrix]) -> dict[str, Matrix]:
        """The program in these units, on the graph of its blocks."""
        D, E, b, a = (unit.to(blocks["q"]) for unit in (self.columns, self.rows, self.size, self.objective))
        found = {"q": blocks["q"] * (a * D / b), "G": scaled(blocks["G"], E, D), "h": blocks["h"] * (E / b)}
        if "P" in blocks:
            found["P"] = scaled(blocks["P"], a * D, D)
        return {name: found[name] for name in blocks}

    def inward(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A point of the original program, in these units."""
        return x / self.x.to(x), y / self.y.to(x), s / self.s.to(x)

    def outward(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A point in these units, of the original program."""
        return x * self.x.to(x), y * self.y.to(x), s * self.s.to(x)

    def of_point(self, point: Tensor, zero: int) -> Tensor:
        """Those of ``(x, y, v)`` of a QP: of a row that holds, of the multiplier, else of the slack."""
        held = point[:, self.x.shape[-1] :] > 0
        held[:, :zero] = True
        return torch.cat([self.x, torch.where(held, self.y, self.s)], dim=-1).to(point)

    def stats(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Statistics, with proofs of the original program."""
        return {name: self.proof(stat) if name == "certificate" else stat for name, stat in stats.items()}

    def proof(self, proof: Tensor) -> Tensor:
        """That of the original program: a ray of ``x``, or multipliers."""
        return proof * torch.cat([self.columns, self.rows], dim=-1).to(proof)


def plain(data: Data) -> bool:
    """Whether no sample is :func:`extreme`, at a glance at all."""
    sizes = torch.cat([size.flatten() for size in _sizes(data)])
    least, largest = torch.where(sizes > 0, sizes, 1).aminmax()
    return float(least) >= 1 / MODERATE and float(largest) <= MODERATE


def extreme(data: Data, samples: int) -> Tensor:
    """In which samples the objective, ``d``, or a row or column of ``C`` is of a size far from one, ``(samples,)``."""
    found = torch.zeros(samples, dtype=torch.bool, device=data.q.device)
    for size in _sizes(data):
        found = found | (((size > MODERATE) | (size < 1 / MODERATE)) & (size > 0)).any(-1)
    return found


def _sizes(data: Data) -> list[Tensor]:
    """The largest absolute values in the objective, in ``d``, and in columns and rows of ``C``."""
    C, d = constraints(data)
    sizes = [objective_size(data).unsqueeze(-1), d.abs().amax(-1, keepdim=True)]
    if isinstance(C, Sparse):
        return [*sizes, largest_in(C, -2), largest_in(C, -1)]
    # Where there are many, allocating absolute values would take most of the time.
    return [*sizes, *[torch.maximum(C.amax(dim), -C.amin(dim)) for dim in (-2, -1)]]


def _typical(P: Matrix | None, q: Tensor, d: Tensor) -> Tensor:
    """A size of ``x``: what rows of length one reach, or where those are homogeneous, what the objective asks for."""
    size = _level(d)
    if P is None:
        return size
    curvature = largest_in(P, -1).amax(-1, keepdim=True)
    asked = torch.where(curvature > 0, q.abs().amax(-1, keepdim=True) / torch.where(curvature > 0, curvature, 1), 0)
    return torch.where(size > 0, size, asked)


def _level(d: Tensor) -> Tensor:
    """The geometric mean of the entries that aren't zero, ``(..., 1)``."""
    return _mean(d.abs(), torch.zeros(d.shape[-1], dtype=torch.int64, device=d.device))[..., :1]


def _mean(sizes: Tensor, group: Tensor) -> Tensor:
    """Of every group the geometric mean of what isn't zero, in all its places; zero where nothing is left."""
    present = sizes > 0
    empty = sizes.new_zeros(*sizes.shape[:-1], int(group[-1]) + 1)
    logs = empty.index_add(-1, group, torch.where(present, sizes, 1).log())
    count = empty.index_add(-1, group, present.to(sizes.dtype))
    return torch.where(count > 0, (logs / count.clamp_min(1)).exp(), 0)[..., group]
