"""CVXPY problems as layers: CVXPY's own solutions, derivatives, and what a wrong problem or call is told."""

import copy
import pickle
import warnings

import contracts
import cvxpy as cp
import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers._solution import Status
from difflayers.errors import ConvergenceWarning, ProblemError, SolverError, UnknownNameError
from difflayers.qp import SCS, Clarabel, CvxpyLayer

TIGHT = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}


class Case:
    """A problem, what goes in and comes out, and values ``(samples, ...)`` for it."""

    def __init__(self, objective, constraints, parameters, variables, values, gp=False):
        self.problem = cp.Problem(objective, constraints)
        self.parameters, self.variables, self.values, self.gp = parameters, variables, values, gp

    def layer(self, **options):
        return CvxpyLayer(self.problem, self.parameters, self.variables, gp=self.gp, on_failure="raise", **options)

    def by_cvxpy(self, sample):
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.value = value[sample].numpy() if value.dim() > 1 else value[sample].item()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Solution may be inaccurate")  # than we ask for
            self.problem.solve(gp=self.gp, solver=cp.CLARABEL, **TIGHT)
        values = [variable.value for variable in self.variables]
        return [torch.as_tensor(np.asarray(v.toarray() if hasattr(v, "toarray") else v)) for v in values]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def l1_fit():
    """From the README of cvxpylayers."""
    x, A, b = cp.Variable(2), cp.Parameter((3, 2)), cp.Parameter(3)
    return Case(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0], [A, b], [x], [random(4, 3, 2), random(4, 3)])


def dual_program():
    """From the README of cvxpylayers."""
    x, c, b = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    equation, signs = cp.sum(x) == b, x >= 0
    duals = [equation.dual_variables[0], signs.dual_variables[0]]
    return Case(cp.Minimize(c @ x), [equation, signs], [c, b], [x, *duals], [random(4, 2).abs(), random(4).abs() + 0.5])


def geometric_program():
    """From the README of cvxpylayers."""
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a, b, c = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]
    values = [2 + random(4).abs(), 1 + random(4, seed=1).abs(), 0.5 + 0.1 * random(4, seed=2)]
    return Case(cp.Minimize(1 / (x * y * z)), constraints, [a, b, c], [x, y, z], values, gp=True)


def second_order():
    x, A, b, weight = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(5), cp.Parameter(nonneg=True)
    ball = cp.norm(x - 1) <= 2
    objective = cp.Minimize(cp.norm(A @ x - b) + weight * cp.norm1(x) + 0.1 * cp.sum_squares(x))
    values = [random(4, 5, 3), random(4, 5), random(4).abs()]
    return Case(objective, [ball], [A, b, weight], [x, ball.dual_variables[0]], values)


def nearest_correlation():
    X, C = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3), symmetric=True)
    diagonal = cp.diag(X) == 1
    M = random(4, 3, 3)
    variables = [X, diagonal.dual_variables[0]]
    return Case(cp.Minimize(cp.sum_squares(X - C)), [diagonal], [C], variables, [M + M.mT])


def matrix_inequality():
    x, A, B = cp.Variable(2), cp.Parameter((3, 3)), random(3, 3, seed=3)
    below = x[0] * np.eye(3) + x[1] * (B + B.mT).numpy() >> A + A.T
    return Case(
        cp.Minimize(cp.sum(x) + cp.sum_squares(x)), [below], [A], [x, below.dual_variables[0]], [random(4, 3, 3)]
    )


def entropy():
    p, score, mean = cp.Variable(4), cp.Parameter(4), cp.Parameter()
    total = cp.sum(p) == 1
    objective = cp.Maximize(score @ p + cp.sum(cp.entr(p)))
    constraints = [total, np.arange(4) @ p <= mean]
    values = [random(4, 4), 1 + 0.1 * random(4)]
    return Case(objective, constraints, [score, mean], [p, total.dual_variables[0]], values)


def power_cone():
    x, a = cp.Variable(3), cp.Parameter(3)
    cone = cp.PowCone3D(x[0], x[1], x[2], 0.3)
    return Case(cp.Minimize(cp.sum_squares(x - a)), [cone], [a], [x], [random(4, 3)])


