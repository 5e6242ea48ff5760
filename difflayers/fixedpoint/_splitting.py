"""Monotone equilibria ``z = relu(W z + x)`` with ``I - W`` strongly monotone, and the splittings that find them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32
from difflayers._problem import Problem, Residual
from difflayers._solver import IterativeSolver
from difflayers.errors import ProblemError
from difflayers.fixedpoint._problem import FixedPointProblem
from difflayers.linear._direct import lu_factor

_TRIALS = 12


class Blocks(ABC):
    """A linear map ``W`` on samples, block diagonal in some basis: ``matrices`` are its blocks, ``(blocks, n, n)``."""

    matrices: Tensor

    @abstractmethod
    def apply(self, z: Tensor) -> Tensor:
        """``W z``, ``(*batch, *event)``."""

    @abstractmethod
    def analyze(self, z: Tensor) -> Tensor:
        """``z`` in the basis of the blocks, ``(*batch, blocks, n)``."""

    @abstractmethod
    def synthesize(self, coefficients: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`analyze`, in the shape and dtype of ``like``."""

    def complement(self) -> Tensor:
        """The blocks of ``I - W``, in at least single precision."""
        matrices = self.matrices if self.matrices.is_complex() else at_least_float32(self.matrices)
        return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device) - matrices

    def factor(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """An LU factorization of ``I + step · (I - W)``."""
        blocks = self.complement()
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        return lu_factor(eye + step * blocks)

    def solve(self, lu: Tensor, pivots: Tensor, v: Tensor) -> Tensor:
        """``(I + step · (I - W))⁻¹ v`` from that factorization."""
        columns = self.analyze(v).to(lu.dtype).movedim(-2, 0)
        rows = columns.reshape(columns.shape[0], -1, columns.shape[-1])
        solved = torch.linalg.lu_solve(lu, pivots, rows.mT).mT.reshape(columns.shape)
        return self.synthesize(solved.movedim(0, -2), v)


class Dense(Blocks):
    """``W`` as one matrix ``(n, n)``."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.matrices = weight, weight.unsqueeze(0)

    def apply(self, z: Tensor) -> Tensor:
        return z @ self.weight.mT

    def analyze(self, z: Tensor) -> Tensor:
        return z.unsqueeze(-2)

    def synthesize(self, coefficients: Tensor, like: Tensor) -> Tensor:
        return coefficients.squeeze(-2).to(like.dtype)


class MonotoneResidual(Residual):
    """``z -> relu(W z + x) - z``, with ``W`` and ``x`` in the open."""

    def __init__(self, operator: Blocks, offset: Tensor, problem: Problem) -> None:
        super().__init__(self._evaluate, problem)
        self.operator, self.offset = operator, offset
        self._at: Tensor | None = None
        self._affine: Tensor | None = None

    def affine(self, z: Tensor) -> Tensor:
        """``W z + x``; asking twice at one ``z`` costs once."""
        if self._affine is None or z is not self._at:
            self._at, self._affine = z, self.operator.apply(z) + self.offset
        return self._affine

    def _evaluate(self, z: Tensor) -> Tensor:
        return torch.relu(self.affine(z)) - z


def dense_equilibrium(z: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """``relu(W z + x)``, the map of which :class:`MonotoneProblem` wants the fixed point."""
    return torch.relu(z @ weight.mT + offset)


@dataclass(frozen=True)
class MonotoneProblem(FixedPointProblem):
    """``z = relu(W z + x)`` in the parameters ``(W, x)``, ``(n, n)`` and ``(*batch, n)``.

    It has exactly one solution where ``I - W`` is strongly monotone: ``½ (2I - W - Wᵀ) ⪰ mI`` with ``m > 0`` (Winston
    and Kolter 2020, NeurIPS, "Monotone operator equilibrium networks", theorem 1).
    """

    residual: Callable[..., Any] = dense_equilibrium
    batch_dims: int = field(default=1, kw_only=True)
    shared = 1

    def bind(self, *params: Any) -> Residual:
        weight, offset = params
        return MonotoneResidual(Dense(weight), offset, self)


@dataclass(frozen=True)
class Splitting(IterativeSolver):
    """What both splittings share: a step size, and a problem in which they can see ``W``."""

    max_steps: int = 2000
    patience: int = field(default=2000, kw_only=True)
    step_size: float | None = None

    def supports(self, problem: Problem) -> str | None:
        if isinstance(problem, MonotoneProblem):
            return None
        return f"{type(self).__name__} splits a MonotoneProblem into its linear part and relu; use {problem.advice}"

    def _step_size(self, operator: Blocks, factors: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``α``, the best of several by ``factors(α, blocks of I - W)``, ``(trials, blocks)``."""
        blocks = operator.complement()
        real = blocks.real
        if self.step_size is not None:
            return real.new_tensor(self.step_size)
        largest = _largest_eigenvalue(blocks.mH @ blocks).amax().sqrt()
        margin = torch.linalg.eigvalsh((blocks + blocks.mH) / 2).amin()
        low = (margin / largest**2).clamp_min(1e-4 / largest)
        # A step beyond 2/m contracts less than that one.
        exponents = torch.linspace(0, 1, _TRIALS, dtype=real.dtype, device=real.device)
        high = (2 / margin).clamp(2 / largest, 1e4 / largest)
        trials = low * (high / low) ** exponents
        worst = factors(trials[:, None, None, None], blocks).amax(-1).nan_to_num(torch.inf)
        return torch.gather(trials, 0, worst.argmin(0, keepdim=True)).squeeze(0)


@dataclass(frozen=True)
class ForwardBackward(Splitting):
    """Forward-backward splitting: ``z <- relu(z - α (z - W z - x))``.

    Needs products with ``W`` only; converges for ``α`` below ``2m/‖I - W‖²``, slowly where ``‖I - W‖`` is far above the
    margin ``m`` (Winston and Kolter 2020, section 3.3).

    Args:
        step_size: ``α``; None is the one of a dozen with the least proven contraction factor, at the cost of as many
            factorizations a solve. For layers of many hundred units give a number.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    max_steps: int = 20_000
    patience: int = field(default=20_000, kw_only=True)

    def init(self, residual: Residual, z: Tensor) -> Tensor:
        step_size: Tensor = residual.inside(self._prepare, z)
        return step_size

    def step(self, residual: Residual, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return residual.inside(_forward_backward, z, state), state

    def _prepare(self, residual: MonotoneResidual, z: Tensor) -> Tensor:
        return self._step_size(residual.operator, _forward_factors)


@dataclass(frozen=True)
class PeacemanRachford(Splitting):
    """Peaceman-Rachford splitting: reflections at the resolvents of ``I - W`` and of relu, in turn.

    With ``V = (I + α (I - W))⁻¹``, factorized once per solve: ``h = 2z - u``, ``u <- 2V(h + αx) - h`` and
    ``z <- relu(u)``. Converges for every ``α > 0``, usually much faster than :class:`ForwardBackward` (Winston and
    Kolter 2020, section 3.3).

    Args:
        step_size: ``α``; None is the one of a dozen with the least proven contraction factor, at the cost of as many
            factorizations a solve. For layers of many hundred units give a number.

    Further options are those of :class:`~difflayers.IterativeSolver`.
    """

    def init(self, residual: Residual, z: Tensor) -> tuple[Tensor, ...]:
        state: tuple[Tensor, ...] = residual.inside(self._prepare, z)
        return state

    def step(self, residual: Residual, z: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, step_size, lu, pivots = state
        z, u = residual.inside(_peaceman_rachford, z, u, step_size, lu, pivots)
        return z, (u, step_size, lu, pivots)

    def _prepare(self, residual: MonotoneResidual, z: Tensor) -> tuple[Tensor, ...]:
        step_size = self._step_size(residual.operator, _reflection_factors)
        # At the answer this is the u that goes with it, so a warm start is one.
        u = z - step_size.to(z.dtype) * (z - residual.affine(z))
        return u, step_size, *residual.operator.factor(step_size)


def _forward_backward(residual: MonotoneResidual, z: Tensor, step_size: Tensor) -> Tensor:
    return torch.relu(z - step_size.to(z.dtype) * (z - residual.affine(z)))


def _peaceman_rachford(
    residual: MonotoneResidual, z: Tensor, u: Tensor, step_size: Tensor, lu: Tensor, pivots: Tensor
) -> tuple[Tensor, Tensor]:
    h = 2 * torch.relu(u) - u
    u = 2 * residual.operator.solve(lu, pivots, h + step_size.to(z.dtype) * residual.offset) - h
    return torch.relu(u), u


def _forward_factors(step: Tensor, blocks: Tensor) -> Tensor:
    """``‖I - α (I - W)‖²`` for every step and block."""
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return _largest_eigenvalue(eye - step * (blocks + blocks.mH) + step**2 * (blocks.mH @ blocks))


def _reflection_factors(step: Tensor, blocks: Tensor) -> Tensor:
    """``‖(I - α (I - W)) (I + α (I - W))⁻¹‖²`` for every step and block."""
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    reflection = torch.linalg.solve_ex(eye + step * blocks, eye - step * blocks)[0]
    return _largest_eigenvalue(reflection @ reflection.mH)


def _largest_eigenvalue(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 0:
        raise ProblemError("W has no rows")
    # What isn't finite fails in the solve, which says so; LAPACK would stop here.
    finite = matrices.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    eigenvalues: Tensor = torch.linalg.eigvalsh(torch.where(finite, matrices, 0))[..., -1]
    return torch.where(finite[..., 0, 0], eigenvalues, torch.nan)
