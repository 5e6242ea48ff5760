"""Krylov solvers, batched: every sample has its own scalars, and a sample that is done stands still."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflayers.linear._base import IterativeLinearSolver, Product

Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CG(IterativeLinearSolver):
    """Conjugate gradients, for symmetric positive definite Jacobians (Hestenes and Stiefel 1952)."""

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
    """Stabilized biconjugate gradients: two products a step, a few vectors (van der Vorst 1992)."""

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
class GMRES(IterativeLinearSolver):
    """Generalized minimal residuals, restarted every ``restart`` products (Saad and Schultz 1986).

    Keeps ``restart + 1`` vectors per sample. ``max_steps`` counts products.
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
    """Classical Gram-Schmidt, twice: as stable as the modified one, in four batched products."""
    h = torch.bmm(basis, w[:, :, None])
    w = torch.baddbmm(w[:, None], h.mT, basis, alpha=-1)[:, 0]
    again = torch.bmm(basis, w[:, :, None])
    w = torch.baddbmm(w[:, None], again.mT, basis, alpha=-1)[:, 0]
    return w, (h + again)[:, :, 0]


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
