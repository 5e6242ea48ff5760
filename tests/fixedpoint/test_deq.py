"""The DEQ layer: everything that an nn.Module owes."""

import copy
import io
import pickle

import contracts
import pytest
import torch
import torch.distributed as dist
from problems import Cell
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from difflayers import UnrolledAdjoint
from difflayers.errors import ConvergenceWarning, ProblemError
from difflayers.fixedpoint import DEQ, Anderson, Newton, Picard, ScipyRoot

TIGHT = Anderson(rtol=1e-13, atol=1e-13)


def reference(cell, x):
    z = torch.zeros_like(x)
    for _ in range(200):
        z = cell(z, x)
    return z


@pytest.mark.parametrize("solver", [TIGHT, Picard(rtol=1e-13), Newton(rtol=1e-13), ScipyRoot(rtol=1e-12)], ids=repr)
def test_module_parameters_and_input_get_their_gradients(solver):
    layer, x = DEQ(Cell(), solver=solver), torch.randn(3, 4, requires_grad=True)
    wrt = (x, *layer.parameters())
    ours = torch.autograd.grad(layer(x).pow(3).sum(), wrt)
    contracts.assert_close(ours, torch.autograd.grad(reference(layer.fn, x).pow(3).sum(), wrt), 1e-7)


def test_second_derivatives_reach_module_parameters():
    layer, x = DEQ(Cell(), solver=TIGHT), torch.randn(3, 4, requires_grad=True)

    def penalty(z):
        (first,) = torch.autograd.grad(z.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), tuple(layer.parameters()))

    contracts.assert_close(penalty(layer(x)), penalty(reference(layer.fn, x)))


