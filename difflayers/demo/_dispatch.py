"""A forecast trained on what decisions cost: generators dispatched by a QP, on a power grid of pandapower's."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from difflayers import monitor
from difflayers.demo._row import Check, Row, Score, float64, gradient_error, live, source
from difflayers.qp import QPSolution, solve_qp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIT = 100.0  # MW
UP = 0.02  # of its capacity, by which a generator can still go up when the demand is known


@dataclass(frozen=True)
class Grid:
    """A grid in DC approximation: what generation costs, and how it flows. Power in units of 100 MW.

    Attributes:
        quadratic: cost of generators, and of demand that isn't served.
        linear: the same.
        flows: of one unit from each, ``(lines, generators + 1)``.
        capacity: of generators.
        limit: of lines.
        demand: nominal.
        price: what it costs to change a schedule.
        cost: pandapower's, at the nominal demand.
    """

    quadratic: Tensor
    linear: Tensor
    flows: Tensor
    capacity: Tensor
    limit: Tensor
    demand: float
    price: float
    cost: float

    @classmethod
    def ieee30(cls) -> Grid:
        """The IEEE case of 30 buses and 6 generators."""
        import pandapower

        net = pandapower.networks.case30()
        pandapower.rundcopp(net, numba=False)
        bus, branch, generator, price = (np.real(net._ppc_opf[key]) for key in ("bus", "branch", "gen", "gencost"))
        ends = branch[:, :2].astype(int)
        incidence = np.eye(len(bus))[ends[:, 0]] - np.eye(len(bus))[ends[:, 1]]
        flow = incidence / (branch[:, 3] * branch[:, 8])[:, None]
        factors = flow @ np.linalg.pinv(incidence.T @ flow)
        demand = bus[:, 2] + bus[:, 4]
        # Demand is spread like the nominal one. What isn't served is as if it were generated there.
        flows = np.c_[factors[:, generator[:, 0].astype(int)], factors @ (demand / demand.sum())]
        quadratic, linear, capacity = 2 * price[:, 4] * UNIT, price[:, 5], generator[:, 8] / UNIT
        dearest = 25 * (linear + quadratic * capacity).max()
        return cls(
            torch.tensor([*quadratic, 1.0]),
            torch.tensor([*linear, dearest]),
            torch.tensor(flows),
            torch.tensor(capacity),
            torch.tensor(branch[:, 5] / UNIT),
            demand.sum() / UNIT,
            20 * quadratic.mean(),
            net.res_cost / UNIT,
        )


def dispatch(grid: Grid, quadratic: Tensor, linear: Tensor, demand: Tensor, low: Tensor, high: Tensor) -> QPSolution:
    """The cheapest generation that serves the demand and that the lines can carry."""
    along = demand[:, None] * grid.flows[:, -1]
    G, h = torch.cat([grid.flows, -grid.flows]), torch.cat([grid.limit + along, grid.limit - along], dim=1)
    ones = torch.ones(1, len(grid.linear))
    return solve_qp(torch.diag(quadratic), linear, G, h, A=ones, b=demand[:, None], lb=low, ub=high)


def costs(grid: Grid, forecast: Tensor, demand: Tensor) -> tuple[Tensor, QPSolution]:
    """What the hour costs that is scheduled for a forecast, and corrected when the demand is known."""
    most = torch.cat([grid.capacity, torch.tensor([2 * grid.demand])])
    first = dispatch(grid, grid.quadratic, grid.linear, forecast, torch.zeros_like(most), most)
    scheduled = first.x[:, :-1]
    price = torch.cat([torch.full_like(grid.capacity, grid.price), torch.zeros(1)])
    high = torch.cat([torch.minimum(scheduled + UP * grid.capacity, grid.capacity), demand[:, None]], dim=1)
    linear = grid.linear - price * torch.cat([scheduled, torch.zeros(len(scheduled), 1)], dim=1)
    final = dispatch(grid, grid.quadratic + price, linear, demand, torch.zeros_like(most), high)
    moves = (final.x[:, :-1] - scheduled).square().sum(1)
    return final.x.square() @ grid.quadratic / 2 + final.x @ grid.linear + grid.price / 2 * moves, final


def hours(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features of some hours and their demand, relative to the nominal one. Made up: daily, weekly, and by the weather.

    How uncertain it is, features tell: most where there is sun behind broken clouds.
    """
    hour, cloud, weekend = torch.rand(3, count, generator=generator)
    hour, weekend, heat = 2 * torch.pi * hour, (weekend < 2 / 7).double(), torch.randn(count, generator=generator)
    sun = torch.relu(-hour.cos())
    mean = 0.9 + 0.15 * (hour - 2.4).sin() + 0.04 * heat - 0.06 * weekend - 0.12 * sun * (1 - cloud)
    spread = 0.015 + 0.25 * sun * cloud * (1 - cloud)
    features = torch.stack([hour.sin(), hour.cos(), cloud, weekend, heat, sun], dim=1)
    return features, mean + spread * torch.randn(count, generator=generator)


