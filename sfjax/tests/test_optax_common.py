"""Optax's own tests of what it has in contrib, with sfjax's functions in place of its schedule_free ones."""

from __future__ import annotations

import re
import unittest
from collections.abc import Iterator

import optax
import pytest

import sfjax

theirs = pytest.importorskip("optax.contrib._common_test", reason="this optax ships no tests")

NAMES = ("schedule_free", "schedule_free_adamw", "schedule_free_eval_params", "schedule_free_sgd")
SHORT = ("test_optimizers_can_be_wrapped_in_inject", "test_optimizers_accept_learning_rate_schedule")
# inner_momentum that is injected is an array, which may become another than 0, and so has its buffer.
DIFFERS = "test_optimizers_can_be_wrapped_in_inject_hyperparams(opt_name='schedule_free_adamw'"


def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for one in suite:
        yield from cases(one) if isinstance(one, unittest.TestSuite) else [one]


def name(case: unittest.TestCase) -> str:
    """Returns what absl calls it, without its number and addresses, which differ by process."""
    told = re.sub(r"^.*\.(\w+?)\d* \(", r"\1(", str(case.shortDescription()).splitlines()[0])
    return re.sub(r" at 0x[0-9a-f]+", "", told)


EVERY = [
    one
    for one in cases(unittest.defaultTestLoader.loadTestsFromModule(theirs))
    if "schedule_free" in name(one)
]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.filterwarnings("default")  # theirs, about other optimizers too
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(one, marks=[] if name(one).startswith(SHORT) else [pytest.mark.slow], id=name(one))
        for one in EVERY
    ],
)
def test_it_holds_here_too(case, monkeypatch):
    for one in NAMES:
        monkeypatch.setattr(optax.contrib, one, getattr(sfjax, one))
    result = unittest.TestResult()
    case.run(result)
    assert result.testsRun == 1
    assert result.errors == []
    if name(case).startswith(DIFFERS):
        ((_, said),) = result.failures
        assert "Trees have different structures" in said
        assert (
            said.count("MomentsState], [[*, *], None]") == said.count("MomentsState], [[*, *], [*, *]]") == 1
        )
    else:
        assert result.failures == []


def test_there_are_such_cases():
    assert len(EVERY) >= 40
    assert sum(name(one).startswith(DIFFERS) for one in EVERY) == 1
