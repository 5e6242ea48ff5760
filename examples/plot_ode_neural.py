"""
A neural ODE: learn the law of motion
=====================================

A pendulum with friction is filmed a few times, for a few seconds each. A network :math:`f` is to be its law of motion,
:math:`\\dot y = f(y)`, trained through the solver: its parameters get the gradient of the distance between the solution
and what was filmed (Chen, Rubanova, Bettencourt, Duvenaud 2018, NeurIPS, "Neural ordinary differential equations"). A
law, once learned, answers for other starts and for later times. How far is that true?
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn

from difflayers import plot
from difflayers.ode import Dopri5, ODELayer, odeint

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

# sphinx_gallery_start_ignore
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
# sphinx_gallery_end_ignore

# %%
# What was filmed
# ---------------
# Generated: sixteen swings of 6 s, a period or less each, with a frame every 0.4 s and an error of 0.05 in angle and
# speed. Eight more starts, four times as long and without noise, are for the test.

FRICTION, NOISE = 0.1, 0.05


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    angle, speed = y.unbind(-1)
    return torch.stack([speed, -torch.sin(angle) - FRICTION * speed], -1)


def starts(count: int) -> Tensor:
    """Of any phase, and never so fast that it would go over the top, which takes an energy of 2."""
    energy, phase = 0.1 + 1.4 * torch.rand(count), 2 * torch.pi * torch.rand(count)
    angle = torch.arccos(1 - energy) * torch.cos(phase)
    speed = torch.sqrt(2 * (energy - 1 + torch.cos(angle)))
    return torch.stack([angle, speed * torch.sign(torch.sin(phase))], -1)


frames = torch.linspace(0, 6, 16)
later = torch.linspace(0, 24, 241)
exact = Dopri5(rtol=1e-9, atol=1e-9)
filmed = odeint(pendulum, starts(16), frames, batch_dims=1, solver=exact).ys
filmed = filmed + NOISE * torch.randn(filmed.shape)
truth = odeint(pendulum, starts(8), later, batch_dims=1, solver=exact).ys

# %%
# The baseline: differences
# -------------------------
# No solver is needed to fit a network to the slopes between neighboring frames. It takes a second, but noise is divided
# by the time between frames, and a chord isn't a tangent.


class Field(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        hidden = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def fit(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.Adam(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(value.detach()))
    return losses


differences = Field()
middle, slope = (filmed[1:] + filmed[:-1]) / 2, torch.diff(filmed, dim=0) / torch.diff(frames)[:, None, None]
losses = fit(lambda: (differences(frames[0], middle) - slope).square().mean(), differences.parameters(), 1000, 1e-2)
print(f"root mean square of what is left of slopes {losses[0] ** 0.5:.3f} -> {losses[-1] ** 0.5:.3f}")

# %%
# Training through the solver
# ---------------------------
# It goes on from there. Where a swing begins is as uncertain as every other frame, so the starts are unknowns too, and
# get gradients like the network.


def through_solver(law: nn.Module, steps: int, rate: float) -> nn.Module:
    layer = ODELayer(law, frames, solver=Dopri5(rtol=1e-4, atol=1e-4), batch_dims=1)
    begin, clock = nn.Parameter(filmed[0].clone()), time.process_time()
    losses = fit(lambda: (layer(begin) - filmed).square().mean(), [*layer.parameters(), begin], steps, rate)
    seconds = time.process_time() - clock
    left = f"{losses[0] ** 0.5:.4f} -> {losses[-1] ** 0.5:.4f}"
    print(f"root mean square of what is left {left}, noise {NOISE}; {seconds:.1f} s of CPU")
    return law


learned = through_solver(copy.deepcopy(differences), 500, 3e-3)

# %%
# A second baseline: a pendulum that swings little is a linear system. Here is the best matrix, found in the same way.


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix.mT


laws = {"neural ODE": learned, "differences": differences, "linear": through_solver(Linear(), 200, 1e-2)}

# %%
# Beyond the film
# ---------------
# Eight new starts, and four times the time. Errors are relative to how far the pendulum swings in the same span. What
# the solver did is in ``stats``, how it went in ``status``, one number per sample.

spans = {"0 to 6 s": later <= 6, "6 to 12 s": (later > 6) & (later <= 12), "12 to 24 s": later > 12}
found = {}
print("".join(f"{head:>14}" for head in ("error in", *spans, "evaluations", "accepted", "rejected", "SUCCESS")))
for name, law in laws.items():
    with torch.no_grad():
        solution = odeint(law, truth[0], later, batch_dims=1)
    found[name] = solution.ys
    square = (solution.ys - truth).square().sum(-1)
    errors = [square[span].mean().sqrt() / truth[span].square().sum(-1).mean().sqrt() for span in spans.values()]
    work = [int(solution.stats[key].max()) for key in ("evaluations", "accepted", "rejected")]
    cells = [f"{100 * float(error):.1f} %" for error in errors] + [*map(str, work), f"{int(solution.ok.sum())} of 8"]
    print("".join(f"{cell:>14}" for cell in (name, *cells)))

# %%
# The swing that goes furthest, and the error of all eight over time:

styles = {"neural ODE": (plot.BLUE, "-"), "differences": (plot.VERMILION, "--"), "linear": (plot.GREEN, ":")}
furthest = int(truth[..., 0].abs().amax(0).argmax())
figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 2), layout="constrained")
above.plot(later, truth[:, furthest, 0], color=TEXT, linewidth=5, alpha=0.4, label="truth")
for name, (color, line) in styles.items():
    above.plot(later, found[name][:, furthest, 0], color=color, linestyle=line, linewidth=1.8, label=name)
    distance = (found[name] - truth).square().sum(-1).mean(1).sqrt()
    below.plot(later[1:], distance[1:], color=color, linestyle=line, linewidth=1.8)
for ax in (above, below):
    ax.axvspan(0, 6, color=TEXT, alpha=0.12, linewidth=0)
above.text(3, 2.15, "as long as was filmed", ha="center", va="top", size=10)
above.set(ylabel="angle in rad", ylim=(-1.8, 2.2))
above.legend(frameon=False, ncols=4, loc="upper right")
below.set(yscale="log", xlabel="time in s", ylabel="error, root mean\nsquare of 8 starts", xlim=(0, 24), ylim=(5e-3, 4))
plt.show()

# %%
# The vector field
# ----------------
# Arrows follow the learned law; shades say how far it is from the true one. It is good where somebody has filmed, and a
# guess elsewhere.

side = np.linspace(-2.6, 2.6, 61)
grid = torch.tensor(np.stack(np.meshgrid(side, side), -1))
figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained")
for ax, (name, law) in zip(axes, laws.items(), strict=True):
    with torch.no_grad():
        field = law(later[0], grid)
    off = (field - pendulum(later[0], grid)).norm(dim=-1)
    shades = ax.pcolormesh(side, side, off, cmap="Oranges", norm=LogNorm(0.02, 1), shading="gouraud")
    speed = field.norm(dim=-1).numpy()
    u, v = field.unbind(-1)
    ax.streamplot(side, side, u.numpy(), v.numpy(), density=0.8, color="#404040", linewidth=0.3 + 0.4 * speed)
    ax.plot(*filmed.reshape(-1, 2).T, ".", color=plot.BLUE, markersize=4, alpha=0.7)
    ax.set(title=name, xlabel="angle in rad", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
axes[0].set_ylabel("speed in rad/s")
figure.colorbar(shades, ax=axes, label="distance from the true field", extend="both", shrink=0.85)
plt.show()
