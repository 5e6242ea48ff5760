"""
Projections, and where they have kinks
======================================

The nearest point in a set, for the sets of :doc:`/qp/projections`, and how it moves when the point moves. All of it is
evaluated in one batch per set, the Jacobians by ``vmap`` of ``jacrev``.
"""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor
from torch.func import jacrev, vmap

from difflayers.qp.projections import (
    entmax,
    project_affine,
    project_box,
    project_halfspace,
    project_l1_ball,
    project_l2_ball,
    project_psd,
    project_second_order_cone,
    project_simplex,
)

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

# %%
# Sets in the plane
# -----------------
# A second-order cone in two dimensions is a wedge; its first entry is drawn upward. The semidefinite cone has three
# dimensions already for 2 × 2 matrices. What is drawn of it is the slice of matrices with the entries :math:`x, y, y,`
# and 0.5, though their nearest points needn't lie in that slice.

ROOT2 = 2**0.5


def wedge(x: Tensor) -> Tensor:
    return project_second_order_cone(x.flip(-1)).flip(-1)


def semidefinite(v: Tensor) -> Tensor:
    """In coordinates that keep lengths: the diagonal, and √2 times the entry off it."""
    a, b, c = v.unbind(-1)
    X = torch.stack([a, b / ROOT2, b / ROOT2, c], -1).unflatten(-1, (2, 2))
    Y = project_psd(X)
    return torch.stack([Y[..., 0, 0], ROOT2 * Y[..., 0, 1], Y[..., 1, 1]], -1)


SETS: dict[str, Callable[[Tensor], Tensor]] = {
    "box": lambda x: project_box(x, torch.tensor([-1.0, -0.5]), torch.tensor([1.0, 0.7])),
    "half-space": lambda x: project_halfspace(x, torch.tensor([1.0, 2.0]), 0.5),
    "affine set": lambda x: project_affine(x, torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])),
    "simplex": project_simplex,
    "ℓ1 ball": project_l1_ball,
    "ℓ2 ball": project_l2_ball,
    "second-order cone": wedge,
    "PSD cone, a slice": semidefinite,
}
SIDE = 2.2


def grid(count: int) -> Tensor:
    ticks = torch.linspace(-SIDE, SIDE, count)
    return torch.cartesian_prod(ticks, ticks)


def points(name: str, plane: Tensor) -> Tensor:
    """Points of the plane as points of the space of the set."""
    if "PSD" not in name:
        return plane
    x, y = plane.unbind(-1)
    return torch.stack([x, ROOT2 * y, torch.full_like(x, 0.5)], -1)


def in_plane(name: str, point: Tensor) -> Tensor:
    return point if "PSD" not in name else torch.stack([point[:, 0], point[:, 1] / ROOT2], -1)


# %%
# Points and their nearest points
# -------------------------------
# Gray is the set; every arrow goes from a point to the nearest one in the set. In the slice of the PSD cone arrows are
# what is seen of a move in three dimensions.

TEXT = "#767676"  # a gray for light and dark pages
BLUE, VERMILION = "#0072b2", "#d55e00"
plt.rcParams.update(
    {
        "font.size": 11,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    }
)


def panels() -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(4, 2, figsize=(5.6, 10.4), sharex=True, sharey=True, layout="constrained")
    for ax, name in zip(axes.flat, SETS, strict=True):
        ax.set(title=name, aspect="equal", xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    return figure, list(axes.flat)


def draw_moves(ax: plt.Axes, name: str) -> None:
    fine, coarse = points(name, grid(151)), points(name, grid(12))
    inside = (SETS[name](fine) - fine).norm(dim=-1) < 1e-9
    shape = inside.reshape(151, 151).T.numpy()
    if shape.mean() > 0.05:
        gray = ListedColormap([(0, 0, 0, 0), (0.46, 0.46, 0.46, 0.35)])
        ax.imshow(shape, extent=(-SIDE, SIDE, -SIDE, SIDE), origin="lower", cmap=gray, vmin=0, vmax=1)
    else:  # a set without interior: wherever points end up
        line = in_plane(name, SETS[name](fine)).numpy()
        line = line[np.argsort(line[:, 0])]
        ax.plot(*line.T, color=TEXT, linewidth=4, alpha=0.6)
    start, end = in_plane(name, coarse), in_plane(name, SETS[name](coarse))
    moved = (end - start).norm(dim=-1) > 1e-9
    (x, y), (dx, dy) = start[moved].T.numpy(), (end - start)[moved].T.numpy()
    ax.quiver(x, y, dx, dy, color=BLUE, angles="xy", scale_units="xy", scale=1, width=0.005, headwidth=4)


figure, axes = panels()
for ax, name in zip(axes, SETS, strict=True):
    draw_moves(ax, name)
plt.show()

# %%
# Their derivatives
# -----------------
# The Jacobian of a projection is symmetric where it exists, with eigenvalues between zero and one: one in directions
# that the projection follows, zero in those that it flattens. Its trace counts the dimensions that are left. For a
# polyhedron it is a whole number that jumps at kinks; a curved boundary also shrinks what runs along it, more with
# distance. The PSD cone has three dimensions.


def trace_of_jacobian(name: str, count: int) -> Tensor:
    jacobians = vmap(jacrev(SETS[name]))(points(name, grid(count)))
    return jacobians.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(count, count)


figure, axes = panels()
for ax, name in zip(axes, SETS, strict=True):
    image = ax.imshow(
        trace_of_jacobian(name, 161).T.numpy(),
        extent=(-SIDE, SIDE, -SIDE, SIDE), origin="lower", cmap="viridis", vmin=0, vmax=3,
    )  # fmt: skip
bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8, aspect=40, ticks=[0, 1, 2, 3])
bar.set_label("trace of the Jacobian")
bar.outline.set_visible(False)
plt.show()

# %%
# From softmax to sparsemax
# -------------------------
# In one dimension: the probability of the first of two classes, and its derivative, over the difference of their
# scores. Softmax never gives zero; below 2, entmax reaches zero with slope zero; sparsemax and what is beyond it have
# kinks there.

difference = torch.linspace(-3, 3, 601, requires_grad=True)
figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.6, 5.6), sharex=True, layout="constrained")
COLORS = {1.0: TEXT, 1.25: "#cc79a7", 1.5: BLUE, 2.0: VERMILION, 4.0: "#009e73"}
for alpha, color in COLORS.items():
    scores = torch.stack([difference, torch.zeros_like(difference)], -1)
    probability = entmax(scores, alpha)[:, 0]
    (slope,) = torch.autograd.grad(probability.sum(), difference)
    name = {1.0: "softmax, α = 1", 2.0: "sparsemax, α = 2"}.get(alpha, f"entmax, α = {alpha:g}")
    top.plot(difference.detach().numpy(), probability.detach().numpy(), color=color, label=name)
    bottom.plot(difference.detach().numpy(), slope.numpy(), color=color)
top.set(ylabel="probability")
bottom.set(ylabel="derivative", xlabel="difference of scores", ylim=(-0.1, 2.1))
top.legend(frameon=False)
for ax in (top, bottom):
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=TEXT, alpha=0.2, linewidth=0.8)
plt.show()
