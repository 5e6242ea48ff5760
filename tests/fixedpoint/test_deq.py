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

from difflayers import ImplicitAdjoint, UnrolledAdjoint, linear
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


def test_bfloat16_and_float32():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        layer = DEQ(Cell().to(dtype), solver=Anderson(rtol=tolerance / 5, atol=tolerance / 5), on_failure="ignore",
                    adjoint=ImplicitAdjoint(linear.Picard(rtol=tolerance)))  # fmt: skip
        x = torch.randn(3, 4, dtype=dtype)
        z = layer(x)
        z.sum().backward()
        assert z.dtype == layer.fn.linear.weight.grad.dtype == dtype
        wide = copy.deepcopy(layer.fn).double()
        assert (z.double() - reference(wide, x.double())).norm() < tolerance * 10


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