def long_power_cones(axis):
    """Two of them, in columns or in rows."""
    shape = (2, 4) if axis else (4, 2)
    W, z, a, limit = cp.Variable(shape), cp.Variable(2), cp.Parameter(shape), cp.Parameter()
    exponents = np.array([[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.375, 0.125]])
    cone = cp.PowConeND(W, z, exponents if axis else exponents.T, axis=axis)
    total = cp.sum(W) <= limit
    objective = cp.Minimize(cp.sum_squares(W - a) - cp.sum(z))
    variables = [W, z, total.dual_variables[0], *cone.dual_variables]
    return Case(objective, [cone, total], [a, limit], variables, [random(4, *shape), 3 + random(4).abs()])


def long_power_cones_in_columns():
    return long_power_cones(0)


def long_power_cones_in_rows():
    return long_power_cones(1)


def geometric_mean():
    """By a power cone of five entries."""
    x, price = cp.Variable(5), cp.Parameter(5, pos=True)
    budget = price @ x <= 1
    objective = cp.Maximize(cp.geo_mean(x, [1, 2, 3, 1.5, 0.5], approx=False))
    return Case(objective, [budget], [price], [x, budget.dual_variables[0]], [0.5 + random(4, 5).abs()])


CASES = [
    l1_fit, dual_program, geometric_program, second_order, nearest_correlation, matrix_inequality, entropy, power_cone,
    long_power_cones_in_columns, long_power_cones_in_rows, geometric_mean,
]  # fmt: skip


def ids(make):
    return make.__name__


@pytest.mark.parametrize("make", CASES, ids=ids)
def test_solutions_and_duals_are_those_of_cvxpy(make):
    case = make()
    found = case.layer()(*case.values)
    for sample in range(4):
        for ours, theirs in zip(found, case.by_cvxpy(sample), strict=True):
            contracts.assert_close(ours[sample], theirs.reshape(ours[sample].shape), 1e-5)


@pytest.mark.parametrize("make", CASES, ids=ids)
def test_gradients_are_those_of_central_differences(make):
    case = make()
    layer, values = case.layer(), case.values
    directions = [random(*value.shape, seed=7) for value in values]
    if make is nearest_correlation:
        directions = [d + d.mT for d in directions]

    def loss(*values):
        return sum(out.pow(2).sum() + out.sum() for out in layer(*values))

    wanted = contracts.wanting(values)
    gradients = torch.autograd.grad(loss(*wanted), wanted)
    ours = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def difference(h):
        either = (loss(*[v + s * h * d for v, d in zip(values, directions, strict=True)]) for s in (1, -1))
        return (next(either) - next(either)) / (2 * h)

    # Richardson's extrapolation, so that the reference isn't the worse of the two.
    numeric = (4 * difference(5e-6) - difference(1e-5)) / 3
    assert abs(ours - numeric) <= 1e-8 * (1 + abs(numeric))


