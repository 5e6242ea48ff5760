"""All families, one after the other."""

from __future__ import annotations

from difflayers.demo import _digits_row, _dispatch, _penalties, _predators
from difflayers.demo._digits import one_thread
from difflayers.demo._failure import infeasible
from difflayers.demo._row import Row


def run(quick: bool, *, seed: int, device: str) -> tuple[list[Row], str]:
    """A row for each family, and what a failure says."""
    with one_thread():
        rows = [
            _digits_row.run(quick, seed=seed, device=device),
            _predators.run(quick),
            _dispatch.run(quick),
            _penalties.run(quick),
        ]
        return rows, infeasible()
