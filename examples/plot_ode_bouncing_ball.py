"""
How bouncy is the ball? Ask when it hits the ground
===================================================

A ball is thrown, and a microphone hears when it bounces. How fast was it thrown, and how much of its speed does it keep
when it bounces? Each flight is an initial value problem that ends at an event, the next one starts from there, and the
gradient of the times of all bounces runs back through every one of them. :doc:`/ode/events` explains events.
"""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from difflayers.ode import Dopri5, Event, odeint

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(2)

# %%
# The ball
# --------
# It falls through air, whose drag grows with the square of its speed, and keeps a part of its vertical speed when it
# bounces. The state is where the ball is, and how fast: :math:`(x, z, \dot x, \dot z)`.

GRAVITY, DRAG, BOUNCES = 9.81, 0.03, 9


def fall(t: Tensor, state: Tensor) -> Tensor:
    velocity = state[2:]
    drag = DRAG * velocity.norm() * velocity
    return torch.cat([velocity, torch.tensor([0.0, -GRAVITY]) - drag])


ground = Event(lambda t, state: state[1], direction=-1)
solver = Dopri5(rtol=1e-9, atol=1e-9)


def thrown(speed: Tensor) -> Tensor:
    return torch.stack([torch.tensor(0.0), torch.tensor(1.0), 0.25 * speed, speed])


def bounce_times(speed: Tensor, restitution: Tensor) -> Tensor:
    """One flight after another, each until the ball is on the ground."""
    t, state, times = torch.tensor(0.0), thrown(speed), []
    for _ in range(BOUNCES):
        flight = odeint(fall, state, torch.stack([t, t + 10]), solver=solver, event=ground)
        t = flight.event_t
        x, z, vx, vz = flight.event_y
        state = torch.stack([x, z, vx, -restitution * vz])
        times.append(t)
    return torch.stack(times)


# %%
# What was heard
# --------------
# The record is generated: nine bounces of a ball that was thrown at 4 m/s and keeps 82 % of its speed, each heard with
# an error of 5 ms.

TRUTH, NOISE = torch.tensor([4.0, 0.82]), 0.005
heard = bounce_times(*TRUTH) + NOISE * torch.randn(BOUNCES, generator=generator)
print("heard at", ", ".join(f"{t:.3f}" for t in heard.tolist()), "s")

# %%
# The fit
# -------
# Least squares by the method of Gauss and Newton, from a poor guess. Derivatives of nine times in two parameters are
# nine rows of a Jacobian, each a backward pass through up to nine flights.

parameters = torch.tensor([2.0, 0.6])
history = [parameters]
print("\n speed  restitution   root mean square of what is left")
for _ in range(8):
    jacobian = torch.stack(torch.autograd.functional.jacobian(bounce_times, tuple(parameters)), dim=1)
    residual = bounce_times(*parameters) - heard
    print(f"{parameters[0]:6.3f}  {parameters[1]:11.4f}   {1e3 * residual.square().mean().sqrt():9.2f} ms")
    step = torch.linalg.lstsq(jacobian, -residual[:, None]).solution[:, 0]
    parameters = parameters + step
    history.append(parameters)
    if step.norm() < 1e-9:
        break

covariance = residual.square().sum() / (BOUNCES - 2) * torch.linalg.inv(jacobian.T @ jacobian)
errors = covariance.diagonal().sqrt()
for name, value, error, true in zip(("speed", "restitution"), parameters, errors, TRUTH, strict=True):
    print(f"{name:12} {value:.4f} ± {error:.4f}, in truth {true:.2f}")

# %%
# Is the derivative right? Central differences say the same, as far as they can.

differences = torch.stack(
    [(bounce_times(*(parameters + h)) - bounce_times(*(parameters - h))) / 2e-5 for h in 1e-5 * torch.eye(2)], dim=1
)
print(f"largest difference of the Jacobian from central differences: {(jacobian - differences).abs().max():.0e}")

# %%
# The picture
# -----------
# What the ball does at every stage of the fit, seen from the side with a flash every 20 ms, and below it the bounces
# against those that were heard.


def photograph(speed: Tensor, restitution: Tensor) -> Tensor:
    """Where the ball is every 20 ms, ``(frames, 2)``."""
    start, state, frames = 0.0, thrown(speed), []
    for _ in range(BOUNCES):
        first = math.ceil(start / 0.02) * 0.02
        t = torch.cat([torch.tensor([start]), torch.arange(first, first + 3, 0.02)])
        flight = odeint(fall, state, t, solver=solver, event=ground)
        frames.append(flight.ys[1:][~flight.ys[1:, 0].isnan(), :2])
        start = float(flight.event_t)
        x, z, vx, vz = flight.event_y
        state = torch.stack([x, z, vx, -restitution * vz])
    return torch.cat(frames)


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
colors = plt.get_cmap("plasma")
figure, (side, clock) = plt.subplots(2, 1, figsize=(8, 6.2), height_ratios=(3, 1.3), layout="constrained")
shown = [k for k in range(len(history)) if k < 4]
for k in [*shown, len(history) - 1]:
    last = k == len(history) - 1
    color = "#0072b2" if last else colors(0.85 - 0.2 * k)
    x, z = photograph(*history[k]).T
    label = "fit" if last else f"step {k}" if k else "guess"
    side.scatter(x, z, s=70 if last else 14, color=color, alpha=0.55 if last else 0.8, linewidths=0, label=label)
    row = -1 - k if not last else -1 - len(shown)
    clock.plot(bounce_times(*history[k]), [row] * BOUNCES, "o", color=color, markersize=6)
for t in heard:
    clock.axvline(float(t), color=TEXT, linewidth=1, alpha=0.7)
side.axhline(0, color=TEXT, linewidth=1)
side.set(xlabel="x in m", ylabel="height in m", aspect="equal", ylim=(-0.05, 2.3))
side.legend(frameon=False, loc="upper right", ncols=5, markerscale=1.2, handletextpad=0.1)
clock.set(xlabel="time in s; lines: bounces that were heard", yticks=[], xlim=(0, 7), ylim=(-2 - len(shown), 0))
clock.spines["left"].set_visible(False)
plt.show()