@pytest.mark.parametrize(
    "make", [l1_fit, geometric_program, second_order, nearest_correlation, geometric_mean], ids=ids
)
def test_derivatives_of_every_order_and_mode(make):
    case = make()
    layer, values = case.layer(), [value[:2] for value in case.values]

    def first(value, *rest):
        return layer(value, *rest)[0]

    wanted = contracts.wanting(values)
    assert torch.autograd.gradcheck(first, wanted, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(first, wanted, fast_mode=True)
    value, *rest = values
    eager = torch.autograd.functional.jacobian(lambda v: first(v, *rest), value)
    contracts.assert_close(jacrev(first)(value, *rest), eager)
    contracts.assert_close(jacfwd(first)(value, *rest), eager)

    def cubed(value, *rest):
        return first(value, *rest).pow(3).sum()

    expected = torch.autograd.functional.hessian(lambda v: cubed(v, *rest), value)
    contracts.assert_close(hessian(cubed)(value, *rest), expected)
    contracts.assert_close(vmap(first)(value, *rest), first(value, *rest))
    contracts.assert_close(vmap(grad(cubed))(value, *rest), grad(cubed)(value, *rest))


def test_batched_and_unbatched_parameters():
    case = l1_fit()
    layer, (A, b) = case.layer(), case.values
    shared = A[0].clone().requires_grad_()
    (x,) = layer(shared, b)
    assert x.shape == (4, 2)
    (single,) = layer(A[0], b[0])
    contracts.assert_close(single, x[0])
    x.pow(2).sum().backward()
    each = A[0].expand(4, 3, 2).clone().requires_grad_()
    layer(each, b)[0].pow(2).sum().backward()
    contracts.assert_close(shared.grad, each.grad.sum(0), 1e-10)
    assert layer(A[0], b.reshape(2, 2, 3))[0].shape == (2, 2, 2)
    assert layer(A[:0], b[:0])[0].shape == (0, 2)
    assert layer(A[:1], b[0])[0].shape == (1, 2)


def test_a_symmetric_parameter_has_a_symmetric_gradient():
    case = nearest_correlation()
    C = case.values[0].clone().requires_grad_()
    X, _ = case.layer()(C)
    X.pow(3).sum().backward()
    contracts.assert_close(C.grad, C.grad.mT, 1e-12)
    assert C.grad.abs().max() > 0.1


def test_a_variable_with_attributes():
    D, s, x = cp.Variable((2, 2), diag=True), cp.Variable((2, 2), symmetric=True), cp.Variable(2, nonpos=True)
    a = cp.Parameter((2, 2))
    objective = cp.Minimize(cp.sum_squares(D - a) + cp.sum_squares(s - a) + cp.sum_squares(x - a[0]))
    case = Case(objective, [cp.sum(s) >= 1], [a], [D, s, x], [random(4, 2, 2)])
    for ours, theirs in zip(case.layer()(*case.values), case.by_cvxpy(0), strict=True):
        contracts.assert_close(ours[0], theirs, 1e-5)


@pytest.mark.parametrize("solver", [cp.CLARABEL, "scs", Clarabel(tol=1e-8), SCS(tol=1e-9)], ids=str)
def test_solvers_agree(solver):
    case = second_order()
    contracts.assert_close(case.layer(solver=solver)(*case.values), case.layer()(*case.values), 1e-9)


def test_options_of_the_solver():
    case = second_order()
    layer = case.layer(solver_args={"eps": 1e-7})
    assert layer.solver == Clarabel(tol=1e-7)
    contracts.assert_close(layer(*case.values, solver_args={"max_iters": 60}), layer(*case.values), 1e-9)
    with pytest.raises(SolverError, match="MAX_STEPS"):
        layer(*case.values, solver_args={"max_iters": 1})
    with pytest.raises(UnknownNameError, match="did you mean 'max_steps'"):
        layer(*case.values, solver_args={"max_step": 2})


def test_the_solution_with_statistics_and_a_warm_start():
    case = second_order()
    layer = case.layer()
    solution = layer.solve(*case.values)
    assert solution.ok.all()
    assert (solution.stats["residual"] < 1e-12).all()
    assert solution.cone.y.shape == solution.cone.s.shape
    again = layer.solve(*[value + 1e-5 for value in case.values], init=solution)
    assert not again.stats["steps"].any()


def test_copies_and_pickles_give_the_same_to_the_last_bit():
    case = geometric_program()
    layer = case.layer()
    expected = layer(*case.values)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(map(torch.equal, other(*case.values), expected))
    assert not layer.state_dict()
    assert "gp=True" in repr(layer)


def test_float32_and_numpy():
    case = second_order()
    layer = case.layer()
    narrow = [value.float().requires_grad_() for value in case.values]
    found, _ = layer(*narrow)
    assert found.dtype == torch.float32
    contracts.assert_close(found.double(), layer(*case.values)[0], 1e-4)
    found.sum().backward()
    assert narrow[0].grad.dtype == torch.float32
    arrays = layer(*[value.numpy() for value in case.values])
    assert np.abs(arrays[0] - layer(*case.values)[0].numpy()).max() < 1e-14


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_a_compiled_model_gives_the_same():
    case = l1_fit()
    layer = case.layer()

    def model(A, b):
        return layer(2 * A, b)[0] + 1

    compiled = torch.compile(model, backend="eager")
    contracts.assert_close(compiled(*case.values), model(*case.values), 1e-14)
    wanted = contracts.wanting(case.values)
    ours = torch.autograd.grad(compiled(*wanted).pow(2).sum(), wanted)
    contracts.assert_close(ours, torch.autograd.grad(model(*wanted).pow(2).sum(), wanted), 1e-14)


def test_samples_without_a_solution_among_healthy_ones():
    x, low, high, cost = cp.Variable(2), cp.Parameter(), cp.Parameter(), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cost @ x + cp.exp(x[0])), [x >= low, cp.sum(x) <= high])
    lows, highs = torch.zeros(4), torch.tensor([1.0, -1.0, torch.inf, 1.0])
    costs = torch.ones(4, 2)
    costs[3, 0] = torch.nan
    highs[2] = 1e3
    lows, highs, costs = (t.requires_grad_() for t in (lows, highs, costs))
    layer = CvxpyLayer(problem, [low, high, cost], [x])
    with pytest.warns(ConvergenceWarning, match="INFEASIBLE in 1 of 4 samples \\(1\\)"):
        solution = layer.solve(lows, highs, costs)
    assert solution.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE, Status.SUCCESS, Status.NONFINITE]
    (found,) = solution.value
    assert found[[1, 3]].isnan().all()
    found[solution.ok].sum().backward()
    for leaf in (lows, highs, costs):
        assert leaf.grad[[0, 2]].isfinite().all()
        assert not leaf.grad[[1, 3]].any()
    strict = CvxpyLayer(problem, [low, high, cost], [x], on_failure="raise")
    with pytest.raises(SolverError):
        strict(lows, highs, costs)


