"""Krylov solvers, batched: every sample has its own scalars, and a sample that is done stands still."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from difflayers._arrays import at_least_float32
from difflayers.linear._base import Factor, IterativeLinearSolver, LinearSolution, Product

Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CG(IterativeLinearSolver):
    """Conjugate gradients, for symmetric positive definite Jacobians (Hestenes and Stiefel 1952).

    Further options are those of :class:`IterativeLinearSolver`.
    """

    def iterate(self, product: Product, rhs: Tensor, tolerance: Tensor) -> Result:
        x, r = torch.zeros_like(rhs), rhs
        p, rho = r, _dot(r, r)
        steps = _counter(rhs)
        for _ in range(self.max_steps):
            active = _active(r, tolerance)
            if not active.any():
                break
            q = product(p)
            alpha = _ratio(rho, _dot(p, q)) * active[:, None]
            x, r = x + alpha * p, torch.where(active[:, None], r - alpha * q, r)
            rho_next = _dot(r, r)
            p, rho = r + _ratio(rho_next, rho) * p, rho_next
            steps = steps + active
        return x, r.norm(dim=1), steps


@dataclass(frozen=True)
class BiCGSTAB(IterativeLinearSolver):
    """Stabilized biconjugate gradients: two products a step, a few vectors (van der Vorst 1992).

    Further options are those of :class:`IterativeLinearSolver`.
    """

    def iterate(self, product: Product, rhs: Tensor, tolerance: Tensor) -> Result:
        x, r, shadow = torch.zeros_like(rhs), rhs, rhs
        p, rho = r, _dot(shadow, r)
        steps = _counter(rhs)
        for _ in range(self.max_steps):
            active = _active(r, tolerance)
            if not active.any():
                break
            v = product(p)
            alpha = _ratio(rho, _dot(shadow, v))
            s = r - alpha * v
            t = product(s)
            omega = _ratio(_dot(t, s), _dot(t, t))
            x = torch.where(active[:, None], x + alpha * p + omega * s, x)
            r = torch.where(active[:, None], s - omega * t, r)
            rho_next = _dot(shadow, r)
            p = r + _ratio(rho_next, rho) * _ratio(alpha, omega) * (p - omega * v)
            rho, steps = rho_next, steps + active
        return x, r.norm(dim=1), steps


@dataclass(frozen=True)
class GCR(IterativeLinearSolver):
    """Generalized conjugate residuals, restarted after ``memory`` products (Eisenstat, Elman, Schultz 1983).

    Residuals as small as those of GMRES, for less work per product. It breaks down
    where ``xᵀJx = 0``, which a contraction's ``A - I`` rules out. What is known of the inverse of the Jacobian it takes
    as a preconditioner. Keeps ``2 · memory`` vectors per sample.

    Further options are those of :class:`IterativeLinearSolver`.
    """

    memory: int = 60

    def solve(self, factor: Factor, rhs: Tensor, *, transpose: bool = False) -> LinearSolution:
        inverse = factor.operator.inverse
        guess = None if inverse is None else inverse.products(transpose)
        return self.solve_by(partial(self.iterate, guess=guess), factor, rhs, transpose)

    def iterate(self, product: Product, rhs: Tensor, tolerance: Tensor, guess: Product | None = None) -> Result:
        cycle = _Cycle(rhs, min(self.memory, rhs.shape[1], self.max_steps))
        x, r, error, steps = torch.zeros_like(rhs), rhs, rhs.norm(dim=1), _counter(rhs)
        active = (error < torch.inf) & ~(error <= tolerance)
        checked = error
        for _ in range(self.max_steps):
            if not active.any():
                break
            p = r if guess is None else guess(r)
            r = cycle.reduce(r, p, product(p), active)
            error, steps = r.norm(dim=1), steps + active
            active = active & (error > tolerance) & (error < torch.inf)
            if cycle.full:
                x = x + cycle.update()
                active, checked = active & (error < 0.999 * checked), error  # stagnation
        return x + cycle.update(), error, steps


class _Cycle:
    """Directions ``p`` as they come, and their images ``J p`` orthonormal: ``J P = Q R``, so ``x = P R⁻¹ α``.

    Directions that follow the orthogonalization would be a third of the memory traffic, which is what a step costs.
    """

    def __init__(self, rhs: Tensor, memory: int) -> None:
        self.memory, self.used = memory, 0
        samples, n = rhs.shape
        self.directions, self.images = rhs.new_empty(samples, memory, n), rhs.new_empty(samples, memory, n)
        self.alpha = rhs.new_empty(samples, memory)
        self.upper = rhs.new_zeros(samples, memory, memory)

    @property
    def full(self) -> bool:
        return self.used == self.memory

    def reduce(self, r: Tensor, p: Tensor, q: Tensor, active: Tensor) -> Tensor:
        """The residual without its part along ``q = J p``; samples that aren't active keep theirs."""
        slot = self.used
        if slot:
            images = self.images[:, :slot]
            c = torch.bmm(q.unsqueeze(1), images.mT)
            q = torch.baddbmm(q.unsqueeze(1), c, images, alpha=-1).squeeze(1)
            self.upper[:, :slot, slot] = torch.where(active.unsqueeze(1), c.squeeze(1), 0)
        size = q.norm(dim=1, keepdim=True)
        moves = (size > 0) & active.unsqueeze(1)
        q = q * torch.where(moves, size.reciprocal(), 0)
        alpha = _dot(q, r)
        self.directions[:, slot], self.images[:, slot], self.alpha[:, slot] = p, q, alpha.squeeze(1)
        self.upper[:, slot, slot] = torch.where(moves, size, 1).squeeze(1)
        self.used += 1
        return torch.addcmul(r, alpha, q, value=-1)

    def update(self) -> Tensor:
        """What all directions together add to the solution; then start anew."""
        used, self.used = self.used, 0
        upper, alpha = self.upper[:, :used, :used], self.alpha[:, :used].unsqueeze(-1)
        weights = torch.linalg.solve_triangular(*map(at_least_float32, (upper, alpha)), upper=True).mT.to(alpha.dtype)
        self.upper = torch.zeros_like(self.upper)
        return torch.bmm(weights, self.directions[:, :used]).squeeze(1)


