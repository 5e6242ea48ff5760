"""Ways to factor the Jacobian of a cone program give one derivative; large and structured problems."""

import contracts
import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from difflayers.qp import Cones, CvxpyLayer, Sparse, _cone_factors, solve_cone
from difflayers.qp._cone_factor import Exact, Proximal
from difflayers.qp._cone_projection import NearestFactor
from difflayers.qp._cone_sparse import SparseFactor
from difflayers.qp._data import Data

CONES = Cones(5, 20, (8, 20), (3,), 2, (0.3,))


def program(samples=2, n=45):
    """A problem with a known answer, rows of every kind active and not."""
    generator = torch.Generator().manual_seed(3)
    C, x, v = (torch.randn(*s, generator=generator) for s in ((CONES.rows, n), (samples, n), (samples, CONES.rows)))
    y, P = CONES.project(v), 0.5 * torch.eye(n)
    return [P, -0.5 * x - y @ C, C, x @ C.mT + y - v], (x, y)


def nearest_correlation(samples=3, k=9):
    columns, rows = torch.tril_indices(k, k)
    scale, M = torch.where(rows == columns, 1, 2**0.5), torch.randn(samples, k, k)
    C = torch.cat([torch.eye(len(rows))[rows == columns], -torch.diag(scale)])
    d = torch.cat([torch.ones(k), torch.zeros(len(rows))])
    q = -2 * scale**2 * ((M + M.mT) / 2)[:, rows, columns]
    return (torch.diag(2 * scale**2), q, C, d), Cones(zero=k, semidefinite=(k,))


def answer(blocks, cones, monkeypatch, large, sparse, expected):
    kinds, made = set(), _cone_factors.factored

    def watched(*arguments):
        factor = made(*arguments)
        kinds.add(type(factor))
        return factor

    monkeypatch.setattr(_cone_factors, "LARGE", large)
    monkeypatch.setattr(_cone_factors, "SPARSE", sparse)
    for module in ("_cone_solver", "_cone_jacobian"):
        monkeypatch.setattr(f"difflayers.qp.{module}.factored", watched)
    wanted = contracts.wanting(blocks)
    P, q, C, d = wanted
    C = C if sparse > 9999 else Sparse(torch.ones_like(C).nonzero().mT, C.flatten(), C.shape)
    solution = solve_cone(P, q, C, d, cones)
    gradients = torch.autograd.grad(solution.x.pow(3).sum() + solution.y.pow(2).sum(), wanted)
    assert kinds == {expected}
    return solution, gradients


@pytest.mark.parametrize(("kind", "sparse"), [(Proximal, 10**5), (SparseFactor, 50)])
def test_every_factorization_gives_the_same(kind, sparse, monkeypatch):
    blocks, (x, y) = program()
    _, expected = answer(blocks, CONES, monkeypatch, 1000, 10**5, Exact)
    solution, gradients = answer(blocks, CONES, monkeypatch, 10, sparse, kind)
    assert not solution.stats["degenerate"].any()
    contracts.assert_close((solution.x, solution.y), (x, y), 1e-9)
    contracts.assert_close(gradients, expected, 1e-8)


LONG = Cones(zero=20, nonnegative=5, second_order=(401, 2, 41, 401, 1))


@pytest.mark.parametrize("samples", [1, 3])
def test_long_second_order_cones_are_no_dense_blocks(samples):
    n, rows = 90, LONG.rows
    generator = torch.Generator().manual_seed(1)
    C = torch.zeros(rows, n).scatter(
        1, torch.randint(n, (rows, 3), generator=generator), torch.randn(rows, 3, generator=generator)
    )
    v = torch.randn(samples, rows, generator=generator)
    v[:, 25], v[:, 428], v[:, 469] = 0.4, 100, -100  # first rows of long cones: on, in and outside of it
    y, P = LONG.project(v), torch.eye(n)
    data = Data(P, torch.zeros(samples, n), C, torch.zeros(samples, rows))
    rotation = LONG.rotation(v, y)
    dense, sparse = Exact(data, LONG, rotation), SparseFactor(data.all_sparse(), LONG, rotation)
    assert not sparse.degenerate.any()
    entries = [system._lu.L.nnz + system._lu.U.nnz for system in sparse._systems]
    assert max(entries) < 401**2 / 2  # of two such blocks
    first, sides = torch.randn(samples, n, generator=generator), torch.randn(samples, rows, generator=generator)
    D = LONG.derivative(rotation)
    weighted = D.vectors.dense() * D.weights[:, None]
    D = D.blocks.dense() + weighted @ D.vectors.dense().mT

    def product(x, z, transposed):
        moved = (D @ (x @ C.mT + z if transposed else z)[..., None])[..., 0]
        return x + (z if transposed else moved) @ C, moved - z + (0 if transposed else x @ C.mT)

    for transposed in (False, True):
        solve = [getattr(factor, "solve_transposed" if transposed else "solve") for factor in (dense, sparse)]
        exact = solve[0](first, sides)
        contracts.assert_close(product(*exact, transposed), (first, sides), 1e-9)
        x, z = solve[1](first, sides)
        for _ in range(4):  # what regularization leaves
            one, other = product(x, z, transposed)
            x, z = (part + more for part, more in zip((x, z), solve[1](first - one, sides - other), strict=True))
        contracts.assert_close((x, z), exact, 1e-9)


