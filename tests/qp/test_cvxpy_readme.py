"""The examples of cvxpylayers' README and of its example folder, with the same call, and the numbers it gives.

An example is a function of the class, so that the numbers here are what the same functions gave with version 1.2.0,
diffcp 1.1.9 and SCS at a tolerance of 1e-12; see :data:`RECORDED`.

Its README has two more, for JAX and for a GPU that CuClarabel solves on: JAX has no layer here, and the other is
:func:`readme_gpu`, whose parameters are on the CPU where there is no GPU.
"""

import warnings

import contracts
import cvxpy as cp
import numpy as np
import pytest
import torch

from difflayers.errors import ProblemError, UnknownNameError
from difflayers.qp import SCS, Clarabel, CvxpyLayer
from difflayers.qp._options import with_options


def numbers(*shape, seed=0):
    """The same wherever they are drawn; a leaf."""
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).standard_normal(shape))).requires_grad_()


def with_gradients(found, *leaves):
    """Values of the variables, and gradients of their sum."""
    gradients = torch.autograd.grad(sum(value.sum() for value in found), leaves)
    return [*found, *gradients]


def readme_pytorch(layer_class):
    n, m = 2, 3
    x = cp.Variable(n)
    A = cp.Parameter((m, n))
    b = cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0])
    layer = layer_class(problem, parameters=[A, b], variables=[x])
    A_value, b_value = numbers(m, n), numbers(m, seed=1)
    return with_gradients(layer(A_value, b_value), A_value, b_value)


def readme_dual_variables(layer_class):
    x = cp.Variable(2)
    c = cp.Parameter(2)
    b = cp.Parameter()
    total = cp.sum(x) == b
    problem = cp.Problem(cp.Minimize(c @ x), [total, x >= 0])
    layer = layer_class(problem, parameters=[c, b], variables=[x, total.dual_variables[0]])
    c_value = torch.tensor([1.0, 2.0], requires_grad=True)
    b_value = torch.tensor(1.0, requires_grad=True)
    return with_gradients(layer(c_value, b_value), c_value, b_value)


def readme_log_log_convex(layer_class):
    x, y, z = (cp.Variable(pos=True) for _ in range(3))
    a = cp.Parameter(pos=True, value=2.0)
    b = cp.Parameter(pos=True, value=1.0)
    c = cp.Parameter(value=0.5)
    constraints = [a * (x * y + x * z + y * z) <= b, x >= y**c]
    problem = cp.Problem(cp.Minimize(1 / (x * y * z)), constraints)
    layer = layer_class(problem, parameters=[a, b, c], variables=[x, y, z], gp=True)
    values = [torch.tensor(parameter.value, requires_grad=True) for parameter in (a, b, c)]
    return with_gradients(layer(*values), *values)


def readme_options(layer_class):
    x, a = cp.Variable(3), cp.Parameter(3)
    layer = layer_class(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1]), [a], [x])
    a_value = numbers(3)
    return with_gradients(layer(a_value, solver_args={"eps": 1e-8}), a_value)


def readme_options_if_not_converging(layer_class):
    x, a = cp.Variable(3), cp.Parameter(3)
    layer = layer_class(cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1]), [a], [x])
    options = {"eps": 1e-8, "max_iters": 10000, "acceleration_lookback": 0}
    a_value = numbers(3)
    with pytest.warns(UserWarning, match="acceleration_lookback"):
        found = layer(a_value, solver_args=options)
    return with_gradients(found, a_value)


def readme_gpu(layer_class):
    n, m = 2, 3
    x, A, b = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m)
    problem = cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.warns(UserWarning, match="Clarabel, on the CPU"):
        layer = layer_class(problem, parameters=[A, b], variables=[x], solver=cp.CUCLARABEL).to(device)
    leaves = numbers(m, n), numbers(m, seed=1)
    return [t.cpu() for t in with_gradients(layer(*[leaf.to(device) for leaf in leaves]), *leaves)]


def least_squares(layer_class):
    """The folder hello_world."""
    n, m = 2, 3
    A, b, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    layer = layer_class(cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), parameters=[A, b], variables=[x])
    A_value, b_value = numbers(m, n), numbers(m, seed=1)
    return with_gradients(layer(A_value, b_value), A_value, b_value)


