"""Every linear solver against torch.linalg, with masks, transposes, empty and singular systems."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflayers import Status, linear
from difflayers._arrays import default_tolerance

GENERAL = [
    linear.LU(), linear.LeastSquares(), linear.GMRES(), linear.GMRES(restart=7), linear.GCR(), linear.GCR(memory=9),
    linear.BiCGSTAB(), linear.Picard(),
    linear.Anderson(), linear.Auto(), linear.Auto(dense_size=0),
]  # fmt: skip


def systems(samples=4, n=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(samples, n, n, generator=generator, dtype=torch.float64) / n**0.5 * 0.5
    return a - torch.eye(n, dtype=torch.float64), torch.randn(samples, n, generator=generator, dtype=torch.float64)


def solve(solver, matrix, rhs, transpose=False, properties=("fixed_point",)):
    operator = linear.MatrixOperator(matrix, frozenset(properties))
    assert solver.supports(operator.properties) is None
    return solver.solve(solver.factor(operator), rhs, transpose=transpose)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("solver", GENERAL, ids=repr)
def test_solves(solver, transpose):
    matrix, rhs = systems()
    rhs[1] = 0
    solution = solve(solver, matrix, rhs, transpose)
    expected = torch.linalg.solve(matrix.mT if transpose else matrix, rhs)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-9)
    assert solution.status.tolist() == [Status.SUCCESS] * 4
    assert solution.residual.max() < 1e-8
    assert not solution.value[1].any()


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 4), n=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_iterative_solvers_agree_with_lu(samples, n, seed):
    matrix, rhs = systems(samples, n, seed)
    expected = solve(linear.LU(), matrix, rhs).value
    for solver in (linear.GMRES(), linear.LeastSquares()):
        torch.testing.assert_close(solve(solver, matrix, rhs).value, expected, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients():
    matrix, rhs = systems()
    spd = matrix @ matrix.mT
    solution = solve(linear.CG(), spd, rhs, properties=("symmetric", "positive_definite"))
    torch.testing.assert_close(solution.value, torch.linalg.solve(spd, rhs), rtol=1e-7, atol=1e-8)


def test_a_sample_that_cannot_be_solved_is_flagged_and_leaves_the_others_alone():
    matrix, rhs = systems()
    alone = [solve(solver, matrix[:1], rhs[:1]).value for solver in GENERAL]
    matrix[1] = 0
    matrix[2, 0, 0] = torch.nan
    for solver, expected in zip(GENERAL, alone, strict=True):
        solution = solve(solver, matrix, rhs)
        status = solution.status.tolist()
        assert status[0] == status[3] == Status.SUCCESS, solver
        if not isinstance(solver, linear.LeastSquares):
            assert status[1] not in (Status.SUCCESS, Status.NONFINITE), solver
        assert status[2] == Status.NONFINITE, solver
        torch.testing.assert_close(solution.value[:1], expected, rtol=1e-9, atol=1e-11)


def test_conjugate_gradients_flag_what_they_cannot_solve():
    matrix, rhs = systems(5)
    matrix = matrix @ matrix.mT
    alone = solve(linear.CG(), matrix[:1], rhs[:1]).value
    matrix[1] = 0
    matrix[2, 0, 0] = torch.nan
    rhs[3, 0] = torch.inf
    solution = solve(linear.CG(), matrix, rhs)
    bad = [Status.MAX_STEPS, Status.NONFINITE, Status.NONFINITE]
    assert solution.status.tolist() == [Status.SUCCESS, *bad, Status.SUCCESS]
    torch.testing.assert_close(solution.value[:1], alone, rtol=1e-9, atol=1e-11)


def test_conjugate_gradients_do_not_claim_what_is_not_symmetric():
    matrix, rhs = systems()
    assert not (solve(linear.CG(max_steps=50), matrix, rhs).status == Status.SUCCESS).any()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("solver", [*GENERAL, linear.GMRES(max_steps=3), linear.BiCGSTAB(max_steps=3)], ids=repr)
def test_the_residual_reported_is_that_of_the_answer(solver, transpose):
    matrix, rhs = systems()
    solution = solve(solver, matrix, rhs, transpose)
    x = solution.value.unsqueeze(-1)
    residual = (((matrix.mT if transpose else matrix) @ x).squeeze(-1) - rhs).norm(dim=1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-12)


def test_consistent_singular_systems_are_solved_where_that_is_possible():
    matrix, rhs = torch.diag_embed(torch.tensor([[-1.0, -2.0, 0.0]])), torch.tensor([[1.0, 1.0, 0.0]])
    for solver in (linear.GMRES(), linear.GCR(), linear.BiCGSTAB(), linear.LeastSquares(), linear.CG()):
        solution = solve(solver, matrix, rhs)
        assert solution.status.tolist() == [Status.SUCCESS], solver
        torch.testing.assert_close(solution.value, torch.tensor([[-1.0, -0.5, 0.0]]), msg=repr(solver))


def test_singular_is_named_by_lu_and_answered_by_least_squares():
    matrix = torch.diag_embed(torch.tensor([[1.0, 2.0], [1.0, 0.0]]))
    rhs = torch.ones(2, 2)
    assert solve(linear.LU(), matrix, rhs).status.tolist() == [Status.SUCCESS, Status.SINGULAR]
    torch.testing.assert_close(solve(linear.LeastSquares(), matrix, rhs).value[1], torch.tensor([1.0, 0.0]))


def test_max_steps_is_reported_per_sample():
    matrix, rhs = systems(2, 30)
    matrix[0] = -torch.eye(30)
    for solver in (linear.GMRES(max_steps=3), linear.Picard(max_steps=3), linear.BiCGSTAB(max_steps=3)):
        assert solve(solver, matrix, rhs).status.tolist() == [Status.SUCCESS, Status.MAX_STEPS], solver


def test_neumann_is_a_truncated_series_and_identity_its_first_term():
    matrix, rhs = systems()
    a = matrix + torch.eye(20)
    expected = -(rhs + (a @ rhs[..., None])[..., 0])
    torch.testing.assert_close(solve(linear.Neumann(1), matrix, rhs).value, expected)
    torch.testing.assert_close(solve(linear.Identity(), matrix, rhs).value, -rhs)
    assert linear.Neumann().supports(frozenset()) is not None


def test_auto_chooses_by_size_and_structure():
    small = linear.MatrixOperator(torch.eye(3).expand(2, 3, 3))
    large = torch.eye(100).expand(2, 100, 100)
    assert linear.Auto().choose(small) == linear.LU()
    assert isinstance(linear.Auto().choose(linear.MatrixOperator(large)), linear.GMRES)
    definite = linear.MatrixOperator(large, frozenset({"symmetric", "positive_definite"}))
    assert isinstance(linear.Auto().choose(definite), linear.CG)
    contractive = linear.MatrixOperator(large, frozenset({"fixed_point", "contractive"}))
    fixed_point = linear.MatrixOperator(large, frozenset({"fixed_point"}))
    assert linear.Auto().choose(contractive).memory < linear.Auto().choose(fixed_point).memory
    assert isinstance(linear.Auto().choose(fixed_point), linear.GCR)
    assert linear.Auto(dense_size=100).choose(definite) == linear.LU()
    assert linear.Auto(dense_size=2).choose(small) == linear.GMRES()
    small.inverse = small  # what a quasi-Newton solver learnt
    assert linear.Auto().choose(small) == linear.GCR()
    assert linear.Auto().held_to(1e-3).choose(small).rtol == 1e-3
    assert linear.Auto(rtol=1e-5).held_to(1e-3).choose(small).rtol == 1e-5


def test_auto_falls_back_to_lu_where_gmres_stalls():
    n = 60
    shift = torch.eye(n).roll(1, 0)  # GMRES makes no progress on a cyclic shift before its n-th product
    rhs = torch.zeros(1, n)
    rhs[0, 0] = 1
    assert solve(linear.GMRES(restart=40), shift[None], rhs).status.tolist() == [Status.STALLED]
    solution = solve(linear.Auto(), shift[None], rhs)
    assert solution.status.tolist() == [Status.SUCCESS]
    torch.testing.assert_close((shift @ solution.value[0]), rhs[0])
    unaffordable = solve(linear.Auto(dense_entries=n * n - 1), shift[None], rhs)
    assert unaffordable.status.tolist() == [Status.STALLED]


def test_jacobian_operator_products_match_its_matrix():
    point = torch.randn(3, 4)
    weight = torch.randn(4, 4)
    operator = linear.JacobianOperator(lambda z: torch.tanh(z @ weight), point, 1)
    x = torch.randn(3, 4)
    dense = operator.dense
    torch.testing.assert_close(operator.apply(x), (dense @ x[..., None])[..., 0])
    torch.testing.assert_close(operator.apply_transpose(x), (dense.mT @ x[..., None])[..., 0])
    torch.testing.assert_close(operator.transpose.dense, dense.mT)


@pytest.mark.parametrize("solver", GENERAL, ids=repr)
def test_empty(solver):
    assert solve(solver, torch.zeros(0, 5, 5), torch.zeros(0, 5)).value.shape == (0, 5)


@pytest.mark.parametrize("solver", GENERAL, ids=repr)
def test_solves_while_gradients_are_on(solver):
    matrix, rhs = systems()
    solution = solve(solver, matrix.requires_grad_(), rhs)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-9)


class Counted(linear.MatrixOperator):
    products_taken = 0

    def apply(self, x):
        self.products_taken += 1
        return super().apply(x)


def conditioned(condition, n=30, symmetric=True):
    left, right = torch.linalg.qr(torch.randn(2, 3, n, n))[0]
    values = torch.logspace(0, -math.log10(condition), n)
    return left * values @ (left if symmetric else right).mT


def residual_of(matrix, solution, rhs):
    return ((matrix @ solution.value.unsqueeze(-1)).squeeze(-1) - rhs).norm(dim=1)


KRYLOV = [linear.CG(), linear.GMRES(), linear.GCR(), linear.BiCGSTAB()]


@pytest.mark.parametrize("solver", KRYLOV, ids=repr)
@pytest.mark.parametrize("condition", [1e6, 1e10])
def test_what_the_recursion_claims_is_confirmed(solver, condition):
    matrix, rhs = conditioned(condition), torch.randn(3, 30)
    solution = solve(solver, matrix, rhs, properties=("symmetric", "positive_definite"))
    residual = residual_of(matrix, solution, rhs)
    torch.testing.assert_close(solution.residual, residual, rtol=0.2, atol=0.0)
    ok = solution.status == Status.SUCCESS
    assert torch.equal(ok, solution.residual <= default_tolerance(torch.float64) * rhs.norm(dim=1))
    assert ok.all() == (condition < 1e10)


@pytest.mark.parametrize("solver", [linear.GMRES(), linear.GCR()], ids=repr)
def test_a_right_hand_side_that_hides_the_norm_is_confirmed_too(solver):
    matrix = conditioned(1e12)
    rhs = torch.linalg.eigh(matrix)[1][..., 0]
    solution = solve(solver, matrix, rhs)
    residual = residual_of(matrix, solution, rhs)
    torch.testing.assert_close(solution.residual, residual, rtol=0.2, atol=0.0)
    assert solution.status.tolist() == [Status.STALLED] * 3
    assert (residual > default_tolerance(torch.float64)).all()


def test_refinement_reaches_a_tolerance_that_the_recursion_missed():
    matrix, rhs = conditioned(1e6), torch.randn(3, 30)
    taken, recursive = [], linear.CG(rtol=1e-10).iterate
    tolerance = 1e-10 * rhs.norm(dim=1)

    def sloppy(product, rhs, tolerance):  # stops short of what it says
        taken.append(len(taken))
        x, _, steps = recursive(product, rhs, tolerance if len(taken) > 1 else 1e4 * tolerance)
        return x, 0 * tolerance, steps

    operator = linear.MatrixOperator(matrix)
    solution = linear.CG(rtol=1e-10).solve_by(sloppy, linear.Factor(operator), rhs, transpose=False)
    assert solution.status.tolist() == [Status.SUCCESS] * 3
    assert (residual_of(matrix, solution, rhs) <= tolerance).all()
    assert len(taken) > 1


@pytest.mark.parametrize("solver", [linear.CG(), linear.GMRES(), linear.GCR()], ids=repr)
def test_well_conditioned_systems_pay_nothing_for_it(solver):
    matrix, rhs = conditioned(50.0), torch.randn(3, 30)
    operator = Counted(matrix, frozenset({"symmetric", "positive_definite"}))
    solution = solver.solve(solver.factor(operator), rhs)
    assert operator.products_taken == solution.steps.max()


@pytest.mark.parametrize("solver", [linear.LU(), linear.LeastSquares()], ids=repr)
def test_dense_solvers_claim_what_their_residual_confirms(solver):
    matrix, rhs = conditioned(1e10, symmetric=False), torch.randn(3, 30)
    good = solve(solver, matrix, rhs)
    assert good.status.tolist() == [Status.SUCCESS] * 3
    torch.testing.assert_close(good.residual, residual_of(matrix, good, rhs))
    factor = solver.factor(linear.MatrixOperator(matrix))
    elsewhere = linear.Factor(linear.MatrixOperator(conditioned(10.0)), factor.data)  # factors of another matrix
    assert solver.solve(elsewhere, rhs).status.tolist() == [Status.STALLED] * 3
    rhs[1, 0] = torch.nan
    assert solve(solver, matrix, rhs).status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]


def test_least_squares_keep_small_right_hand_sides_exact():
    matrix = conditioned(1e12)
    rhs = torch.linalg.eigh(matrix)[1][..., -1]  # needs nothing of the inverse's large entries
    solution = solve(linear.LeastSquares(), matrix, rhs)
    assert solution.status.tolist() == [Status.SUCCESS] * 3
    torch.testing.assert_close(solution.residual, torch.zeros(3), rtol=0, atol=1e-12)


def test_least_squares_cut_where_they_are_told():
    matrix, rhs = torch.diag_embed(torch.tensor([[1.0, 1e-3]])), torch.ones(1, 2)
    solution = solve(linear.LeastSquares(rtol=1e-2), matrix, rhs)
    torch.testing.assert_close(solution.value, torch.tensor([[1.0, 0.0]]))
    assert solution.status.tolist() == [Status.SUCCESS]


def test_many_rows_with_several_threads():
    """Batched LU of torch 2.13 with MKL is wrong there."""
    matrix, rhs = systems(samples=3, n=170)
    torch.set_num_threads(2)
    try:
        solution = solve(linear.LU(), matrix, rhs)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close((matrix @ solution.value.unsqueeze(-1)).squeeze(-1), rhs, rtol=1e-9, atol=1e-9)
