"""Names of solvers and options: ours, and those of CVXPY and cvxpylayers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from difflayers._areas import resolve
from difflayers._solver import Solver
from difflayers.errors import ProblemError, UnknownNameError
from difflayers.qp._clarabel import Clarabel
from difflayers.qp._cone_api import CONE_SOLVERS

# What diffcp, SCS, Clarabel and Moreau call the options that every solver has.
ALIASES = {
    "tol": ("eps", "eps_abs", "eps_rel", "tol_gap_abs", "tol_gap_rel", "tol_feas"),
    "max_steps": ("max_iters", "max_iter"),
    "threads": ("n_jobs_forward", "max_threads"),
}
# What they call how they get to an answer, which then isn't ours.
IGNORED = (
    "acceleration_interval", "acceleration_lookback", "adaptive_scale", "alpha", "cg_rate", "device", "eps_infeas",
    "gpu", "log_csv_filename", "mode", "n_jobs_backward", "normalize", "raise_on_error", "rho_x", "scale",
    "use_indirect", "verbose", "warm_start", "write_data_filename",
)  # fmt: skip
# Backends of cvxpylayers for which another solver answers.
REPLACED = {"cuclarabel": "Clarabel, on the CPU"}


def named(solver: str | Solver | None) -> Solver | None:
    """The solver that was meant, in capitals too, as CVXPY writes them; None is the default one."""
    if not isinstance(solver, str):
        return None if solver is None else resolve(solver, CONE_SOLVERS)
    name = solver.lower()
    if name in REPLACED:
        _tell(f"solver={solver!r}: {REPLACED[name]}, answers for it; the derivative is computed where parameters are")
    return None if name == "diffcp" or name in REPLACED else resolve(name, CONE_SOLVERS)


def with_options(solver: Solver | None, options: Mapping[str, Any] | None) -> Solver | None:
    """The solver with options by our names or theirs; with a warning where one has no meaning here.

    Raises:
        UnknownNameError: an option that nobody has.
        ProblemError: ``mode="lpgd"``, which is an adjoint here.
    """
    if not options:
        return solver
    if "lpgd" in str(options.get("mode")):
        raise ProblemError("solver_args has mode='lpgd': pass adjoint=difflayers.qp.LPGDAdjoint() to the layer instead")
    if "solve_method" in options:
        solver = named(options["solve_method"])
    having = solver or Clarabel()
    changes: dict[str, Any] = {}
    for name, value in options.items():
        if name in IGNORED:
            _tell(f"the option {name} of other solvers has no meaning here and was ignored")
        elif name != "solve_method":
            own = _own(having, name)
            changes[own] = min(value, changes.get(own, value)) if own == "tol" else value
    if changes.get("threads") is not None and changes["threads"] <= 0:
        changes["threads"] = None  # diffcp's way to say as many as there are
    return replace(having, **changes) if changes else solver  # type: ignore[type-var]


def _own(solver: Solver, name: str) -> str:
    """Our name of an option."""
    known = [field.name for field in fields(solver)]  # type: ignore[arg-type]
    own = next((own for own, others in ALIASES.items() if name in others), name)
    if own not in known:
        accepted = [*known, *(other for own in ALIASES if own in known for other in ALIASES[own])]
        raise UnknownNameError(f"option of {type(solver).__name__}", name, [*accepted, "solve_method", *IGNORED])
    return own


def _tell(message: str) -> None:
    # One place, so that Python shows each message once.
    warnings.warn(message, stacklevel=2)