def batched_least_squares(layer_class):
    """The folder batching."""
    n, m, batch = 2, 3, 4
    A, b, x = cp.Parameter((m, n)), cp.Parameter(m), cp.Variable(n)
    layer = layer_class(cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b))), parameters=[A, b], variables=[x])
    A_value, b_value = numbers(batch, m, n), numbers(batch, m, seed=1)
    return with_gradients(layer(A_value, b_value), A_value, b_value)


def entropic_transport(layer_class):
    """The folder optimal_transport: which way support points move one entry of the plan."""
    n, m = 3, 3
    C, a, b = cp.Parameter((n, m)), cp.Parameter(n), cp.Parameter(m)
    eps = cp.Parameter(1, nonneg=True)
    P = cp.Variable((n, m))
    objective = cp.Minimize(cp.trace(P.T @ C) - eps * (cp.sum(cp.entr(P)) + cp.sum(P)))
    constraints = [P @ np.ones(m) == a, P.T @ np.ones(n) == b, P >= 0]
    layer = layer_class(cp.Problem(objective, constraints), [C, a, b, eps], [P])
    x, y = numbers(n), numbers(m, seed=1)
    thirds, eps_value = torch.full((n,), 1 / 3), torch.tensor([1.0], requires_grad=True)
    (plan,) = layer((x[:, None] - y[None, :]).pow(2), thirds, thirds, eps_value)
    return [plan, *torch.autograd.grad(plan[2, 2], (x, y, eps_value))]


def linear_quadratic_policy(layer_class):
    """The folder lqr: three steps of a rollout, whose cost is differentiated in the value function."""
    n, m, batch = 3, 2, 4
    dynamics, control = 0.5 * numbers(n, n).detach(), numbers(n, m, seed=1).detach()
    state, root = cp.Parameter((n, 1)), cp.Parameter((n, n))
    u, after = cp.Variable((m, 1)), cp.Variable((n, 1))
    objective = cp.Minimize(cp.quad_form(u, np.eye(m)) + cp.sum_squares(root @ after))
    constraints = [after == dynamics.numpy() @ state + control.numpy() @ u]
    policy = layer_class(cp.Problem(objective, constraints), [state, root], [u])
    weight = torch.eye(n, requires_grad=True)
    x, cost = numbers(batch, n, 1, seed=2).detach(), 0.0
    for _ in range(3):
        (action,) = policy(x, weight.expand(batch, n, n))
        cost = cost + x.pow(2).sum() + action.pow(2).sum()
        x = dynamics @ x + control @ action
    return [cost, *torch.autograd.grad(cost, weight)]


