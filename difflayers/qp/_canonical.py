"""A CVXPY problem as a cone program whose data are affine in the parameters: canonicalized once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.errors import ProblemError
from difflayers.qp._affine import AffineMap, Block, Source
from difflayers.qp._cones import Cones
from difflayers.qp._presolve import Entries, Presolved, presolved

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Selection:
    """A variable as entries of the solution, each times a number; of ``y`` if it is dual, else of ``x``."""

    index: Tensor
    factor: Tensor | None  # None is one everywhere
    shape: tuple[int, ...]
    dual: bool = False
    exponential: bool = False

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The variable, ``(*batch, *shape)``."""
        picked = (y if self.dual else x).index_select(-1, self.index.to(x.device))
        if self.factor is not None:
            picked = picked * self.factor.to(picked)
        value = picked.reshape((*picked.shape[:-1], *self.shape))
        return value.exp() if self.exponential else value


@dataclass(frozen=True, eq=False)
class Canonical:
    """The cone program: what is where in its data, and in its solution."""

    cones: Cones
    data: AffineMap
    variables: tuple[Selection, ...]


def canonicalized(problem: Any, parameters: Sequence[Any], variables: Sequence[Any], *, gp: bool) -> Canonical:
    """By CVXPY, as for Clarabel, with quadratic objectives as they are."""
    import cvxpy

    # A problem of its own: what CVXPY remembers of one may ask for values of parameters the next time.
    own, options = cvxpy.Problem(problem.objective, problem.constraints), {"use_quad_obj": True}
    made, chain, inverse = own.get_problem_data(cvxpy.CLARABEL, gp=gp, solver_opts=options)
    if made["param_prob"].cone_dims.pnd:
        made, chain, inverse = own.get_problem_data(_without_long_powers(), gp=gp, solver_opts=options)
    program = made["param_prob"]
    direct = getattr(program, "dir_cones", None)  # since CVXPY 1.9.3
    if program.lower_bounds is not None or program.upper_bounds is not None or direct:
        raise ProblemError("CVXPY kept bounds apart from the constraints; write them as constraints")
    cones = _cones(program.cone_dims)
    primal = {variable.id for variable in problem.variables()}
    duals = _duals(chain, inverse, program.x.size, cones.rows)
    selections = [
        _primal(v, program, chain.reductions, gp) if v.id in primal else _dual(v, problem, duals) for v in variables
    ]
    unknowns, rows = (
        np.unique(
            np.concatenate([np.zeros(0, dtype=np.int64), *[s.index.numpy() for s in selections if s.dual is dual]])
        )
        for dual in (False, True)
    )
    smaller = presolved(_blocks(program, cones.rows), cones.zero, unknowns, rows)
    cones = replace(cones, zero=cones.zero - cones.rows + len(smaller.rows))
    blocks = {name: Block.of(*entries) for name, entries in smaller.blocks.items()}
    data = AffineMap(blocks, tuple(_sources(program, chain.reductions, parameters)), len(smaller.unknowns))
    return Canonical(cones, data, tuple(_renumbered(s, smaller) for s in selections))


def _without_long_powers() -> Any:
    """CVXPY's Clarabel, but power cones of more than three entries are made of those with three."""
    from cvxpy.constraints.power import PowConeND
    from cvxpy.reductions.solvers.conic_solvers.clarabel_conif import CLARABEL

    class Target(CLARABEL):
        def __init__(self) -> None:
            super().__init__()
            self.SUPPORTED_CONSTRAINTS = [
                cone for cone in CLARABEL.SUPPORTED_CONSTRAINTS if not issubclass(cone, PowConeND)
            ]

        def name(self) -> str:
            return "DIFFLAYERS"

    return Target()


def _renumbered(selection: Selection, smaller: Presolved) -> Selection:
    kept = smaller.rows if selection.dual else smaller.unknowns
    return replace(selection, index=torch.from_numpy(np.searchsorted(kept, selection.index.numpy())))


def _cones(dims: Any) -> Cones:
    return Cones(dims.zero, dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp, tuple(map(float, dims.p3d)))


def _blocks(program: Any, rows: int) -> dict[str, Entries]:
    """Each block of data as sparse rows, one for each entry, in the parameters and, last, one."""
    from scipy.sparse import csr_matrix

    n = program.x.size
    columns = program.q.shape[1]
    blocks = {"q": _column(csr_matrix(program.q)[:n])}
    entries = program.reduced_A.problem_data_index
    if rows == 0 or entries is None:
        empty = np.zeros(0, dtype=np.int64)
        blocks["C"] = Entries(csr_matrix((0, columns)), empty, empty, (rows, n))
        blocks["d"] = _column(csr_matrix((rows, columns)))
    else:
        place, column = _places(entries)
        mapping = csr_matrix(program.reduced_A.reduced_mat)
        matrix, side = column < n, column == n
        # CVXPY's rows are Ax + b = s, ours Cx + s = d.
        blocks["C"] = Entries(-mapping[matrix], place[matrix], column[matrix], (rows, n))
        spread = csr_matrix((np.ones(side.sum()), (place[side], np.arange(side.sum()))), shape=(rows, side.sum()))
        blocks["d"] = _column((spread @ mapping[side]).tocsr())
    entries = None if program.P is None else program.reduced_P.problem_data_index
    if entries is not None and program.reduced_P.reduced_mat.nnz:
        place, column = _places(entries)
        blocks["P"] = Entries(csr_matrix(program.reduced_P.reduced_mat), place, column, (n, n))
    return blocks