def test_functional_transforms_of_the_layer():
    layer, x = DEQ(Cell(), solver=TIGHT), torch.randn(3, 4)
    params = dict(layer.named_parameters())

    def loss(params, row):
        return functional_call(layer, params, (row[None],)).pow(2).sum()

    def expected(params, row):
        cell = {name.removeprefix("fn."): p for name, p in params.items()}
        return reference(lambda z, x: functional_call(layer.fn, cell, (z, x)), row[None]).pow(2).sum()

    contracts.assert_close(vmap(grad(loss), (None, 0))(params, x), vmap(grad(expected), (None, 0))(params, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_model_equals_eager():
    model = nn.Sequential(nn.Linear(4, 4), DEQ(Cell(), solver=TIGHT), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, 4)

    def gradients(fn):
        return torch.autograd.grad(fn(x).pow(2).sum(), tuple(model.parameters()))

    contracts.assert_close(compiled(x), model(x), 1e-12)
    contracts.assert_close(gradients(compiled), gradients(model), 1e-12)


def test_fullgraph_compile_is_refused():
    layer = torch.compile(DEQ(Cell()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        layer(torch.randn(3, 4))


def test_copies_and_state():
    layer, x = DEQ(Cell(), solver=TIGHT), torch.randn(3, 4)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        contracts.assert_close(other(x), expected)
    other, buffer = DEQ(Cell(), solver=TIGHT), io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    contracts.assert_close(other(x), expected)
    assert "Anderson(rtol=1e-13" in repr(layer)
    assert sorted(layer.state_dict()) == ["fn.linear.bias", "fn.linear.weight"]


def test_empty_batch_and_missing_input():
    layer = DEQ(Cell())
    layer(torch.zeros(0, 4)).sum().backward()
    assert not layer.fn.linear.weight.grad.any()
    with pytest.raises(ProblemError, match="pass init="):
        layer()
    with pytest.raises(ProblemError, match=r"use fixed_point\(\)"):
        DEQ(lambda z, x: z)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.03), (torch.bfloat16, 0.15)], ids=str
)
@pytest.mark.parametrize("size", [4, 64])
def test_low_precision_with_default_tolerances(size, dtype, tolerance):
    cell = Cell(size)
    layer, x = DEQ(copy.deepcopy(cell).to(dtype), on_failure="raise"), torch.randn(3, size)
    z = layer(x.to(dtype))
    z.sum().backward()
    assert z.dtype == layer.fn.linear.weight.grad.dtype == dtype
    expected = reference(cell, x)
    expected.sum().backward()
    assert (z.double() - expected).norm() < tolerance * expected.norm()
    for ours, wide in zip(layer.fn.parameters(), cell.parameters(), strict=True):
        assert (ours.grad.double() - wide.grad).norm() < tolerance * wide.grad.norm()


def test_autocast():
    cell, x = Cell(64), torch.randn(3, 64, dtype=torch.float32)
    layer = DEQ(copy.deepcopy(cell).float(), solver=Anderson(rtol=1e-2, atol=1e-2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
    z.sum().backward()
    assert z.dtype == layer.fn.linear.weight.grad.dtype == torch.float32
    expected = reference(cell, x.double())
    expected.sum().backward()
    assert (z - expected).norm() < 0.03 * expected.norm()
    assert (layer.fn.linear.weight.grad - cell.linear.weight.grad).norm() < 0.03 * cell.linear.weight.grad.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    layer, x = DEQ(Cell(), solver=TIGHT), torch.randn(3, 4, requires_grad=True)
    plain = torch.autograd.grad(layer(x).pow(2).sum(), (x, *layer.parameters()))
    checkpoint(layer, x, use_reentrant=reentrant).pow(2).sum().backward()
    contracts.assert_close((x.grad, *[p.grad for p in layer.parameters()]), plain, 1e-12)


def test_forward_mode_and_checked_derivatives():
    layer, x = DEQ(Cell(), solver=TIGHT), torch.randn(3, 4, requires_grad=True)
    state = dict(layer.named_parameters())

    def call(x, *values):
        return functional_call(layer, dict(zip(state, values, strict=True)), (x,))

    inputs = (x, *state.values())
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_batch_statistics_break_the_promise_in_training_only():
    class Normed(Cell):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=0.0)

        def forward(self, z, x):
            return 0.5 * torch.tanh(self.norm(self.linear(z)) + x)

    layer, x = DEQ(Normed()), torch.randn(5, 4)
    layer.eval()
    layer(x)
    layer.train()
    with pytest.raises(ProblemError, match="promises independent samples"):
        layer(x)


def test_unrolled_route_agrees():
    layer, x = DEQ(Cell(), solver=TIGHT), torch.randn(3, 4)
    unrolled = DEQ(layer.fn, solver=Picard(max_steps=60, rtol=1e-14), adjoint=UnrolledAdjoint())
    wrt = tuple(layer.parameters())
    ours, traced = (torch.autograd.grad(m(x).pow(2).sum(), wrt) for m in (layer, unrolled))
    contracts.assert_close(ours, traced)


def test_failures_warn_by_default_and_warm_starts_are_taken():
    layer, x = DEQ(Cell(), solver=Anderson(max_steps=1, rtol=1e-13)), torch.randn(3, 4)
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
        layer(x)
    layer = DEQ(Cell())
    assert layer.solve(x, init=layer.solve(x)).stats["steps"].max() == 0


class Pair(nn.Module):
    """Two states of different sizes, and where they start."""

    def __init__(self):
        super().__init__()
        self.mix, self.narrow = nn.Linear(6, 4), nn.Linear(6, 2)

    def start(self, x):
        return {"wide": torch.zeros_like(x), "narrow": x.new_zeros(*x.shape[:-1], 2)}

    def forward(self, z, x):
        both = torch.cat([z["wide"], z["narrow"]], -1)
        return {"wide": 0.5 * torch.tanh(self.mix(both) + x), "narrow": 0.5 * torch.tanh(self.narrow(both))}


def test_several_states():
    cell = Pair()
    layer, x = DEQ(cell, solver=TIGHT, start=cell.start), torch.randn(3, 4)
    z = cell.start(x)
    for _ in range(100):
        z = cell(z, x)
    wrt = tuple(cell.parameters())
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        contracts.assert_close(other(x), z, 1e-10)
        ours = torch.autograd.grad(other(x)["narrow"].pow(2).sum(), tuple(other.parameters()))
        contracts.assert_close(ours, torch.autograd.grad(z["narrow"].pow(2).sum(), wrt, retain_graph=True))
    contracts.assert_close(DEQ(cell, solver=TIGHT)(x, init=cell.start(x)), z, 1e-10)


def test_warm_start_renews_failed_samples_and_takes_no_gradient():
    layer, x = DEQ(Cell(), on_failure="ignore"), torch.randn(3, 4)
    broken = x.clone()
    broken[1] = torch.nan
    first = layer.solve(broken)
    assert first.status.tolist() == [0, 3, 0]
    second = layer.solve(x, init=first)
    assert second.ok.all()
    assert second.stats["steps"][[0, 2]].tolist() == [0, 0]
    start = torch.zeros(3, 4, requires_grad=True)
    layer(x, init=start).sum().backward()
    assert start.grad is None


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z, x):
        return z @ self.weight.mT + x


def test_jacobian_penalty_estimates_the_frobenius_norm():
    layer, x = DEQ(Linear(torch.randn(4, 4) * 0.3)), torch.randn(3, 4)
    exact = layer.fn.weight.square().sum() / 4
    generator = torch.Generator().manual_seed(0)
    estimate = layer.jacobian_penalty(layer.solve(x), x, samples=2000, generator=generator)
    assert estimate.shape == (3,)
    torch.testing.assert_close(estimate, exact.expand(3), rtol=0.1, atol=0)
    diagonal = DEQ(Linear(torch.diag(torch.tensor([0.1, 0.2, 0.3, 0.4]))))  # random signs make this one exact
    contracts.assert_close(diagonal.jacobian_penalty(x, x), torch.full((3,), 0.3 / 4))
    assert layer.jacobian_penalty(layer.solve(x), x).requires_grad
    with pytest.raises(ProblemError, match="samples must be"):
        layer.jacobian_penalty(x, x, samples=0)


def test_jacobian_penalty_is_differentiable_through_the_equilibrium():
    layer, x = DEQ(Cell(), solver=TIGHT), torch.randn(3, 4, requires_grad=True)

    def penalty(*_):
        generator = torch.Generator().manual_seed(0)
        return layer.jacobian_penalty(layer.solve(x), x, generator=generator)

    assert torch.autograd.gradcheck(penalty, (x, *layer.parameters()))
    detached = layer.jacobian_penalty(layer(x).detach(), x, generator=torch.Generator().manual_seed(0))
    contracts.assert_close(detached, penalty(), 1e-12)


def test_jacobian_penalty_without_the_failed_sample():
    layer, x = DEQ(Cell(), on_failure="ignore", solver=TIGHT), torch.randn(3, 4)
    broken = x.clone()
    broken[1] = torch.nan

    def gradients(x, rows):
        solution = layer.solve(x)
        penalty = layer.jacobian_penalty(solution, x, generator=torch.Generator().manual_seed(0))
        (corrected,) = layer.solve(x, at=(2,)).trajectory
        assert penalty.isnan().equal(~solution.ok)
        assert corrected.isnan().all(1).equal(~solution.ok)
        return torch.autograd.grad(penalty[rows].sum() + corrected[rows].pow(2).sum(), tuple(layer.parameters()))

    contracts.assert_close(gradients(broken, [0, 2]), gradients(x, [0, 2]), 1e-10)


def test_trajectory_is_one_application_to_each_iterate():
    layer, x = DEQ(Cell(), solver=Picard()), torch.randn(3, 4)
    solution = layer.solve(x, at=(0, 2, 5, 1000))
    z, expected = torch.zeros_like(x), []
    for step in range(6):
        after = layer.fn(z, x)
        if step in (0, 2, 5):
            expected.append(after)
        z = after.detach()
    contracts.assert_close(solution.trajectory[:3], tuple(expected), 1e-12)
    contracts.assert_close(solution.trajectory[3], solution.value)
    contracts.assert_close(solution.value, layer(x), 0)
    wrt = tuple(layer.parameters())
    for ours, theirs in zip(solution.trajectory, expected, strict=False):
        contracts.assert_close(torch.autograd.grad(ours.sum(), wrt), torch.autograd.grad(theirs.sum(), wrt), 1e-12)
    with pytest.raises(ProblemError, match="numbers of steps"):
        layer.solve(x, at=(-1,))
    with pytest.raises(ProblemError, match="doesn't show its iterates"):
        DEQ(Cell(), solver=ScipyRoot()).solve(x, at=(1,))
    with pytest.raises(ProblemError, match="outside of them"):
        torch.func.grad(lambda x: layer.solve(x, at=(1,)).trajectory[0].sum())(x)


@pytest.mark.parametrize("radius", [0.99, 1.1, 2.0])
def test_linear_maps_that_need_not_contract(radius):
    weight = torch.randn(8, 8)
    layer = DEQ(Linear(weight * (radius / torch.linalg.eigvals(weight).abs().max())), on_failure="raise", solver=TIGHT)
    x = torch.randn(4, 8)
    expected = torch.linalg.solve(torch.eye(8) - layer.fn.weight, x.mT).mT
    contracts.assert_close(layer(x), expected)
    ours, theirs = (torch.autograd.grad(z.pow(2).sum(), layer.fn.weight) for z in (layer(x), expected))
    contracts.assert_close(ours, theirs, 1e-7)


class Scaled(nn.Module):
    """Has no fixed point where ``scale`` is one."""

    def forward(self, z, scale, shift):
        return scale * z + shift


def test_no_fixed_point_is_said_and_a_hard_sample_costs_the_others_nothing():
    layer = DEQ(Scaled(), solver=Picard(max_steps=3000, patience=3000), on_failure="ignore")
    scale, shift = torch.tensor([[0.5], [0.99], [1.0]]), torch.ones(3, 1)
    solution = layer.solve(scale, shift, init=torch.zeros(3, 1))
    assert solution.ok.tolist() == [True, True, False]
    assert solution.stats["steps"][0] < 60 < 1000 < solution.stats["steps"][1]
    alone = layer.solve(scale[:1], shift[:1], init=torch.zeros(1, 1))
    assert torch.equal(solution.value[0], alone.value[0])
    assert solution.stats["steps"][0] == alone.stats["steps"][0]


class Bistable(nn.Module):
    def forward(self, z, x):
        return torch.tanh(2 * z) + 0 * x


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=["picard", "anderson"])
def test_of_several_equilibria_the_one_near_the_start(solver):
    layer, x = DEQ(Bistable(), solver=solver), torch.zeros(2, 1)
    init = torch.tensor([[0.5], [-0.5]])
    z = layer(x, init=init)
    contracts.assert_close(z, torch.tensor([[0.957504], [-0.957504]]), 1e-6)
    assert torch.equal(z, layer(x, init=init))
    assert torch.equal(layer(x), torch.zeros(2, 1))  # zero is one too, and a solve starts there


