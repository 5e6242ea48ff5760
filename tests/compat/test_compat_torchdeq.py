"""torchdeq's programs with another import."""

import argparse
import inspect

import contracts
import pytest
import torch
from torch import nn

from difflayers import Status, linear, monitor
from difflayers.compat.torchdeq import get_deq
from difflayers.errors import ConvergenceWarning, ProblemError, UnknownNameError
from difflayers.fixedpoint import Anderson, Broyden

TIGHT = {"f_tol": 1e-10, "b_tol": 1e-10, "f_max_iter": 200, "b_max_iter": 200}

# The quick start of its README, with a map to solve and its arguments.
README = """
import argparse
import torch
from torchdeq import get_deq

args = argparse.Namespace(ift=True, f_tol=1e-10, b_tol=1e-10, f_max_iter=100, b_max_iter=100, lr=0.1)
deq = get_deq(args)
weight = torch.tensor([0.3, -0.4], requires_grad=True)
a0 = b0 = c0 = torch.zeros(3, 2)

def fn(a, b, c):
    return torch.tanh(weight * b + 1), 0.5 * torch.cos(c), weight * a

z_out, info = deq(fn, (a0, b0, c0))
loss = sum(state.square().sum() for state in z_out[-1])
loss.backward()
found = *z_out[-1], weight.grad
"""

# What torchdeq 0.1.0 gave: the first row of every state, and the gradient.
RECORDED = [
    [0.8162661625, 0.6679856552],
    [0.4850832307, 0.4822577402],
    [0.2448798487, -0.2671942621],
    [1.7036448846, 0.3104690743],
]


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.2 * torch.randn(6, 6, generator=generator))
        self.x = nn.Parameter(torch.randn(4, 6, generator=generator))

    def forward(self, z):
        return torch.tanh(z @ self.weight + self.x)


def test_its_readme_gives_the_numbers_that_it_gave():
    names = {}
    exec(README.replace("from torchdeq import", "from difflayers.compat.torchdeq import"), names)
    for value, then in zip(names["found"], RECORDED, strict=True):
        row = value.detach().reshape(-1, 2)[0]
        torch.testing.assert_close(row, torch.tensor(then), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"ift": True}, {"hook_ift": True}, {}, {"grad": 3}, {"grad": [2]}, {"core": "indexing"},
     {"ift": True, "f_solver": "anderson", "b_solver": "anderson"},
     {"ift": True, "f_solver": "broyden", "b_solver": "broyden"},
     {"ift": True, "f_stop_mode": "rel", "b_stop_mode": "rel"}],
    ids=str,
)  # fmt: skip
def test_beside_torchdeq_itself(options):
    theirs = pytest.importorskip("torchdeq").get_deq
    found = []
    for make in (get_deq, theirs):
        cell = Cell()
        z_out, info = make(**TIGHT, **options)(cell, torch.zeros(4, 6))
        assert isinstance(z_out, list)
        assert info["nstep"].shape == info["abs_lowest"].shape == info["rel_lowest"].shape == (4,)
        found.append([z_out[-1], *torch.autograd.grad(z_out[-1].square().sum(), tuple(cell.parameters()))])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)


def test_arguments_of_the_call():
    forward = inspect.signature(get_deq().forward).parameters
    assert list(forward) == ["func", "z_init", "solver_kwargs", "sradius_mode", "backward_writer"]
    peer = pytest.importorskip("torchdeq")
    assert inspect.signature(peer.get_deq).parameters.keys() == inspect.signature(get_deq).parameters.keys()
    there = inspect.signature(peer.get_deq().forward).parameters
    assert [*forward][2:] == [*there][2 : len(forward)]


def test_exact_gradients_are_those_of_differences():
    x = torch.tensor([[0.5, 1.0]], requires_grad=True)

    def solved(x):
        return get_deq(ift=True, **TIGHT)(lambda z: torch.cos(z) * x, torch.zeros(1, 2))[0][-1]

    assert torch.autograd.gradcheck(solved, (x,))


def test_options_are_those_of_solvers():
    deq = get_deq({"f_solver": "anderson", "f_tol": 1e-4, "b_solver": "broyden", "ift": True, "f_stop_mode": "rel"})
    assert deq.solver == Anderson(memory=6, rtol=1e-4, atol=0.0, max_steps=40)
    assert deq.adjoint.linear_solver == linear.GCR(rtol=0.0, atol=1e-6, max_steps=40)
    deq = get_deq(argparse.Namespace(f_solver="broyden", epochs=3), grad=4)
    assert deq.solver == Broyden(rtol=0.0, atol=1e-3, max_steps=40)
    assert deq.adjoint.linear_solver == linear.Neumann(3)


def test_options_of_a_call_and_of_evaluation():
    deq = get_deq(f_solver="anderson", f_tol=1e-12, eval_f_max_iter=3)
    with monitor() as log, pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
        deq(Cell(), torch.zeros(4, 6), solver_kwargs={"f_max_iter": 2, "m": 4, "tau": 0.9})
    assert log[0].status == {"MAX_STEPS": 4}
    deq.eval()
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
        _, info = deq(Cell(), torch.zeros(4, 6), sradius_mode=True)
    assert info["nstep"].tolist() == [3] * 4
    assert info["status"].tolist() == [Status.MAX_STEPS] * 4
    assert 0 < info["sradius"].max() < 1


def test_samples_that_depend_on_one_another():
    def mixed(z):
        return 0.5 * torch.cos(z - z.mean(0, keepdim=True))

    start = torch.arange(6.0).reshape(3, 2)
    with pytest.raises(ProblemError, match="batch_dims=0"):
        get_deq()(mixed, start)
    z_out, _ = get_deq(batch_dims=0, **TIGHT)(mixed, start)
    contracts.assert_close(mixed(z_out[-1]), z_out[-1], 1e-9)


@pytest.mark.parametrize(
    "options", [{"n_states": 3}, {"indexing": [3]}, {"sup_gap": 2}, {"sup_loc": [1]}, {"tau": 0.8}, {"grad": [1, 2]}]
)
def test_options_that_are_refused(options):
    with pytest.raises(ProblemError, match=r"isn't there|one number of steps"):
        get_deq(**options)


def test_unknown_names():
    for options in ({"f_solver": "newton"}, {"b_solver": "lu"}, {"f_stop_mode": "both"}, {"f_maxiter": 3}):
        with pytest.raises(UnknownNameError, match="Known: "):
            get_deq(**options)
    with pytest.raises(UnknownNameError, match="Known: f_max_iter"):
        get_deq(f_solver="broyden")(Cell(), torch.zeros(4, 6), solver_kwargs={"ls": True})


def test_a_writer_is_told_of_the_monitor():
    with pytest.warns(UserWarning, match=r"use difflayers\.monitor"):
        get_deq()(Cell(), torch.zeros(4, 6), backward_writer=max)