def _column(mapping: Any) -> Entries:
    """A vector with all its entries."""
    count = mapping.shape[0]
    return Entries(mapping, np.arange(count), np.zeros(count, dtype=np.int64), (count, 1))


def _places(entries: tuple[Array, Array, Any]) -> tuple[Array, Array]:
    """Row and column of every entry of a matrix by columns."""
    rows, offsets, _ = entries
    return np.asarray(rows, dtype=np.int64), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _sources(program: Any, reductions: Sequence[Any], parameters: Sequence[Any]) -> list[Source]:
    """Where each entry of CVXPY's vector of parameters comes from."""
    known: dict[int, tuple[int, Any, bool, bool]] = {p.id: (i, p, False, False) for i, p in enumerate(parameters)}
    for reduction in reductions:
        for old, (new,) in getattr(reduction, "param_id_map", {}).items():
            index, leaf, reduced, logarithm = known[old]
            kind = type(reduction).__name__
            if kind not in ("Dgp2Dcp", "CvxAttr2Constr"):
                raise ProblemError(f"CVXPY's reduction {kind} changes {leaf.name()}, which isn't known to be affine")
            known[new] = index, leaf, reduced or kind == "CvxAttr2Constr", logarithm or kind == "Dgp2Dcp"
    found = []
    for key, start in sorted(program.param_id_to_col.items(), key=lambda item: item[1]):
        if key >= 0:
            index, leaf, reduced, logarithm = known[key]
            found.append(Source(index, start, *_entries(leaf, reduced), logarithm))
    return found


def _entries(leaf: Any, reduced: bool) -> tuple[Tensor, Tensor | None]:
    """The entries of the parameter that CVXPY takes; of a symmetric one also those on the other side."""
    from cvxpy.reductions.cvx_attr2constr import SYMMETRIC_ATTRIBUTES, attributes_present, lower_value

    places = np.arange(leaf.size).reshape(leaf.shape)
    if not reduced:
        return torch.from_numpy(places.ravel(order="F").copy()), None
    other = None
    if attributes_present([leaf], SYMMETRIC_ATTRIBUTES):
        other = torch.from_numpy(np.ravel(lower_value(leaf, np.swapaxes(places, -2, -1)), order="F").copy())
    return torch.from_numpy(np.ravel(lower_value(leaf, places), order="F").copy()), other


def _primal(variable: Any, program: Any, reductions: Sequence[Any], gp: bool) -> Selection:
    from cvxpy.reductions.cvx_attr2constr import recover_value_for_leaf

    key = variable.id
    for reduction in reductions:
        key = getattr(reduction, "var_id_map", {}).get(key, [key])[0]
    if key not in program.var_id_to_col:
        raise ProblemError(f"{variable.name()} is in no objective or constraint that CVXPY kept")
    start, leaf = program.var_id_to_col[key], program.id_to_var[key]
    # What recovers a variable moves entries, or leaves zeros: entries that carry their own number tell where.
    numbers = np.arange(1, leaf.size + 1, dtype=np.float64).reshape(leaf.shape, order="F")
    recovered = recover_value_for_leaf(variable, numbers, project=False)
    recovered = recovered.toarray() if hasattr(recovered, "toarray") else np.asarray(recovered)
    index = recovered.reshape(variable.shape).ravel().astype(np.int64)
    factor = None if (index > 0).all() else torch.from_numpy((index > 0).astype(np.float64))
    return Selection(torch.from_numpy(start + np.maximum(index - 1, 0)), factor, variable.shape, exponential=gp)


def _duals(chain: Any, inverse: Any, n: int, rows: int) -> list[Any]:
    """What CVXPY makes of three vectors of multipliers: ones, their numbers, and something else to check."""
    check = np.cos(np.arange(rows))
    probes = np.ones(rows), np.arange(1.0, rows + 1), check
    found = []
    for z in probes:
        raw = SimpleNamespace(
            status="Solved", x=np.zeros(n), z=z, s=np.zeros(rows), obj_val=0.0, solve_time=0.0, iterations=0
        )
        found.append(chain.invert(raw, inverse).dual_vars)
    return found


def _dual(variable: Any, problem: Any, probed: list[Any]) -> Selection:
    """A dual variable, each entry of which is a multiple of one multiplier."""
    places = {v.id: (c, i) for c in problem.constraints for i, v in enumerate(c.dual_variables)}
    constraint, part = places[variable.id]
    ones, numbers, check = (_part(values.get(constraint.id), constraint, part) for values in probed)
    index = np.rint(numbers / np.where(ones == 0, 1, ones)).astype(np.int64) - 1
    index = np.maximum(index, 0)
    if not np.allclose(ones * np.cos(index), check, atol=1e-12):
        raise ProblemError(f"the dual variable of {constraint} isn't a selection of multipliers; it can't be returned")
    return Selection(torch.from_numpy(index), torch.from_numpy(ones), variable.shape, dual=True)


def _part(value: Any, constraint: Any, part: int) -> Array:
    """The entries of one of a constraint's dual variables, from what CVXPY recovered for all of them."""
    if value is None:
        raise ProblemError(f"CVXPY has no multiplier for the constraint {constraint}")
    saved = [variable.value for variable in constraint.dual_variables]
    constraint.save_dual_value(value)
    found = np.asarray(constraint.dual_variables[part].value, dtype=np.float64).ravel()
    for variable, old in zip(constraint.dual_variables, saved, strict=True):
        variable.save_value(old)
    return found