def run(quick: bool) -> Row:
    """Least squares, least squares with a margin, and the cost as the loss."""
    start = time.perf_counter()
    with float64():
        torch.manual_seed(0)
        grid, generator = Grid.ieee30(), torch.Generator().manual_seed(0)
        features, demand = hours(800, generator)
        test, later = hours(1000, generator)
        demand, later = grid.demand * demand, grid.demand * later
        squares = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
        sample = features, grid, demand
        train(squares, sample, squared_error, 300 if quick else 1500, 5e-3, "QP, squared error")
        focused = copy.deepcopy(squares)
        losses = train(focused, sample, cost_of_decisions, 60 if quick else 400, 2e-3, "QP, cost of decisions")
        with torch.no_grad():
            known, guess = costs(grid, later, later)[0], grid.demand * squares(features)
            margins = torch.arange(8) / 100
            margin = margins[
                int(torch.stack([costs(grid, guess * (1 + m), demand)[0].mean() for m in margins]).argmin())
            ]
            forecasts = {
                "least squares": grid.demand * squares(test),
                "with the best margin": grid.demand * squares(test) * (1 + margin),
                "trained on cost": grid.demand * focused(test),
            }
            over = {
                name: costs(grid, forecast, later)[0] / known.mean() - known / known.mean()
                for name, forecast in forecasts.items()
            }
        return _row(grid, over, losses, forecasts, later, start)


def squared_error(grid: Grid, forecast: Tensor, demand: Tensor) -> Tensor:
    return (forecast - demand).square().mean()


def cost_of_decisions(grid: Grid, forecast: Tensor, demand: Tensor) -> Tensor:
    return costs(grid, forecast, demand)[0].mean()


def train(
    model: nn.Module,
    sample: tuple[Tensor, Grid, Tensor],
    loss_of: Callable[[Grid, Tensor, Tensor], Tensor],
    steps: int,
    rate: float,
    what: str,
) -> list[float]:
    """Adam on batches of 100 hours."""
    features, grid, demand = sample
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=rate), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    with monitor() as log, tqdm(range(steps), desc=what, unit="step", mininterval=0.5) as bar:
        for _ in bar:
            rows = torch.randint(len(features), (100,))
            loss = loss_of(grid, grid.demand * model(features[rows]), demand[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(live(log, loss=f"{losses[-1]:.4g}"), refresh=False)
    return losses


def _row(
    grid: Grid, over: dict[str, Tensor], losses: list[float], forecasts: dict[str, Tensor], later: Tensor, start: float
) -> Row:
    few = later[:16], forecasts["trained on cost"][:16]
    with torch.no_grad():
        final = costs(grid, few[1], few[0])[1]
    error = gradient_error(lambda forecast: costs(grid, forecast, few[0])[0].mean(), few[1], 1e-4)
    nominal = dispatch(grid, grid.quadratic, grid.linear, torch.tensor([grid.demand]), *_bounds(grid))
    cost = float(nominal.x[0].square() @ grid.quadratic / 2 + nominal.x[0] @ grid.linear)
    means = {name: float(extra.mean()) for name, extra in over.items()}
    score = Score(
        "cost of an hour beyond what it costs if demand is known",
        means["trained on cost"],
        "least squares, best margin",
        means["with the best margin"],
        ".2%",
    )
    checks = [
        Check("gradient error of the QP", error, 1e-5),
        Check("difference from pandapower's cost", abs(cost / grid.cost - 1), 1e-4),
        Check("residual of the QP", float(final.stats["residual"].max()), 1e-9),
    ]
    return Row(
        "QP",
        "dispatch on IEEE's 30 buses, made-up demand",
        score,
        float(final.stats["steps"].double().mean()),
        float(final.stats["residual"].max()),
        error,
        "pandapower's optimal power flow",
        abs(cost / grid.cost - 1),
        time.perf_counter() - start,
        checks,
        source(dispatch),
        {"Cost beyond the best, and the loss in training": _figure(over, losses)},
        [f"A forecast of least squares alone costs {means['least squares']:.1%} more than if demand is known."],
        {"over": means, "losses": losses},
    )


def _bounds(grid: Grid) -> tuple[Tensor, Tensor]:
    high = torch.cat([grid.capacity, torch.tensor([2 * grid.demand])])
    return torch.zeros_like(high), high


def _figure(over: dict[str, Tensor], losses: list[float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = [100 * float(extra.mean()) for extra in over.values()]
    errors = [100 * float(extra.std()) / len(extra) ** 0.5 for extra in over.values()]
    left.barh(list(over), means, xerr=errors, color=["#d55e00", "#e69f00", "#0072b2"])
    left.set(xlabel="cost beyond the best, % ± standard error")
    left.invert_yaxis()
    right.plot(losses, color="#0072b2", linewidth=0.8)
    right.set(xlabel="step", ylabel="cost of an hour, training")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
