"""Statuses, failure policy, errors."""

import pickle

import numpy as np
import pytest
import torch

from difflayers import Solution, Status
from difflayers._solution import check_status, describe_failures
from difflayers.errors import ConvergenceWarning, MissingBackendError, ProblemError, SolverError

HALF = Solution(torch.zeros(3, 2), torch.tensor([0, 1, 6], dtype=torch.int8), {"steps": torch.arange(3)})


def test_every_status_says_what_to_try():
    assert len({status.message for status in Status}) == len(Status)
    assert [s.name for s in Status if s.has_answer] == ["SUCCESS", "MAX_STEPS", "STALLED"]


def test_raise_names_the_failed_samples_and_carries_the_solution():
    with pytest.raises(
        SolverError, match=r"MAX_STEPS in 1 of 3 samples \(1\)(.|\n)*SINGULAR in 1 of 3 samples \(2\)"
    ) as info:
        HALF.raise_if_failed()
    assert info.value.solution is HALF
    assert pickle.loads(pickle.dumps(info.value)).solution.status.tolist() == [0, 1, 6]


def test_long_lists_of_failures_are_cut_and_batches_are_indexed():
    text = describe_failures(torch.ones(3, 7, dtype=torch.int8), "solve")
    assert "21 of 21 samples ((0, 0), (0, 1)" in text
    assert text.count("(") < 15
    assert "..." in text


def test_warn_and_ignore():
    with pytest.warns(ConvergenceWarning, match="SINGULAR"):
        assert check_status(HALF, "warn") is HALF
    assert check_status(HALF, "ignore") is HALF
    with pytest.raises(ProblemError, match="did you mean 'raise'"):
        check_status(HALF, "rais")


def test_numpy_copies_everything_to_the_host():
    solution = HALF.numpy()
    assert isinstance(solution.value, np.ndarray)
    assert isinstance(solution.stats["steps"], np.ndarray)
    assert HALF.ok.tolist() == [True, False, False]


def test_missing_backend_names_the_command():
    with pytest.raises(ImportError, match=r"pip install difflayers\[qp\]"):
        raise MissingBackendError("daqp", "qp")
