"""Cells that the package brings: the transformer."""

import copy
import pickle

import contracts
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from difflayers import Status
from difflayers.errors import ProblemError
from difflayers.fixedpoint import DEQ, Anderson, Picard, TransformerCell

TIGHT = Anderson(rtol=1e-13, atol=1e-13)


def small(**options):
    return DEQ(TransformerCell(4, 2, hidden=6, **options), solver=TIGHT, on_failure="raise")


def sequences(*shape, **options):
    return torch.randn(*(shape or (3, 5, 4)), **options)


def iterated(layer, x, steps=150):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = layer.fn(z, x)
    return z


def weighted(z):
    return (z.pow(2) * torch.linspace(-1, 1, z[0].numel()).reshape(z.shape[1:])).sum()


def test_the_equation():
    cell = TransformerCell(6, 3, causal=True)
    z, x = sequences(2, 5, 6), sequences(2, 5, 6)
    h = z + cell.norm_input(x)
    q, k, v = cell.project(h).split(6, -1)
    mixed = [
        nn.functional.scaled_dot_product_attention(*(t[..., i : i + 2] for t in (q, k, v)), is_causal=True)
        for i in (0, 2, 4)
    ]
    a = cell.norm_attention(h + cell.gather(torch.cat(mixed, -1)))
    contracts.assert_close(cell(z, x), cell.norm_output(a + cell.feed_forward(a)), 1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_converges_at_initialization(causal, dtype, scale):
    layer = DEQ(TransformerCell(32, 4, causal=causal).to(dtype), on_failure="raise")
    solution = layer.solve(scale * sequences(2, 12, 32, dtype=dtype))
    assert solution.value.dtype == dtype
    assert solution.stats["steps"].max() <= 30
    layer.solver = Picard()  # finds it too, for the cell is a contraction there
    assert layer.solve(sequences(2, 12, 32, dtype=dtype)).ok.all()


@pytest.mark.parametrize("causal", [False, True])
def test_equilibrium_and_its_gradients(causal):
    layer, x = small(causal=causal), sequences().requires_grad_()
    z, wrt = layer(x), (x, *layer.parameters())
    contracts.assert_close(layer.fn(z, x), z, 1e-11)
    contracts.assert_close(z, iterated(layer, x), 1e-11)
    ours, expected = (torch.autograd.grad(weighted(state), wrt) for state in (z, iterated(layer, x)))
    contracts.assert_close(ours, expected)


def test_second_derivatives_equal_those_of_the_iteration():
    layer, x = small(causal=True), sequences(2, 3, 4).requires_grad_()

    def penalty(z):
        (first,) = torch.autograd.grad(weighted(z), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), tuple(layer.parameters()), allow_unused=True)

    contracts.assert_close(penalty(layer(x)), penalty(iterated(layer, x)), 1e-7)


def test_checked_derivatives_of_both_modes():
    layer, x = small(causal=True), sequences(2, 3, 4).requires_grad_()
    names = ["fn.project.weight", "fn.norm_input.weight", "fn.feed_forward.0.weight", "fn.norm_output.bias"]
    params = dict(layer.named_parameters())

    def call(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(params[name] for name in names))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_functional_transforms_of_the_layer():
    layer, x = small(causal=True), sequences()
    params = dict(layer.named_parameters())

    def loss(params, row):
        return weighted(functional_call(layer, params, (row[None],)))

    per_sample = vmap(grad(loss), (None, 0))(params, x)
    for i in range(len(x)):
        alone = torch.autograd.grad(weighted(layer(x[i : i + 1])), tuple(layer.parameters()))
        contracts.assert_close([g[i] for g in per_sample.values()], alone)
    tangent = torch.func.jvp(lambda x: weighted(layer(x)), (x,), (torch.ones_like(x),))[1]
    contracts.assert_close(tangent, torch.func.grad(lambda x: weighted(layer(x)))(x).sum())


