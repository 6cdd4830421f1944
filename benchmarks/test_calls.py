"""How much of our Python a step goes through: no more than it may, and the count can be wrong."""

from __future__ import annotations

import pytest

from benchmarks import calls
from sfcore.native import build


@pytest.mark.parametrize("name", calls.LIMITS)
def test_a_step_visits_no_more_than_it_may(name):
    if "fused" in name and isinstance(build.find(), str):
        pytest.skip(build.find())
    found = calls.visits(calls.steps()[name])
    summary, limit = calls.summary(found), calls.LIMITS[name]
    assert all(took <= most for took, most in zip(summary, limit, strict=True)), "\n".join(map(str, found))
    assert summary.functions > 10


def test_functions_are_counted_in_the_packages_asked_for_without_comprehensions():
    def counted():
        return [calls.summary(calls.Counter({("a", str(i)): i for i in range(3)})) for _ in range(2)]

    assert calls.summary(calls.visits(counted, ("benchmarks.calls",))) == (1, 1, 2)
    assert calls.summary(calls.visits(counted, ("benchmarks.call", "sftorch"))) == (0, 0, 0)
