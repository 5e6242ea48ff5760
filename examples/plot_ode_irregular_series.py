"""
Irregular time series: every sample its own times
=================================================

How long people live, in 142 countries, of which every one has its own years in the record. An encoder reads the first
four entries of a country, and a differential equation goes on from the fourth to whatever years are asked for: a latent
ODE (Rubanova, Chen, Duvenaud 2019, NeurIPS, "Latent ordinary differential equations for irregularly-sampled time
series"), here without its distribution over latent states. The years go into the layer as they are, a list with one
tensor for each country.
"""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.pyplot as plt
import plotly.data
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from difflayers import plot
from difflayers.ode import Dopri5, odeint

torch.set_num_threads(1)
torch.set_default_dtype(torch.float32)

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
# The record
# ----------
# Life expectancy and gross domestic product per head every five years from 1952 to 2007, from Gapminder
# (https://www.gapminder.org/data, CC BY 4.0), as it ships with plotly, which skfolio brings. Three entries of ten are
# dropped here, at random. A hundred countries are for training, the rest for testing; there *all* years after the
# fourth entry count, also those that were dropped.

SEEN = 4
table = plotly.data.gapminder()
names = sorted(table.country.unique())
columns = [table.pivot(index="country", columns="year", values=name) for name in ("lifeExp", "gdpPercap")]
life, product = (torch.tensor(column.loc[names].to_numpy(), dtype=torch.float32) for column in columns)
record = torch.stack([life / 10, product.log10()], -1) - torch.tensor([6.0, 3.5])
years = (torch.tensor(columns[0].columns.to_numpy(), dtype=torch.float32) - 1980) / 10

generator = torch.Generator().manual_seed(0)
kept = torch.rand(life.shape, generator=generator) < 0.7
order = torch.randperm(len(names), generator=generator)


@dataclass(frozen=True)
class Series:
    """What was seen, ``(countries, SEEN)``, and when the rest is asked for, ragged; the rest is padded with NaN."""

    country: list[int]
    t: Tensor
    x: Tensor
    later: list[Tensor]
    target: Tensor

    @classmethod
    def of(cls, countries: Tensor, everything: bool = False) -> Series:
        rows = []
        for country in countries.tolist():
            entries = kept[country].nonzero()[:, 0]
            seen, rest = entries[:SEEN], entries[SEEN:]
            if everything and len(seen) == SEEN:
                rest = torch.arange(int(seen[-1]) + 1, len(years))
            if len(rest):
                one = record[country]
                rows.append((country, years[seen], one[seen], years[rest], one[rest]))
        country, t, x, later, target = zip(*rows, strict=True)
        padded = pad_sequence(target, batch_first=True, padding_value=torch.nan)
        return cls(list(country), torch.stack(t), torch.stack(x), list(later), padded)


train, test = Series.of(order[:100]), Series.of(order[100:], everything=True)
print(f"{len(train.later)} countries to train with, {len(test.later)} to test with")
for country, t, later in list(zip(train.country, train.t, train.later, strict=True))[:3]:
    print(
        f"{names[country]:16} seen", *(10 * t + 1980).int().tolist(), "asked for", *(10 * later + 1980).int().tolist()
    )

# %%
# The model
# ---------
# The state is what was last seen and eight hidden numbers, which a GRU makes of the four entries and the gaps between
# them. ``odeint`` gets the times of each country, from its fourth entry on, and every country takes its own steps. A
# row of the answer ends where the years of its country do, and is NaN from there.

HIDDEN = 8


class Encoder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 16, batch_first=True), nn.Linear(16, size)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gaps = torch.diff(t, dim=1, prepend=t[:, :1])
        return self.head(self.gru(torch.cat([x, gaps[..., None]], -1))[1][0])


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 + HIDDEN + 1, 32), nn.Tanh(), nn.Linear(32, 2 + HIDDEN))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.expand(len(y), 1)], 1))


class LatentODE(nn.Module):
    solver = Dopri5(rtol=1e-4, atol=1e-4)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.field = Encoder(HIDDEN), Field()

    def forward(self, t: Tensor, x: Tensor, later: list[Tensor]) -> Tensor:
        y0 = torch.cat([x[:, -1], self.encoder(t, x)], 1)
        times = [torch.cat([seen[-1:], asked]) for seen, asked in zip(t, later, strict=True)]
        self.solution = odeint(self.field, y0, times, batch_dims=1, solver=self.solver)
        return self.solution.ys[1:, :, :2].transpose(0, 1)


# %%
# Baselines
# ---------
# A second GRU in place of the equation, which goes from one year that is asked for to the next and gets the gap as an
# input; it is about as large, and starts from the last entry as well. Then two that need no training: nothing changes,
# and a straight line through the first and the last of the four entries.


