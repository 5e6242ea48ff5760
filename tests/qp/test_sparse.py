"""Sparse blocks: the same answers, derivatives and errors as dense ones, whatever the format."""

import contracts
import numpy as np
import pytest
import scipy.sparse
import torch
from torch.func import jacfwd, jacrev, vmap

from difflayers import Status
from difflayers.errors import ProblemError
from difflayers.qp import DAQP, OSQP, PIQP, Auto, Clarabel, InteriorPoint, Sparse, solve_qp
from difflayers.qp._data import Data
from difflayers.qp._proximal import proximal

MATRICES = ("P", "G", "A")


def problem(n=8, m=10, p=3, seed=11):
    """Dense blocks with many zeros; rows of ``G`` and bounds of both kinds are active."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, density=0.4):
        kept = torch.rand(shape, generator=generator) < density
        return kept * torch.randn(shape, generator=generator, dtype=torch.float64)

    root, inside = draw(n, n), draw(n, density=1)
    G, A = draw(m, n), draw(p, n)
    return {
        "P": root @ root.mT + torch.eye(n), "q": 4 * draw(n, density=1), "G": G,
        "h": G @ inside + draw(m, density=1).abs(), "A": A, "b": A @ inside,
        "lb": inside - 0.3, "ub": torch.where(inside > 0, inside + 0.1, torch.inf),
    }  # fmt: skip


def places(matrix):
    return matrix.nonzero().T


def sparse(matrix, values=None):
    indices = places(matrix)
    return Sparse(indices, matrix[tuple(indices)] if values is None else values, tuple(matrix.shape))


def uncoalesced(matrix):
    indices, half = places(matrix), matrix[tuple(places(matrix))] / 2
    return torch.sparse_coo_tensor(
        torch.cat([indices, indices.flip(1)], 1), torch.cat([half, half.flip(0)]), matrix.shape
    )


FORMATS = {
    "coo": torch.Tensor.to_sparse_coo,
    "uncoalesced": uncoalesced,
    "csr": torch.Tensor.to_sparse_csr,
    "Sparse": sparse,
    "scipy csr": lambda m: scipy.sparse.csr_matrix(m.numpy()),
    "scipy csc": lambda m: scipy.sparse.csc_array(m.numpy()),
    "scipy coo": lambda m: scipy.sparse.coo_matrix(m.numpy()),
}
ignoring_beta = pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:Sparse invariant:UserWarning")


def converted(data, convert):
    return {name: convert(block) if name in MATRICES else block for name, block in data.items()}


@ignoring_beta
@pytest.mark.parametrize("convert", FORMATS.values(), ids=list(FORMATS))
def test_every_format_has_the_answer_of_dense_blocks(convert):
    data = problem()
    dense, found = solve_qp(**data), solve_qp(**converted(data, convert))
    assert (dense.z > 0).any()
    assert (dense.z_box > 0).any()
    assert (dense.z_box < 0).any()
    for name in ("x", "y", "z", "z_box"):
        contracts.assert_close(getattr(found, name), getattr(dense, name), 1e-12)


@pytest.mark.parametrize("solver", [PIQP(), Clarabel(), DAQP(), OSQP(), InteriorPoint()], ids=repr)
def test_every_backend_takes_sparse_blocks(solver):
    data = problem()
    found = solve_qp(**converted(data, sparse), solver=solver)
    contracts.assert_close(found.x, solve_qp(**data).x, 1e-12)


@ignoring_beta
@pytest.mark.parametrize("name", ["coo", "uncoalesced", "csr"])
def test_gradients_of_sparse_tensors_are_sparse(name):
    data = problem()
    leaves = {k: FORMATS[name](data[k]).requires_grad_() for k in MATRICES}
    dense = {k: data[k].clone().requires_grad_() for k in MATRICES}
    for blocks in (leaves, dense):
        solve_qp(**data | blocks).x.pow(2).sum().backward()
    for k in MATRICES:
        assert leaves[k].grad.layout == leaves[k].layout
        contracts.assert_close(leaves[k].grad.to_dense(), dense[k].grad * (data[k] != 0), 1e-11)


def test_second_derivatives_of_sparse_tensors():
    data = problem()
    found = []
    for leaf in (data["G"].to_sparse_coo().coalesce().requires_grad_(), data["G"].clone().requires_grad_()):
        x = solve_qp(**data | {"G": leaf}).x
        (first,) = torch.autograd.grad(x.pow(2).sum(), leaf, create_graph=True)
        entries = first.coalesce().values() if leaf.is_sparse else first[tuple(places(data["G"]))]
        found.append(torch.autograd.grad(entries.pow(2).sum(), leaf)[0].to_dense() * (data["G"] != 0))
    contracts.assert_close(*found, 1e-10)


def of_values(data):
    """The minimizer as a function of the values of ``G`` and ``A``, and of the vectors."""
    names = [name for name in data if name not in ("P", "ub")]

    def solve(*blocks):
        given = dict(zip(names, blocks, strict=True))
        given |= {name: sparse(data[name], given[name]) for name in ("G", "A")}
        return solve_qp(sparse(data["P"]), **given, ub=data["ub"]).x

    return solve, [data[k][tuple(places(data[k]))] if k in MATRICES else data[k] for k in names]


def test_derivatives_of_every_order_and_mode():
    solve, params = of_values(problem())
    params = contracts.wanting(params)
    assert torch.autograd.gradcheck(solve, params, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(solve, params)


@pytest.mark.parametrize("argument", range(6))
def test_transforms(argument):
    solve, params = of_values(problem())

    def of_one(value):
        return solve(*params[:argument], value, *params[argument + 1 :])

    reverse = jacrev(of_one)(params[argument])
    contracts.assert_close(jacfwd(of_one)(params[argument]), reverse, 1e-11)
    several = params[argument] * torch.tensor([[1.0], [1.01], [1.02]])
    contracts.assert_close(vmap(of_one)(several), torch.stack([of_one(one) for one in several]), 1e-12)
    contracts.assert_close(vmap(jacrev(of_one))(several)[0], reverse, 1e-11)


def test_derivatives_of_the_objective_matrix():
    data = problem()
    values = data["P"][tuple(places(data["P"]))]

    def solve(weight):
        return solve_qp(**converted(data, sparse) | {"P": sparse(data["P"], values * weight)}).x

    def dense(weight):
        return solve_qp(**data | {"P": data["P"] * weight}).x

    weight = torch.tensor(1.3, requires_grad=True)
    contracts.assert_close(jacrev(solve)(weight), jacrev(dense)(weight), 1e-11)
    assert torch.autograd.gradgradcheck(solve, weight)


def test_a_batch_of_values_on_one_pattern():
    data, generator = problem(), torch.Generator().manual_seed(1)
    values = data["G"][tuple(places(data["G"]))]
    several = values + 0.05 * torch.randn(2, 3, len(values), generator=generator, dtype=torch.float64)
    matrices = torch.zeros(2, 3, *data["G"].shape)
    rows, columns = places(data["G"])
    matrices[..., rows, columns] = several
    shared = contracts.wanting([data["A"][tuple(places(data["A"]))], data["q"]])
    found = solve_qp(**converted(data, sparse) | {"G": sparse(data["G"], several), "q": shared[1]}
                     | {"A": sparse(data["A"], shared[0])})  # fmt: skip
    dense = contracts.wanting([data["A"], data["q"]])
    expected = solve_qp(**data | {"G": matrices, "A": dense[0], "q": dense[1]})
    contracts.assert_close(found.x, expected.x, 1e-12)
    ours = torch.autograd.grad(found.x.pow(2).sum(), shared)
    theirs = torch.autograd.grad(expected.x.pow(2).sum(), dense)
    contracts.assert_close(ours[0], theirs[0][tuple(places(data["A"]))], 1e-11)
    contracts.assert_close(ours[1], theirs[1], 1e-11)


def test_entries_at_one_place_add_up():
    indices = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    matrix = Sparse(indices, values, (2, 2))
    contracts.assert_close(matrix.dense(), torch.tensor([[4.0, 2.0], [4.0, 0.0]]))
    weights = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    (gradient,) = torch.autograd.grad((matrix.dense() * weights).sum(), values)
    contracts.assert_close(gradient, torch.tensor([100.0, 10.0, 100.0, 1.0]))


def test_float32_and_mixed_blocks():
    data = {name: block.float() for name, block in problem().items()}
    found = solve_qp(**data | {"G": sparse(data["G"]), "P": scipy.sparse.csr_matrix(data["P"].double().numpy())})
    assert found.x.dtype == torch.float32
    torch.testing.assert_close(found.x, solve_qp(**data).x)


def test_numpy_in_numpy_out():
    data = problem()
    given = {name: scipy.sparse.csr_array(b.numpy()) if name in MATRICES else b.numpy() for name, b in data.items()}
    found = solve_qp(**given)
    assert isinstance(found.x, np.ndarray)
    np.testing.assert_allclose(found.x, solve_qp(**data).x.numpy(), atol=1e-12)


def test_linear_programs():
    data = problem()
    names = [name for name in data if name != "P"]
    data = {name: data[name] for name in names} | {"ub": data["lb"] + 2}
    found = solve_qp(None, **converted(data, sparse))
    contracts.assert_close(found.x, solve_qp(None, **data).x, 1e-10)


@pytest.mark.parametrize("copies", [2, 3])
def test_constraints_that_depend_on_each_other(copies):
    """Multipliers aren't unique, but the minimizer and its derivative are those of one copy."""
    data = problem()
    more = data | {k: torch.cat([data[k]] * copies) for k in "GhAb"}
    leaves = [d["q"].clone().requires_grad_() for d in (data, more)]
    one = solve_qp(**data | {"q": leaves[0]})
    many = solve_qp(**converted(more, sparse) | {"q": leaves[1]})
    assert many.stats["degenerate"]
    contracts.assert_close(many.x, one.x, 1e-11)
    contracts.assert_close(many.z.reshape(copies, -1).sum(0), one.z, 1e-9)
    assert (many.z >= 0).all()
    gradients = [torch.autograd.grad(s.x.pow(2).sum(), leaf)[0] for s, leaf in zip((one, many), leaves, strict=True)]
    contracts.assert_close(*gradients, 1e-10)


