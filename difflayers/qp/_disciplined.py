"""What a CVXPY problem, its parameters and its variables must be; errors that name the offending part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from difflayers.errors import ProblemError

RULES = "https://www.cvxpy.org/tutorial/dpp/index.html"


def check_problem(problem: Any, *, gp: bool) -> None:
    """Raise unless the problem is real, continuous and disciplined in its parameters.

    Raises:
        ProblemError: naming the expression that isn't.
    """
    import cvxpy

    if not isinstance(problem, cvxpy.Problem):
        raise ProblemError(f"problem must be a cvxpy.Problem, got {type(problem).__name__}")
    for leaf in (*problem.variables(), *problem.parameters()):
        if leaf.attributes["boolean"] or leaf.attributes["integer"]:
            raise ProblemError(f"{leaf.name()} is an integer variable, whose solution has no derivative; relax it")
        if leaf.is_complex():
            raise ProblemError(f"{leaf.name()} is complex; write real and imaginary part as two")
    disciplined: Any = problem  # whose decorated methods have lost their signatures
    if disciplined.is_dgp(dpp=True) if gp else disciplined.is_dcp(dpp=True):
        return
    where, expression = _offending(problem, gp)
    kind = "DGP" if gp else "DCP"
    if not (problem.is_dgp() if gp else problem.is_dcp()):
        hint = "" if gp or not problem.is_dgp() else " It is a geometric program: pass gp=True."
        raise ProblemError(f"the problem doesn't follow the {kind} rules: {expression}, in {where}.{hint}")
    raise ProblemError(
        f"the problem follows the {kind} rules, but not with parameters that vary (DPP, {RULES}): {expression}, in "
        f"{where}. Where parameters multiply one another, or are in a nonlinear function, make the result a parameter, "
        "or a variable with an equality constraint."
    )


def _offending(problem: Any, gp: bool) -> tuple[str, str]:
    """Where the first part is that breaks the rules, and its smallest expression that does."""
    from cvxpy.utilities import scopes

    with scopes.dpp_scope():
        parts = [("the objective", problem.objective)]
        parts += [
            (f"constraint {index}, {constraint}", constraint) for index, constraint in enumerate(problem.constraints)
        ]
        for where, part in parts:
            if not (part.is_dgp() if gp else part.is_dcp()):
                return where, str(_smallest(part, gp))
    return "the problem", str(problem)


def _smallest(expression: Any, gp: bool) -> Any:
    """The innermost part that is at fault, which may be the curvature of the whole."""
    for argument in expression.args:
        if not (argument.is_dgp() if gp else argument.is_dcp()):
            return _smallest(argument, gp)
    return expression


def check_parameters(problem: Any, parameters: Sequence[Any]) -> None:
    """Raise unless ``parameters`` are those of the problem, each once."""
    known = {parameter.id: parameter for parameter in problem.parameters()}
    seen: set[int] = set()
    for parameter in parameters:
        name = _name(parameter)
        if getattr(parameter, "id", None) not in known:
            raise ProblemError(f"parameters has {name}, which isn't a parameter of the problem")
        if parameter.id in seen:
            raise ProblemError(f"parameters has {name} twice")
        seen.add(parameter.id)
    missing = [parameter.name() for key, parameter in known.items() if key not in seen]
    if missing:
        raise ProblemError(f"parameters lacks {', '.join(missing)}; list every parameter of the problem")


def check_variables(problem: Any, variables: Sequence[Any]) -> None:
    """Raise unless ``variables`` are variables of the problem, or dual variables of its constraints."""
    if not variables:
        raise ProblemError("variables is empty; list the variables to return")
    primal = {variable.id for variable in problem.variables()}
    dual = {variable.id for constraint in problem.constraints for variable in constraint.dual_variables}
    for variable in variables:
        if getattr(variable, "id", None) not in primal | dual:
            raise ProblemError(
                f"variables has {_name(variable)}, which is neither a variable of the problem nor a dual variable of "
                "one of its constraints"
            )


def _name(leaf: Any) -> str:
    return str(leaf.name()) if hasattr(leaf, "name") and callable(leaf.name) else type(leaf).__name__
