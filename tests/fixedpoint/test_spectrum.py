"""Spectral radii against dense eigenvalues."""

import contracts
import pytest
import torch
from torch import nn

from difflayers.errors import ProblemError
from difflayers.fixedpoint import DEQ, fixed_point, spectral_radius


def linear(z, matrix):
    return torch.einsum("bij,bj->bi", matrix, z)


def radius(matrix):
    return torch.linalg.eigvals(matrix).abs().amax(-1)


def led_by(block, samples=6, size=60, others=0.4):
    """Matrices with the eigenvalues of ``block`` in front of a random rest of spectral radius ``others``."""
    rest = torch.randn(samples, size, size)
    rest = rest * (others / radius(rest))[:, None, None]
    matrix = torch.stack([torch.block_diag(block, r) for r in rest])
    basis = torch.linalg.qr(torch.randn(matrix.shape))[0]
    return basis @ matrix @ basis.mT


def turn(angle, length=0.9):
    c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    return length * torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


@pytest.mark.parametrize("steps", [9, 20, 200])
def test_small_systems_are_exact(steps):
    matrix = torch.randn(50, 9, 9)
    assert matrix.shape == (50, 9, 9)
    leading = torch.linalg.eigvals(matrix)
    leading = leading.gather(1, leading.abs().argmax(1, keepdim=True))
    assert 5 < (leading.imag.abs() > 1e-3).sum() < 45  # real leaders and complex pairs
    found = spectral_radius(linear, torch.zeros(50, 9), (matrix,), batch_dims=1, steps=steps)
    torch.testing.assert_close(found, radius(matrix), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "block",
    [torch.tensor([[0.9]]), torch.tensor([[-0.9]]), turn(0.3), turn(1.5), turn(2.9), turn(0.3, 1.7)],
    ids=["real", "negative", "slow pair", "quarter turns", "near half turns", "expanding"],
)
def test_leading_eigenvalues_real_or_a_pair(block):
    matrix = led_by(block)
    found = spectral_radius(linear, torch.zeros(6, len(matrix[0])), (matrix,), batch_dims=1)
    torch.testing.assert_close(found, radius(matrix), rtol=1e-3, atol=0)


def test_crowded_eigenvalues_are_found_as_the_docs_say():
    matrix = torch.randn(64, 128, 128) / 128**0.5
    exact = radius(matrix)
    for steps, bound in ((10, 0.2), (20, 0.05), (40, 0.005)):
        found = spectral_radius(linear, torch.zeros(64, 128), (matrix,), batch_dims=1, steps=steps)
        assert (found / exact - 1).abs().median() < bound


def test_a_defective_matrix():
    matrix = torch.tensor([[0.5, 1.0], [0.0, 0.5]]).expand(3, 2, 2)
    found = spectral_radius(linear, torch.zeros(3, 2), (matrix,), batch_dims=1)
    torch.testing.assert_close(found, torch.full((3,), 0.5), rtol=1e-6, atol=0)


def test_an_invariant_space_ends_the_search():
    z = torch.zeros(4, 30)
    torch.testing.assert_close(spectral_radius(lambda z: -0.7 * z, z, batch_dims=1), torch.full((4,), 0.7))
    projection = torch.diag(torch.tensor([0.5, 0.3] + [0.0] * 28))
    torch.testing.assert_close(spectral_radius(lambda z: z @ projection, z, batch_dims=1), torch.full((4,), 0.5))


@pytest.mark.parametrize("fn", [lambda z: 0 * z, lambda z: torch.ones_like(z)], ids=["zero", "ignores z"])
def test_maps_that_forget(fn):
    assert spectral_radius(fn, torch.ones(3, 4), batch_dims=1).tolist() == [0, 0, 0]


