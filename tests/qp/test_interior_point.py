"""The interior-point method: answers against compiled peers, degenerate and broken problems, batches, bookkeeping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status
from difflayers.qp import DAQP, PIQP, InteriorPoint, solve_qp
from difflayers.qp import _interior_point as module
from difflayers.qp import _newton as newton
from difflayers.qp._data import Data

INF = torch.inf
EYE = [[1.0, 0.0], [0.0, 1.0]]


def random_qp(samples, n, m, p=0, *, rank=None, bounds=False, seed=0):
    """A feasible batch whose ``P`` has the given rank (None: full and well conditioned); LPs are bounded below."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(samples, *shape, generator=generator, dtype=torch.float64)

    L, G, A, x = random(n, n if rank is None else rank), random(m, n), random(p, n), random(n)
    P = L @ L.mT / n + (0.1 * torch.eye(n) if rank is None else 0)
    inside = random(m).abs()
    # Multipliers that make the objective bounded, whatever P is.
    q = random(n) if rank is None else -(P @ x[..., None])[..., 0] - (inside.unsqueeze(-2) @ G).squeeze(-2)
    data = {"P": P, "q": q, "G": G, "h": (G @ x[..., None])[..., 0] + random(m).abs()}
    if p:
        data |= {"A": A, "b": (A @ x[..., None])[..., 0]}
    if bounds:
        data |= {"lb": x - random(n).abs(), "ub": x + random(n).abs()}
    return data


def one(**blocks):
    """A batch of one QP."""
    return Data(**{"P": None} | {name: torch.tensor([block], dtype=torch.float64) for name, block in blocks.items()})


def answer(data, **options):
    return InteriorPoint(**options).answers(data, len(data.q))


def objective(data, x):
    quadratic = 0 if data.get("P") is None else 0.5 * (x * (x.unsqueeze(-2) @ data["P"]).squeeze(-2)).sum(-1)
    return quadratic + (data["q"] * x).sum(-1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 12), p=st.integers(0, 3), bounds=st.booleans(), seed=st.integers(0, 10**6),
    peer=st.sampled_from([DAQP(), PIQP()]),
)  # fmt: skip
def test_agrees_with_compiled_solvers(n, m, p, bounds, seed, peer):
    data = random_qp(5, n, m, min(p, n - 1), bounds=bounds, seed=seed)
    ours, theirs = solve_qp(**data, solver=InteriorPoint()), solve_qp(**data, solver=peer)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-9, atol=1e-9)
    assert ours.stats["steps"].max() <= 25


@pytest.mark.parametrize("size", [(64, 10, 10, 2), (32, 50, 50, 10), (4, 100, 100, 20)], ids=str)
@pytest.mark.parametrize("bounds", [False, True])
def test_takes_few_steps_and_is_accurate_before_polishing(size, bounds):
    data = random_qp(*size, bounds=bounds)
    found = answer(Data(**data), tol=1e-10)
    assert (found.status == Status.SUCCESS).all()
    assert found.steps.max() <= 20
    torch.testing.assert_close(found.x, solve_qp(**data, solver=DAQP()).x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 4], ids=["LP", "rank 1", "rank 4"])
def test_semidefinite(rank):
    data = random_qp(8, 6, 14, 1, rank=rank)
    data["P"] = data["P"] if rank else None
    ours, theirs = solve_qp(**data, solver=InteriorPoint()), solve_qp(**data, solver=PIQP())
    torch.testing.assert_close(objective(data, ours.x), objective(data, theirs.x), rtol=1e-9, atol=1e-9)
    assert ours.stats["steps"].max() <= 25


def test_one_inequality_beside_equations():
    data = random_qp(6, 8, 1, 5)
    ours, theirs = solve_qp(**data, solver=InteriorPoint()), solve_qp(**data, solver=DAQP())
    torch.testing.assert_close(ours.x, theirs.x)