@pytest.mark.parametrize("causal", [True, False])
def test_causal_means_causal(causal):
    layer, x = small(causal=causal), sequences(2, 6, 4)
    later = x.clone()
    later[:, 4:] = sequences(2, 2, 4)
    change = (layer(later) - layer(x)).abs()
    assert change[:, 4:].amax(-1).min() > 1e-2
    if causal:
        assert change[:, :4].max() < 1e-11
        contracts.assert_close(layer(x[:, :4]), layer(x)[:, :4], 1e-11)
    else:
        assert change[:, :4].amax(-1).min() > 1e-4


def test_a_permuted_batch_gives_permuted_states():
    layer, x = small(), sequences(4, 5, 4)
    order = torch.tensor([2, 0, 3, 1])
    contracts.assert_close(layer(x[order]), layer(x)[order], 1e-11)


def test_a_broken_sample_leaves_its_neighbours_alone():
    layer, x = small(), sequences()
    layer.on_failure = "ignore"
    bad = x.clone()
    bad[1, 2, 0] = torch.nan
    rows, wrt = [0, 2], tuple(layer.parameters())
    solution = layer.solve(bad)
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
    contracts.assert_close(solution.value[rows], layer(x)[rows], 1e-11)
    ours, expected = (torch.autograd.grad(weighted(z[rows]), wrt) for z in (solution.value, layer(x)))
    contracts.assert_close(ours, expected, 1e-10)


def test_copies_and_state():
    layer, x = small(causal=True), sequences()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        contracts.assert_close(other(x), expected, 0)
    other = small(causal=True)
    other.load_state_dict(layer.state_dict())
    contracts.assert_close(other(x), expected, 0)
    assert "features=4, heads=2, causal=True" in repr(layer)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 1, 4)])
def test_empty_batches_and_short_sequences(shape):
    layer = small(causal=True)
    z = layer(sequences(*shape))
    assert z.shape == shape
    z.sum().backward()
    assert layer.fn.project.weight.grad.isfinite().all()


def test_autocast():
    cell = TransformerCell(32, 4).float()
    layer = DEQ(cell, solver=Anderson(rtol=1e-2, atol=1e-2), on_failure="raise")
    x = sequences(3, 6, 32, dtype=torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
    z.pow(2).sum().backward()
    assert z.dtype == cell.project.weight.grad.dtype == torch.float32
    assert (z - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    cell, x = TransformerCell(32, 4), sequences(2, 6, 32)
    expected = DEQ(cell)(x)
    z = DEQ(copy.deepcopy(cell).to(dtype), on_failure="raise")(x.to(dtype))
    assert z.dtype == dtype
    assert (z.double() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    layer, x = small(), sequences().requires_grad_()
    wrt = (x, *layer.parameters())
    weighted(checkpoint(layer, x, use_reentrant=reentrant)).backward()
    contracts.assert_close([p.grad for p in wrt], torch.autograd.grad(weighted(layer(x)), wrt), 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_model_equals_eager():
    model = nn.Sequential(nn.Linear(4, 4), small(causal=True), nn.Linear(4, 2))
    compiled, x = torch.compile(model, backend="aot_eager"), sequences()
    ours, eager = (torch.autograd.grad(fn(x).pow(2).sum(), tuple(model.parameters())) for fn in (compiled, model))
    contracts.assert_close(compiled(x), model(x), 1e-12)
    contracts.assert_close(ours, eager, 1e-11)


def test_dropout_draws_once_a_solve():
    layer, x = small(dropout=0.3), sequences()
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert (first - second).abs().max() > 1e-3
    torch.manual_seed(1)
    contracts.assert_close(layer(x), first, 0)
    layer.eval()
    contracts.assert_close(layer(x), iterated(layer, x), 1e-10)


def test_wrong_calls():
    with pytest.raises(ProblemError, match="heads=3 must divide features=4"):
        TransformerCell(4, 3)
    with pytest.raises(ProblemError, match="heads=0"):
        TransformerCell(4, 0)
    for shape in ((3, 5, 6), (4,)):
        with pytest.raises(ProblemError, match=r"\(batch, length, 4\), got shape"):
            small()(torch.ones(shape))
