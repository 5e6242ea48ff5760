"""qpth's programs with another import: the numbers that qpth 0.0.18 gave, and what is better defined here."""

import inspect
import warnings

import contracts
import pytest
import torch

import difflayers.compat.qpth
from difflayers import Status
from difflayers.compat.qpth.qp import QPFunction, QPSolvers
from difflayers.errors import ConvergenceWarning, ProblemError, UnknownNameError

EMPTY = torch.Tensor()

# The layer of its documentation, inequalities alone, on one sample: of what samples share qpth's gradient is the mean.
OPTNET = """
import math
import torch
from torch import nn
from qpth.qp import QPFunction

def numbers(*shape):
    return torch.arange(math.prod(shape)).double().mul(0.7).sin().reshape(shape)

class OptNet(nn.Module):
    def __init__(self, hidden=5, nineq=4, eps=1e-4):
        super().__init__()
        self.fc = nn.Linear(6, hidden)
        self.M = torch.tril(torch.ones(hidden, hidden))
        self.L = nn.Parameter(torch.eye(hidden) + 0.3 * numbers(hidden, hidden))
        self.G = nn.Parameter(numbers(nineq, hidden))
        self.z0 = nn.Parameter(torch.zeros(hidden))
        self.s0 = nn.Parameter(torch.ones(nineq))
        self.eps = eps

    def forward(self, x):
        L = self.M * self.L
        Q = L.mm(L.t()) + self.eps * torch.eye(len(L))
        h = self.G.mv(self.z0) + self.s0
        e = torch.Tensor()
        return QPFunction(verbose=-1)(Q, self.fc(x), self.G, h, e, e)

model = OptNet()
nn.init.ones_(model.fc.bias)
model.fc.weight.data.copy_(numbers(5, 6))
z = model(2 * numbers(1, 6))
z.square().sum().backward()
found = z, *(p.grad for p in model.parameters())
"""

# Of z and the gradients of L, G, z0, s0, fc.weight and fc.bias: three entries, and all times the cosine of their
# number. Printed by qpth 0.0.18 in double precision.
RECORDED = [
    [-5.4763671797, 3.6319448016, 0.6936019135, 0.4579964052],
    [-106.3391126939, 0.0, 0.0, -232.3780048435],
    [0.0, 0.0, 0.0, -1.8458451288],
    [-0.6252129102, -1.2514143985, -1.2890561413, -0.1739369433],
    [0.0, 1.154585168, 0.0, 0.3760119573],
    [0.0, 14.7173705699, 22.5129317955, -7.5335913873],
    [11.4226688132, -10.3791130738, 0.0934605315, -1.6582107961],
]


def test_its_layer_gives_the_numbers_that_it_gave():
    names = {}
    exec(OPTNET.replace("from qpth.qp import", "from difflayers.compat.qpth.qp import"), names)
    for i, (value, then) in enumerate(zip(names["found"], RECORDED, strict=True)):
        flat = value.detach().flatten()
        digest = torch.cat([flat[:3], (flat @ torch.arange(len(flat)).to(flat).cos())[None]])
        torch.testing.assert_close(digest, torch.tensor(then), rtol=1e-9 if i == 0 else 1e-7, atol=1e-9)


def test_signature():
    parameters = inspect.signature(QPFunction).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        ("eps", 1e-12), ("verbose", 0), ("notImprovedLim", 3), ("maxIter", 20), ("solver", QPSolvers.PDIPM_BATCHED),
        ("check_Q_spd", True),
    ]  # fmt: skip
    assert [(member.name, member.value) for member in QPSolvers] == [("PDIPM_BATCHED", 1), ("CVXPY", 2)]
    assert difflayers.compat.qpth.QPFunction is QPFunction