DEGENERATE = {
    "LP with many solutions": (one(q=[1.0, 1.0], A=[[1.0, 1.0]], b=[1.0], lb=[0.0, 0.0]), None),
    "redundant equations": (
        one(P=EYE, q=[-1.0, -2.0], G=[[-1.0, 0.0]], h=[5.0], A=[[1.0, 1.0], [1.0, 1.0]], b=[1.0, 1.0]), [0.0, 1.0]),
    "the same row twice": (one(P=EYE, q=[-3.0, 0.0], G=[[1.0, 0.0], [1.0, 0.0]], h=[1.0, 1.0]), [1.0, 0.0]),
    "an equation as two inequalities": (
        one(P=EYE, q=[-3.0, 0.0], G=[[1.0, 1.0], [-1.0, -1.0]], h=[1.0, -1.0]), [2.0, -1.0]),
    "bounds that meet": (one(P=EYE, q=[-3.0, -1.0], lb=[1.0, -5.0], ub=[1.0, 5.0]), [1.0, 1.0]),
    "a row of zeros": (one(P=EYE, q=[-1.0, -1.0], G=[[0.0, 0.0], [1.0, 1.0]], h=[1.0, 1.0]), [0.5, 0.5]),
    "no bound is finite": (one(P=EYE, q=[-1.0, -2.0], lb=[-INF, -INF], ub=[INF, INF]), [1.0, 2.0]),
    "an unknown in no row": (one(q=[1.0, 0.0], G=[[-1.0, 0.0]], h=[0.0]), None),
    "weakly active": (one(P=EYE, q=[0.0, -1.0], G=[[1.0, 0.0]], h=[0.0]), [0.0, 1.0]),
    "P of all sizes": (
        one(P=[[1e6, 0.0], [0.0, 1e-4]], q=[-1e6, 1e-4], A=[[1.0, 1.0]], b=[1.0], ub=[0.5, 5.0]), [0.5, 0.5]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate(name):
    data, expected = DEGENERATE[name]
    found = answer(data)
    assert found.status.item() == Status.SUCCESS
    assert found.steps.item() <= 15
    slack = data.limits - data.products(found.x)
    assert (found.z >= 0).all()
    assert slack.min() > -1e-7
    assert (found.z * torch.where(slack.isfinite(), slack, 0)).abs().max() < 1e-6 * (1 + found.z.max())
    if expected is not None:
        torch.testing.assert_close(found.x, torch.tensor([expected]), rtol=0, atol=1e-4)


INFEASIBLE = {
    "rows": one(P=EYE, q=[1.0, 0.0], G=[[1.0, 0.0], [-1.0, 0.0]], h=[-1.0, -1.0]),
    "by 1e-4": one(P=EYE, q=[1.0, 0.0], G=[[1.0, 0.0], [-1.0, 0.0]], h=[1.0, -1.0001]),
    "equations": one(P=EYE, q=[1.0, 0.0], G=[[1.0, 0.0]], h=[1.0], A=[[0.0, 1.0], [0.0, 1.0]], b=[0.0, 1.0]),
    "bounds": one(q=[1.0, 1.0], A=[[1.0, 1.0]], b=[3.0], lb=[0.0, -INF], ub=[1.0, 1.0]),
}
UNBOUNDED = {
    "LP": one(q=[1.0, 0.0], G=[[1.0, 0.0]], h=[1.0]),
    "flat P": one(P=[[1.0, 0.0], [0.0, 0.0]], q=[1.0, -1.0], lb=[-1.0, -1.0], ub=[1.0, INF]),
    "along equations": one(q=[-1.0, 0.0], A=[[1.0, -1.0]], b=[0.0], lb=[0.0, 0.0]),
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_infeasible_with_multipliers_that_prove_it(name):
    data = INFEASIBLE[name]
    found = answer(data)
    assert found.status.item() == Status.INFEASIBLE
    pulled = data.pulled(found.z) + (0 if data.A is None else (found.y.unsqueeze(-2) @ data.A).squeeze(-2))
    limits = torch.where(data.limits.isfinite(), data.limits, 0)
    value = (limits * found.z).sum() + (0 if data.b is None else (data.b * found.y).sum())
    assert (found.z >= 0).all()
    assert value < 0
    assert pulled.abs().max() < -1e-6 * value


@pytest.mark.parametrize("name", UNBOUNDED)
def test_unbounded_with_a_direction_that_proves_it(name):
    data = UNBOUNDED[name]
    found = answer(data)
    assert found.status.item() == Status.UNBOUNDED
    fall = -(data.q * found.x).sum()
    assert fall > 0
    assert torch.where(data.limits.isfinite(), data.products(found.x), 0).max() < 1e-6 * fall
    for matrix in (data.P, data.A):
        assert matrix is None or (matrix @ found.x[..., None]).abs().max() < 1e-6 * fall


def test_larger_infeasible_and_unbounded_batches():
    data = random_qp(16, 20, 30, 3)
    weights = torch.rand(16, 30)
    row, limit = (weights.unsqueeze(-2) @ data["G"]), (weights * data["h"]).sum(-1, keepdim=True)
    infeasible = data | {"G": torch.cat([data["G"], -row], 1), "h": torch.cat([data["h"], -limit - 1e-3], 1)}
    assert (answer(Data(**infeasible)).status == Status.INFEASIBLE).all()
    flat = torch.ones(20)
    flat[0] = 0
    G = data["G"].clone()
    G[..., 0] = -G[..., 0].abs()
    endless = {"P": data["P"] * flat * flat[:, None], "q": data["q"].index_fill(1, torch.tensor(0), -0.1)}
    assert (answer(Data(**data | endless | {"G": G, "A": data["A"] * flat})).status == Status.UNBOUNDED).all()


def test_broken_samples_leave_the_others_alone():
    data = random_qp(6, 5, 8, 1)
    data["q"][1, 0] = torch.nan
    data["G"][3, 1], data["h"][3, :2] = -data["G"][3, 0], -1.0
    solution = solve_qp(**data, solver=InteriorPoint(), on_failure="ignore")
    assert solution.status.tolist() == [0, int(Status.NONFINITE), 0, int(Status.INFEASIBLE), 0, 0]
    assert solution.x[[1, 3]].isnan().all()
    healthy = torch.tensor([0, 2, 4, 5])
    alone = solve_qp(**{name: block[healthy] for name, block in data.items()}, solver=InteriorPoint())
    torch.testing.assert_close(solution.x[healthy], alone.x, rtol=1e-12, atol=1e-12)


def test_float32_data():
    data = random_qp(4, 6, 9, 2)
    exact = solve_qp(**data, solver=InteriorPoint()).x
    single = solve_qp(**{name: block.float() for name, block in data.items()}, solver=InteriorPoint()).x
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", ["q", "h", "lb", "P", "G", "A"])
def test_shared_blocks_are_what_the_same_in_every_sample_is(own):
    data = {name: block[0] for name, block in random_qp(1, 5, 7, 2, bounds=True).items()}
    data[own] = torch.stack([data[own], data[own] * 1.1, data[own] * 1.01])
    expanded = {name: block if name == own else block.expand(3, *block.shape) for name, block in data.items()}
    ours, theirs = (InteriorPoint().answers(Data(**blocks), 3) for blocks in (data, expanded))
    for one_of_us, one_of_them in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one_of_us, one_of_them)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("what", ["objective", "rows", "one row", "unknowns", "sides"])
def test_scaled_data(factor, what):
    data = random_qp(6, 8, 12, 2, bounds=True)
    x, scaled = solve_qp(**data, solver=DAQP()).x, dict(data)
    if what == "objective":
        scaled |= {name: factor * data[name] for name in "Pq"}
    elif what == "rows":
        scaled |= {name: factor * data[name] for name in "GhAb"}
    elif what == "one row":
        scaled |= {name: data[name].clone() for name in "Gh"}
        scaled["G"][:, 0], scaled["h"][:, 0] = factor * data["G"][:, 0], factor * data["h"][:, 0]
    elif what == "unknowns":  # x / factor
        scaled |= {"P": factor**2 * data["P"]} | {name: factor * data[name] for name in "qGA"}
        scaled |= {name: data[name] / factor for name in ("lb", "ub")}
        x = x / factor
    else:  # factor * x
        scaled |= {name: factor * data[name] for name in ("q", "h", "b", "lb", "ub")}
        x = factor * x
    found = answer(Data(**scaled))
    assert (found.status == Status.SUCCESS).all()
    assert (found.steps - answer(Data(**data)).steps).abs().max() <= 2
    solution = solve_qp(**scaled, solver=InteriorPoint())
    torch.testing.assert_close(solution.x, x, rtol=1e-8, atol=1e-8 * float(x.abs().max()))


def test_bounds_are_rows():
    data = random_qp(4, 5, 6, 1, bounds=True)
    data["lb"][:, 0], data["ub"][:, 1] = -INF, INF
    eye = torch.eye(5).expand(4, 5, 5)
    dense = {name: data[name] for name in "PqAb"}
    limits = torch.cat([data["h"], (-data["lb"]).clamp_max(1e3), data["ub"].clamp_max(1e3)], 1)
    dense |= {"G": torch.cat([data["G"], -eye, eye], 1), "h": limits}
    torch.testing.assert_close(solve_qp(**data, solver=InteriorPoint()).x, solve_qp(**dense, solver=InteriorPoint()).x)


def test_samples_that_are_done_stand_still():
    """In a batch with slower ones every sample stops where it stops alone."""
    data = random_qp(12, 6, 20, 1)
    data["q"][:4] *= torch.tensor([1e-3, 1e2, 1e4, 1e5])[:, None]
    together = answer(Data(**data))
    assert together.steps.unique().numel() > 2
    for i in range(12):
        alone = answer(Data(**{name: block[i : i + 1] for name, block in data.items()}))
        assert together.steps[i] == alone.steps[0]
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=1e-6, atol=1e-8)


def test_out_of_steps():
    found = answer(Data(**random_qp(4, 6, 12)), max_steps=2)
    assert (found.status == Status.MAX_STEPS).all()
    assert (found.steps == 2).all()
    assert found.x.isfinite().all()


def test_lu_where_cholesky_breaks_down(monkeypatch):
    data, cholesky, calls = random_qp(5, 6, 8, 2, bounds=True), torch.linalg.cholesky_ex, []

    def breaking(matrix, out=None):
        lower, info = cholesky(matrix, out=out)
        lower[::2], info[::2] = torch.nan, 1
        calls.append(len(matrix))
        return lower, info

    expected = answer(Data(**data))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", breaking)
    found = answer(Data(**data))
    assert calls
    assert (found.status == Status.SUCCESS).all()
    torch.testing.assert_close(found.x, expected.x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.y, expected.y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("damage", [1.0, torch.nan])
def test_a_step_that_did_harm_is_taken_again_with_more_regularization(monkeypatch, damage):
    data, direction, regularizations = random_qp(3, 6, 8, 2), newton.Newton.direction, []

    def rough(self, *args):
        move = direction(self, *args)
        regularizations.append(self.soft.clone())
        if len(regularizations) in (4, 5):  # the second step
            move[1, :6] += damage
        return move

    expected = answer(Data(**data))
    monkeypatch.setattr(newton.Newton, "direction", rough)
    found = answer(Data(**data))
    assert (found.status == Status.SUCCESS).all()
    torch.testing.assert_close(found.x, expected.x, rtol=1e-5, atol=1e-5)
    before, after = regularizations[4], regularizations[5]
    torch.testing.assert_close(after / before, torch.tensor([1.0, module.MORE, 1.0])[:, None].expand_as(before))
    assert found.steps[1] > expected.steps[1]