@dataclass(frozen=True)
class GMRES(IterativeLinearSolver):
    """Generalized minimal residuals, restarted every ``restart`` products (Saad and Schultz 1986).

    Keeps ``restart + 1`` vectors per sample. ``max_steps`` counts products.

    Further options are those of :class:`IterativeLinearSolver`.
    """

    restart: int = 40

    def iterate(self, product: Product, rhs: Tensor, tolerance: Tensor) -> Result:
        x, r, error = torch.zeros_like(rhs), rhs, rhs.norm(dim=1)
        steps = _counter(rhs)
        while True:
            active = error.isfinite() & ~(error <= tolerance) & (steps < self.max_steps)
            if not active.any():
                return x, error, steps
            limit = min(self.restart, rhs.shape[1], self.max_steps - int(steps[active].min()))
            update, reached, used = _cycle(product, r, active, tolerance, limit)
            x, steps = x + update, steps + used
            finished = active & (reached <= tolerance)
            if bool((finished | ~active).all()):
                return x, torch.where(active, reached, error), steps
            r = torch.where(active[:, None], rhs - product(x), r)
            true_error = torch.where(finished, reached, r.norm(dim=1))
            stuck = active & ~(true_error < 0.999 * error)
            error = torch.where(active, true_error, error)
            if bool((stuck | finished | ~active).all()):
                return x, error, steps


def _cycle(product: Product, r: Tensor, active: Tensor, tolerance: Tensor, limit: int) -> Result:
    """One restart cycle from residual ``r``: the update of x, the residual norm it reaches, products used."""
    samples, n = r.shape
    tiny = torch.finfo(r.dtype).tiny
    basis = r.new_zeros(samples, limit + 1, n)
    upper = torch.eye(limit, dtype=r.dtype, device=r.device).repeat(samples, 1, 1)
    error = torch.where(active, r.norm(dim=1), 0)
    carried = error  # the last entry of the rotated right-hand side; its magnitude is the residual norm
    reduced, used = r.new_zeros(samples, limit), _counter(r)
    basis[:, 0] = torch.where(active[:, None], r / error.clamp_min(tiny)[:, None], 0)
    # All rotations so far as one matrix per sample: applying them one by one would be most of the time.
    rotation = torch.eye(limit + 1, dtype=r.dtype, device=r.device).repeat(samples, 1, 1)
    for j in range(limit):
        w = torch.where(active[:, None], product(basis[:, j]), 0)
        w, h = _orthogonalize(basis[:, : j + 1], w)
        last = w.norm(dim=1)
        h = torch.bmm(rotation[:, : j + 1, : j + 1], h[:, :, None])[:, :, 0]
        norm = torch.hypot(h[:, j], last)
        moves = active & (norm > 0)
        c = torch.where(moves, h[:, j] / norm.clamp_min(tiny), 0)
        s = torch.where(moves, last / norm.clamp_min(tiny), 1)
        upper_row, lower_row = rotation[:, j].clone(), rotation[:, j + 1].clone()
        rotation[:, j] = c[:, None] * upper_row + s[:, None] * lower_row
        rotation[:, j + 1] = c[:, None] * lower_row - s[:, None] * upper_row
        h[:, j] = norm
        upper[:, : j + 1, j] = torch.where(moves[:, None], h[:, : j + 1], upper[:, : j + 1, j])
        reduced[:, j] = torch.where(moves, c * carried, 0)
        carried = torch.where(moves, -s * carried, carried)
        error = carried.abs()
        used = used + active
        active = active & moves & (error > tolerance)
        basis[:, j + 1] = torch.where(active[:, None], w / last.clamp_min(tiny)[:, None], 0)
        if not active.any():
            break
    y = torch.linalg.solve_triangular(upper, reduced[:, :, None], upper=True)
    return torch.bmm(y.mT, basis[:, :limit]).squeeze(1), error, used


def _orthogonalize(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Classical Gram-Schmidt, twice where cancellation calls for it: as stable as the modified one, in few products."""
    # (1, n) times (n, j), not (j, n) times (n, 1): several times faster in batched BLAS.
    before, w = w.norm(dim=1), w[:, None]
    h = torch.bmm(w, basis.mT)
    w = torch.baddbmm(w, h, basis, alpha=-1)
    if bool((w[:, 0].norm(dim=1) < 0.7 * before).any()):
        again = torch.bmm(w, basis.mT)
        w, h = torch.baddbmm(w, again, basis, alpha=-1), h + again
    return w[:, 0], h[:, 0]


def _active(r: Tensor, tolerance: Tensor) -> Tensor:
    error: Tensor = r.norm(dim=1)
    return error.isfinite() & ~(error <= tolerance)


def _counter(rhs: Tensor) -> Tensor:
    return torch.zeros(rhs.shape[0], dtype=torch.int64, device=rhs.device)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = (a * b).sum(1, keepdim=True)
    return product


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where ``b`` is: a breakdown stalls its own sample and is reported as such."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))
