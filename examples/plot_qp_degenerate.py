"""
Where a QP has no one derivative
================================

The pictures of :doc:`/qp/degenerate`: a weakly active constraint, a solution that isn't unique, rows that say the same
thing twice, and constraints that contradict each other. For each, what is returned and how it is flagged.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from difflayers import Status
from difflayers.qp import solve_qp

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


def jacobian(x: Tensor, by: Tensor) -> Tensor:
    """Of one answer, row by row."""
    return torch.stack([torch.autograd.grad(entry, by, retain_graph=True)[0] for entry in x])


# %%
# Weakly active
# -------------
# The nearest point to ``c`` below zero is ``min(c, 0)``. At ``c = 0`` it touches the bound without pressing on it:
# multiplier and slack are both zero. One-sided derivatives are 1 and 0; what comes back is one of the two, and
# ``margin`` says that it was a choice. Nearby, ``margin`` is the distance to the kink.

c = (torch.arange(-20, 21)[:, None] / 20).requires_grad_()
weak = solve_qp(torch.eye(1), -c, ub=torch.zeros(1))
slope = torch.autograd.grad(weak.x.sum(), c)[0]
print("c      x      slope  margin")
for i in (10, 19, 20, 21, 30):
    print(f"{c[i].item():+.2f}  {weak.x[i].item():+.2f}  {slope[i].item():+.2f}  {weak.stats['margin'][i]:.2f}")

# %%
# Not unique
# ----------
# A linear program on a rectangle. Where the objective is that of an edge, every point of the edge is a solution, and
# the smallest change of ``q`` sends it to a corner: there is no derivative by ``q``. What comes back is
# ``degenerate``, the solution of least norm, and the derivative of least norm, which doesn't move along the edge.

lower, upper = torch.tensor([0.0, -0.6]), torch.tensor([1.0, 0.8]).requires_grad_()
for tilt in (-0.1, 0.0, 0.1):
    q = torch.tensor([-1.0, -tilt]).requires_grad_()
    edge = solve_qp(None, q, lb=lower, ub=upper)
    print(
        f"q {q.tolist()} x {edge.x.tolist()} degenerate {bool(edge.stats['degenerate'])}",
        f"\n   dx/dub {jacobian(edge.x, upper).tolist()} dx/dq {jacobian(edge.x, q).tolist()}",
    )

# %%
# Redundant
# ---------
# The same row three times, once scaled. The solution is what it is with one. How the rows share the multiplier isn't
# determined: an active-set method (DAQP) takes one of them and finds the others idle, with a ``margin`` of zero;
# after an interior-point method (PIQP) all three are active, which is ``degenerate``, and the multipliers are those
# of least norm. Derivatives by single right-hand sides differ in the same way. Moved together they move the solution
# alike.

row, target = torch.tensor([[1.0, 1.0]]), torch.tensor([1.5, 1.0])
rows, sides = torch.cat([row, row, 2 * row]), torch.tensor([1.0, 1.0, 2.0]).requires_grad_()
for solver in ("daqp", "piqp"):
    redundant = solve_qp(torch.eye(2), -target, rows, sides, solver=solver)
    by_side = jacobian(redundant.x, sides)
    flags = f"margin {redundant.stats['margin']:.3f} degenerate {bool(redundant.stats['degenerate'])}"
    print(f"{solver}: x {redundant.x.tolist()} z {redundant.z.detach().numpy().round(4)} {flags}")
    print(f"   dx₁/dh {by_side[0].numpy().round(4)}, dx along h {(by_side @ sides.detach()).numpy().round(4)}")

# %%
# Infeasible
# ----------
# Above one line and below another, with a triangle's third side. The proof is a combination of rows, with weights that
# aren't negative, in which ``x`` cancels and what is left is false.

G = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
h = torch.tensor([1.0, -0.8, -0.7], requires_grad=True)
nothing = solve_qp(torch.eye(2), torch.zeros(2), G, h, on_failure="ignore")
weights = nothing.stats["certificate"][2:]
print(Status(int(nothing.status)).name, "x", nothing.x.tolist(), "weights", weights.numpy().round(6))
print(
    "largest entry of Gᵀw:",
    f"{(G.T @ weights).abs().max():.0e};",
    "hᵀw =",
    round(float(h.detach() @ weights), 4),
    "< 0",
)
downhill = solve_qp(None, torch.tensor([1.0, 0.0]), G[:1], torch.ones(1), on_failure="ignore")
ray = downhill.stats["certificate"][:2]
print(Status(int(downhill.status)).name, "ray", ray.numpy().round(6))

# %%
# The pictures
# ------------

TEXT = "#767676"  # a gray for light and dark pages
plt.rcParams.update(
    {
        "font.size": 11,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    }
)
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
figure, ((kink, face), (twice, empty)) = plt.subplots(2, 2, figsize=(7.8, 7.4), layout="constrained")

x = c.detach()[:, 0]
kink.plot(x, weak.x.detach()[:, 0], color=BLUE, linewidth=2, label="x")
kink.plot(x, slope[:, 0], ".", color=GREEN, label="derivative")
kink.plot(x, weak.stats["margin"], color=ORANGE, linestyle="--", label="margin")
kink.plot(0, slope[20, 0], "o", color=RED, label="weakly active", markersize=9, fillstyle="none", markeredgewidth=2)
kink.set(title="a weakly active bound", xlabel="c", ylim=(-1.1, 1.5))
kink.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")


def area(axes: plt.Axes, corners: list[list[float]]) -> None:
    axes.fill(*zip(*corners, strict=True), color=TEXT, alpha=0.2, linewidth=0)
    axes.set(aspect="equal", xlabel="x₁", ylabel="x₂")


def arrow(axes: plt.Axes, start: list[float], by: list[float], color: str) -> None:
    end = [a + b for a, b in zip(start, by, strict=True)]
    axes.annotate("", xytext=start, xy=end, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 2})


area(face, [[0, -0.6], [1, -0.6], [1, 0.8], [0, 0.8]])
face.plot([1, 1], [-0.6, 0.8], color=ORANGE, linewidth=5, alpha=0.7, label="all solutions")
face.plot([1, 1], [-0.6, 0.8], "s", color=GREEN, label="q tilted, down or up", markersize=8)
face.plot(1, 0, "o", color=BLUE, label="returned", markersize=9)
arrow(face, [1, 0], [0.45, 0], BLUE)
face.text(1.1, 0.08, "dx/du₁", color=BLUE)
face.set(title="a solution that isn't unique", xlim=(-0.3, 1.75), ylim=(-0.8, 1.6))
face.legend(frameon=False, fontsize="small", loc="upper left")

area(twice, [[-0.5, 1.5], [1.5, -0.5], [-0.5, -0.5]])
for color, style in ((ORANGE, "-"), (GREEN, "--"), (RED, ":")):
    twice.plot([-0.5, 1.5], [1.5, -0.5], style, color=color, linewidth=2)
twice.plot(*target.tolist(), "s", color=TEXT, label="without the rows")
twice.plot(*redundant.x.tolist(), "o", color=BLUE, label="returned", markersize=9)
arrow(twice, redundant.x.tolist(), (0.8 * by_side @ sides.detach()).tolist(), BLUE)
twice.text(1.1, 0.45, "dx along h", color=BLUE)
twice.set(title="one row, three times", xlim=(-0.5, 1.75), ylim=(-0.5, 1.75))
twice.legend(frameon=False, fontsize="small", loc="lower left")

line = torch.tensor([-0.5, 2.0])
empty.fill_between(line, 1 - line, -1, color=BLUE, alpha=0.2, linewidth=0, label="x₁ + x₂ ≤ 1")
empty.fill_betweenx([-1, 3], 0.8, 3, color=ORANGE, alpha=0.2, linewidth=0, label="x₁ ≥ 0.8")
empty.fill_between(line, 0.7, 3, color=GREEN, alpha=0.2, linewidth=0, label="x₂ ≥ 0.7")
for start, normal, weight, color in zip(
    ([0.4, 0.6], [0.8, 1.3], [1.4, 0.7]), G.tolist(), weights.tolist(), (BLUE, ORANGE, GREEN), strict=True
):
    arrow(empty, start, [0.35 * weight * v for v in normal], color)
empty.set(title="infeasible", aspect="equal", xlim=(-0.3, 1.7), ylim=(-0.3, 1.7))
empty.set(xlabel="x₁", ylabel="x₂")
empty.legend(frameon=False, fontsize="small", loc="lower left")
plt.show()
