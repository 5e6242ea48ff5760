"""Derivatives of QPs: every order and mode, over backends; what a layer owes; warm starts."""

import copy
import pickle

import contracts
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from difflayers import ImplicitAdjoint, linear, monitor
from difflayers.errors import ConvergenceWarning
from difflayers.qp import DAQP, OSQP, PIQP, Auto, Clarabel, InteriorPoint, Moreau, ProxQP, QPLayer, solve_qp

BACKENDS = [Auto(), DAQP(), PIQP(), InteriorPoint(), Clarabel(), OSQP(), ProxQP(), Moreau()]


def blocks(samples=3, n=4, m=5, p=1, shared=("G", "A", "lb")):
    """Random blocks with active and inactive rows; ``L`` stands for ``P = LLᵀ + I``."""
    generator = torch.Generator().manual_seed(3)

    def random(name, *shape):
        batch = () if name in shared else (samples,)
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    return {
        "L": random("L", n, n), "q": random("q", n), "G": random("G", m, n), "h": random("h", m).abs(),
        "A": random("A", p, n), "b": 0.1 * random("b", p), "lb": -random("lb", n).abs() - 0.2,
    }  # fmt: skip


def call(solver, part="x", **options):
    """One part of the solution as a function of the blocks."""

    def solve(L, q, G, h, A, b, lb):
        solution = solve_qp(L @ L.mT + torch.eye(L.shape[-1]), q, G, h, A, b, lb=lb, solver=solver, **options)
        return solution.x if part == "x" else (solution.x, solution.y, solution.z, solution.z_box)

    return solve


@pytest.mark.parametrize("solver", BACKENDS, ids=repr)
def test_first_and_second_derivatives_of_everything(solver):
    pytest.importorskip({"ProxQP": "proxsuite", "Moreau": "moreau"}.get(type(solver).__name__, "torch"))
    params = contracts.wanting(blocks(samples=2, n=3, m=4).values())
    assert torch.autograd.gradcheck(call(solver, "all"), params, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call(solver, "all"), params, fast_mode=True)


def test_an_active_set_is_a_linear_system():
    """A second route: the rows that are active, as equations, by torch.linalg.solve."""
    data = {name: block.requires_grad_() for name, block in blocks(shared=()).items()}
    solution = solve_qp(
        data["L"] @ data["L"].mT + torch.eye(4), *[data[k] for k in "qGhAb"], lb=data["lb"], solver=DAQP()
    )
    losses, references = solution.x.pow(3).sum(), 0
    for i in range(3):
        L, q, G, h, A, b, lb = (data[k][i] for k in ("L", "q", "G", "h", "A", "b", "lb"))
        rows, low = solution.z[i] > 0, solution.z_box[i] < 0
        C = torch.cat([A, G[rows], -torch.eye(4)[low]])
        d = torch.cat([b, h[rows], -lb[low]])
        zeros = torch.zeros(len(C), len(C))
        system = torch.cat([torch.cat([L @ L.mT + torch.eye(4), C.mT], 1), torch.cat([C, zeros], 1)])
        references = references + torch.linalg.solve(system, torch.cat([-q, d]))[:4].pow(3).sum()
    assert (solution.z > 0).any()
    assert (solution.z_box < 0).any()
    contracts.assert_close(losses, references, 1e-12)
    ours = torch.autograd.grad(losses, data.values(), create_graph=True)
    theirs = torch.autograd.grad(references, data.values(), create_graph=True)
    contracts.assert_close(ours, theirs, 1e-11)
    second = [torch.autograd.grad(sum(g.pow(2).sum() for g in gs), data.values()) for gs in (ours, theirs)]
    contracts.assert_close(second[0], second[1], 1e-9)


@pytest.mark.parametrize("argument", range(7))
def test_transforms(argument):
    params = list(blocks().values())

    def of_one(value):
        return call(DAQP())(*params[:argument], value, *params[argument + 1 :])

    value = params[argument]
    eager = torch.autograd.functional.jacobian(of_one, value)
    contracts.assert_close(jacrev(of_one)(value), eager)
    contracts.assert_close(jacfwd(of_one)(value), eager)
    contracts.assert_close(jvp(of_one, (value,), (value,))[1], (eager * value).flatten(2).sum(-1))
    cubed = contracts.cubed(of_one)
    contracts.assert_close(hessian(cubed)(value), torch.autograd.functional.hessian(cubed, value))


