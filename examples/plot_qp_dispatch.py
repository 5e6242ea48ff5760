"""
Economic dispatch with a forecast
=================================

Generators are scheduled for a demand that is only forecast; what the forecast got wrong is corrected when the demand
is known, within what generators can still change, and what can't be corrected is load that goes without. Both steps
are QPs, so the cost of the day can be a training loss for the forecast (as in Donti, Amos, Kolter 2017, NeurIPS,
"Task-based end-to-end model learning in stochastic optimization"). A forecast of least squared error is the wrong one
for it: too little is dearer than too much, and how much dearer depends on the grid.

The grids are the IEEE cases of 30 and 118 buses, from pandapower. Demand and its features are generated here, and so
are the line limits of the larger case, which has none.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandapower
import torch
from pandapower import networks
from torch import Tensor, nn

from difflayers.qp import QPLayer, QPSolution

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

# %%
# The grid
# --------
# DC power flow: flows are linear in what is put in at the buses, :math:`f = H (Mp - d)`, with the matrix ``H`` of
# power transfer distribution factors. pandapower solves the same optimal power flow, which checks all of this. Demand
# comes in three areas, buses in the order of their numbers; all power is in units of 100 MW.

UNIT, AREAS = 100.0, 3


@dataclass(frozen=True)
class Grid:
    """A DC grid. Money is in units of 100 EUR."""

    quadratic: Tensor  # cost of generators
    linear: Tensor
    capacity: Tensor
    from_generators: Tensor  # flows of one unit each, (lines, generators)
    from_areas: Tensor  # flows of one unit of demand, spread over an area like the nominal demand, (lines, areas)
    nominal: Tensor  # demand of areas
    limit: Tensor

    @classmethod
    def of(cls, net) -> Grid:
        pandapower.rundcopp(net, numba=False)
        case = net._ppc_opf
        bus, branch, generator, price = (np.real(case[key]) for key in ("bus", "branch", "gen", "gencost"))
        ends = branch[:, :2].astype(int)
        incidence = np.eye(len(bus))[ends[:, 0]] - np.eye(len(bus))[ends[:, 1]]
        susceptance = 1 / (branch[:, 3] * branch[:, 8])
        flow = susceptance[:, None] * incidence
        factors = flow @ np.linalg.pinv(incidence.T @ flow)
        demand = bus[:, 2] + bus[:, 4]
        area = np.arange(len(bus)) * AREAS // len(bus)
        share = np.stack([np.where(area == k, demand, 0) for k in range(AREAS)], axis=1)
        at = generator[:, 0].astype(int)
        limit = branch[:, 5] / UNIT
        if limit.min() > 90:  # none: 15 % over the flow at nominal demand, for lines that matter
            carried = np.abs(factors @ (np.bincount(at, generator[:, 1], len(bus)) - demand))
            factors, limit = factors[carried > 50], 1.15 * carried[carried > 50] / UNIT
        arrays = (
            2 * price[:, 4] * UNIT,
            price[:, 5],
            generator[:, 8] / UNIT,
            factors[:, at],
            factors @ (share / share.sum(0)),
            share.sum(0) / UNIT,
            limit,
        )
        return cls(*map(torch.as_tensor, arrays))


# %%
# Two steps, two layers
# ---------------------
# Demand that isn't served, at 25 times the dearest generator's price, keeps every problem feasible. The second step
# starts from the schedule: generators can go down, and up by 2 % of their capacity, and every move has a price.

UP = 0.02
layer = QPLayer(solver="daqp")


class Dispatch:
    """The QPs of one grid; unknowns are generation and, for each area, demand that isn't served."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.shed_price = 25 * (grid.linear + grid.quadratic * grid.capacity).max()
        self.move_price = 20 * grid.quadratic.mean()
        self.flows = torch.cat([grid.from_generators, grid.from_areas], dim=1)
        self.quadratic = torch.cat([grid.quadratic, torch.ones(AREAS)])
        self.linear = torch.cat([grid.linear, self.shed_price.expand(AREAS)])

    def schedule(self, forecast: Tensor) -> Tensor:
        """The cheapest generation for a forecast, ``(samples, areas)``."""
        low = torch.zeros(len(self.linear))
        high = torch.cat([self.grid.capacity, 2 * self.grid.nominal])
        return self._solved(self.quadratic, self.linear, forecast, low, high).x[:, :-AREAS]

    def correct(self, schedule: Tensor, demand: Tensor) -> QPSolution:
        """The cheapest correction once the demand is known."""
        price = torch.cat([self.move_price.expand(len(self.grid.capacity)), torch.zeros(AREAS)])
        anchor = torch.cat([schedule, torch.zeros(len(schedule), AREAS)], dim=1)
        capacity = self.grid.capacity
        low = torch.zeros(len(self.linear))
        high = torch.cat([torch.minimum(schedule + UP * capacity, capacity), demand], dim=1)
        return self._solved(self.quadratic + price, self.linear - price * anchor, demand, low, high)

    def cost(self, forecast: Tensor, demand: Tensor) -> tuple[Tensor, QPSolution]:
        """What generation, corrections and missing demand cost, per sample."""
        schedule = self.schedule(forecast)
        corrected = self.correct(schedule, demand)
        moves = (corrected.x[:, :-AREAS] - schedule).square().sum(1)
        x = corrected.x
        return 0.5 * x.square() @ self.quadratic + x @ self.linear + 0.5 * self.move_price * moves, corrected

    def _solved(self, quadratic: Tensor, linear: Tensor, demand: Tensor, low: Tensor, high: Tensor) -> QPSolution:
        along = demand @ self.grid.from_areas.mT
        h = torch.cat([self.grid.limit + along, self.grid.limit - along], dim=1)
        G = torch.cat([self.flows, -self.flows])
        balance = torch.ones(1, len(self.linear))
        return layer.solve(torch.diag(quadratic), linear, G, h, balance, demand.sum(1, keepdim=True), low, high)


