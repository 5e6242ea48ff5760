"""
Robust portfolios: how much doubt, and when
===========================================

Past means are poor estimates of future returns. A robust portfolio takes the worst of all means in an ellipsoid around
them (Goldfarb, Iyengar 2003, Mathematics of Operations Research 28),

.. math::

   \\max_w \\ \\mu^\\top w - \\kappa \\|L^\\top w\\| \\quad \\text{where} \\quad
   \\textstyle\\sum_i w_i = 1, \\ w_i \\ge 0, \\ \\Sigma = L L^\\top,

a second-order cone program. Its radius :math:`\\kappa` says how much the means are doubted. A grid can choose one for
all times. Here it depends on what the market was like, :math:`\\kappa = \\exp(a + b^\\top z)` with volatility and
return of the last months in :math:`z`, and the gradient of what the portfolios earned chooses :math:`a` and
:math:`b`.

The prices are those of skfolio: 20 companies of the S&P 500, 1990 to 2022. All of them are large today, which nobody
knew then, so levels of return are too good for every method alike.
"""

from __future__ import annotations

import time

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import torch
from skfolio.datasets import load_sp500_dataset
from torch import Tensor

from difflayers.qp import CvxpyLayer

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

# %%
# Data
# ----
# Means and covariances are those of the last 60 months, the latter shrunk by 30 % to a multiple of the identity. The
# state of the market is the volatility of its last 60 days, in logarithms, and its return over six months,
# standardized by the training period.

prices = load_sp500_dataset()
monthly = prices.resample("ME").last()
returns = monthly.pct_change().to_numpy()
market = prices.pct_change().mean(axis=1)
volatility = np.log(market.rolling(60).std().resample("ME").last().to_numpy())
trend = market.rolling(126).mean().resample("ME").last().to_numpy()
FIRST, COUNT, RISK, FEE = 60, prices.shape[1], 5.0, 0.001
months = np.arange(FIRST, len(monthly) - 1)


def covariance(past: np.ndarray) -> np.ndarray:
    sample = np.cov(past.T)
    return 0.7 * sample + 0.3 * np.trace(sample) / COUNT * np.eye(COUNT)


means = torch.as_tensor(np.stack([returns[m - 59 : m + 1].mean(0) for m in months]))
roots = torch.linalg.cholesky(torch.as_tensor(np.stack([covariance(returns[m - 59 : m + 1]) for m in months])))
earned, dates = torch.as_tensor(returns[months + 1]), monthly.index[months + 1]
count = int((dates.year <= 2008).sum())
train, test = slice(0, count), slice(count, None)
state = torch.as_tensor(np.stack([volatility[months], trend[months]], axis=1))
state = (state - state[train].mean(0)) / state[train].std(0)
print(f"{count} months to learn from, to {dates[train][-1]:%B %Y}; {len(dates) - count} to test")

# %%
# The portfolio
# -------------
# Divided by :math:`\\kappa`, so that numbers stay of one size. All months are one batch.

w, mu, root = cp.Variable(COUNT), cp.Parameter(COUNT), cp.Parameter((COUNT, COUNT))
problem = cp.Problem(cp.Minimize(cp.norm(root @ w) - mu @ w), [cp.sum(w) == 1, w >= 0])
layer = CvxpyLayer(problem, parameters=[mu, root], variables=[w])


def decide(radius: Tensor, months: slice) -> Tensor:
    (weights,) = layer(means[months] / radius.reshape(-1, 1), roots[months].mT)
    return weights


def income(weights: Tensor, earned: Tensor) -> Tensor:
    """After 0.1 % of what is traded, the first time free."""
    grown = weights * (1 + earned)
    grown = grown / grown.sum(1, keepdim=True)
    traded = torch.cat([weights.new_zeros(1), (weights[1:] - grown[:-1]).abs().sum(1)])
    return (weights * earned).sum(1) - FEE * traded


def utility(income: Tensor) -> Tensor:
    """Mean minus risk, per year."""
    return 12 * (income.mean() - RISK / 2 * income.var())