def denoising(layer_class):
    """The folder signal_denoising: a signal among parameters that are shared."""
    n, batch = 6, 3
    y, difference = cp.Variable(n), cp.Variable(n)
    x, theta, weight = cp.Parameter(n), cp.Parameter((n, n)), cp.Parameter(pos=True)
    objective = cp.Minimize(cp.sum_squares(theta @ difference) + weight * cp.sum_squares(cp.diff(y)))
    layer = layer_class(cp.Problem(objective, [difference == x - y]), [x, theta, weight], [y])
    signals = numbers(batch, n)
    metric, amount = torch.eye(n, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (found,) = layer(signals, metric, amount)
    return [found, *torch.autograd.grad(found.pow(2).sum(), (signals, metric, amount))]


def median(layer_class):
    """The tutorial: the derivative of a median is one, in its own entry."""
    x, y = cp.Variable(), cp.Parameter(7)
    layer = layer_class(cp.Problem(cp.Minimize(cp.norm1(y - x))), [y], [x])
    values = numbers(7)
    return with_gradients(layer(values), values)


def elastic_net(layer_class):
    """The tutorial: a regression whose hyperparameters are parameters."""
    count, n = 12, 1
    a, b = cp.Variable(n), cp.Variable()
    X, Y = cp.Parameter((count, n)), cp.Parameter(count)
    lam, alpha = cp.Parameter(nonneg=True), cp.Parameter(nonneg=True)
    loss = (1 / count) * cp.sum(cp.square(X @ a + b - Y)) + lam * cp.norm1(a) + alpha * cp.sum_squares(a)
    layer = layer_class(cp.Problem(cp.Minimize(loss)), [X, Y, lam, alpha], [a, b])
    data, targets = numbers(count, n), numbers(count, seed=1)
    weights = torch.tensor(0.02, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    return with_gradients(layer(data, targets, *weights), data, targets, *weights)


def logistic_regression(layer_class):
    """The tutorial: sensitivity of a fit to its data."""
    count, n = 10, 2
    a, b, X = cp.Variable((n, 1)), cp.Variable((1, 1)), cp.Parameter((count, n))
    labels = (np.arange(count) % 3 == 0).astype(float)[:, None]
    likelihood = (1 / count) * cp.sum(cp.multiply(labels, X @ a + b) - cp.logistic(X @ a + b))
    problem = cp.Problem(cp.Maximize(likelihood - 0.1 * cp.norm(a, 1) - 0.1 * cp.sum_squares(a)))
    layer = layer_class(problem, [X], [a, b])
    data = numbers(count, n, seed=4)
    return with_gradients(layer(data), data)


EXAMPLES = [
    readme_pytorch, readme_dual_variables, readme_log_log_convex, readme_options, readme_options_if_not_converging,
    readme_gpu, least_squares, batched_least_squares, entropic_transport, linear_quadratic_policy, denoising, median,
    elastic_net, logistic_regression,
]  # fmt: skip

# Of every value and gradient up to three entries, and where there are more, the sum of all, each times the cosine of
# its number. Recorded by calling the functions above with a subclass of cvxpylayers.torch.CvxpyLayer whose calls pass
# solver_args={"eps": 1e-13, "max_iters": 100000, "mode": "dense"}; by itself it stops up to 3e-4 from these numbers.
RECORDED = {
    "readme_pytorch": [
        [0.9119585957, 2.26481351],
        [0.0, 0.0, -2.8435242189, 8.0881854878],
        [0.0, 3.1180409201, 1.860968874],
    ],
    "readme_dual_variables": [
        [1.0, 0.0],
        [-1.0],
        [-1.0, 0.0],
        [1.0],
    ],
    "readme_log_log_convex": [
        [0.5612142611],
        [0.3149614468],
        [0.368920458],
        [-0.2989806884],
        [0.5979613769],
        [-0.1176519768],
    ],
    "readme_options": [
        [0.1257302211, -0.1321048633, 0.6404226504],
        [1.0, 1.0, 1.0],
    ],
    "least_squares": [
        [0.9182829245, 1.8306246796],
        [2.2752463008, 5.8211105543, -2.6631980289, 11.8792309621],
        [-0.8071143808, 3.0470772772, 1.5866851438],
    ],
    "batched_least_squares": [
        [0.9182829245, 1.8306246796, -0.7693745467, 1.6129598307],
        [2.2752463008, 5.8211105543, -2.6631980289, 14.7787861745],
        [-0.8071143808, 3.0470772772, 1.5866851438, -1.6402367068],
    ],
    "entropic_transport": [
        [0.114597299, 0.1039575269, 0.1147785075, 0.1657348417],
        [0.0134028099, 0.0121681419, -0.0255709518],
        [-0.0279360106, -0.0323208695, 0.0602568801],
        [0.0162985578],
    ],
    "linear_quadratic_policy": [
        [14.3707594879],
        [0.0668707534, -0.0545952632, -0.0471359437, 0.1714406074],
    ],
    "denoising": [
        [0.0996740116, 0.0475615926, 0.3547820855, 1.7365937859],
        [0.2033423778, 0.2113310871, 0.4517356, 2.3332142325],
        [3.9258544462, -0.1130325869, 1.1226704333, 1.0057117611],
        [-4.0706555018],
    ],
    "median": [
        [0.1257302211],
        [1.0, 0.0, 0.0, 1.0],
    ],
    "elastic_net": [
        [-0.1440175714],
        [0.2385300507],
        [0.0311611535, 0.0861097009, 0.049365132, 0.3061601709],
        [0.0975104929, 0.0622472321, 0.1679032921, 0.4976584352],
        [0.8206003657],
        [0.2363617436],
    ],
    "logistic_regression": [
        [0.0173078103, -0.4231459034],
        [-0.1799209271],
        [0.1812239612, 0.1140729724, -0.1410367184, 1.4100165297],
    ],
}
RECORDED |= {
    "readme_options_if_not_converging": RECORDED["readme_options"],
    "readme_gpu": RECORDED["readme_pytorch"],
}


def digest(value):
    flat = value.detach().flatten()
    weighted = flat @ torch.arange(len(flat)).to(flat).cos()
    return flat[:3] if len(flat) <= 3 else torch.cat([flat[:3], weighted[None]])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_the_example_gives_the_same_numbers(example):
    found, recorded = example(CvxpyLayer), RECORDED[example.__name__]
    assert len(found) == len(recorded)
    for value, numbers_then in zip(found, recorded, strict=True):
        contracts.assert_close(digest(value), torch.tensor(numbers_then), 1e-7)


def test_float32_as_the_readme_has_it():
    x, A, b = cp.Variable(2), cp.Parameter((3, 2)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1)), [x >= 0])
    layer = CvxpyLayer(problem, parameters=[A, b], variables=[x])
    values = [numbers(3, 2).detach().float().requires_grad_(), numbers(3, seed=1).detach().float().requires_grad_()]
    (solution,) = layer(*values)
    solution.sum().backward()
    for value, numbers_then in zip([solution, *[v.grad for v in values]], RECORDED["readme_pytorch"], strict=True):
        assert value.dtype == torch.float32
        contracts.assert_close(digest(value.double()), torch.tensor(numbers_then), 1e-5)