def test_a_long_second_order_cone_gives_what_dense_data_give():
    n = 400
    generator = torch.Generator().manual_seed(0)
    A = torch.zeros(n, 50).scatter(
        1, torch.randint(50, (n, 3), generator=generator), torch.randn(n, 3, generator=generator)
    )
    b, P = torch.randn(2, n, generator=generator), torch.diag(torch.tensor([0.1] * 50 + [0.0]))
    C = torch.zeros(n + 1, 51)
    C[0, -1], C[1:, :50] = -1, -A
    q = torch.eye(51)[-1]
    found = []
    for sparse in (False, True):
        d = torch.cat([torch.zeros(2, 1), -b], dim=-1).requires_grad_()
        solution = solve_cone(P, q, C.to_sparse() if sparse else C, d, Cones(second_order=(n + 1,)))
        assert not solution.stats["degenerate"].any()
        found.append((solution.x, solution.y, *torch.autograd.grad(solution.x.pow(3).sum(), d)))
    contracts.assert_close(*found, 1e-9)


def test_nearest_points_need_no_backend(monkeypatch):
    blocks, cones = nearest_correlation()
    expected, exact = answer(blocks, cones, monkeypatch, 1000, 10**5, Exact)
    solution, gradients = answer(blocks, cones, monkeypatch, 10, 10**5, NearestFactor)
    assert expected.stats["steps"].all()
    assert not solution.stats["steps"].any()
    contracts.assert_close((solution.x, solution.y), (expected.x, expected.y), 1e-10)
    contracts.assert_close(gradients, exact, 1e-9)


def test_a_large_program_with_several_solutions_is_flagged():
    """``x₁ + x₂`` is determined, ``x₁ - x₂`` isn't."""
    n = 60
    P, q = torch.eye(n), torch.ones(n, requires_grad=True)
    P[:2, :2] = 0.5
    C, d = torch.cat([torch.zeros(1, n), -torch.eye(n)]), torch.zeros(n + 1)
    d[0] = 100
    solution = solve_cone(P, q, C, d, Cones(second_order=(n + 1,)))
    assert solution.stats["degenerate"]
    solution.x[:2].sum().backward()
    contracts.assert_close(q.grad[:2], torch.full((2,), -1.0), 1e-8)


def test_a_layer_of_two_thousand_variables():
    n = 2000
    x, a, radius = cp.Variable(n), cp.Parameter(n), cp.Parameter()
    groups = cp.reshape(x, (50, 40), order="F")
    D = sp.diags([1.0, -1.0], [0, 1], shape=(n - 1, n)).tocsr()
    problem = cp.Problem(
        cp.Minimize(cp.sum_squares(x - a) + 0.5 * cp.norm1(D @ x)), [cp.norm(groups, axis=0) <= radius]
    )
    layer = CvxpyLayer(problem, [a, radius], [x], on_failure="raise")
    point, size = 0.1 * torch.randn(n).cumsum(-1), torch.tensor(3.0)
    values = contracts.wanting((point, size))
    solution = layer.solve(*values)
    assert solution.stats["residual"] < 1e-9
    gradients = torch.autograd.grad(solution.value[0].pow(2).sum() + solution.value[0].sum(), values)
    directions = torch.randn(n), torch.tensor(1.0)

    def loss(step):
        (found,) = layer(point + step * directions[0], size + step * directions[1])
        return (found.pow(2).sum() + found.sum()).item()

    numeric = (loss(1e-6) - loss(-1e-6)) / 2e-6
    exact = sum((g * e).sum().item() for g, e in zip(gradients, directions, strict=True))
    assert abs(exact - numeric) <= 1e-5 * (1 + abs(exact))


def test_unknowns_that_equations_give_leave_the_program():
    x, y, a, scale = cp.Variable(3), cp.Variable(2), cp.Parameter(3), cp.Parameter()
    M = np.array([[1.0, 2, 0], [0, 1, 3]])
    link = y == M @ x + a[:2]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a) + cp.sum_squares(y)), [link, cp.norm(x) <= scale])
    values = contracts.wanting((torch.randn(4, 3), torch.rand(4) + 0.2))
    everything = CvxpyLayer(problem, [a, scale], [x, y, link.dual_variables[0]])
    some = CvxpyLayer(problem, [a, scale], [x])
    assert some.canonical.cones.zero < everything.canonical.cones.zero
    found, expected = some(*values)[0], everything(*values)[0]
    contracts.assert_close(found, expected, 1e-9)
    gradients = [torch.autograd.grad(out.pow(3).sum(), values) for out in (found, expected)]
    contracts.assert_close(*gradients, 1e-8)