class Wrong(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, z, x):
        return self.change(z + x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.float, "float32"),
        (lambda z: z[..., :2], r"shape \(3, 2\)"),
        (lambda z: (z,), "structure"),
        (lambda z: z.detach().numpy(), "ndarray"),
    ],
    ids=["dtype", "shape", "structure", "numpy"],
)
def test_a_cell_that_returns_something_else(change, message):
    with pytest.raises(ProblemError, match=message):
        DEQ(Wrong(change))(torch.randn(3, 4))


def _gradients(model, x):
    model(x).pow(2).mean().backward()
    return [p.grad for p in model.parameters()]


def _worker(rank, path, x, model, results):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    gradients = _gradients(nn.parallel.DistributedDataParallel(model), x.chunk(2)[rank])
    if rank == 0:
        torch.save(gradients, results)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_two_processes_equal_one(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), DEQ(Cell(), solver=Anderson(rtol=1e-15, atol=1e-15)), nn.Linear(4, 2))
    x = torch.randn(6, 4)
    expected = _gradients(copy.deepcopy(model), x)
    arguments = (str(tmp_path / "rendezvous"), x, model, str(tmp_path / "gradients"))
    torch.multiprocessing.spawn(_worker, arguments, nprocs=2)
    contracts.assert_close(torch.load(tmp_path / "gradients"), expected, 1e-12)
