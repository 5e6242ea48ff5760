"""
One operator, or a module of many
=================================

The same function can be written as a *module*, many small operations that autograd records one by one, or as an
*operator*, one operation that comes with its own derivative. The numbers and the gradients agree. What differs is what
has to be kept for the backward pass, and that is what a layer of this package is about: a solver's iterations never
reach autograd's record.

Two examples. A convolution is a sum of :math:`k^2` matrix products. A weight-tied network is the same cell over and
over, and its fixed point is the depth to which it converges.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from difflayers import ImplicitAdjoint, ImplicitFunction, linear
from difflayers.fixedpoint import Anderson, FixedPointProblem

torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)
generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# %%
# What is kept for the backward pass, and how long it takes
# ---------------------------------------------------------
# Autograd says through ``saved_tensors_hooks`` which tensors it keeps. Views share a storage, which counts once.


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Memory that the backward pass needs, inputs and weights included."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other storage gets the address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def seconds(forward: Callable[[], Tensor], inputs: list[Tensor], repetitions: int = 3) -> float:
    """CPU time of one forward and backward pass, the least of a few."""
    best = float("inf")
    for _ in range(repetitions):
        start = time.process_time()
        torch.autograd.grad(forward().square().sum(), inputs)
        best = min(best, time.process_time() - start)
    return best


def agree(forwards: list[Callable[[], Tensor]], inputs: list[Tensor], tolerance: float) -> None:
    """Both ways must give the same numbers and the same gradients."""
    values = [forward() for forward in forwards]
    gradients = [torch.autograd.grad(value.square().sum(), inputs) for value in values]
    for one, other in zip((values[0], *gradients[0]), (values[1], *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


# %%
# A convolution
# -------------
# The module shifts the picture :math:`k^2` times and multiplies each copy by a matrix. Autograd keeps every copy.
# The operator does the same inside one ``torch.autograd.Function``; its backward pass needs the picture and the
# weights, which are there anyway.


def convolution_module(x: Tensor, weight: Tensor) -> Tensor:
    k = weight.shape[-1]
    padded = F.pad(x, [k // 2] * 4)
    height, width = x.shape[2:]
    total = x.new_zeros(x.shape[0], height, width, weight.shape[0])
    for i in range(k):
        for j in range(k):
            shifted = padded[:, :, i : i + height, j : j + width].permute(0, 2, 3, 1)
            total = total + shifted @ weight[:, :, i, j].T
    return total.permute(0, 3, 1, 2)


class ConvolutionOperator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx, cotangent):
        x, weight = ctx.saved_tensors
        padding = weight.shape[-1] // 2
        return (
            torch.nn.grad.conv2d_input(x.shape, weight, cotangent, padding=padding),
            torch.nn.grad.conv2d_weight(x, weight.shape, cotangent, padding=padding),
        )


def compare(ways: list[Callable[[], Tensor]], inputs: list[Tensor], tolerance: float) -> list[tuple[int, float]]:
    agree(ways, inputs, tolerance)
    return [(saved_bytes(way), seconds(way, inputs)) for way in ways]


kernels = [1, 3, 5, 7, 9, 11]
x = random(2, 16, 32, 32).requires_grad_()
convolution = []
for k in kernels:
    weight = random(16, 16, k, k).requires_grad_()
    ways = [lambda w=weight: convolution_module(x, w), lambda w=weight: ConvolutionOperator.apply(x, w)]
    convolution.append(compare(ways, [x, weight], 1e-11))

# %%
# A deep network
# --------------
# The module applies one cell ``depth`` times. The operator finds the state that the cell leaves as it is, however it
# likes, and differentiates the *condition* :math:`z = f(z)`. It keeps one state. There is no depth to choose, so
# for every depth the comparison is with the same operator; the numbers agree where the network is deep enough.


def cell(z: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z @ W.T + b)


def network_module(depth: int, W: Tensor, b: Tensor) -> Tensor:
    z = torch.zeros_like(b)
    for _ in range(depth):
        z = cell(z, W, b)
    return z


network_operator = ImplicitFunction(
    FixedPointProblem(cell, batch_dims=1),
    Anderson(rtol=1e-8, atol=0.0),
    ImplicitAdjoint(linear.Anderson(rtol=1e-8)),
)
W = random(256, 256)
W = (W * (0.95 / torch.linalg.eigvals(W).abs().max())).requires_grad_()
b = (0.2 * random(128, 256)).requires_grad_()


def operator() -> Tensor:
    return network_operator(W, b, init=torch.zeros_like(b)).value


depths = [1, 4, 16, 64, 256]
networks = [lambda d=d: network_module(d, W, b) for d in depths]
agree([networks[-1], operator], [W, b], 1e-6)
unrolled = [(saved_bytes(network), seconds(network, [W, b])) for network in networks]
fixed = (saved_bytes(operator), seconds(operator, [W, b]))

with torch.no_grad():
    limit = operator()
    distances = [float((network_module(d, W, b) - limit).norm() / limit.norm()) for d in depths]
for depth, distance in zip(depths, distances, strict=True):
    print(f"depth {depth:3}: {distance:.0e} from the fixed point")

# %%
# The picture
# -----------
# Memory above, time below. What a module keeps grows with what it does; what an operator keeps doesn't. Time need not
# follow: a solver works until its tolerance is met, however few layers would have done. Look at the distances above
# for how deep a network must be to say the same.

MODULE, OPERATOR, TEXT = "#d55e00", "#0072b2", "#767676"  # Okabe and Ito's colors, and a gray for light and dark pages
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


def draw(axes: plt.Axes, x: list[int], module: list[float], operator: list[float], unit: str) -> None:
    """Two lines, where they end, and how far apart."""
    ratio = module[-1] / operator[-1]
    for y, other, color, marker in ((module, operator, MODULE, "o"), (operator, module, OPERATOR, "s")):
        axes.plot(x, y, color=color, marker=marker, markersize=6, linewidth=2.5, clip_on=False)
        text = f"{y[-1]:.0f} {unit}" if y[-1] >= 10 else f"{y[-1]:.1f} {unit}"
        shift = 0 if ratio > 5 else 8 if y[-1] > other[-1] else -8
        beside = {"xytext": (9, shift), "textcoords": "offset points", "va": "center", "color": color}
        axes.annotate(text, (x[-1], y[-1]), **beside)
    axes.set(xscale="log", yscale="log", xticks=x, xticklabels=[str(v) for v in x])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.8)
    if ratio > 5:
        middle = (x[-1], (module[-1] * operator[-1]) ** 0.5)
        axes.annotate("", (x[-1], module[-1]), (x[-1], operator[-1]), arrowprops={"arrowstyle": "<->", "color": TEXT})
        beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{ratio:.0f}×", middle, fontsize=17, fontweight="bold", **beside)


def name(axes: plt.Axes, text: str, x: float, y: float, color: str, side: str) -> None:
    """A line's name, beside the line."""
    place = {"xytext": (-8, 8), "ha": "right"} if side == "left" else {"xytext": (0, -9), "ha": "center", "va": "top"}
    axes.annotate(text, (x, y), textcoords="offset points", color=color, fontweight="bold", **place)


