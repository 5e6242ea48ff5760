"""One solve sees one function: dropout, normalization statistics, parametrizations, nesting."""

import copy

import contracts
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from difflayers.errors import ProblemError
from difflayers.fixedpoint import DEQ, Anderson, Picard

TIGHT = Anderson(rtol=1e-13, atol=1e-13)


class Cell(nn.Module):
    """A contraction around any inner module."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.inner(z) + x)


class FunctionalDropout(nn.Module):
    def forward(self, z):
        return dropout(z, 0.4)  # draws in evaluation mode too


class Counting(nn.Module):
    """A parametrization that tells how often it is evaluated."""

    calls = 0

    def forward(self, weight):
        Counting.calls += 1
        return 0.5 * weight


def iterated(fn, x, steps=100):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = fn(z)
    return z


@pytest.mark.parametrize("drop", [nn.Dropout(0.4), FunctionalDropout()], ids=["module", "function"])
def test_dropout_keeps_its_mask_in_a_solve_and_in_its_derivatives(drop):
    layer, x = DEQ(Cell(nn.Linear(4, 4), drop), solver=TIGHT), torch.randn(3, 4)
    weight = layer.fn.inner[0].weight

    def seeded(x, _):
        torch.manual_seed(1)
        return layer(x)

    inputs = (x.requires_grad_(), weight)
    assert layer.solve(x).ok.all()
    assert torch.autograd.gradcheck(seeded, inputs, check_forward_ad=False)
    assert torch.autograd.gradgradcheck(seeded, inputs)
    # The mask that the solve drew is the first that the generator gives.
    torch.manual_seed(1)
    mask = dropout(torch.ones(3, 4), 0.4)
    linear = layer.fn.inner[0]
    contracts.assert_close(seeded(x, None), iterated(lambda z: 0.5 * torch.tanh(mask * linear(z) + x), x), 1e-10)


def test_the_next_call_draws_another_mask_as_if_the_cell_had_been_called_once():
    layer, x = DEQ(Cell(nn.Linear(4, 4), nn.Dropout(0.4))), torch.randn(3, 4)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    after = torch.rand(3)
    first.sum().backward()
    assert not torch.equal(torch.rand(3), after)
    assert (first - second).abs().max() > 1e-2
    torch.manual_seed(1)
    dropout(torch.ones(3, 4), 0.4), dropout(torch.ones(3, 4), 0.4)
    contracts.assert_close(torch.rand(3), after, 0)
    layer.eval()
    contracts.assert_close(layer(x), layer(x), 0)


def test_dropout_under_checkpoint_and_vmap():
    layer, x = DEQ(Cell(nn.Linear(4, 4), nn.Dropout(0.4)), solver=TIGHT), torch.randn(3, 4)
    torch.manual_seed(1)
    plain = torch.autograd.grad(layer(x).pow(2).sum(), layer.fn.inner[0].weight)
    torch.manual_seed(1)
    around = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).pow(2).sum(), layer.fn.inner[0].weight)
    contracts.assert_close(around, plain, 1e-12)
    same = vmap(lambda row: layer(row[None]), randomness="same")(x[:1].expand(3, 4))
    different = vmap(lambda row: layer(row[None]), randomness="different")(x[:1].expand(3, 4))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def batch_normed():
    norm = nn.BatchNorm1d(4)
    norm.weight.data.fill_(0.3)
    return Cell(nn.Linear(4, 4), norm)


def test_batch_statistics_count_one_step():
    layer, x = DEQ(batch_normed(), solver=TIGHT, batch_dims=0), torch.randn(8, 4, requires_grad=True)
    norm, twin = layer.fn.inner[1], copy.deepcopy(layer.fn)
    z = layer(x)
    z.pow(2).sum().backward()
    assert norm.num_batches_tracked.item() == 1
    with torch.no_grad():
        twin(z, x)
    contracts.assert_close(dict(norm.named_buffers()), dict(twin.inner[1].named_buffers()), 1e-10)
    frozen = copy.deepcopy(layer.fn)
    reference = torch.autograd.grad(iterated(lambda z: frozen(z, x), x).pow(2).sum(), (x, *frozen.parameters()))
    contracts.assert_close((x.grad, *[p.grad for p in layer.parameters()]), reference, 1e-8)
    layer(x)
    assert norm.num_batches_tracked.item() == 2


def test_running_statistics_serve_in_evaluation_and_without_gradients():
    layer, x = DEQ(batch_normed(), solver=TIGHT, batch_dims=0), torch.randn(8, 4)
    with torch.no_grad():
        layer(x)
    layer.eval()
    norm = layer.fn.inner[1]
    before = copy.deepcopy(norm.state_dict())
    assert norm.num_batches_tracked.item() == 1
    contracts.assert_close(layer(x), iterated(lambda z: layer.fn(z, x), x), 1e-10)
    contracts.assert_close(norm.state_dict(), before, 0)
    with torch.inference_mode():
        contracts.assert_close(layer(x), iterated(lambda z: layer.fn(z, x), x), 1e-10)


def test_a_step_without_an_answer_leaves_statistics_alone():
    layer, x = DEQ(batch_normed(), batch_dims=0, on_failure="ignore"), torch.randn(8, 4)
    x[0, 0] = torch.nan
    assert layer(x).isnan().all()
    assert layer.fn.inner[1].num_batches_tracked.item() == 0
    assert layer.fn.inner[1].running_mean.isfinite().all()


class Assigning(nn.Module):
    """Counts its own evaluations by assignment instead of writing in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z):
        self.count = self.count + 1
        return z


