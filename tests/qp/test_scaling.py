"""Badly scaled problems: never solved if they have no solution, and solved if they have."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from difflayers import Status
from difflayers.qp import DAQP, PIQP, InteriorPoint, solve_qp
from difflayers.qp._data import Data
from difflayers.qp._scaling import Scaling


@dataclass
class Posed:
    """Integers times powers of two, so that what it is it is to the last bit."""

    P: np.ndarray | None
    q: np.ndarray
    G: np.ndarray
    h: np.ndarray
    A: np.ndarray
    b: np.ndarray

    def solve(self, solver="auto", sparse=False, matrix=torch.from_numpy):
        matrix = csr_matrix if sparse else matrix
        P = None if self.P is None else matrix(self.P)
        equations = (matrix(self.A), torch.from_numpy(self.b)) if len(self.b) else (None, None)
        sides = map(torch.from_numpy, (self.q, self.h))
        q, h = sides
        return solve_qp(P, q, matrix(self.G), h, *equations, solver=solver, on_failure="ignore")


def posed(kind, seed):
    """``kind`` is solvable, infeasible or unbounded; units spread over two to eight decades."""
    rng = np.random.default_rng([len(kind), seed])
    n = int(rng.integers(3, 12))
    m, p, decades = int(rng.integers(2, 2 * n)), int(rng.integers(0, n // 3 + 1)), seed % 4 + 1
    rank = 0 if seed % 3 == 0 else int(rng.integers(1, n + 1))
    factor, G, A = (rng.integers(-3, 4, (rows, n)).astype(float) for rows in (rank, m, p))
    x = rng.integers(-3, 4, n)
    if kind == "unbounded":
        along = np.r_[1, rng.integers(-2, 3, n - 1)]
        factor, G, A = (M * (along @ along) - np.outer(M @ along, along) for M in (factor, G, A))
        G -= np.outer(rng.integers(0, 3, m), along)
    P, b, h = factor.T @ factor, A @ x, G @ x + rng.integers(0, 4, m)
    z = rng.integers(0, 3, m) * (h == G @ x)
    q = -P @ x - G.T @ z - A.T @ rng.integers(-3, 4, p)
    if kind == "unbounded":
        q = q * (along @ along) - (q @ along) * along - rng.integers(1, 4) * along
    if kind == "infeasible":
        weights, others = np.r_[1, rng.integers(0, 3, m - 2)], rng.integers(-2, 3, p)
        G[-1] = -weights @ G[:-1] - others @ A
        h[-1] = -weights @ h[:-1] - others @ b - 2.0 ** -rng.integers(0, 10)

    def units(size, span=decades):
        return np.exp2(np.round(np.log2(10) * rng.uniform(-span, span, size)))

    columns, rows, equations, objective = units(n, decades / 2), units(m), units(p), units(())
    P = None if rank == 0 else objective * P * columns * columns[:, None]
    G, A = G * columns * rows[:, None], A * columns * equations[:, None]
    return Posed(P, objective * q * columns, G, h * rows, A, b * equations)


@pytest.mark.parametrize(
    ("solver", "sparse"), [("auto", False), ("auto", True), (PIQP(), False), (InteriorPoint(), False)]
)
@pytest.mark.parametrize("kind", ["infeasible", "unbounded"])
def test_what_has_no_solution_is_never_solved(kind, solver, sparse):
    every = [posed(kind, seed).solve(solver, sparse) for seed in range(60)]
    statuses = [Status(int(solution.status)) for solution in every]
    assert Status.SUCCESS not in statuses
    proved = [status in (Status.INFEASIBLE, Status.UNBOUNDED) for status in statuses]
    assert sum(proved) >= 50
    if kind == "unbounded":
        assert Status.INFEASIBLE not in statuses


@pytest.mark.parametrize("sparse", [False, True])
def test_what_has_a_solution_is_solved(sparse):
    assert all(posed("solvable", seed).solve(sparse=sparse).ok for seed in range(60))


@pytest.mark.parametrize("unit", [1e-6, 1e-9, 1e-12, 1e-15])
@pytest.mark.parametrize("solver", ["auto", PIQP(), DAQP()], ids=str)
def test_rows_in_tiny_units_count(unit, solver):
    P, q = torch.eye(2), torch.zeros(2)
    rows = unit * torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    contradictory = solve_qp(P, q, rows, unit * torch.tensor([-1.0, 0.5]), solver=solver, on_failure="ignore")
    assert int(contradictory.status) == Status.INFEASIBLE
    solvable = solve_qp(P, q, rows, unit * torch.tensor([-1.0, 2.0]), solver=solver)
    torch.testing.assert_close(solvable.x, torch.tensor([1.0, 0.0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_scaling_is_the_same_problem(sparse):
    rng = torch.Generator().manual_seed(0)
    n, G, A = 5, torch.randn(7, 5, generator=rng) * 1e4, torch.randn(2, 5, generator=rng) * 1e-5
    units = torch.tensor([1e-4, 1.0, 1e3, 1.0, 10.0])
    P, bound = torch.diag(units), torch.ones(n)
    blocks = Data(P, units, G * units, torch.ones(7), A, torch.ones(2), -bound, bound)
    data = blocks.all_sparse() if sparse else blocks
    scaling = Scaling(data, 1)
    assert scaling.severe.all()
    x, y, z = (torch.rand(1, size, generator=rng) for size in (n, 2, 7 + 2 * n))
    back = scaling.point(x), *scaling.multipliers(y, z)
    slack = scaling.data.limits - scaling.data.products(x)
    assert torch.equal(scaling.violation(*back), scaling.data.violation(x, y, z, slack))
    # Stationarity is a multiple of that of the original, row by row.
    ours = _stationarity(scaling.data, x, y, z) * scaling.point(torch.ones(1, n)) ** -1
    theirs = _stationarity(data, *back)
    torch.testing.assert_close(ours / ours[:, :1], theirs / theirs[:, :1])


def _stationarity(data, x, y, z):
    data = data.dense()
    return x @ data.P.mT.reshape(5, 5) + data.q + data.pulled(z) + y @ data.A.reshape(2, 5)


@pytest.mark.parametrize("unit", [1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("curved", [True, False])
def test_small_sides_say_as_much_as_large_ones(unit, curved):
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(8, 6, generator=generator)
    P = G.mT @ G + torch.eye(6) if curved else None
    q, h = -G.mT @ torch.rand(8, generator=generator), torch.rand(8, generator=generator)
    own = unit if curved else 1.0  # of a linear objective, whose size says nothing about x
    plain = solve_qp(P, q, G, h, lb=-torch.ones(6), ub=torch.ones(6))
    small = solve_qp(P, q * own, G, h * unit, lb=-unit * torch.ones(6), ub=unit * torch.ones(6))
    assert (small.x / unit - plain.x).norm() <= 1e-12 * plain.x.norm()
    assert (small.z / own - plain.z).norm() <= 1e-12 * plain.z.norm()
    # Two rows that exclude each other by as little.
    none = solve_qp(P, q * own, torch.cat([G, -G]), unit * torch.cat([h - 2, -h - 1]), on_failure="ignore")
    assert none.status == Status.INFEASIBLE
    x, y = none.x, none.stats["certificate"][6:]
    assert x.isnan().all()
    assert (y @ torch.cat([h - 2, -h - 1])) < 0 <= y.min()
    torch.testing.assert_close(y @ torch.cat([G, -G]), torch.zeros(6), atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", ["auto", "proxqp"])
def test_a_huge_objective_excuses_no_row(solver):
    P, q = torch.tensor([[8.7]]), torch.tensor([1e30])
    G = torch.tensor([[0.0], [-1.1], [-1.0], [-1.2], [0.66], [-1.6]])
    h = torch.tensor([0.1, 1.4, -0.37, -0.92, 0.52, -1.27])
    h[5] = -1.6 * h[4] / 0.66 - 1e-3  # the last two rows exclude each other by a little
    assert solve_qp(P, q, G, h, solver=solver, on_failure="ignore").status == Status.INFEASIBLE
    h[5] += 2e-3
    solution = solve_qp(P, q, G, h, solver=solver, on_failure="ignore")
    assert (solution.status != Status.SUCCESS) | ((G @ solution.x - h).max() <= 1e-8)
