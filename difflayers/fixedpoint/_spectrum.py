"""How hard an equilibrium is to find: the spectral radius of the Jacobian there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from difflayers._arrays import Packing, at_least_float32
from difflayers._autodiff import pull
from difflayers._problem import matched
from difflayers._solution import Solution
from difflayers.errors import ProblemError
from difflayers.fixedpoint._deq import Equilibrium
from difflayers.fixedpoint._equilibrium import View


def spectral_radius(
    fn: Callable[..., Any],
    z: Any,
    args: Sequence[Any] = (),
    *,
    batch_dims: int = 0,
    steps: int = 20,
    generator: Generator | None = None,
) -> Tensor:
    """An estimate of the spectral radius of ``∂fn/∂z`` at ``z``, ``(*batch,)``: the largest ``|λ|`` of its eigenvalues.

    Below one, plain iteration converges near the equilibrium, with about that factor per step; the further above one,
    the harder it is to find for any solver, and the less to be trusted. The estimate is a number, without gradients.

    It is the largest eigenvalue of ``∂fn/∂z`` restricted to the space that ``steps`` power iterations span, from a
    random start (Arnoldi's method; Saad 2011, "Numerical Methods for Large Eigenvalue Problems", chapter 6), at the
    price of one evaluation, ``steps`` vector-Jacobian products, and memory of as many ``z``. Complex pairs are as good
    as real ones. It is exact where ``z`` has no more than ``steps`` entries, good to several digits where a few
    eigenvalues lead, and to a few percent (20 steps; 10 % at 10 steps) for a random matrix, whose eigenvalues crowd at
    the edge. It is mostly too small, but may be too large for matrices far from normal.

    Args:
        fn: the map or cell, ``fn(z, *args)``; parametrizations and buffers of a module are left as they are.
        z: where: the equilibrium, or what a solve gave. An :class:`Equilibrium` brings its own masks and weights, those
            of its solve. A sample without an answer (NaN) has no estimate, NaN.
        args: further arguments of ``fn``.
        batch_dims: leading dimensions of ``z`` that index independent samples.
        steps: vector-Jacobian products.
        generator: where the random start comes from.

    Raises:
        ProblemError: ``steps`` is less than one, or ``fn`` doesn't return what ``z`` looks like.

    >>> import torch
    >>> from difflayers.fixedpoint import spectral_radius
    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)  # λ = 0.6 ± 0.8i
    >>> spectral_radius(lambda z: z @ turn, torch.zeros(3, 2).double(), batch_dims=1)
    tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64)
    """
    if steps < 1:
        raise ProblemError(f"steps must be at least 1, got {steps}")
    function = _seen_by(fn, z)
    value = z.value if isinstance(z, Solution) else z
    packing = Packing.of(value, batch_dims)
    with torch.no_grad():
        point = packing.pack(value).detach()
        batch, size = point.shape[:batch_dims], point.shape[batch_dims:].numel()
        if point.numel() == 0:
            return point.new_zeros(batch)
        pullback = pull(lambda p: packing.pack(matched(function(packing.unpack(p), *args), value, "fn")), (point,))

        def product(rows: Tensor) -> Tensor:
            (pulled,) = pullback(rows.to(point.dtype).reshape(point.shape))
            return torch.zeros_like(rows) if pulled is None else pulled.reshape(rows.shape).to(rows.dtype)

        start = torch.empty_like(at_least_float32(point).reshape(-1, size)).normal_(generator=generator)
        return _largest(_hessenberg(product, start, min(steps, size))).to(point.dtype).reshape(batch)


def _seen_by(fn: Callable[..., Any], z: Any) -> Callable[..., Any]:
    if isinstance(z, Equilibrium) and z.view is not None:
        return z.view
    return View(fn, advance=False) if isinstance(fn, nn.Module) else fn


def _hessenberg(product: Callable[[Tensor], Tensor], start: Tensor, size: int) -> Tensor:
    """Every row's matrix in an orthonormal basis of the Krylov space of ``start``, ``(rows, size, size)``."""
    basis = start.new_zeros(len(start), size, start.shape[1])
    basis[:, 0] = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    projected = start.new_zeros(len(start), size, size)
    for k in range(size):
        image = product(basis[:, k])
        before, known = torch.linalg.vector_norm(image, dim=1, keepdim=True), basis[:, : k + 1]
        for _ in range(2):  # once leaves rounding errors that grow
            inner = torch.einsum("bkn,bn->bk", known, image)
            image = image - torch.einsum("bk,bkn->bn", inner, known)
            projected[:, : k + 1, k] += inner
        if k + 1 < size:
            rest = torch.linalg.vector_norm(image, dim=1, keepdim=True)
            # The space is invariant: what is left is rounding, and as a direction it would be an invention.
            closed = rest <= 10 * torch.finfo(start.dtype).eps * before
            projected[:, k + 1, k] = torch.where(closed, 0, rest).squeeze(1)
            basis[:, k + 1] = torch.where(closed, 0, image / rest)
    return projected


def _largest(matrix: Tensor) -> Tensor:
    finite = matrix.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvals(torch.where(finite[:, None, None], matrix, 0))  # LAPACK refuses NaN
    return torch.where(finite, values.abs().amax(-1), torch.nan)
