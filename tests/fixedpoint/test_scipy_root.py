"""Every method of scipy.optimize.root: answers, derivatives, tolerances, limits, failures."""

import contracts
import problems
import pytest
import torch
from scipy.optimize import root as scipy_root

from difflayers import Status
from difflayers.fixedpoint import ScipyRoot, fixed_point, root
from difflayers.fixedpoint._scipy import _STEP_LIMIT

METHODS = sorted(_STEP_LIMIT)


def tanh_cell(solver, scale=0.3):
    weight, x = problems.TANH.params()
    params = contracts.wanting((scale * weight, x))
    solution = fixed_point(
        problems.tanh_cell, torch.zeros(3, 4), params, batch_dims=1, solver=solver, on_failure="ignore"
    )
    return solution, params


def test_no_method_is_missing():
    known = scipy_root.__doc__.split("method : str")[1].split("jac :")[0]
    assert {name for name in METHODS if f"'{name}'" in known} == set(METHODS)
    assert known.count("'") == 2 * len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_answers_and_derivatives(method):
    solution, params = tanh_cell(ScipyRoot(method))
    assert solution.ok.all()
    contracts.assert_close(solution.value, problems.TANH.answer(*params), 1e-7)
    ours = torch.autograd.grad(solution.value.pow(2).sum(), params)
    contracts.assert_close(ours, torch.autograd.grad(problems.TANH.answer(*params).pow(2).sum(), params), 1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lm", "krylov")])  # exact before they look
def test_a_tighter_tolerance_costs_more_and_gives_more(method):
    loose, tight = (tanh_cell(ScipyRoot(method, rtol=rtol))[0] for rtol in (1e-3, 1e-9))
    assert tight.stats["residual"].max() < 0.01 * loose.stats["residual"].max()
    assert tight.stats["evaluations"].sum() > loose.stats["evaluations"].sum()


@pytest.mark.parametrize("method", METHODS)
def test_the_limit_is_named(method):
    solution, _ = tanh_cell(ScipyRoot(method, max_steps=2))
    assert solution.status.tolist() == [Status.MAX_STEPS] * 3


@pytest.mark.parametrize("method", METHODS)
def test_no_root_and_a_bad_sample(method):
    solver = ScipyRoot(method, max_steps=30)
    solution = root(lambda z: z**2 + 1, torch.ones(2), solver=solver, on_failure="ignore")
    assert solution.status.item() in (Status.MAX_STEPS, Status.STALLED)
    bad = torch.tensor([[0.5], [torch.nan], [torch.inf]])
    solution = root(lambda z, a: z + a, torch.zeros(3, 1), (bad,), batch_dims=1, solver=solver, on_failure="ignore")
    assert solution.status.tolist()[1:] == [Status.NONFINITE] * 2
