"""Several resolutions at one equilibrium, and heads on them: what every layer owes, and what these add."""

import copy
import pickle

import contracts
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from difflayers import Status
from difflayers.errors import ConvergenceWarning, ProblemError
from difflayers.fixedpoint import Anderson, ClassificationHead, MultiscaleDEQ, Picard, SegmentationHead

TIGHT = Anderson(rtol=1e-13, atol=1e-13)


def small(**options):
    return MultiscaleDEQ(2, (4, 6), groups=2, **{"solver": TIGHT, "on_failure": "raise", **options})


def images(*shape, **options):
    return torch.randn(*(shape or (3, 2, 5, 4)), **options)


def iterated(layer, x, steps=100):
    cell, injection = layer.deq.fn, layer.stem(x)
    z = cell.start(injection)
    for _ in range(steps):
        z = cell(z, injection)
    return z


def squares(states):
    return sum(z.pow(2).mul(torch.linspace(-1, 1, z[0].numel()).reshape(z.shape[1:])).sum() for z in states)


def gradients(states, tensors):
    return torch.autograd.grad(squares(states), tuple(tensors))


@pytest.mark.parametrize(("size", "levels"), [((8, 8), 3), ((13, 10), 3), ((3, 7), 2), ((9, 17), 4), ((2, 5), 1)])
def test_equilibria_of_any_size(size, levels):
    layer = MultiscaleDEQ(1, (8, 8, 16, 16)[:levels], solver=TIGHT, on_failure="raise")
    x = images(2, 1, *size)
    z = layer(x)
    assert isinstance(z, tuple)
    assert [tuple(s.shape) for s in z] == [
        (2, c, -(-size[0] // 2**i), -(-size[1] // 2**i)) for i, c in enumerate(layer.channels)
    ]
    contracts.assert_close(layer.deq.fn(z, layer.stem(x)), z, 1e-10)


def test_plain_iteration_finds_the_same_states():
    layer, x = small(), images()
    z = layer(x)
    contracts.assert_close(iterated(layer, x), z, 1e-10)


@pytest.mark.parametrize("fill", [None, 0.0, 1.0], ids=["noise", "black", "white"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_converges_at_initialization_whatever_the_image(fill, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        layer = MultiscaleDEQ(3, (8, 16, 32), on_failure="raise").to(dtype)
        x = images(2, 3, 16, 12, dtype=dtype) if fill is None else torch.full((2, 3, 16, 12), fill, dtype=dtype)
        solution = layer.solve(x)
        assert {z.dtype for z in solution.value} == {dtype}
        assert solution.stats["steps"].max() <= 40
        layer.deq.solver = Picard()  # finds it too, for the cell is a contraction there
        assert layer.solve(x).ok.all()


def test_gradients_equal_those_of_the_iteration():
    layer, x = small(), images().requires_grad_()
    wrt = (x, *layer.parameters())
    contracts.assert_close(gradients(layer(x), wrt), gradients(iterated(layer, x), wrt), 1e-8)


def test_second_derivatives_equal_those_of_the_iteration():
    layer, x = small(), images(2, 2, 3, 3).requires_grad_()

    def penalty(states):
        (first,) = torch.autograd.grad(squares(states), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), tuple(layer.parameters()))

    contracts.assert_close(penalty(layer(x)), penalty(iterated(layer, x)), 1e-7)


def test_checked_derivatives_of_both_modes():
    layer, x = small(), images(2, 2, 3, 3).requires_grad_()
    names = ["stem.0.weight", "deq.fn.blocks.1.conv1.weight", "deq.fn.paths.0.1.weight", "deq.fn.norms.0.weight"]
    params = dict(layer.named_parameters())

    def call(x, *values):
        return torch.cat([z.flatten() for z in functional_call(layer, dict(zip(names, values, strict=True)), (x,))])

    inputs = (x, *(params[name] for name in names))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_functional_transforms_of_the_layer():
    layer, x = small(), images()
    params = dict(layer.named_parameters())

    def loss(params, image):
        return squares(functional_call(layer, params, (image[None],)))

    per_sample = vmap(grad(loss), (None, 0))(params, x)
    for i in range(len(x)):
        alone = gradients(layer(x[i : i + 1]), layer.parameters())
        contracts.assert_close([g[i] for g in per_sample.values()], alone)
    tangent = torch.func.jvp(lambda x: squares(layer(x)), (x,), (torch.ones_like(x),))[1]
    contracts.assert_close(tangent, torch.func.grad(lambda x: squares(layer(x)))(x).sum())


def test_a_permuted_batch_gives_permuted_states():
    layer, x = small(), images(4, 2, 5, 4)
    order = torch.tensor([2, 0, 3, 1])
    contracts.assert_close(layer(x[order]), [z[order] for z in layer(x)], 1e-11)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_sample_leaves_its_neighbours_alone(broken):
    layer, head, x = small(on_failure="ignore"), SegmentationHead((4, 6), 3, features=5), images()
    bad = x.clone()
    bad[1, 0, 2, 2] = broken
    rows = [0, 2]
    solution = layer.solve(bad)
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
    assert all(z[1].isnan().all() for z in solution.value)
    logits = head(solution.value)
    assert logits[1].isnan().all()
    healthy = head(layer(x))
    contracts.assert_close(logits[rows], healthy[rows], 1e-11)
    wrt = (*layer.parameters(), *head.parameters())
    ours, expected = (torch.autograd.grad(value[rows].pow(2).sum(), wrt) for value in (logits, healthy))
    contracts.assert_close(ours, expected, 1e-9)


def test_copies_and_state():
    layer, x = small(), images()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        contracts.assert_close(other(x), expected, 0)
        assert other.deq.start.__self__ is other.deq.fn  # a copy doesn't drag the original along
    other = small()
    other.load_state_dict(layer.state_dict())
    contracts.assert_close(other(x), expected, 0)
    assert "in_channels=2, channels=(4, 6)" in repr(layer)
    assert "Anderson(rtol=1e-13" in repr(layer)


def test_empty_batch():
    layer = small()
    states = layer(images(0, 2, 5, 4))
    assert [tuple(z.shape) for z in states] == [(0, 4, 5, 4), (0, 6, 3, 2)]
    sum(z.sum() for z in states).backward()
    assert not layer.stem[0].weight.grad.any()
    assert ClassificationHead((4, 6), 3)(states).shape == (0, 3)
    assert SegmentationHead((4, 6), 3)(states).shape == (0, 3, 5, 4)


def test_autocast():
    layer = MultiscaleDEQ(2, (8, 8), solver=Anderson(rtol=1e-2, atol=1e-2), on_failure="raise").float()
    x = images(3, 2, 8, 8, dtype=torch.float32)
    expected = layer.solve(x).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = layer(x)
    sum(z.square().sum() for z in states).backward()
    assert {z.dtype for z in states} == {layer.stem[0].weight.grad.dtype} == {torch.float32}
    for z, e in zip(states, expected, strict=True):
        assert (z - e).norm() < 0.05 * e.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    layer, x = small(), images().requires_grad_()
    wrt = (x, *layer.parameters())
    squares(checkpoint(layer, x, use_reentrant=reentrant)).backward()
    contracts.assert_close([p.grad for p in wrt], gradients(layer(x), wrt), 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_model_equals_eager():
    model = nn.Sequential(small(), ClassificationHead((4, 6), 3, features=4))
    compiled, x = torch.compile(model, backend="aot_eager"), images()
    ours, eager = (torch.autograd.grad(fn(x).pow(2).sum(), tuple(model.parameters())) for fn in (compiled, model))
    contracts.assert_close(compiled(x), model(x), 1e-12)
    contracts.assert_close(ours, eager, 1e-11)


def test_dropout_draws_once_a_solve():
    layer, x = small(dropout=0.5), images()
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert (first[1] - second[1]).abs().max() > 1e-3
    torch.manual_seed(1)
    contracts.assert_close(layer(x), first, 0)
    layer.eval()
    contracts.assert_close(layer(x), iterated(layer, x), 1e-10)


def test_warm_starts_and_iterates():
    layer, x = small(), images()
    solution = layer.solve(x, at=(0, 1000))
    assert layer.solve(x, init=solution).stats["steps"].max() == 0
    assert layer.solve(x, init=layer(x)).stats["steps"].max() <= 1
    injection = layer.stem(x)
    contracts.assert_close(solution.trajectory[0], layer.deq.fn(layer.deq.fn.start(injection), injection), 1e-12)
    contracts.assert_close(solution.trajectory[1], solution.value)


def test_jacobian_penalty():
    layer, x = small(), images(2, 2, 3, 3)
    solution, injection = layer.solve(x), layer.stem(x).detach()
    penalty = layer.jacobian_penalty(solution, x, samples=300, generator=torch.Generator().manual_seed(0))

    def of_one(i):
        z = tuple(v[i : i + 1].detach() for v in solution.value)
        blocks = torch.autograd.functional.jacobian(lambda *z: layer.deq.fn(z, injection[i : i + 1]), z)
        return sum(block.square().sum() for row in blocks for block in row) / sum(v.numel() for v in z)

    torch.testing.assert_close(penalty, torch.stack([of_one(0), of_one(1)]), rtol=0.1, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(penalty.sum(), layer.parameters()))


def test_failures_warn_by_default():
    with pytest.warns(ConvergenceWarning, match="MAX_STEPS"):
        MultiscaleDEQ(2, (8, 8), solver=Anderson(max_steps=1))(images())


def test_heads_see_every_resolution():
    layer, x = MultiscaleDEQ(2, (8, 8, 16), on_failure="raise"), images(2, 2, 9, 7)
    states = layer(x)
    for head, shape in (
        (ClassificationHead(layer.channels, 5), (2, 5)),
        (SegmentationHead(layer.channels, 5), (2, 5, 9, 7)),
    ):
        logits = head(states)
        assert logits.shape == shape
        assert all(g.any() for g in torch.autograd.grad(logits.pow(2).sum(), states, retain_graph=True))
        assert torch.autograd.gradcheck(
            lambda *z, head=head: head(z), [z.detach().requires_grad_() for z in states], fast_mode=True
        )
        contracts.assert_close(pickle.loads(pickle.dumps(head))(states), logits, 0)
    assert SegmentationHead(layer.channels, 5)(states, size=(18, 14)).shape == (2, 5, 18, 14)


def test_per_sample_gradients_of_a_model_with_a_head():
    for head in (ClassificationHead((4, 6), 3, features=4), SegmentationHead((4, 6), 3, features=4)):
        model, x = nn.Sequential(small(), head), images(2, 2, 5, 4)
        params = dict(model.named_parameters())

        def loss(params, image, model=model):
            return functional_call(model, params, (image[None],)).pow(2).sum()

        per_sample = vmap(grad(loss), (None, 0))(params, x)
        alone = torch.autograd.grad(model(x[:1]).pow(2).sum(), tuple(model.parameters()))
        contracts.assert_close([g[0] for g in per_sample.values()], alone)


def test_a_grid_tells_where_something_is():
    state = torch.zeros(1, 4, 6, 6)
    state[..., :3, :3] = 1.0
    for grid in (1, 2):
        head = ClassificationHead((4,), 3, grid=grid)
        moved = float((head((state.flip((-2, -1)),)) - head((state,))).detach().abs().max())
        assert moved < 1e-12 if grid == 1 else moved > 1e-3


def test_a_constant_segmentation_stays_one_at_any_size():
    head = SegmentationHead((4, 4), 2)
    logits = head((torch.ones(1, 4, 5, 3), torch.ones(1, 4, 3, 2)), size=(11, 6))
    contracts.assert_close(logits, logits[..., :1, :1].expand(1, 2, 11, 6), 1e-12)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 8), r"\(batch, 2, h, w\), got shape \(2, 3, 8, 8\)"),
        ((2, 8, 8), r"got shape \(2, 8, 8\)"),
        ((2, 2, 8, 4), "images are 8 × 4, but 3 resolutions.*at least 5 × 5"),
    ],
)
def test_wrong_images(shape, message):
    with pytest.raises(ProblemError, match=message):
        MultiscaleDEQ(2, (8, 8, 8))(images(*shape))


def test_wrong_layers():
    with pytest.raises(ProblemError, match="groups=4 must divide each of channels=\\(8, 10\\)"):
        MultiscaleDEQ(2, (8, 10))
    with pytest.raises(ProblemError, match="two or more in a group"):
        MultiscaleDEQ(2, (4,))
    with pytest.raises(ProblemError, match="channels is empty"):
        MultiscaleDEQ(2, ())
    with pytest.raises(ProblemError, match="channels is empty"):
        ClassificationHead((), 3)


@pytest.mark.parametrize(
    "head", [ClassificationHead((8, 16), 3), SegmentationHead((8, 16), 3)], ids=["class", "pixels"]
)
def test_wrong_states(head):
    for states in (torch.ones(2, 8, 4, 4), (torch.ones(2, 8, 4, 4),), (torch.ones(2, 8, 4, 4), torch.ones(2, 8, 2, 2))):
        with pytest.raises(ProblemError, match=r"2 tensors \(batch, channels, h, w\) with \(8, 16\) channels"):
            head(states)