def test_more_active_rows_than_unknowns():
    """A vertex in which five planes meet: multipliers of least norm may be negative, but not all are."""
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 2, 0], [3, 1, 0], [0, 0, 1]])
    q = torch.tensor([-1.0, -0.01, 1.0])
    found = solve_qp(None, q, sparse(rows), torch.zeros(6), lb=torch.full((3,), -1.0))
    contracts.assert_close(found.x, torch.tensor([0.0, 0.0, -1.0]), 1e-9)
    assert (found.z >= 0).all()
    contracts.assert_close(q + rows.mT @ found.z + found.z_box, torch.zeros(3), 1e-9)


def test_several_solutions_give_one_of_them_and_say_so():
    P = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    q = torch.tensor([-1.0, -1.0], requires_grad=True)
    found = solve_qp(sparse(P), q)
    assert found.stats["degenerate"]
    contracts.assert_close(found.x, torch.tensor([0.5, 0.5]), 1e-9)
    (gradient,) = torch.autograd.grad(found.x.sum(), q)
    contracts.assert_close(gradient, torch.tensor([-0.5, -0.5]), 1e-9)


def test_infeasible_and_unbounded_come_with_proofs():
    data = problem()
    data["A"], data["b"] = torch.cat([data["A"], data["A"]]), torch.cat([data["b"], data["b"] + 1])
    found = solve_qp(**converted(data, sparse), on_failure="ignore")
    assert found.status == Status.INFEASIBLE
    n, p = 8, 6
    y, z = found.stats["certificate"][n : n + p], found.stats["certificate"][n + p :]
    every = Data.of(data)
    contracts.assert_close(data["A"].mT @ y + every.pulled(z), torch.zeros(n), 1e-7)
    assert data["b"] @ y + torch.where(every.limits.isfinite(), every.limits, 0) @ z < 0
    found = solve_qp(None, -torch.ones(3), sparse(torch.eye(3)[:2]), torch.ones(2), on_failure="ignore")
    assert found.status == Status.UNBOUNDED
    assert found.stats["certificate"][2] > 0