def test_vmap_maps_some_blocks_and_shares_the_rest():
    L, q, G, h, A, b, lb = blocks().values()

    def one(L, q, h, b):
        return call(DAQP())(L, q, G, h, A, b, lb)

    together = call(DAQP())(L, q, G, h, A, b, lb)
    contracts.assert_close(vmap(one)(L, q, h, b), together)
    each = vmap(grad(contracts.cubed(one), argnums=1))(L, q, h, b)
    contracts.assert_close(each, grad(lambda q: call(DAQP())(L, q, G, h, A, b, lb).pow(3).sum())(q))
    nested = vmap(vmap(one, (None, 0, None, None)), (0, None, 0, 0))(L, torch.stack([q[0], 2 * q[0]]), h, b)
    contracts.assert_close(nested[:, 1], vmap(one, (0, None, 0, 0))(L, 2 * q[0], h, b))
    # A batch inside, and a block of which only one copy of it exists.
    inside = vmap(lambda q: call(DAQP())(L, q, G, h, A, b, lb), in_dims=0)(torch.stack([q, -q]))
    contracts.assert_close(inside[0], together)


def test_shared_blocks_are_summed_over_the_batch():
    names = ("G", "A", "lb")
    data = blocks()
    shared = {name: data[name].clone().requires_grad_() for name in names}
    call(DAQP())(**{**data, **shared}).pow(2).sum().backward()
    each = {name: data[name].expand(3, *data[name].shape).clone().requires_grad_() for name in names}
    call(DAQP())(**{**data, **each}).pow(2).sum().backward()
    for name in names:
        contracts.assert_close(shared[name].grad, each[name].grad.sum(0), 1e-12)


def test_leading_dimensions_broadcast():
    data = blocks()
    q = torch.stack([data["q"], 2 * data["q"]])  # (2, 3, n) with everything else (3, ...) or shared
    x = call(DAQP())(**{**data, "q": q})
    assert x.shape == (2, 3, 4)
    contracts.assert_close(x[1], call(DAQP())(**{**data, "q": 2 * data["q"]}))
    single = solve_qp(torch.eye(2), torch.ones(2), lb=torch.zeros(2))
    assert single.x.shape == (2,)
    assert single.status.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_keep_their_dtype_and_accuracy(dtype):
    exact = contracts.wanting(blocks().values())
    expected = torch.autograd.grad(call(DAQP())(*exact).pow(2).sum(), exact)
    narrow = [block.detach().to(dtype).requires_grad_() for block in exact]
    L, q, G, h, A, b, lb = narrow
    x = solve_qp(L @ L.mT + torch.eye(4, dtype=dtype), q, G, h, A, b, lb=lb, solver=DAQP()).x
    assert x.dtype == dtype
    for ours, wide in zip(torch.autograd.grad(x.pow(2).sum(), narrow), expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - wide).norm() <= (1e-5 if dtype == torch.float32 else 1e-11) * (1 + wide.norm())


def test_a_bad_sample_leaves_the_others_alone():
    data = blocks()
    data["q"][1, 0] = torch.nan
    params = {name: block.clone().requires_grad_() for name, block in data.items()}
    solution = solve_qp(
        params["L"] @ params["L"].mT + torch.eye(4), *[params[k] for k in "qGhAb"], lb=params["lb"], on_failure="ignore"
    )
    assert solution.status.tolist() == [0, 3, 0]
    assert solution.x[1].isnan().all()
    solution.x[solution.ok].pow(2).sum().backward()
    rows = [0, 2]
    healthy = {k: (v[rows] if v.dim() == blocks(shared=())[k].dim() else v) for k, v in data.items()}
    alone = {name: block.clone().requires_grad_() for name, block in healthy.items()}
    call(DAQP())(**alone).pow(2).sum().backward()
    for name, block in params.items():
        ours, theirs = block.grad, alone[name].grad
        contracts.assert_close(ours[rows] if ours.shape != theirs.shape else ours, theirs, 1e-12)
        assert ours.isfinite().all()


def test_approximate_or_least_squares_adjoints_by_choice():
    params = contracts.wanting(blocks().values())
    expected = torch.autograd.grad(call(DAQP())(*params).pow(2).sum(), params)
    for solver in (linear.LeastSquares(), linear.LU()):
        ours = torch.autograd.grad(call(DAQP(), adjoint=ImplicitAdjoint(solver))(*params).pow(2).sum(), params)
        contracts.assert_close(ours, expected, 1e-8)


class Model(nn.Module):
    """Two blocks from inputs, two learned."""

    def __init__(self, n=4):
        super().__init__()
        self.root = nn.Parameter(torch.randn(n, n))
        self.rows = nn.Parameter(torch.randn(3, n))
        self.layer = QPLayer(solver=DAQP())

    def forward(self, q):
        P = self.root @ self.root.mT + torch.eye(len(self.root), dtype=q.dtype)
        return self.layer(P, q, self.rows, torch.ones(3, dtype=q.dtype), lb=-torch.ones(q.shape[1], dtype=q.dtype))