def test_assigned_buffers_count_one_step_too():
    layer = DEQ(Cell(nn.Linear(4, 4), Assigning()))
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.fn.inner[1].count.item() == 1


def test_ensembles_with_stacked_buffers():
    layers = [DEQ(batch_normed(), solver=TIGHT).eval() for _ in range(3)]
    for layer in layers:
        layer.fn.inner[1].running_mean.normal_()
    x = torch.randn(5, 4)
    state = stack_module_state(layers)
    ours = vmap(lambda *state: functional_call(layers[0], state, (x,)))(*state)
    contracts.assert_close(ours, torch.stack([layer(x) for layer in layers]), 1e-10)


@pytest.mark.parametrize("normalize", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_normalized_weights_have_exact_derivatives(normalize):
    layer, x = DEQ(Cell(normalize(nn.Linear(4, 4))), solver=TIGHT).eval(), torch.randn(3, 4)
    inputs = tuple(layer.parameters())

    def call(*_):
        return layer(x)

    assert torch.autograd.gradcheck(call, inputs)
    if normalize is parametrizations.spectral_norm:  # torch's weight_norm alone fails this too (2.13)
        assert torch.autograd.gradgradcheck(call, inputs)
    state = dict(layer.named_parameters())

    def functional(state):
        return functional_call(layer, state, (x,)).pow(2).sum()

    ours = torch.func.grad(functional)(state)
    expected = torch.autograd.grad(iterated(lambda z: layer.fn(z, x), x).pow(2).sum(), list(state.values()))
    contracts.assert_close(list(ours.values()), expected)


def test_spectral_normalization_takes_one_power_iteration_a_step():
    layer, x = DEQ(Cell(parametrizations.spectral_norm(nn.Linear(4, 4))), solver=TIGHT), torch.randn(3, 4)
    norm = layer.fn.inner[0].parametrizations.weight[0]
    twin = copy.deepcopy(layer.fn)
    weight, bias = twin.inner[0].weight, twin.inner[0].bias  # one access is one iteration
    solution = layer.solve(x)
    solution.value.sum().backward()
    contracts.assert_close(norm._u, twin.inner[0].parametrizations.weight[0]._u, 1e-12)
    expected = iterated(lambda z: 0.5 * torch.tanh(nn.functional.linear(z, weight, bias) + x), x)
    contracts.assert_close(solution.value, expected, 1e-10)
    kept = norm._u.clone()
    layer.jacobian_penalty(solution, x), layer.jacobian_penalty(solution.value, x)
    contracts.assert_close(norm._u, kept, 0)


def test_parametrizations_are_evaluated_once_a_solve_and_come_off_again():
    layer, x = DEQ(Cell(nn.Linear(4, 4))), torch.randn(3, 4)
    linear = layer.fn.inner[0]
    parametrize.register_parametrization(linear, "weight", Counting())
    Counting.calls = 0
    layer(x).sum().backward()
    assert Counting.calls == 1
    assert linear.parametrizations.weight.original.grad.abs().min() > 0
    for other in (copy.deepcopy(layer), layer):
        contracts.assert_close(other(x), layer(x), 0)
        assert parametrize.is_parametrized(other.fn.inner[0])
    parametrize.remove_parametrizations(linear, "weight")
    assert isinstance(linear.weight, nn.Parameter)


class Outer(nn.Module):
    """An equilibrium inside of each step towards another."""

    def __init__(self, cell):
        super().__init__()
        self.layer = DEQ(cell, solver=TIGHT)

    def forward(self, z, x):
        return 0.4 * self.layer(z + x)


@pytest.mark.parametrize(
    "normalize", [lambda module: module, parametrizations.spectral_norm], ids=["plain", "spectral"]
)
def test_an_equilibrium_within_an_equilibrium(normalize):
    layer, x = DEQ(Outer(Cell(normalize(nn.Linear(4, 4)))), solver=TIGHT).eval(), torch.randn(3, 4)
    wrt = tuple(layer.parameters())
    ours = torch.autograd.grad(layer(x).pow(2).sum(), wrt)
    expected = iterated(lambda z: 0.4 * iterated(lambda y: layer.fn.layer.fn(y, z + x), x, 60), x, 40)
    contracts.assert_close(ours, torch.autograd.grad(expected.pow(2).sum(), wrt), 1e-8)


def test_tied_weights_get_one_gradient():
    shared = nn.Linear(4, 4)
    layer, x = DEQ(Cell(shared, nn.Tanh(), shared), solver=TIGHT), torch.randn(3, 4)
    ours = torch.autograd.grad(layer(x).pow(2).sum(), tuple(layer.parameters()))
    expected = iterated(lambda z: layer.fn(z, x), x).pow(2).sum()
    contracts.assert_close(ours, torch.autograd.grad(expected, tuple(layer.parameters())), 1e-8)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_a_compiled_cell_and_a_script():
    cell, x = Cell(nn.Linear(4, 4)), torch.randn(3, 4)
    compiled = DEQ(torch.compile(cell, backend="eager"), solver=TIGHT)
    wrt = tuple(cell.parameters())
    ours, plain = (torch.autograd.grad(m(x).pow(2).sum(), wrt) for m in (compiled, DEQ(cell, solver=TIGHT)))
    contracts.assert_close(ours, plain, 1e-12)
    script = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(ProblemError, match="ScriptModule"):
        DEQ(Cell(script))(x)


class WritesUnknown(nn.Module):
    def forward(self, z, x):
        z.mul_(0.5)
        return z + x


class WritesInput(nn.Module):
    def forward(self, z, x):
        x.mul_(0.5)
        return 0.5 * z + x


class WritesItsOwn(nn.Module):
    def forward(self, z, x):
        value = z * 0.5
        return value.add_(x)


@pytest.mark.parametrize("solver", [Picard(), TIGHT], ids=["picard", "anderson"])
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("cell", [WritesUnknown(), WritesInput()], ids=["unknown", "input"])
def test_writing_in_place_is_refused_where_it_would_be_wrong(cell, batch_dims, solver):
    with pytest.raises(ProblemError, match="in place"):
        DEQ(cell, batch_dims=batch_dims, solver=solver)(torch.randn(3, 4))


def test_writing_to_a_temporary_is_right():
    x = torch.randn(3, 4, requires_grad=True)
    z = DEQ(WritesItsOwn(), solver=TIGHT)(x)
    contracts.assert_close(z, 2 * x)
    z.sum().backward()
    contracts.assert_close(x.grad, torch.full((3, 4), 2.0))