class Recurrent(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.encoder, self.cell, self.head = Encoder(size), nn.GRUCell(2, size), nn.Linear(size, 2)

    def forward(self, t: Tensor, x: Tensor, later: list[Tensor]) -> Tensor:
        h, y, before, answers = torch.tanh(self.encoder(t, x)), x[:, -1], t[:, -1], []
        for now in pad_sequence(later, padding_value=torch.nan):
            h = self.cell(torch.stack([now - before, now], 1).nan_to_num(), h)
            y, before = y + self.head(h), now
            answers.append(torch.where(now.isnan()[:, None], torch.nan, y))
        return torch.stack(answers, 1)


def constant(t: Tensor, x: Tensor, later: list[Tensor]) -> Tensor:
    return line(t, x[:, -1:].expand_as(x), later)


def line(t: Tensor, x: Tensor, later: list[Tensor]) -> Tensor:
    slope = (x[:, -1] - x[:, 0]) / (t[:, -1] - t[:, 0])[:, None]
    ahead = pad_sequence(later, batch_first=True, padding_value=torch.nan) - t[:, -1:]
    return x[:, -1:] + ahead[..., None] * slope[:, None]


# %%
# Training
# --------
# The same loss, steps and optimizer for both, each from three seeds. The padding stays out of the loss.


def trained(model: nn.Module, steps: int = 100) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    there = ~train.target.isnan()
    for _ in range(steps):
        answer = model(train.t, train.x, train.later)
        loss = nn.functional.smooth_l1_loss(answer[there], train.target[there], beta=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


models = {"latent ODE": [], "GRU over gaps": []}
for seed in range(3):
    for name, kind in (("latent ODE", LatentODE), ("GRU over gaps", Recurrent)):
        torch.manual_seed(seed)
        models[name].append(trained(kind()))
for name, (model, *_) in models.items():
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters")

# %%
# The test
# --------
# Life expectancy of the test countries, in years, over all years after the fourth entry; mean of the seeds, and the
# range.


def errors(answer: Tensor) -> tuple[float, float, float]:
    off = 10 * (answer - test.target)[..., 0]
    off = off[~off.isnan()]
    return float(off.abs().median()), float(off.abs().mean()), float(off.square().mean().sqrt())


print(f"{'error in years':16}{'median':>18}{'mean':>18}{'root mean square':>18}")
with torch.no_grad():
    for name, ways in {**models, "straight line": [line], "no change": [constant]}.items():
        columns = zip(*(errors(way(test.t, test.x, test.later)) for way in ways), strict=True)
        cells = [f"{sum(c) / len(c):.2f}" + (f" ({min(c):.2f}–{max(c):.2f})" if len(c) > 1 else "") for c in columns]
        print(f"{name:16}" + "".join(f"{cell:>18}" for cell in cells))

# %%
# The equation is the better model of the typical country. The mean square is the same for both. With three other draws
# of countries and dropped entries (seeds 1 to 3 of the generator) its median was lower each time, by 0.1 to 0.3 years,
# and its mean in two of the three. A few countries decide the mean square, those that an epidemic or a war befell, and
# those that gained faster than before:

ode, gru = (ways[0] for ways in models.values())
with torch.no_grad():
    off = 10 * (ode(test.t, test.x, test.later) - test.target)[..., 0].nan_to_num().abs().amax(1)
worst = off.topk(5).indices.tolist()
print("furthest off:", ", ".join(f"{names[test.country[row]]} by {off[row]:.0f} years" for row in worst))

# %%
# How it went, country by country: no status but ``SUCCESS``, steps and outputs of its own for each.

solution = ode.solution
for key in ("outputs", "accepted", "evaluations"):
    print(f"{key:12} {solution.stats[key].min()} to {solution.stats[key].max()}")
print(f"{'SUCCESS':12} {int(solution.ok.sum())} of {len(solution.ok)}")

# %%
# Curves, and whether they depend on what is asked
# ------------------------------------------------
# An equation has an answer for every year, and that for 2007 is the same, to the last bit, whether it's asked for alone
# or along with every year before: steps don't depend on output times. The GRU takes one step of thirty years
# or many small ones, and these are different predictions.

dense = [torch.linspace(float(t[-1]), 2.7, 60) for t in test.t]
alone = [years[-1:] for _ in test.t]
with torch.no_grad():
    for name, model in (("latent ODE", ode), ("GRU over gaps", gru)):
        answers = zip(model(test.t, test.x, test.later), test.later, strict=True)
        together = torch.stack([row[len(later) - 1] for row, later in answers])
        moved = 10 * (together - model(test.t, test.x, alone)[:, 0])[:, 0].abs()
        print(f"{name}: 2007 alone or with the years before: {moved.mean():.2f} years apart, {moved.max():.2f} at most")
    smooth, asked = ode(test.t, test.x, dense)[..., 0], gru(test.t, test.x, test.later)[..., 0]

figure, axes = plt.subplots(2, 4, figsize=(11, 5.6), sharex=True, sharey=True, layout="constrained")
calendar = 10 * years + 1980
for row, ax in zip(torch.linspace(0, len(test.later) - 1, 8).long().tolist(), axes.flat, strict=True):
    country, later = test.country[row], 10 * test.later[row] + 1980
    ax.plot(calendar, life[country], "o", color=TEXT, markersize=4, fillstyle="none", label="record")
    ax.plot(10 * test.t[row] + 1980, 10 * test.x[row, :, 0] + 60, "o", color=TEXT, markersize=6, label="seen")
    ax.plot(10 * dense[row] + 1980, 10 * smooth[row] + 60, color=plot.BLUE, linewidth=2, label="latent ODE")
    ax.plot(later, 10 * asked[row, : len(later)] + 60, "x", color=plot.VERMILION, markersize=5, label="GRU over gaps")
    ax.set_title(names[country], fontsize=11)
for ax in axes[:, 0]:
    ax.set_ylabel("years of life")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
plt.show()