def test_layer_owes_what_a_module_owes():
    model, q = Model(), torch.randn(5, 4)
    expected = model(q)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        contracts.assert_close(other(q), expected)
    assert "DAQP" in repr(model)
    assert sorted(model.state_dict()) == ["root", "rows"]
    assert model(q[:0]).shape == (0, 4)
    model(q[:0]).sum().backward()
    params = dict(model.named_parameters())
    each = vmap(grad(lambda p, q: functional_call(model, p, (q[None],)).pow(2).sum()), (None, 0))(params, q)
    whole = grad(lambda p: functional_call(model, p, (q,)).pow(2).sum())(params)
    contracts.assert_close({k: v.sum(0) for k, v in each.items()}, whole)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layer_under_checkpoint(reentrant):
    model, q = Model(), torch.randn(5, 4, requires_grad=True)
    wrt = (q, *model.parameters())
    plain = torch.autograd.grad(model(q).pow(2).sum(), wrt)
    checkpoint(model, q, use_reentrant=reentrant).pow(2).sum().backward()
    contracts.assert_close([t.grad for t in wrt], plain, 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_layer_in_a_compiled_model():
    model = nn.Sequential(nn.Linear(4, 4), Model())
    compiled, q = torch.compile(model, backend="aot_eager"), torch.randn(5, 4)
    wrt = tuple(model.parameters())
    contracts.assert_close(compiled(q), model(q), 1e-12)
    ours, eager = (torch.autograd.grad(m(q).pow(2).sum(), wrt) for m in (compiled, model))
    contracts.assert_close(ours, eager, 1e-12)


def test_layer_under_autocast():
    model, q = Model().float(), torch.randn(5, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = model.layer(torch.eye(4, dtype=torch.float32), q, model.rows, torch.ones(3, dtype=torch.float32))
    x.sum().backward()
    assert x.dtype == model.rows.grad.dtype == torch.float32


def test_warm_starts_cost_no_backend_and_change_nothing():
    data = blocks()
    P = data["L"] @ data["L"].mT + torch.eye(4)
    rest = [data[k] for k in "GhAb"]
    first = solve_qp(P, data["q"], *rest, lb=data["lb"], solver=DAQP())
    assert first.stats["steps"].min() > 0
    near = solve_qp(P, data["q"] + 1e-3, *rest, lb=data["lb"], solver=DAQP(), init=first)
    assert near.stats["steps"].max() == 0
    contracts.assert_close(near.x, solve_qp(P, data["q"] + 1e-3, *rest, lb=data["lb"], solver=DAQP()).x, 1e-12)
    far = solve_qp(P, -10 * data["q"], *rest, lb=data["lb"], solver=DAQP(), init=first)
    contracts.assert_close(far.x, solve_qp(P, -10 * data["q"], *rest, lb=data["lb"], solver=DAQP()).x, 1e-12)
    from_point = solve_qp(P, data["q"], *rest, lb=data["lb"], solver=DAQP(), init=first.x)
    assert from_point.stats["steps"].max() == 0
    contracts.assert_close(from_point.x, first.x, 1e-12)


def test_an_infeasible_sample_warns_and_trains_on():
    layer = QPLayer(solver=DAQP())
    q, h = torch.zeros(2, 1, requires_grad=True), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    with pytest.warns(ConvergenceWarning, match="INFEASIBLE in 1 of 2 samples"):
        x = layer(torch.eye(1), q, torch.tensor([[1.0], [-1.0]]), h)
    x[:1].sum().backward()
    contracts.assert_close(q.grad, torch.tensor([[-1.0], [0.0]]))


def test_monitor_sees_both_solves():
    params = contracts.wanting(blocks().values())
    with monitor() as log:
        call(DAQP())(*params).sum().backward()
    assert [record.role for record in log] == ["forward", "adjoint"]
    assert log[0].samples == 3
    assert "DAQP" in log[0].solver


def test_corrected_samples_differentiate_on_their_own_active_set():
    """A warm start that is right for some samples and wrong for others."""
    data = blocks(samples=20)
    P, rest = data["L"] @ data["L"].mT + torch.eye(4), [data[k] for k in "GhAb"]
    first = solve_qp(P, data["q"], *rest, lb=data["lb"], solver=DAQP())
    q = (data["q"] * torch.where(torch.arange(20) % 2 == 0, 1.0, 0.3)[:, None]).requires_grad_()
    warm = solve_qp(P, q, *rest, lb=data["lb"], solver=DAQP(), init=first)
    cold = solve_qp(P, q, *rest, lb=data["lb"], solver=DAQP())
    changed = ((first.z > 0) != (cold.z > 0)).any(1) | ((first.z_box < 0) != (cold.z_box < 0)).any(1)
    assert 0 < int(changed.sum()) < 20
    contracts.assert_close(warm.x, cold.x, 1e-11)
    ours, theirs = (torch.autograd.grad(s.x.pow(2).sum() + s.z.sum(), q)[0] for s in (warm, cold))
    contracts.assert_close(ours, theirs, 1e-11)