# %%
# Choosing the radius
# -------------------
# By a grid, for all months; and from the best of it by the gradient, with the state of the market.

start = time.process_time()
grid = torch.tensor([0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0])
with torch.no_grad():
    utilities = torch.stack([utility(income(decide(radius, train), earned[train])) for radius in grid])
constant = grid[utilities.argmax()]
coefficients = torch.tensor([float(constant.log()), 0.0, 0.0]).requires_grad_()
optimizer = torch.optim.Adam([coefficients], lr=0.1)


def radii(months: slice) -> Tensor:
    """Between 0.1 and 100, which is all or nothing."""
    return (coefficients[0] + state[months] @ coefficients[1:]).exp().clamp(0.1, 100)


for _ in range(60):
    loss = -utility(income(decide(radii(train), train), earned[train]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{time.process_time() - start:.0f} s of CPU; best of the grid {constant:.2f}")
print("learned: a, volatility, trend", coefficients.detach().numpy().round(2))

# %%
# What they earn
# --------------
# Intervals are those of a bootstrap over blocks of a year, 95 %, for the difference of Sharpe ratios to equal weights.

with torch.no_grad():
    portfolios = {
        "equal weights": torch.full_like(earned, 1 / COUNT),
        "hardly any doubt, κ = 0.01": decide(torch.tensor(0.01), slice(None)),
        "least variance, κ = 100": decide(torch.tensor(100.0), slice(None)),
        f"robust, κ = {constant:.2f}": decide(constant, slice(None)),
        "robust, learned κ": decide(radii(slice(None)), slice(None)),
    }


def sharpe(income: np.ndarray) -> np.ndarray:
    return 12**0.5 * income.mean(-1) / income.std(-1, ddof=1)


rng = np.random.default_rng(0)
length = len(dates[test])
blocks = rng.integers(length, size=(4000, -(-length // 12)))
resampled = ((blocks[..., None] + np.arange(12)) % length).reshape(4000, -1)[:, :length]
incomes = {name: income(weights[test], earned[test]).numpy() for name, weights in portfolios.items()}
print(f"{'':26}  utility, % a year   Sharpe ratio, test")
print(f"{'':26}  training     test   and difference")
for name, weights in portfolios.items():
    inside, outside = (100 * float(utility(income(weights[part], earned[part]))) for part in (train, test))
    difference = sharpe(incomes[name][resampled]) - sharpe(incomes["equal weights"][resampled])
    low, high = np.quantile(difference, [0.025, 0.975])
    print(f"{name:26}  {inside:8.1f} {outside:8.1f} {sharpe(incomes[name]):7.2f}  [{low:+.2f}, {high:+.2f}]")

# %%
# The picture
# -----------

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
figure, (upper, lower) = plt.subplots(2, 1, figsize=(7.6, 5.6), layout="constrained", height_ratios=(2, 1), sharex=True)
for (name, values), color in zip(incomes.items(), (TEXT, "#d55e00", "#e69f00", "#009e73", "#0072b2"), strict=True):
    upper.plot(dates[test], np.cumprod(1 + values), color=color, label=name)
upper.set(yscale="log", ylabel="value of 1, end of 2008", yticks=[1, 2, 4, 8, 16])
upper.set_yticklabels(["1", "2", "4", "8", "16"])
upper.minorticks_off()
upper.legend(frameon=False, fontsize="small")
lower.axhline(float(constant), color="#009e73")
lower.plot(dates[test], radii(test).detach(), color="#0072b2")
lower.set(ylabel="radius κ", yscale="log")
plt.show()

# %%
# What it shows
# -------------
# - Means of 60 months are worth little: in the training months the best constant radius is so large that hardly more
#   than least variance is left. With hardly any doubt the portfolio made much money in the test, and lost utility
#   all the same, by its risk.
# - A radius that grows with volatility is a little better than the best constant one, in training, where it was chosen
#   for that, and in the test too. Three numbers are few enough to be learned from 167 months.
# - Against equal weights all intervals contain zero. In 14 years of months only large differences can be told.
# - The grid of radii and the number of steps were settled when results of the test months had been seen, which nobody
#   had at the end of 2008.