def test_at_an_equilibrium_of_a_nonlinear_map():
    weight, x = torch.randn(5, 5), torch.randn(7, 5)

    def cell(z, weight, x):
        return torch.tanh(0.3 * z @ weight + x)

    solution = fixed_point(cell, torch.zeros(7, 5), (weight, x), batch_dims=1)
    exact = [
        radius(torch.func.jacrev(lambda z, x=x_: cell(z, weight, x))(z))
        for z, x_ in zip(solution.value, x, strict=True)
    ]
    for where in (solution, solution.value):
        torch.testing.assert_close(spectral_radius(cell, where, (weight, x), batch_dims=1), torch.stack(exact))


def test_several_states_and_no_batch():
    matrix = torch.randn(5, 5)

    def fn(z):
        y = matrix @ torch.cat([z["a"], z["b"].flatten()])
        return {"a": y[:3], "b": y[3:].reshape(2, 1)}

    found = spectral_radius(fn, {"a": torch.zeros(3), "b": torch.zeros(2, 1)})
    assert found.shape == ()
    torch.testing.assert_close(found, radius(matrix))


def test_a_sample_without_answer_is_nan_and_the_others_are_as_ever():
    matrix = led_by(turn(1.0))
    z = torch.zeros(6, len(matrix[0]))
    whole = spectral_radius(linear, z, (matrix,), batch_dims=1, generator=torch.Generator().manual_seed(0))
    matrix = matrix.clone()
    matrix[2] = float("nan")
    broken = spectral_radius(linear, z, (matrix,), batch_dims=1, generator=torch.Generator().manual_seed(0))
    assert broken.isnan().tolist() == [False, False, True, False, False, False]
    contracts.assert_close(broken[[0, 1, 3, 4, 5]], whole[[0, 1, 3, 4, 5]], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    matrix = led_by(turn(1.0))
    z = torch.zeros(6, len(matrix[0]), dtype=dtype)
    found = spectral_radius(linear, z, (matrix.to(dtype),), batch_dims=1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), radius(matrix), rtol=10 * torch.finfo(dtype).eps + 1e-3, atol=0)


def test_the_start_is_the_generators():
    matrix = torch.randn(2, 40, 40)
    z = torch.zeros(2, 40)
    runs = [
        spectral_radius(linear, z, (matrix,), batch_dims=1, steps=5, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert runs[0].equal(runs[1])
    assert not runs[0].equal(runs[2])


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.dropout = nn.Dropout(0.5)

    def forward(self, z, x):
        return torch.tanh(self.dropout(self.linear(z)) + x)


def test_a_layer_is_seen_as_its_solve_saw_it():
    layer, x = DEQ(Noisy()), torch.randn(4, 6)
    solution = layer.solve(x)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    found = spectral_radius(layer.fn, solution, (x,), batch_dims=1)
    jacobian = torch.autograd.functional.jacobian(lambda z: solution.view(z, x), solution.value.detach())
    exact = torch.stack([radius(jacobian[i, :, i]) for i in range(4)])
    torch.testing.assert_close(found, exact)
    assert not found.requires_grad
    assert all(buffer.equal(before[name]) for name, buffer in layer.named_buffers())


def test_a_module_at_a_plain_value_keeps_its_buffers():
    cell, x = Noisy(), torch.randn(4, 6)
    before = {name: buffer.clone() for name, buffer in cell.named_buffers()}
    assert spectral_radius(cell, torch.zeros(4, 6), (x,), batch_dims=1).max() <= 2
    assert all(buffer.equal(before[name]) for name, buffer in cell.named_buffers())


def test_nothing_to_look_at():
    assert spectral_radius(torch.cos, torch.zeros(0, 3), batch_dims=1).shape == (0,)
    assert spectral_radius(torch.cos, torch.zeros(2, 0), batch_dims=1).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("fn", "steps", "message"),
    [(torch.cos, 0, "steps must be at least 1"), (lambda z: z[:, :2], 5, "shape")],
)
def test_bad_input(fn, steps, message):
    with pytest.raises(ProblemError, match=message):
        spectral_radius(fn, torch.zeros(2, 3), batch_dims=1, steps=steps)
