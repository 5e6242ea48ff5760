"""What is said of samples: once, of those that failed; degenerate, where rows depend; in forward mode too."""

import warnings

import pytest
import torch
from contracts import assert_close
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, jvp, vmap

from difflayers.errors import ConvergenceWarning
from difflayers.qp import DAQP, PIQP, Cones, InteriorPoint, Sparse, solve_cone, solve_qp

P = torch.eye(2, dtype=torch.float64)
G = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
h = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("solver", [DAQP(), PIQP(), InteriorPoint(), "auto"], ids=str)
def test_duplicate_active_rows_are_degenerate(solver, sparse):
    q = torch.tensor([[-2.0, -2.0], [0.1, 0.1]])  # active for the first alone
    blocks = (Sparse.of(P), q, Sparse.of(G), h) if sparse else (P, q, G, h)
    solution = solve_qp(*blocks, solver=solver)
    assert solution.stats["degenerate"].tolist() == [True, False]
    assert_close(solution.x, torch.tensor([[0.5, 0.5], [-0.1, -0.1]]), 1e-12)


@pytest.mark.parametrize("solver", [DAQP(), PIQP(), InteriorPoint()], ids=str)
def test_an_independent_row_that_only_touches_is_not_degenerate(solver):
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    solution = solve_qp(P, torch.tensor([-1.0, 0.0]), rows, torch.zeros(2), solver=solver)
    assert not solution.stats["degenerate"]
    assert solution.stats["margin"] < 1e-9


def broken(name):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(3, *shape, generator=generator)

    blocks = {"P": torch.eye(2).repeat(3, 1, 1), "q": random(2), "G": random(3, 2), "h": 1 + random(3).abs()}
    blocks |= {"A": random(1, 2), "b": torch.zeros(3, 1), "lb": -torch.ones(3, 2), "ub": torch.ones(3, 2)}
    if name == "infeasible":
        blocks["h"][1] = -10
    elif name == "contradictory":
        blocks["lb"][1] = 2
    else:
        blocks[name][1].flatten()[0] = torch.nan
    return blocks


@pytest.mark.parametrize("mode", ["backward", "on the graph", "dual numbers", "jvp"])
@pytest.mark.parametrize("name", ["infeasible", "contradictory", "P", "q", "G", "h", "A", "b", "lb", "ub"])
def test_failed_samples_are_warned_of_once(name, mode):
    blocks = broken(name)

    def solve(*values):
        return solve_qp(**dict(zip(blocks, values, strict=True)), on_failure="warn").x

    values = tuple(block.requires_grad_(mode in ("backward", "on the graph")) for block in blocks.values())
    ones = tuple(map(torch.ones_like, values))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        if mode == "jvp":
            moves = jvp(solve, values, ones)[1]
        elif mode == "dual numbers":
            with forward_ad.dual_level():
                moves = forward_ad.unpack_dual(solve(*map(forward_ad.make_dual, values, ones))).tangent
        else:
            x = solve(*values)
            moves = torch.autograd.grad(x[::2].sum(), values, create_graph=mode != "backward")[1]
    assert len([w for w in caught if w.category is ConvergenceWarning]) == 1
    assert moves[::2].isfinite().all()


def expanded(block):
    return block.expand(2, *block.shape)


ROWS = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "fn",
    [
        lambda q: solve_qp(expanded(P), expanded(q), expanded(ROWS), torch.ones(2, 4)).x,
        lambda q: solve_qp(P, -q, expanded(ROWS * q), torch.ones(4)).x,
        lambda q: solve_cone(expanded(P), expanded(q), expanded(ROWS), torch.ones(4), Cones(0, 1, (3,))).x,
        lambda q: solve_cone(P, -q, expanded(ROWS * q), torch.ones(4), Cones(0, 4)).x,
    ],
    ids=["qp", "qp in rows", "cone", "cone in rows"],
)
def test_expanded_blocks_in_forward_mode(fn):
    q = torch.tensor([1.5, -2.0])
    exact = jacrev(fn)(q)
    assert_close(jacfwd(fn)(q), exact, 1e-10)
    assert_close(jvp(fn, (q,), (q,))[1], exact @ q, 1e-10)
    assert_close(vmap(jacfwd(fn))(q.expand(3, 2)), exact.expand(3, *exact.shape), 1e-10)
    assert_close(jacfwd(jacfwd(fn))(q), jacrev(jacrev(fn))(q), 1e-8)


@pytest.mark.parametrize("sick", ["flat", "nan"])
def test_a_sample_does_not_choose_the_backend_of_others(sick):
    # Auto takes another backend, and another factorization, for a P without curvature.
    P, q, G, h = torch.eye(3).repeat(4, 1, 1), torch.randn(4, 3), torch.randn(4, 5, 3), torch.rand(4, 5)
    alone = solve_qp(P, q, G, h)
    P[1] = torch.nan if sick == "nan" else torch.zeros(3, 3)
    beside = solve_qp(P, q, G, h, on_failure="ignore")
    healthy = torch.tensor([0, 2, 3])
    assert beside.status[healthy].tolist() == [0, 0, 0]
    assert beside.stats["steps"][healthy].equal(alone.stats["steps"][healthy])
    torch.testing.assert_close(beside.x[healthy], alone.x[healthy], rtol=0, atol=1e-14)