figure, grid = plt.subplots(2, 2, figsize=(10, 6.6), sharex="col", layout="constrained")
figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
module, operator_ = zip(*convolution, strict=True)
for column, (x_values, ours, theirs) in enumerate(
    ((kernels, operator_, module), (depths, [fixed] * len(depths), unrolled))
):
    for row, (unit, scale) in enumerate((("MiB", 2**20), ("ms", 1e-3))):
        draw(grid[row, column], x_values, [t[row] / scale for t in theirs], [o[row] / scale for o in ours], unit)
for column, (module_name, operator_name, x_values, ours, theirs) in enumerate(
    (
        ("module: k² matrix products", "operator", kernels, operator_, module),
        ("module: layer after layer", "operator: its fixed point", depths, [fixed] * len(depths), unrolled),
    )
):
    name(grid[0, column], module_name, x_values[-2], theirs[-2][0] / 2**20, MODULE, "left")
    name(grid[0, column], operator_name, x_values[2], ours[2][0] / 2**20, OPERATOR, "below")
grid[0, 0].set(title="convolution", ylabel="kept for the backward pass (MiB)")
grid[0, 1].set(title="weight-tied network")
grid[1, 0].set(xlabel="kernel size k", ylabel="forward and backward (ms)")
grid[1, 1].set(xlabel="depth")
for axes in grid[0]:
    axes.set_ylim(0.1, 150)
plt.show()