def disk():
    x, a = cp.Variable(3), cp.Parameter(3)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1]), [a], [x]


@pytest.mark.parametrize("name", ["DIFFCP", cp.CLARABEL, cp.SCS, cp.CUCLARABEL])
def test_backends_of_cvxpylayers_by_their_names(name):
    problem, parameters, variables = disk()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "solver='CUCLARABEL': Clarabel")
        layer = CvxpyLayer(problem, parameters, variables, solver=name)
    contracts.assert_close(layer(numbers(3)), CvxpyLayer(problem, parameters, variables)(numbers(3)), 1e-9)
    assert isinstance(layer.solver, SCS) == (name == cp.SCS)


def test_options_of_diffcp():
    layer = CvxpyLayer(*disk())
    options = {"solve_method": "SCS", "eps": 1e-9, "max_iters": 5000, "n_jobs_forward": -1}
    assert with_options(layer.solver, options) == SCS(tol=1e-9, max_steps=5000)
    assert with_options(None, {"eps_abs": 1e-7, "eps_rel": 1e-6}) == Clarabel(tol=1e-7)
    with pytest.warns(UserWarning, match="option mode of other solvers"):
        assert with_options(None, {"mode": "dense"}) is None
    contracts.assert_close(layer(numbers(3), solver_args=options), layer(numbers(3)), 1e-9)
    for wrong in ({"solve_method": "ECOS"}, {"epsilon": 1e-8}):
        with pytest.raises(UnknownNameError, match="Known: "):
            layer(numbers(3), solver_args=wrong)
    with pytest.raises(ProblemError, match="pass adjoint="):
        layer(numbers(3), solver_args={"mode": "lpgd", "derivative_kwargs": {"tau": 0.1}})
    with pytest.raises(UnknownNameError, match="Known: clarabel, moreau, scs"):
        CvxpyLayer(*disk(), solver="MPAX")


def test_arrays_of_other_frameworks_are_told_what_to_do():
    foreign = type("ArrayImpl", (), {"__module__": "jaxlib._jax"})()
    with pytest.raises(ProblemError, match=r"got ArrayImpl; there are no layers for JAX and MLX, pass numpy.asarray"):
        CvxpyLayer(*disk())(foreign)


def test_two_layers_of_one_geometric_program_without_values():
    x, a = cp.Variable(pos=True), cp.Parameter(pos=True)
    problem = cp.Problem(cp.Minimize(x + a / x))
    for _ in range(2):
        (found,) = CvxpyLayer(problem, [a], [x], gp=True)(torch.tensor(4.0))
        contracts.assert_close(found, torch.tensor(2.0), 1e-12)
