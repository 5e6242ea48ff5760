"""A few examples of every property; ``benchmarks/soak.py`` tries thousands."""

import pytest
from hypothesis import HealthCheck, given, settings
from properties import PROPERTIES

EXAMPLES = 30


@pytest.mark.parametrize("name", PROPERTIES)
def test_holds_for_any_input(name):
    one = PROPERTIES[name]

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(one.cases)
    def check(case):
        one(case)

    check()
