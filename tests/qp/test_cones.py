"""Cones: projections on their duals, what they are made of, and the spectra of their derivatives."""

import contracts
import pytest
import torch
from torch.func import hessian, jacrev, vmap

from difflayers._autodiff import value_and_jacobian
from difflayers.errors import ProblemError, UnknownNameError
from difflayers.qp import Cones
from difflayers.qp._exponential import exponential_cone
from difflayers.qp._power import power_cone

KINDS = {
    "linear": Cones(zero=2, nonnegative=3),
    "second order": Cones(second_order=(3, 1, 4, 3)),
    "semidefinite": Cones(semidefinite=(2, 3, 1, 2)),
    "exponential": Cones(exponential=4),
    "power": Cones(power=(0.3, 0.5, 0.9)),
    "all": Cones(2, 3, (3, 1, 4, 3), (2, 3, 2), 2, (0.3, 0.9)),
}


def violation(cones, s, slack):
    """By how much rows miss the cone, by the inequalities in the docstring of Cones, if moved inward by ``slack``.

    Which matters where a boundary is steep: next to zero, exp and powers turn rounding into anything.
    """
    violations, start = [s[:, : cones.zero].abs() - slack, -s[:, cones.zero : cones.linear] - slack], cones.linear
    for size in cones.second_order:
        part = s[:, start : start + size]
        violations.append((part[:, 1:].norm(dim=1) - part[:, 0])[:, None] - slack)
        start += size
    for k in cones.semidefinite:
        X = torch.zeros(len(s), k, k)
        for j in range(k):
            for i in range(j + 1):
                X[:, i, j] = X[:, j, i] = s[:, start] / (1 if i == j else 2**0.5)
                start += 1
        violations.append(-torch.linalg.eigvalsh(X)[:, :1] - slack)
    for _ in range(cones.exponential):
        a, b, c = (s[:, start : start + 3] + slack * torch.tensor([-1.0, 1, 1])).unbind(1)
        curve = torch.where(b > 0, b * (a / b).exp(), torch.inf)
        violations.append((curve - c)[:, None])
        start += 3
    for alpha in cones.power:
        a, b = (s[:, start : start + 2] + slack).unbind(1)
        c = s[:, start + 2].abs()
        violations += [-torch.minimum(a, b)[:, None]]
        violations += [(c - a.clamp_min(0) ** alpha * b.clamp_min(0) ** (1 - alpha))[:, None] - slack]
        start += 3
    return torch.cat(violations, dim=1).amax(1)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
@pytest.mark.parametrize("cones", KINDS.values(), ids=KINDS)
def test_a_point_is_split_into_a_multiplier_and_a_slack_that_are_orthogonal(cones, scale):
    v = scale * torch.randn(300, cones.rows)
    y = cones.project(v)
    s = y - v
    size = v.norm(dim=1)
    assert (violation(cones, s, 1e-12 * size[:, None]) <= 0).all()
    assert ((y * s).sum(1).abs() <= 1e-13 * size**2).all()
    # The dual of the dual: no point of the cone has a negative product with y.
    others = cones.project(torch.randn(300, cones.rows)) - torch.randn(1)
    others = cones.project(others) - others
    assert ((y @ others.mT) >= -1e-10 * scale).all()
    contracts.assert_close(cones.project(y), y, 1e-12 * max(scale, 1))


@pytest.mark.parametrize("cones", KINDS.values(), ids=KINDS)
def test_spectra_are_those_of_the_derivative(cones):
    v = torch.randn(50, cones.rows)
    rotation = cones.rotation(v, cones.project(v))
    eye = torch.eye(cones.rows).expand(50, -1, -1)
    turned = cones.turned(rotation, eye)
    contracts.assert_close(turned @ turned.mT, eye, 1e-12)
    D = cones.turned(rotation, rotation.values.unsqueeze(-1) * turned, back=True)
    contracts.assert_close(D, value_and_jacobian(cones.project, v, 1)[1], 1e-9)
    assert (rotation.values >= 0).all()
    assert (rotation.values <= 1).all()


@pytest.mark.parametrize("cones", KINDS.values(), ids=KINDS)
def test_projections_have_derivatives_of_every_order(cones):
    v = torch.randn(3, cones.rows, requires_grad=True)
    assert torch.autograd.gradcheck(cones.project, v, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(cones.project, v, fast_mode=True)
    direction = torch.randn(cones.rows)

    def second(v):
        return hessian(lambda v: cones.project(v).pow(3).sum())(v) @ direction

    one, step = v[0].detach(), 1e-5
    third = jacrev(second)(one) @ direction
    numeric = (second(one + step * direction) - second(one - step * direction)) / (2 * step)
    contracts.assert_close(third, numeric, 1e-4)
    contracts.assert_close(vmap(cones.project)(v), cones.project(v), 1e-14)


@pytest.mark.parametrize("project", [exponential_cone, lambda x: power_cone(x, torch.tensor(0.7))], ids=["exp", "pow"])
def test_scalar_roots_hold_over_eight_orders_of_magnitude(project):
    x = torch.randn(5000, 3) * 10 ** (8 * torch.rand(5000, 3) - 4)
    p = project(x)
    size = x.norm(dim=1)
    assert ((p * (x - p)).sum(1).abs() <= 1e-12 * size**2).all()
    assert ((project(p) - p).abs().amax(1) <= 1e-11 * size).all()
    assert (project(x - p).abs().amax(1) <= 1e-8 * size).all()


def test_cones_from_a_mapping():
    assert Cones.of({"nonnegative": 2, "second_order": [3]}) == Cones(nonnegative=2, second_order=(3,))
    assert KINDS["all"].rows == 5 + 11 + 12 + 6 + 6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"second": [3]}, "second"),
        ({"second_order": 3}, "one entry per cone"),
        ({"nonnegative": -1}, "nonnegative has -1"),
        ({"semidefinite": [2.5]}, "semidefinite has 2.5"),
        ({"power": [1.0]}, "between zero and one"),
    ],
)
def test_cones_that_make_no_sense(wrong, message):
    with pytest.raises((ProblemError, UnknownNameError), match=message):
        Cones.of(wrong)


def test_derivatives_of_exponential_cones_do_not_depend_on_the_default_dtype():
    cones, v = Cones(exponential=2), torch.randn(6)
    expected = torch.func.jacrev(cones.project)(v)
    torch.set_default_dtype(torch.float32)
    try:
        found = torch.func.jacrev(cones.project)(v)
    finally:
        torch.set_default_dtype(torch.float64)
    assert torch.equal(found, expected)