dispatches = {}
for name, case in (("case30", networks.case30), ("case118", networks.case118)):
    net = case()
    dispatches[name] = dispatch = Dispatch(Grid.of(net))
    grid = dispatch.grid
    p = dispatch.schedule(grid.nominal[None])[0]
    cost = UNIT * float(p @ (grid.quadratic / 2 * p + grid.linear))
    print(f"{name}: {len(p)} generators, {len(grid.limit)} lines with limits")
    print(f"    {cost:.4f} EUR/h at nominal demand; pandapower says {net.res_cost:.4f}")

# %%
# Demand
# ------
# Generated: a daily and a weekly pattern, the weather, and noise whose size the features tell. Where there is much sun,
# the demand left after rooftop solar is uncertain when clouds are about.


def days(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features and demand of areas, relative to the nominal one."""
    uniform = torch.rand(count, 4, generator=generator)
    hour, cloud, weekend = 24 * uniform[:, 0], uniform[:, 1], (uniform[:, 2] < 2 / 7).double()
    heat = torch.randn(count, generator=generator)
    angle = 2 * torch.pi * hour / 24
    sun = torch.relu(-angle.cos())
    features = torch.stack([angle.sin(), angle.cos(), cloud, weekend, heat, sun], dim=1)
    mean = 0.9 + 0.15 * torch.sin(angle - torch.tensor([[2.0], [2.4], [2.8]])) + 0.04 * heat
    mean = mean - 0.06 * weekend - torch.tensor([[0.0], [0.1], [0.25]]) * sun * (1 - cloud)
    spread = 0.015 + torch.tensor([[0.0], [0.15], [0.4]]) * sun * cloud * (1 - cloud)
    return features, (mean + spread * torch.randn(AREAS, count, generator=generator)).mT


generator = torch.Generator().manual_seed(0)
features, share = days(1000, generator)
test_features, test_share = days(1500, generator)

# %%
# Forecasts
# ---------
# Least squares first. Then the same network goes on with the cost as its loss. Between them stands what an operator
# would do: the first forecast and a margin on top, one number, the best on the training data. The bound for all is to
# know the demand.


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, AREAS))


def fit_squares(model: nn.Module, steps: int = 1500) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = (model(features) - share).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fit_cost(model: nn.Module, dispatch: Dispatch, steps: int, batch: int = 100) -> list[float]:
    nominal, losses = dispatch.grid.nominal, []
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(features), (batch,), generator=generator)
        loss = dispatch.cost(nominal * model(features[rows]), nominal * share[rows])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


torch.manual_seed(0)
squares = network()
fit_squares(squares)
found = {}
for name, steps in (("case30", 300), ("case118", 120)):
    dispatch, start = dispatches[name], time.process_time()
    nominal = dispatch.grid.nominal
    focused = copy.deepcopy(squares)
    fit_cost(focused, dispatch, steps)
    seconds = time.process_time() - start
    with torch.no_grad():
        margins, guess = [k / 100 for k in range(8)], squares(features)
        costs = [dispatch.cost(nominal * guess * (1 + m), nominal * share)[0].mean() for m in margins]
        margin = margins[int(torch.stack(costs).argmin())]
        forecasts = {
            "demand known": test_share,
            "least squares": squares(test_features),
            f"margin of {margin:.0%}": squares(test_features) * (1 + margin),
            "trained on cost": focused(test_features),
        }
        results = [dispatch.cost(nominal * forecast, nominal * test_share) for forecast in forecasts.values()]
    best = results[0][0]
    over = {label: (cost - best) / best.mean() for label, (cost, _) in zip(forecasts, results, strict=True)}
    found[name] = forecasts, over
    print(f"\n{name}, trained for {seconds:.0f} s of CPU; demand known: {UNIT * best.mean():.0f} EUR/h")
    for (label, forecast), (_, solution) in zip(forecasts.items(), results, strict=True):
        unserved = solution.x[:, -AREAS:].sum(1) > 1e-6
        error = (forecast - test_share).square().mean().sqrt()
        print(
            f"{label:16} cost +{over[label].mean():6.2%} ± {over[label].std() / len(best) ** 0.5:.2%}, forecast error "
            f"{error:.3f}, demand unserved in {unserved.double().mean():4.1%} of hours"
        )
    gain = over[f"margin of {margin:.0%}"] - over["trained on cost"]
    print(f"training on cost saves {gain.mean():.2%} ± {gain.std() / len(gain) ** 0.5:.2%} against the margin")
    dark = results[1][1].x[:, -AREAS:].sum(1) > 1e-6
    share_of_dark = over["least squares"][dark].sum() / over["least squares"].sum()
    print(f"of what least squares costs too much, {share_of_dark:.0%} are hours with demand unserved")
    more = 100 * (forecasts["trained on cost"] / forecasts["least squares"] - 1)
    unsure = (test_features[:, 5] * test_features[:, 2] * (1 - test_features[:, 2])) > 0.1
    for label, hours in (("uncertain hours", unsure), ("the others", ~unsure)):
        print(f"added to areas in {label}: {more[hours].mean(0).numpy().round(1)} %")

# %%
# The picture
# -----------
# Left, what is paid beyond the cost with demand known, with standard errors. Right, how much more the trained
# forecast says than the first one, area by area, against what decides about the noise: sun, with a sky neither clear
# nor covered.

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
figure, (bars, added) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
kinds = ("least squares", "with the best margin", "trained on cost")
for place, (_, over) in enumerate(found.values()):
    means = [100 * float(extra.mean()) for extra in list(over.values())[1:]]
    errors = [100 * float(extra.std()) / len(extra) ** 0.5 for extra in list(over.values())[1:]]
    places = [place - 0.27, place, place + 0.27]
    labels = kinds if place == 0 else [None] * 3
    bars.bar(places, means, 0.25, yerr=errors, color=["#d55e00", "#e69f00", "#0072b2"], label=labels)
bars.set(xticks=[0, 1], xticklabels=list(found), ylabel="cost beyond the best, %")
bars.legend(frameon=False, loc="upper left")
forecasts = found["case118"][0]
cloudy = test_features[:, 5] * test_features[:, 2] * (1 - test_features[:, 2])
for area, color in enumerate(("#0072b2", "#009e73", "#cc79a7")):
    more = 100 * (forecasts["trained on cost"] / forecasts["least squares"] - 1)[:, area]
    added.plot(cloudy[:500], more[:500], ".", markersize=4, color=color, label=f"area {area + 1}")
added.set(xlabel="sun · cloud · (1 − cloud)", ylabel="added to the forecast, % (case118)")
added.legend(frameon=False)
plt.show()

# %%
# What it shows
# -------------
# - The forecast trained on cost is worse as a forecast and cheaper as a decision. It adds more in hours that are
#   uncertain than in others, and not the same to all areas.
# - Most of the gain over least squares comes from any margin at all. A single tuned number is hard to beat; what
#   training adds to it is two to four standard errors of the difference, hour by hour. It is one training of each.
# - The few hours in which demand isn't served make most of the cost beyond the best, hence the large errors of the
#   means.
