"""cvxpylayers' programs with another import."""

import inspect
import warnings

import contracts
import cvxpy as cp
import numpy as np
import pytest
import torch

from difflayers import Status
from difflayers.compat.cvxpylayers.torch import CvxpyLayer
from difflayers.errors import ConvergenceWarning, ProblemError, SolverError

README = """
import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer

n, m = 2, 3
x = cp.Variable(n)
A = cp.Parameter((m, n))
b = cp.Parameter(m)
constraints = [x >= 0]
objective = cp.Minimize(0.5 * cp.pnorm(A @ x - b, p=1))
problem = cp.Problem(objective, constraints)
assert problem.is_dpp()

layer = CvxpyLayer(problem, parameters=[A, b], variables=[x])
A_tch = numbers(m, n, seed=0)
b_tch = numbers(m, seed=1)
(solution,) = layer(A_tch, b_tch)
solution.sum().backward()
found = solution, A_tch.grad, b_tch.grad
"""

DUALS = """
import cvxpy as cp
import torch
from cvxpylayers.torch import CvxpyLayer

x, c, b = cp.Variable(2), cp.Parameter(2), cp.Parameter()
total = cp.sum(x) == b
layer = CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [total, x >= 0]), [c, b], [x, total.dual_variables[0]])
found = layer(torch.tensor([1.0, 2.0]), torch.tensor(1.0))
"""

# What cvxpylayers 1.2.0 gave with solver_args={"eps": 1e-13, "max_iters": 100000, "mode": "dense"}: up to three entries
# of each, and where there are more, the sum of all, each times the cosine of its number.
RECORDED = {
    README: [
        [0.9119585957, 2.26481351],
        [0.0, 0.0, -2.8435242189, 8.0881854878],
        [0.0, 3.1180409201, 1.860968874],
    ],
    DUALS: [[1.0, 0.0], [-1.0]],
}


def numbers(*shape, seed):
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).standard_normal(shape))).requires_grad_()


def digest(value):
    flat = value.detach().flatten()
    weighted = flat @ torch.arange(len(flat)).to(flat).cos()
    return flat if len(flat) <= 3 else torch.cat([flat[:3], weighted[None]])


@pytest.mark.parametrize("program", [README, DUALS], ids=["README", "duals"])
def test_the_readme_with_another_import(program):
    names = {"numbers": numbers}
    exec(program.replace("from cvxpylayers.torch import", "from difflayers.compat.cvxpylayers.torch import"), names)
    for value, then in zip(names["found"], RECORDED[program], strict=True):
        contracts.assert_close(digest(value), torch.tensor(then), 1e-7)


def test_beside_cvxpylayers_itself():
    theirs = pytest.importorskip("cvxpylayers.torch").CvxpyLayer
    for method in ("__init__", "forward"):
        here, there = (inspect.signature(getattr(layer, method)).parameters for layer in (CvxpyLayer, theirs))
        assert [(p.name, p.kind) for p in there.values()] == [
            (p.name, p.kind) for p in here.values() if p.name != "init"
        ]
    options = {"eps": 1e-10, "max_iters": 20000}
    here = CvxpyLayer(*disk())(torch.tensor([3.0, 4.0]))[0]
    there = theirs(*disk())(torch.tensor([3.0, 4.0]), solver_args=options)[0]
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)


def test_signature_of_1_2():
    names = list(inspect.signature(CvxpyLayer).parameters)
    assert names == [
        "problem", "parameters", "variables", "solver", "gp", "verbose", "canon_backend", "solver_args",
    ]  # fmt: skip


def disk():
    x, a = cp.Variable(2), cp.Parameter(2)
    return cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1]), [a], [x]


def test_positional_arguments_and_gp():
    x, a = cp.Variable(pos=True), cp.Parameter(pos=True)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(x + a / x)), [a], [x], cp.CLARABEL, True)
    value = torch.tensor(4.0, requires_grad=True)
    (found,) = layer(value)
    contracts.assert_close(found, torch.tensor(2.0), 1e-8)
    contracts.assert_close(torch.autograd.grad(found, value)[0], torch.tensor(0.25), 1e-7)


def limited():
    x, top = cp.Variable(), cp.Parameter()
    return cp.Problem(cp.Minimize(cp.square(x - 3)), [x >= 0, x <= top]), [top], [x]


def test_a_failure_raises_or_is_told_sample_by_sample():
    layer, tops = CvxpyLayer(*limited()), torch.tensor([1.0, -1.0])
    with pytest.raises(RuntimeError, match="INFEASIBLE") as raised:
        layer(tops)
    assert isinstance(raised.value, SolverError)
    layer.on_failure = "warn"
    with pytest.warns(ConvergenceWarning, match="INFEASIBLE"):
        solution = layer.solve(tops)
    assert solution.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE]
    contracts.assert_close(solution.value[0][0], torch.tensor(1.0), 1e-8)
    assert solution.value[0][1].isnan()


def test_options():
    with pytest.raises(ProblemError, match=r"init=solution"):
        CvxpyLayer(*disk())(torch.ones(2), warm_start=True)
    with pytest.warns(UserWarning, match="verbose of cvxpylayers has no meaning"):
        CvxpyLayer(*disk(), verbose=True)
    with pytest.warns(UserWarning, match="canon_backend of cvxpylayers has no meaning"):
        CvxpyLayer(*disk(), canon_backend="diffcp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = CvxpyLayer(*disk(), solver_args={"eps": 1e-9})
    first = layer.solve(torch.tensor([3.0, 4.0]))
    (again,) = layer(torch.tensor([3.0, 4.0]), init=first)
    contracts.assert_close(again, torch.tensor([0.6, 0.8]), 1e-8)
