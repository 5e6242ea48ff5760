"""What torchdeq's options are here."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from difflayers import linear
from difflayers._solver import IterativeSolver
from difflayers.errors import ProblemError, UnknownNameError
from difflayers.fixedpoint import Anderson, Broyden, Picard

_FORWARD: dict[str, Callable[..., IterativeSolver]] = {
    "anderson": lambda **options: Anderson(memory=6, **options),
    "broyden": Broyden,
    "fixed_point_iter": Picard,
    "simple_fixed_point_iter": Picard,
}
_BACKWARD: dict[str, Callable[..., linear.LinearSolver]] = {
    "anderson": lambda **options: linear.Anderson(memory=6, **options),
    "broyden": linear.GCR,
    "fixed_point_iter": linear.Picard,
    "simple_fixed_point_iter": linear.Picard,
}
# Only these values can be had here.
_ONLY = {"n_states": 1, "indexing": None, "sup_gap": -1, "sup_loc": None, "tau": 1.0}
_IGNORED = ("core", "no_stat")
# What the solvers call what a call may have as solver_kwargs.
_PER_CALL = {"f_max_iter": "max_steps", "m": "memory", "tau": "damping"}


@dataclass(frozen=True)
class Settings:
    """The options of ``get_deq`` that mean something here, with their defaults there, and ``batch_dims``."""

    f_solver: str = "fixed_point_iter"
    b_solver: str = "fixed_point_iter"
    f_max_iter: int = 40
    b_max_iter: int = 40
    f_tol: float = 1e-3
    b_tol: float = 1e-6
    f_stop_mode: str = "abs"
    b_stop_mode: str = "abs"
    eval_factor: float = 1.0
    eval_f_max_iter: int = 0
    ift: bool = False
    hook_ift: bool = False
    grad: Any = 1
    batch_dims: int = 1

    @classmethod
    def of(cls, args: Any, named: Mapping[str, Any]) -> Settings:
        """Those in a namespace or mapping, which may have the options of a whole program, and those given by name.

        Raises:
            UnknownNameError: one given by name that nobody has.
            ProblemError: one that can't be had here.
        """
        known = {field.name for field in fields(cls)}
        for name in named:
            if name not in known.union(_ONLY, _IGNORED):
                raise UnknownNameError("option", name, [*known, *_ONLY, *_IGNORED])
        given = {**(vars(args) if isinstance(args, Namespace) else args or {}), **named}
        for name, only in _ONLY.items():
            if given.get(name, only) not in (only, [], ()):
                raise ProblemError(
                    f"{name}={given[name]!r} of torchdeq isn't there; see DEQ.solve(at=) for trajectories"
                )
        return cls(**{name: value for name, value in given.items() if name in known})

    def forward(self) -> IterativeSolver:
        """The solver."""
        make = _FORWARD[_one_of("f_solver", self.f_solver, _FORWARD)]
        return make(max_steps=self.f_max_iter, **_tolerance("f_stop_mode", self.f_stop_mode, self.f_tol))

    def backward(self) -> linear.LinearSolver:
        """The solver of the systems behind derivatives."""
        make = _BACKWARD[_one_of("b_solver", self.b_solver, _BACKWARD)]
        if self.ift or self.hook_ift:
            return make(max_steps=self.b_max_iter, **_tolerance("b_stop_mode", self.b_stop_mode, self.b_tol))
        steps = self.grad[0] if isinstance(self.grad, Sequence) and len(self.grad) == 1 else self.grad
        if not isinstance(steps, int) or steps < 1:
            raise ProblemError(f"grad must be one number of steps, at least 1, got {self.grad!r}")
        return linear.Neumann(steps - 1)

    @property
    def evaluation_steps(self) -> int:
        """The most steps in evaluation."""
        return self.eval_f_max_iter or int(self.f_max_iter * self.eval_factor)


def with_options(solver: IterativeSolver, options: Mapping[str, Any]) -> IterativeSolver:
    """The solver of one call.

    Raises:
        UnknownNameError: an option that it doesn't have.
    """
    having = {field.name for field in fields(solver)}
    known = [name for name, own in _PER_CALL.items() if own in having]
    for name in options:
        _one_of(f"option of {type(solver).__name__}", name, known)
    return replace(solver, **{_PER_CALL[name]: value for name, value in options.items()}) if options else solver


def _tolerance(kind: str, mode: str, tol: float) -> dict[str, float]:
    own = {"abs": "atol", "rel": "rtol"}
    return {"rtol": 0.0, "atol": 0.0} | {own[_one_of(kind, mode, own)]: tol}


def _one_of(kind: str, name: str, known: Iterable[str]) -> str:
    if name not in known:
        raise UnknownNameError(kind, name, list(known))
    return name