def _wrong_problem(kind):
    x, a, b = cp.Variable(2), cp.Parameter(2, name="a"), cp.Parameter(2, name="b")
    objectives = {
        "dpp": cp.Minimize(cp.sum_squares(x) + cp.sum(cp.multiply(a, cp.multiply(b, x)))),
        "dcp": cp.Minimize(cp.sum(cp.sqrt(x)) + a @ x + b @ x),
    }
    chosen = cp.Variable(2, integer=True, name="chosen")
    problem = cp.Problem(objectives.get(kind, cp.Minimize(cp.sum_squares(chosen - a) + b @ chosen)), [])
    return problem, [a, b], problem.variables()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dpp", r"\(DPP, .*\): a \* b \* var.*, in the objective"),
        ("dcp", "DCP rules: minimize Sum.*, in the objective"),
        ("integer", "chosen is an integer variable"),
    ],
)
def test_a_problem_that_is_no_layer(kind, message):
    with pytest.raises(ProblemError, match=message):
        CvxpyLayer(*_wrong_problem(kind))


def test_a_geometric_program_needs_to_be_called_one():
    case = geometric_program()
    with pytest.raises(ProblemError, match="pass gp=True"):
        CvxpyLayer(case.problem, case.parameters, case.variables)


def test_wrong_parameters_and_variables():
    case = l1_fit()
    problem, (A, b), (x,) = case.problem, case.parameters, case.variables
    for parameters, variables, message in (
        ([A], [x], "lacks param"),
        ([A, A, b], [x], "twice"),
        ([A, b, cp.Parameter(2, name="other")], [x], "other, which isn't a parameter"),
        ([A, b], [cp.Variable(2, name="other")], "other, which is neither"),
        ([A, b], [], "variables is empty"),
    ):
        with pytest.raises(ProblemError, match=message):
            CvxpyLayer(problem, parameters, variables)
    with pytest.raises(ProblemError, match=r"must be a cvxpy.Problem, got int"):
        CvxpyLayer(3, [], [x])
    with pytest.raises(UnknownNameError, match="did you mean 'clarabel'"):
        CvxpyLayer(problem, [A, b], [x], solver="CLARABELL")


def test_wrong_values():
    case = l1_fit()
    layer, (A, b) = case.layer(), case.values
    for values, message in (
        ((A,), "got 1 values for 2 parameters"),
        ((A, b[:, :2]), r"shape \(4, 2\), but must be \(3,\)"),
        ((A[:3], b), "don't broadcast"),
        ((A, b.float()), "float32"),
        ((A, b.long()), "got torch.int64"),
        ((A, None), "got NoneType"),
    ):
        with pytest.raises(ProblemError, match=message):
            layer(*values)