def program(batch, seed=0):
    """Blocks of feasible QPs, ``Q, p, G, h, A, b``; without a batch if it is None."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    L, p, G, A, z = (torch.randn(*lead, *shape, generator=generator) for shape in ((4, 4), (4,), (5, 4), (2, 4), (4,)))
    product = torch.matmul
    h, b = product(G, z[..., None])[..., 0] + 0.1, product(A, z[..., None])[..., 0]
    return [block.requires_grad_() for block in (L @ L.mT + 0.1 * torch.eye(4), p, G, h, A, b)]


def test_of_a_shared_block_qpth_has_the_mean():
    qpth = pytest.importorskip("qpth.qp")
    found = []
    for function in (QPFunction, qpth.QPFunction):
        Q, p, *rest = program(None)
        z = function(verbose=-1)(Q, torch.stack([p, -p, 2 * p]), *rest)
        found.append(torch.autograd.grad(z.square().sum(), (Q, *rest)))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, 3 * there, rtol=1e-5, atol=1e-5)


def test_beside_qpth_itself():
    qpth = pytest.importorskip("qpth.qp")
    found = []
    for function in (QPFunction, qpth.QPFunction):
        blocks = program(3)
        z = function(verbose=-1)(*blocks)
        found.append([z, *torch.autograd.grad(z.square().sum(), blocks)])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [QPSolvers.PDIPM_BATCHED, QPSolvers.CVXPY, "piqp"])
def test_gradients_are_those_of_differences(solver):
    blocks = [b.detach().requires_grad_() for b in program(2)]
    contracts.assert_close(QPFunction(solver=solver)(*blocks), QPFunction()(*blocks), 1e-9)
    assert torch.autograd.gradcheck(QPFunction(solver=solver), blocks)
    assert torch.autograd.gradgradcheck(QPFunction(solver=solver), blocks)


def test_shapes_and_blocks_that_are_missing():
    Q, p, G, h, A, b = (block.detach() for block in program(None))
    assert QPFunction()(Q, p, G, h, A, b).shape == (1, 4)
    assert QPFunction()(Q, p.expand(3, 4), G, h, A, b).shape == (3, 4)
    assert QPFunction()(Q, p, G, h.expand(2, 5), EMPTY, EMPTY).shape == (2, 4)
    equations = QPFunction()(Q, p, EMPTY, EMPTY, A, b)
    contracts.assert_close(equations[0] @ A.T, b, 1e-9)
    free = QPFunction()(Q, p, EMPTY, EMPTY, EMPTY, EMPTY)
    contracts.assert_close(free[0], -torch.linalg.solve(Q, p), 1e-9)


def test_the_gradient_of_a_shared_block_is_a_sum():
    Q, p, G, h, A, b = (block.detach() for block in program(None))
    h.requires_grad_()
    many = QPFunction()(Q, torch.stack([p, -p]), G, h, A, b)
    (shared,) = torch.autograd.grad(many.sum(), h)
    alone = [torch.autograd.grad(QPFunction()(Q, q, G, h, A, b).sum(), h)[0] for q in (p, -p)]
    contracts.assert_close(shared, sum(alone), 1e-9)


def test_failures_have_a_status():
    Q, p, G = torch.eye(1), torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
    h = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # the second asks for z <= -1 and z >= 1
    with pytest.warns(ConvergenceWarning, match="1 of 2"):
        z = QPFunction()(Q, p, G, h, EMPTY, EMPTY)
    assert z.isnan().flatten().tolist() == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = QPFunction(verbose=-1).solve(Q, p, G, h, EMPTY, EMPTY)
    assert solution.status.tolist() == [Status.SUCCESS, Status.INFEASIBLE]


def test_options():
    for name, value in {"eps": 1e-4, "notImprovedLim": 5, "maxIter": 50}.items():
        with pytest.warns(UserWarning, match=f"{name} of qpth has no meaning"):
            QPFunction(**{name: value})
    with pytest.warns(UserWarning, match=r"difflayers\.monitor"):
        QPFunction(verbose=1)
    Q, p = torch.eye(2), torch.ones(2)
    with pytest.raises(UnknownNameError, match="Known: "):
        QPFunction(solver="pdipm")(Q, p, EMPTY, EMPTY, EMPTY, EMPTY)
    with pytest.raises(ProblemError, match="semidefinite"):
        QPFunction()(-Q, p, EMPTY, EMPTY, EMPTY, EMPTY)
    with pytest.raises(ProblemError, match="columns"):
        QPFunction()(Q, p, torch.ones(1, 3), torch.ones(1), EMPTY, EMPTY)


def test_float32():
    blocks = [block.detach().float() for block in program(2)]
    z = QPFunction()(*blocks)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), QPFunction()(*[block.double() for block in blocks]), rtol=1e-5, atol=1e-5)
