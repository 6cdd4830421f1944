"""The harness against planted mistakes, and its comparisons against differences made by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest

from parity_tests import golden
from parity_tests.cases import CASES
from parity_tests.compare import assert_same, largest
from parity_tests.drivers import Driver
from parity_tests.mistakes import MISTAKES, Mistake, planted, reference_driver
from parity_tests.tolerances import TOLERANCES, Tolerance
from parity_tests.trajectory import Trajectory

EXACT = TOLERANCES["float64", "golden"]
RIGHT = reference_driver("reference")
SHORT = 10


wrong = functools.cache(planted)  # one driver a mistake, so that its runs are found again


@functools.cache
def _short(driver: Driver, id: str, steps: int) -> Trajectory:
    """Returns the first steps of a run, once for all tolerances."""
    short = dataclasses.replace(CASES[id], steps=steps)
    return driver.run(short, golden.load_record(short.problem))


def failing_cases(driver: Driver, tolerance: Tolerance, steps: int = SHORT) -> Iterator[str]:
    """Yields the cases whose golden a driver leaves within the first steps."""
    for case in CASES.values():
        want = golden.load(case.id)
        want = want.at(want.steps[want.steps <= steps])
        try:
            assert_same(driver.name, _short(driver, case.id, steps), want, tolerance)
        except AssertionError:
            yield case.id


def test_the_reference_itself_is_not_caught():
    assert list(failing_cases(RIGHT, Tolerance(1e-14, 1, "float64", "the same program"))) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.id)
def test_a_planted_mistake_is_caught_within_ten_steps(mistake: Mistake):
    assert any(failing_cases(wrong(mistake), EXACT))


def test_float32_alone_would_not_be_enough():
    missed = {m.id for m in MISTAKES if not any(failing_cases(wrong(m), TOLERANCES["float32", "golden"]))}
    assert missed == {"sum in float32"}


def _changed(run: Trajectory, sequence: str, leaf: str, by: float, row: int = 5) -> Trajectory:
    leaves = {k: a.copy() for k, a in run.sequence(sequence).items()}
    leaves[leaf][row, ..., -1:] += by
    return dataclasses.replace(run, **{sequence: leaves})


@pytest.mark.parametrize("sequence", ["x", "y", "z"])
@pytest.mark.parametrize("by", [2e-11, -2e-11, np.nan, np.inf])
def test_a_difference_anywhere_is_found_and_named(sequence: str, by: float):
    want = golden.load("sgd-decay")
    with pytest.raises(AssertionError) as caught:
        assert_same("somebody on sgd-decay", _changed(want, sequence, "bias", by), want, EXACT)
    message = str(caught.value)
    value = float(want.sequence(sequence)["bias"][5, -1])
    step = int(want.steps[5])
    for part in (
        "somebody on sgd-decay",
        f"{sequence}['bias'][2] after step {step}",
        repr(value),
        repr(value + by),
    ):
        assert part in message
    assert f"{abs(by) / np.spacing(abs(value)):.3g} ulps" in message
    assert "of the largest displacement" in message


def test_the_first_failing_step_is_named_though_a_later_one_is_worse():
    want = golden.load("sgd-decay")
    got = _changed(_changed(want, "z", "kernel", 1e-3), "x", "bias", 1e-9, row=2)
    with pytest.raises(AssertionError, match=rf"x\['bias'\]\[2\] after step {want.steps[2]}"):
        assert_same("somebody", got, want, EXACT)


def test_what_is_missing_or_misshapen_is_an_error_and_not_skipped():
    want = golden.load("sgd-decay")
    without = dataclasses.replace(want, x={k: a for k, a in want.x.items() if k != "bias"})
    flat = dataclasses.replace(want, z=want.z | {"kernel": want.z["kernel"].reshape(len(want.steps), -1)})
    for got in (without, flat):
        with pytest.raises(AssertionError, match="must have leaves and shapes"):
            assert_same("somebody", got, want, EXACT)
    with pytest.raises(AssertionError, match=r"without steps \[60\]"):
        assert_same("somebody", want.at(want.steps[:-1]), want, EXACT)


def test_errors_are_relative_to_movement():
    want = golden.load("adamw-scales")
    displacement = max(np.abs(a - a[0]).max() for a in (s["large"] for s in (want.x, want.y, want.z)))
    assert np.abs(want.x["large"]).max() > 1000 * displacement
    loose = Tolerance(1e-3, 0, "float64", "made up")
    assert largest(_changed(want, "x", "large", 2e-3 * displacement), want, loose) == pytest.approx(2e-3)


def test_a_leaf_that_must_stay_put_may_move_by_a_few_ulps_only():
    want = golden.load("sgd-zeros")
    largest_value = max(np.abs(s["bias"]).max() for s in (want.x, want.y, want.z))
    ulp = np.spacing(largest_value)
    assert_same("somebody", _changed(want, "x", "bias", EXACT.ulps * ulp), want, EXACT)
    with pytest.raises(AssertionError):
        assert_same("somebody", _changed(want, "x", "bias", 2 * EXACT.ulps * ulp), want, EXACT)
