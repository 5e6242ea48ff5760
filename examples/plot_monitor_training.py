"""
A training run in TensorBoard
=============================

Solver statistics belong beside the loss: a run whose loss still falls may already be paying for it in iterations, or in
samples that have no equilibrium. :func:`difflayers.log_to` writes what :func:`difflayers.monitor` saw in a step of
training to TensorBoard's ``SummaryWriter``, or to anything else with ``add_scalar``. Here two layers are trained on the
same digits, one run each, and the curves below are read back from the event files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from difflayers import Record, log_to, monitor, plot
from difflayers.fixedpoint import DEQ, Anderson, MonotoneDEQ, PeacemanRachford

torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)

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
# Two layers
# ----------
# The cell :math:`z = \mathrm{relu}(W z + U x + b)` with a :math:`W` that is free, where nothing says that there is an
# equilibrium, and with one that is monotone by construction, where there always is exactly one
# (:class:`~difflayers.fixedpoint.MonotoneDEQ`). Both may take 40 iterations, to a relative residual of 1e-4, and a
# sample that fails is no reason to stop: the records will tell.

digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
y = torch.tensor(digits.target)
SIZE = 64


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.injection = nn.Linear(SIZE, SIZE, bias=False), nn.Linear(64, SIZE)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.relu(self.recurrent(z) + self.injection(x))


def free() -> nn.Module:
    return DEQ(Cell(), solver=Anderson(rtol=1e-4, max_steps=40), on_failure="ignore")


def monotone() -> nn.Module:
    return MonotoneDEQ(64, SIZE, solver=PeacemanRachford(rtol=1e-4, max_steps=40), on_failure="ignore")


# %%
# Three more lines in the training loop
# -------------------------------------
# One ``with monitor()`` around forward and backward, one call of ``log_to``, and the loss as always.

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)


def train(name: str, layer: nn.Module, steps: int = 150) -> list[Record]:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Linear(SIZE, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    records = []
    with SummaryWriter(folder / name) as writer:
        for step in range(steps):
            rows = torch.randint(len(x), (128,))
            with monitor() as log:
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
                loss = loss[loss.isfinite()].mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            log_to(writer, log, step)
            writer.add_scalar("loss", loss, step)
            records += log
    return records


torch.manual_seed(0)
logs = {"free": train("free", free()), "monotone": train("monotone", monotone())}

# %%
# What was written
# ----------------
# ``tensorboard --logdir FOLDER`` shows these curves, grouped into forward and adjoint solves, run beside run:

runs = {name: EventAccumulator(str(folder / name)).Reload() for name in logs}
print("\n".join(runs["free"].Tags()["scalars"]))

# %%
# Read back
# ---------
# Iterations, residuals and failures over time, beside the loss.

PANELS = {
    "loss": "loss",
    "forward/mean_steps": "iterations, mean",
    "forward/residual": "residual norm, worst sample",
    "forward/failed": "failed samples of 128",
}


def curve(name: str, tag: str) -> tuple[np.ndarray, np.ndarray]:
    events = runs[name].Scalars(tag)
    return np.array([event.step for event in events]), np.array([event.value for event in events])


figure, axes = plt.subplots(1, 4, figsize=(12, 3.1), layout="constrained")
for ax, (tag, label) in zip(axes, PANELS.items(), strict=True):
    for name, color in zip(runs, (plot.VERMILION, plot.BLUE), strict=True):
        ax.plot(*curve(name, tag), color=color, linewidth=1.6, label=name)
    ax.set(xlabel="training step", ylabel=label)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_yscale("log")
axes[2].set_yscale("log")
axes[0].legend(frameon=False)
plt.show()

# %%
# In one figure, without TensorBoard
# ----------------------------------
# :func:`difflayers.plot.training` draws the same from the records themselves, adjoint solves included. Here are those
# of the free layer:

plot.training(logs["free"], plt.figure(figsize=(11, 3.3), layout="constrained"))
plt.show()

# %%
# Where the loss of the free layer jumps, look at the step before. An adjoint that takes several times its usual number
# of iterations belongs to a Jacobian that is nearly singular, so that the step it leads to is a large one:

adjoint = [record.steps or 0 for record in logs["free"] if record.role == "adjoint"]
worst = int(np.argmax(adjoint))
loss = curve("free", "loss")[1]
print(f"step {worst}: {adjoint[worst]} iterations of the worst adjoint, {np.median(adjoint):.0f} at other times")
before, after = loss[max(worst - 10, 0) : worst + 1], loss[worst + 1 : worst + 11]
print(f"mean loss of the 10 steps up to there {before.mean():.2f}, of the next 10 {after.mean():.2f}")

# %%
# The monotone layer pays for its guarantee with a few iterations more, and never failed:

for name, log in logs.items():
    forward = [record for record in log if record.role == "forward"]
    failed, late = sum(record.failed for record in forward), np.mean([record.mean_steps for record in forward[-20:]])
    print(f"{name:9} loss {curve(name, 'loss')[1][-20:].mean():.3f}, {late:4.1f} iterations, {failed:2} failed samples")

scratch.cleanup()
