"""``get_deq`` with the call of torchdeq 0.1.0 (Geng and Kolter 2023).

``get_deq(...)`` gives a module that is called ``deq(fn, z0)`` and returns ``(z_out, info)``. What differs:

- Every sample is solved to ``f_tol`` by itself, where torchdeq goes on until the worst one is. A map that mixes
  samples, by batch normalization, say, is refused unless ``batch_dims=0``, which makes one system of the batch.
- Without ``ift`` the gradient is that of ``grad`` applications of the map at the equilibrium, as many terms of a
  Neumann series. ``z_out`` is the equilibrium itself, where torchdeq applies the map that often once more.
- ``b_solver="broyden"`` is :class:`difflayers.linear.GCR`, which starts from what a forward ``"broyden"`` learnt.
- ``"simple_fixed_point_iter"`` stops at the tolerance too. Outputs have gradients in ``eval()`` as well.
- ``info`` has ``abs_lowest``, ``rel_lowest``, ``nstep`` and the ``status`` of every sample, but no traces:
  ``difflayers.monitor(trace=True)`` has them.
- A sample that misses its tolerance, forward or backward, warns by :class:`~difflayers.errors.ConvergenceWarning`.
- Several outputs per call (``n_states``, ``indexing``, ``sup_gap``, ``sup_loc``) and damped gradients (``tau``) aren't
  there; nor are normalization and dropout, since :class:`difflayers.fixedpoint.DEQ` takes PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from difflayers import ImplicitAdjoint
from difflayers.compat._deq_options import Settings, with_options
from difflayers.compat._ignored import ignored
from difflayers.fixedpoint import fixed_point, spectral_radius

__all__ = ["FixedPointCall", "get_deq"]


def get_deq(args: Any = None, **kwargs: Any) -> FixedPointCall:
    """A module ``deq(fn, z0) -> (z_out, info)``; options from a namespace or mapping ``args``, or by name.

    >>> import torch
    >>> from difflayers.compat.torchdeq import get_deq
    >>> deq = get_deq(f_solver="anderson", f_tol=1e-5, ift=True)
    >>> x = torch.tensor([[0.5, 1.0]], requires_grad=True)
    >>> z_out, info = deq(lambda z: torch.cos(z) * x, torch.zeros(1, 2))
    >>> z_out[-1].detach(), info["nstep"]
    (tensor([[0.4502, 0.7391]]), tensor([5]))
    """
    return FixedPointCall(Settings.of(args, kwargs))


class FixedPointCall(nn.Module):
    """What :func:`get_deq` makes: the equilibrium of whatever map it is called with."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.batch_dims = settings.batch_dims
        self.solver = settings.forward()
        self.evaluation_steps = settings.evaluation_steps
        self.adjoint = ImplicitAdjoint(settings.backward())

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: Callable[..., Any] | None = None,
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """``[z]`` and what is known of every sample; ``func`` takes and returns as many states as ``z_init`` has."""
        if backward_writer is not None:
            ignored("backward_writer of torchdeq", "use difflayers.monitor()")
        alone = isinstance(z_init, Tensor)
        fn, start = (func, z_init) if alone else (_Spread(func), tuple(z_init))
        solver = self.solver if self.training else replace(self.solver, max_steps=self.evaluation_steps)
        solver = with_options(solver, solver_kwargs or {})
        solution = fixed_point(
            fn, start, batch_dims=self.batch_dims, solver=solver, adjoint=self.adjoint, on_failure="warn"
        )
        stats = solution.stats
        info = {"abs_lowest": stats["residual"], "rel_lowest": stats["relative_residual"], "nstep": stats["steps"]}
        info["status"] = solution.status
        if sradius_mode and not self.training:
            info["sradius"] = spectral_radius(fn, solution.value, batch_dims=self.batch_dims)
        return [solution.value if alone else list(solution.value)], info

    def extra_repr(self) -> str:
        """What shows of it."""
        return f"solver={self.solver!r}, adjoint={self.adjoint!r}, batch_dims={self.batch_dims}"


class _Spread(nn.Module):
    """A map of several states as one of their tuple."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, z: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self.fn(*z))
