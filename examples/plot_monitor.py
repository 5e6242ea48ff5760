"""
What a solver does while a model trains
=======================================

A layer that is defined by an equilibrium can fail in ways that the loss doesn't show: solves take ever more iterations,
stop short of their tolerance, or give gradients of something that isn't an equilibrium at all. Three figures tell. They
come from :func:`difflayers.monitor`, which sees every solve that runs inside it, and from an estimate of how strongly
the cell pulls toward its equilibrium.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from difflayers import Record, monitor, plot
from difflayers.fixedpoint import DEQ, Anderson, Picard, spectral_radius

torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)
torch.manual_seed(0)

# sphinx_gallery_start_ignore
TEXT = "#767676"  # a gray for light and dark pages
plt.rcParams.update(
    {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
    }
)
# sphinx_gallery_end_ignore

# %%
# Two models to look at
# ---------------------
# Handwritten digits of 8 × 8 pixels, and one cell, :math:`z = \tanh(W z + U x)`. In the first model :math:`W` is free.
# In the second, spectral normalization keeps :math:`\lVert W \rVert \le 1`, so that the cell always contracts.

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
y = torch.tensor(digits.target)
probe = x[:100]  # the same samples are looked at all the time


class Cell(nn.Module):
    def __init__(self, bounded: bool) -> None:
        super().__init__()
        linear = nn.Linear(64, 64, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        self.recurrent = spectral_norm(linear, n_power_iterations=3) if bounded else linear

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + injected)


class Classifier(nn.Module):
    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.inject = nn.Linear(64, 64)
        self.deq = DEQ(Cell(bounded), solver=Anderson(rtol=1e-4), on_failure="ignore")  # the figures will tell
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deq(self.inject(x)))


# %%
# Train them inside ``monitor()``
# -------------------------------
# That is all it takes to record every solve, forward and backward. Every 20 steps we also estimate, for every sample of
# the probe, the spectral radius of :math:`\partial f / \partial z` at its equilibrium: the factor by which the cell
# shrinks a disturbance, per application.


def radii(model: Classifier) -> Tensor:
    with torch.no_grad():
        injected = model.inject(probe)
        solution = model.deq.solve(injected)
        return spectral_radius(model.deq.fn, solution, (injected,), batch_dims=1)


@dataclass
class Training:
    model: Classifier
    log: list[Record] = field(default_factory=list)
    moments: list[int] = field(default_factory=list)
    radii: list[Tensor] = field(default_factory=list)
    models: list[Classifier] = field(default_factory=list)

    def look(self, step: int) -> None:
        self.moments.append(step)
        self.radii.append(radii(self.model))
        self.models.append(deepcopy(self.model))

    @property
    def worst(self) -> Classifier:
        """The model at the moment of the largest spectral radius."""
        return self.models[int(torch.stack([radius.max() for radius in self.radii]).argmax())]


def train(bounded: bool) -> Training:
    torch.manual_seed(0)
    model = Classifier(bounded)
    training = Training(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(160):
        if step % 20 == 0:
            training.look(step)
        rows = torch.randint(len(x), (64,))
        with monitor() as log:
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        training.log += log
    training.look(160)
    return training


free, bounded = train(bounded=False), train(bounded=True)

# %%
# Iterations, residuals, failures
# -------------------------------
# Left: how many iterations the worst sample of a batch needs, and the mean. A gap between the two is normal; both
# rising together is a model that drifts toward equilibria that are harder to find. Middle: the residual where the
# solver stopped. It should be flat, at the tolerance; every peak is a solve that gave up. Right: how many samples did
# not get there, and have the gradient of something that isn't an equilibrium. The adjoint solves of the backward pass
# are systems with the same Jacobian, so they get harder along with the forward ones.
#
# The free model:

plot.training(free.log, plt.figure(figsize=(11, 3.3), layout="constrained"))
plt.show()

# %%
# The bounded one, for comparison:

plot.training(bounded.log, plt.figure(figsize=(11, 3.3), layout="constrained"))
plt.show()

# %%
# The spectral radius
# -------------------
# Here is the reason. The nearer to one, the less the cell pulls toward its equilibrium; from one on, plain iteration no
# longer stays there, and Anderson's method has to work against the cell. Look at the largest, not at the median: one
# bad sample is enough for a bad gradient.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
plot.spectral_radius(free.radii, left, steps=free.moments).set_title("W free")
plot.spectral_radius(bounded.radii, right, steps=bounded.moments).set_title("W bounded")
plt.show()

# %%
# What bounding costs, or saves:

for name, training in (("W free", free), ("W bounded", bounded)):
    with torch.no_grad():
        accuracy = float((training.model(x).argmax(1) == y).float().mean())
    forward = [record for record in training.log if record.role == "forward"]
    failed = sum(record.failed for record in forward)
    work = np.mean([record.mean_steps for record in forward[-50:]])
    print(f"{name:9}  training accuracy {accuracy:.3f}, {failed:2} failed samples, {work:4.1f} iterations in the end")

# %%
# Every sample of one solve
# -------------------------
# With ``monitor(trace=True)`` a record also holds the residual of every sample after every step. Below, equilibria of
# both models, each at the moment of its largest spectral radius, by plain iteration and by Anderson's method. A line
# ends where its sample is done. Plain iteration draws straight lines on this scale, since each step multiplies the
# residual by the spectral radius: the closer to one, the flatter. Where it is one or more the line never comes down,
# and the sample fails. A wave on a line is a complex pair of eigenvalues.

figure, grid = plt.subplots(2, 2, figsize=(10, 6.6), sharey=True, layout="constrained")
for row, (name, model) in zip(grid, (("W free", free.worst), ("W bounded", bounded.worst)), strict=True):
    injected = model.inject(probe).detach()
    for ax, solver in zip(row, (Picard(rtol=1e-4, max_steps=60), Anderson(rtol=1e-4, max_steps=60)), strict=True):
        layer = DEQ(model.deq.fn, solver=solver, on_failure="ignore")
        with monitor(trace=True) as log, torch.no_grad():
            layer(injected)
        plot.convergence(log, ax, relative=True).set_title(f"{name}, {type(solver).__name__}")
plt.show()

# %%
# For a dashboard, ``record.scalars()`` is what TensorBoard's ``add_scalar`` takes, and ``record.as_dict()`` is a row
# for JSON or a table:

free.log[-2].scalars()