def test_a_bad_sample_leaves_the_others_alone():
    data = problem()
    values = data["G"][tuple(places(data["G"]))].expand(3, -1).clone()
    values[1, 0] = torch.nan
    q = data["q"].clone().requires_grad_()
    blocks = converted(data, sparse) | {"G": sparse(data["G"], values), "q": q}
    found = solve_qp(**blocks, on_failure="ignore")
    assert found.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
    assert found.x[1].isnan().all()
    (gradient,) = torch.autograd.grad(found.x[::2].pow(2).sum(), q)
    reference = solve_qp(**data | {"q": q}).x
    contracts.assert_close(found.x[0], reference, 1e-12)
    contracts.assert_close(gradient, torch.autograd.grad(2 * reference.pow(2).sum(), q)[0], 1e-11)


def test_warm_starts_are_right_at_once():
    data = converted(problem(), sparse)
    first = solve_qp(**data)
    again = solve_qp(**data | {"q": data["q"] + 1e-3}, init=first)
    assert first.stats["steps"] > 0
    assert again.stats["steps"] == 0
    contracts.assert_close(again.x, solve_qp(**data | {"q": data["q"] + 1e-3}).x, 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_proximal_method_needs_no_good_guess(seed):
    data = Data.of(converted(problem(30, 40, 5, seed), sparse)).map(lambda block: block.expand(1, *block.shape))
    start = data.q * 0, data.q[:, :5] * 0, data.limits * 0
    x, y, z, active = proximal(data, *start, 200)
    expected = solve_qp(**problem(30, 40, 5, seed))
    contracts.assert_close(x[0], expected.x, 1e-9)
    contracts.assert_close(y[0], expected.y, 1e-8)
    assert torch.equal(active, z > 0)
    assert data.violation(x, y, z, data.limits - data.products(x)) < 1e-9


def at(indices, values, size=(2, 2)):
    return Sparse(torch.tensor(indices), torch.tensor(values, dtype=torch.float64), size)


ROW, WIDE, ONE = at([[0, 0], [0, 1]], [1.0, 1.0], (1, 2)), at([[0], [2]], [1.0], (1, 3)), torch.ones(1).double()


@pytest.mark.parametrize(("blocks", "message"), [
    ({"P": at([[0], [1]], [1.0])}, "isn't symmetric"),
    ({"P": at([[0, 1], [1, 0]], [1.0, 1.0])}, "eigenvalue -1"),
    ({"P": at([[0, 1], [0, 1]], [[1.0, 1.0], [1.0, -2.0]])}, "in sample 1"),
    ({"G": WIDE, "h": ONE}, "G has 3 columns but q has 2"),
    ({"G": ROW}, "G comes without h"),
    ({"A": ROW, "b": ONE.repeat(2)}, "A has 1 rows but b has 2"),
    ({"G": ROW.map(torch.Tensor.float), "h": ONE}, "torch.float32"),
    ({"G": torch.ones(3, 1, 2).double().to_sparse_coo(), "h": ONE}, "Sparse\\(indices, values, size\\)"),
    ({"G": [[1.0, 2.0]], "h": ONE}, "sparse matrix, got list"),
])  # fmt: skip
def test_bad_input(blocks, message):
    with pytest.raises(ProblemError, match=message):
        solve_qp(**{"P": sparse(torch.eye(2)), "q": torch.ones(2)} | blocks)


def test_a_thousand_unknowns_to_rounding():
    generator = np.random.default_rng(0)
    n, m, p = 1000, 1000, 200

    def banded(rows):
        columns = (np.repeat(np.arange(rows), 4) * n // rows + generator.integers(-9, 10, 4 * rows)) % n
        shape = (np.repeat(np.arange(rows), 4), columns)
        return scipy.sparse.csr_matrix((generator.standard_normal(4 * rows), shape), shape=(rows, n))

    P, G, A = scipy.sparse.eye(n).tocsr(), banded(m), banded(p)
    inside = generator.standard_normal(n)
    vectors = generator.standard_normal(n), G @ inside + generator.uniform(0, 1, m), A @ inside
    q, h, b = (torch.from_numpy(v).requires_grad_() for v in vectors)
    found = solve_qp(P, q, G, h, A, b)
    assert found.stats["residual"] < 1e-12
    x, y, z = (t.detach().numpy() for t in (found.x, found.y, found.z))
    np.testing.assert_allclose(P @ x + vectors[0] + G.T @ z + A.T @ y, 0, atol=1e-12)
    weights = torch.from_numpy(generator.standard_normal(n))
    gradients = torch.autograd.grad(found.x @ weights, (q, h, b))
    rows = scipy.sparse.vstack([A, G[z > 0]])
    system = scipy.sparse.bmat([[P, rows.T], [rows, None]]).tocsc()
    u = scipy.sparse.linalg.spsolve(system, np.concatenate([weights.numpy(), np.zeros(rows.shape[0])]))
    np.testing.assert_allclose(gradients[0].numpy(), -u[:n], atol=1e-11)
    np.testing.assert_allclose(gradients[2].numpy(), u[n : n + p], atol=1e-11)
    np.testing.assert_allclose(gradients[1].numpy()[z > 0], u[n + p :], atol=1e-11)


@pytest.mark.parametrize(("spread", "first"), [(10, PIQP), (1000, Clarabel)], ids=["chain", "random"])
def test_auto_looks_at_what_factorizations_fill_in(spread, first):
    generator = np.random.default_rng(0)
    n = m = 1000
    columns = (np.repeat(np.arange(m), 3) + generator.integers(-spread, spread + 1, 3 * m)) % n
    values = generator.standard_normal(3 * m)
    G = scipy.sparse.csr_matrix((values, (np.repeat(np.arange(m), 3), columns)), shape=(m, n))
    blocks = {"P": torch.eye(n), "q": torch.ones(n), "G": torch.from_numpy(G.toarray()), "h": torch.ones(m)}
    data = Data.of(converted(blocks, sparse))
    assert isinstance(Auto(front=300).choices(data)[0], first)
    assert isinstance(Auto(front=n + m).choices(data)[0], PIQP)


def test_missing_columns_and_rows_without_entries():
    G = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = solve_qp(sparse(torch.eye(3)), torch.tensor([1.0, 2.0, -3.0]), sparse(G), torch.tensor([1.0, -2.0]))
    contracts.assert_close(found.x, torch.tensor([-2.0, -2.0, 3.0]), 1e-12)
    empty = Sparse(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (2, 3))
    found = solve_qp(sparse(torch.eye(3)), torch.ones(3), empty, torch.ones(2))
    contracts.assert_close(found.x, -torch.ones(3), 1e-12)


@pytest.mark.parametrize("batched", ["G", "q"])
def test_a_batch_of_no_samples(batched):
    blocks = {"P": sparse(torch.eye(2)), "q": torch.ones(2), "G": sparse(torch.ones(1, 2)), "h": torch.ones(1)}
    leaf = torch.ones(0, 2).requires_grad_()
    blocks[batched] = leaf if batched == "q" else sparse(torch.ones(1, 2), leaf)
    found = solve_qp(**blocks)
    assert found.x.shape == (0, 2)
    (gradient,) = torch.autograd.grad(found.x.sum(), leaf)
    assert gradient.shape == leaf.shape
