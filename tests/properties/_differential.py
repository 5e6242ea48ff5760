"""Initial value problems, tame, stiff and exploding, against tight solves by SciPy."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from difflayers import Status
from difflayers.ode import CheckpointedAdjoint, Dopri5, Event, Kvaerno5, ODELayer, Rodas, Tsit5, odeint
from properties import _core as core

# (y, k) with states (..., 2) and k (..., 1) positive; each sample has its own k.
FIELDS = {
    "decay": lambda y, k: -k * y,
    "oscillator": lambda y, k: k * torch.stack([y[..., 1], -y[..., 0]], -1),
    "pendulum": lambda y, k: torch.stack([y[..., 1], -k[..., 0] * torch.sin(y[..., 0])], -1),
    "relaxation": lambda y, k: torch.stack(
        [-100 * k[..., 0] * (y[..., 0] - torch.cos(y[..., 1])), 1 + 0 * y[..., 1]], -1
    ),
    "logistic": lambda y, k: k * y * (1 - y),
    "constant": lambda y, k: 0 * y * k,
    "explosion": lambda y, k: k * y.square(),
    "kinked": lambda y, k: k * y.abs().clamp(max=3) - y,
}  # fmt: skip
TAME = ("decay", "oscillator", "pendulum", "constant")
ADAPTIVE = ["dopri5", "tsit5", "bosh3", "dopri8", "rodas", "kvaerno5", "scipy", "torchdiffeq"]
FIXED = ["euler", "midpoint", "rk4"]
SICK = ["none", "nan", "infinite", "exploding"]
STEPS = {"dopri5": Dopri5, "tsit5": Tsit5, "rodas": Rodas, "kvaerno5": Kvaerno5}


@dataclass(frozen=True)
class Flow:
    """A batch of solves; ``times`` says what is unusual about the output times."""

    field: str
    solver: str
    batch: int
    outputs: int
    times: str
    per_sample: bool
    event: str
    dtype: str
    exponent: int
    sick: str
    numpy: bool
    flaw: bool
    seed: int

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """States, times and rates, in the dtype."""
        normal, dtype = core.random(self), core.DTYPES[self.dtype]
        y0, k = normal(self.batch, 2) * 10.0**self.exponent, normal(self.batch, 1).abs() + 0.2
        t = torch.linspace(0, 2, self.outputs).double()
        if self.times == "backward":
            t = -t / 2
        if self.times == "equal":
            t = torch.cat([t[:1], t])
        if self.times in ("own", "ragged"):
            t = t * (normal(self.batch, 1).abs() + 0.1)
        if self.times == "ragged" and self.batch and self.outputs > 1:
            t[0, -1] = torch.nan
        if self.field == "logistic":
            y0 = y0.abs()
        if self.batch > 1 and self.sick != "none":
            y0[1] = {"nan": torch.nan, "infinite": torch.inf, "exploding": 1e30}[self.sick]
        return y0.to(dtype), t.to(dtype), k.to(dtype)

    def chosen(self) -> Any:
        """The solver; samples with steps of their own where sick ones could slow the others down."""
        return STEPS[self.solver](per_sample=True) if self.per_sample and self.solver in STEPS else self.solver


def fitting(case: Flow) -> Flow:
    if case.event != "none" or case.times in ("own", "ragged"):
        case = case if case.solver in STEPS else replace(case, solver="tsit5")
    if case.event != "none" and case.times != "usual":
        case = replace(case, times="usual")
    return case


CASES = st.builds(
    Flow, st.sampled_from([*TAME, *FIELDS]), st.sampled_from([*ADAPTIVE, *STEPS, *FIXED]), st.integers(0, 3),
    st.integers(1, 4), st.sampled_from(["usual", "usual", "backward", "equal", "own", "ragged"]), st.booleans(),
    st.sampled_from(["none", "none", "terminal", "counted"]), core.PRECISIONS,
    st.sampled_from([0, 0, 0, -3, 2]), st.sampled_from(SICK), st.booleans(), core.FLAWS,
    core.SEEDS,
).map(fitting)  # fmt: skip


class Field(nn.Module):
    """One of the fields, with a parameter: everybody's factor of the rate."""

    def __init__(self, case: Flow) -> None:
        super().__init__()
        self.case, self.calls = case, 0
        self.factor = nn.Parameter(torch.ones((), dtype=core.DTYPES[case.dtype]))

    def forward(self, t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        self.calls += 1
        return FIELDS[self.case.field](y, self.factor * k)


def event_of(case: Flow) -> Any:
    if case.event == "none":
        return None
    return Event(lambda t, y, k: y[..., 0] - 0.5 * y[..., 1].square() + 0.1, terminal=case.event == "terminal")


def check(case: Flow) -> Counter:
    y0, t, k = case.data()
    field, options = Field(case), {"batch_dims": 1, "solver": case.chosen(), "on_failure": "ignore"}
    if case.flaw:
        y0, t = [(y0.int(), t), (y0, t[..., :0])][case.seed % 2]
        return core.refused(lambda: odeint(field, y0, t, (k,), **options))
    if case.numpy:
        with torch.no_grad():
            field.factor.requires_grad_(False)
            plain = odeint(field, y0.numpy(), t.numpy(), (k.numpy(),), **options)
            core.check_like(plain.ys, (t.shape[-1], *y0.shape), y0.dtype, numpy=True)
            field.factor.requires_grad_()
    y0.requires_grad_()
    k.requires_grad_()
    found = odeint(field, y0, t, (k,), event=event_of(case), **options)
    core.expect(field.calls <= 200_000, f"{field.calls} evaluations")
    ys = core.check_like(found.ys, (t.shape[-1], *y0.shape), y0.dtype).detach()
    ok = torch.as_tensor(found.status).reshape(-1) == int(Status.SUCCESS)
    ended = check_events(case, found, ys, t, ok)
    asked = ~t.isnan() if t.dim() > 1 else torch.ones(case.batch, len(t), dtype=torch.bool)
    for i in range(case.batch):
        if ok[i] and not ended[i] and (t != t[..., :1]).any():  # else nothing was solved
            core.expect(ys[asked[i], i].isfinite().all(), "success, but a state isn't finite")
        if not ok[i]:
            core.expect(ys[-1, i].isnan().all() or not asked[i, -1], "a failed sample has a last state")
        if ok[i] and case.solver not in FIXED and case.field != "kinked":
            check_against_scipy(case, found, ys[:, i], t[i] if t.dim() > 1 else t, y0[i], k[i], float(ended[i]))
    check_tame(case, found)
    return core.counted(found.status) + check_flow_gradients(
        case, found, field, (y0, t, k), asked & ~ended[:, None], ok
    )


def check_events(case: Flow, found: Any, ys: Tensor, t: Tensor, ok: Tensor) -> Tensor:
    """Which samples a terminal event ended, after looking at where it was."""
    ended = torch.zeros(case.batch, dtype=torch.bool)
    if case.event == "none":
        return ended
    met = ~found.event_t.isnan()
    if case.event == "terminal":
        ended = met & ok
        y = found.event_y.detach()[ended].double()
        g = y[:, 0] - 0.5 * y[:, 1].square() + 0.1
        size = 1 + y.norm(dim=1) ** 2
        core.expect(
            (g.abs() <= 1e4 * core.EPS[core.DTYPES[case.dtype]] * size).all(), f"not zero at the event: {g.tolist()}"
        )
        inside = (found.event_t[ended] >= t.min()) & (found.event_t[ended] <= t.max())
        core.expect(inside.all(), "an event before the start or after the end")
    else:
        core.expect((met.sum(-1) == found.event_count)[ok].all(), "times and counts of events differ")
    return ended


def check_against_scipy(case: Flow, found: Any, ys: Tensor, t: Tensor, y0: Tensor, k: Tensor, ended: float) -> None:
    """Every state that there is, within a few hundred tolerances of the solution."""
    times, start = t[~t.isnan()].double().numpy(), y0.detach().double().numpy()
    rate, sign = k.detach().double(), 1 if len(times) < 2 or times[-1] >= times[0] else -1

    def slope(_: float, y: np.ndarray) -> np.ndarray:
        return sign * FIELDS[case.field](torch.from_numpy(y.copy()), rate).numpy()

    ends = np.unique(np.abs(times - times[0]))
    if len(ends) < 2:
        return
    with np.errstate(all="ignore"):
        method = "LSODA" if case.field == "relaxation" else "DOP853"
        tight = solve_ivp(slope, (0, ends[-1]), start, method, ends, rtol=1e-10, atol=1e-12 * (1e-3 + abs(start).max()))
    core.expect(tight.success or ended, f"success, but the solution ends at {tight.t[-1] if len(tight.t) else 0}")
    size = 1 + np.abs(tight.y).max() if tight.y.size else 1
    growth = np.exp(min(float(rate.max()) * 4, 8)) if case.field not in ("decay", "constant") else 10
    limit = 300 * growth * (1e-6 + 20 * core.EPS[core.DTYPES[case.dtype]]) * size
    if case.field == "explosion":
        limit *= size**2  # errors grow like the square of the solution
    for time, y in zip(np.abs(times - times[0]), ys[: len(times)].double().numpy(), strict=True):
        here = np.flatnonzero(tight.t == time)
        if len(here) and np.isfinite(y).all():
            error = np.abs(y - tight.y[:, here[0]]).max()
            core.expect(error <= limit, f"success, but {error:.1e} away from the solution; {limit:.1e} is fine")


def check_tame(case: Flow, found: Any) -> None:
    if case.field in TAME and case.exponent <= 0 and (case.sick == "none" or case.per_sample or case.solver in FIXED):
        status = core.without(found.status, 1) if case.sick != "none" and case.batch > 1 else found.status
        shared = case.batch > 1 and case.sick != "none" and case.solver not in (*STEPS, *FIXED, "scipy")
        if not shared:
            names = [Status(int(s)).name for s in status]
            core.expect((status == int(Status.SUCCESS)).all(), f"{names} of an easy problem")


def check_flow_gradients(
    case: Flow, found: Any, field: Field, data: tuple[Tensor, ...], kept: Tensor, ok: Tensor
) -> Counter:
    """Zero for failed samples, finite and unmoved for the others."""
    if case.solver in ("scipy", "torchdiffeq") and case.batch > 1 and case.sick != "none":
        return Counter()  # a continuous adjoint, held to its tolerance only
    y0, t, k = data
    used = (kept & ok[:, None]).T

    def gradient(found: Any, used: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        nothing = 0 * sum(leaf.nan_to_num(0, 0, 0).sum() for leaf in leaves)
        return torch.autograd.grad(found.ys[used].sum() + nothing, leaves)

    gradients = gradient(found, used, y0, k, field.factor)
    core.check_gradients(gradients[:2], ok)
    wild = case.field in ("explosion", "kinked") or case.exponent > 0
    core.expect(wild or all(g.isfinite().all() for g in gradients), "a gradient isn't finite")
    if case.batch < 2 or case.sick == "none" or wild:
        return Counter()
    own = [core.without(x.detach(), 1).requires_grad_() for x in (y0, k)]
    times = core.without(t, 1) if t.dim() > 1 else t
    alone = odeint(
        field, own[0], times, own[1:], batch_dims=1, solver=case.chosen(), event=event_of(case), on_failure="ignore"
    )
    if not alone.status.equal(core.without(found.status, 1)):
        independent = (case.per_sample and case.solver in STEPS) or case.times in ("own", "ragged")
        core.expect(not independent, f"a sick sample turns {alone.status.tolist()} into {found.status.tolist()}")
        return Counter()
    keep = used[:, [i for i in range(case.batch) if i != 1]]
    # Samples that step together share steps, which a sick one may choose: the solution is the same to the tolerance.
    tolerance = 1e-3 if case.dtype == "float64" else 3e-2
    core.check_close(found.ys.detach()[:, [i for i in range(case.batch) if i != 1]][keep], alone.ys[keep], tolerance,
                "a healthy value")  # fmt: skip
    if not bool(ok[1]):
        moved = gradient(alone, keep, *own, field.factor)
        core.check_close(core.without(gradients[0], 1), moved[0], 10 * tolerance, "a healthy gradient")
        core.expect(
            (gradients[2] - moved[2]).abs() <= 10 * tolerance * (1 + moved[2].abs()), "the parameter's gradient moves"
        )
    return Counter()


def check_layer(case: Flow) -> Counter:
    """The layer gives what the function gives."""
    y0, t, k = case.data()
    field = Field(case)
    layer = ODELayer(field, t, solver=case.chosen(), batch_dims=1, event=event_of(case), on_failure="ignore")
    y0.requires_grad_()
    found = layer.solve(y0, k)
    ys = core.check_like(layer(y0, k), (t.shape[-1], *y0.shape), y0.dtype)
    core.expect(torch.equal(ys.detach().nan_to_num(7), found.ys.detach().nan_to_num(7)), "forward() and solve() differ")
    if case.event == "none" and case.solver in STEPS:
        adjoint = CheckpointedAdjoint()
        plain = odeint(field, y0, t, (k,), batch_dims=1, solver=case.chosen(), adjoint=adjoint, on_failure="ignore")
        core.expect(
            torch.equal(plain.ys.detach().nan_to_num(7), ys.detach().nan_to_num(7)), "odeint() has other states"
        )
    ok = found.ok & (ys.detach()[-1].isfinite().all(-1))
    core.check_answers(ys[-1].detach()[ok], found.status[ok])
    (gradient,) = torch.autograd.grad(ys[-1][ok].sum() + 0 * y0.nan_to_num(0, 0, 0).sum(), y0)
    core.check_gradients([gradient], ok)
    return core.counted(found.status)


PROPERTIES = [
    core.Property("odeint", "ode", Flow, CASES, check),
    core.Property("ODELayer", "ode", Flow, CASES.filter(lambda case: not case.flaw), check_layer),
]
