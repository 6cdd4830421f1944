"""Teacher-forced steps: before each one the state is the reference's, so that a failure names the step
and the operation that is wrong, and not an error carried along from earlier."""

from __future__ import annotations

from typing import cast

import pytest

from parity_tests import golden
from parity_tests.cases import CASES
from parity_tests.compare import assert_same
from parity_tests.drivers import DRIVERS, ForcedRun
from parity_tests.reference import Reference
from parity_tests.tolerances import TOLERANCES
from parity_tests.trajectory import stack

STEPS = 12
SUITES = [
    "sgd-decay",
    "sgd-warmup-power-1-r-2",
    "sgd-beta-0-decay",
    "sgd-prior-400",
    "adamw-everything",
    "adamw-inner-decay",
    "adamw-beta-0-decay",
    "adamw-b2-0",
    "adamw-zeros",
    "radam-silent-decay",
    "radam-not-silent-prior",
    "radam-everything",
    "radam-beta-1-decay",
]


DRIVEN = ["sfjax traced", "sftorch fused", "sftorch foreach", "sftorch single"]
# Each compiles: with numbers that are constants, the fullest case of an optimizer.
PAIRS = [(driver, case) for driver in DRIVEN for case in SUITES] + [
    ("sfjax", case) for case in ("sgd-warmup-power-1-r-2", "adamw-everything", "radam-everything")
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("driver", "case"), PAIRS)
def test_one_step_from_the_references_state(driver: str, case: str, dtype: str):
    chosen = CASES[case]
    recorded = golden.load_record(chosen.problem)
    truth = Reference(chosen.optimizer, recorded.params, chosen.options)
    run = cast(ForcedRun, DRIVERS[driver].start(chosen, recorded.params, dtype))
    for step, lr in enumerate(chosen.lrs[:STEPS]):
        if step:
            run.put(truth)
        before = truth.iterates()
        truth.update(recorded.step(step), lr)
        run.update(recorded.step(step), lr)
        assert_same(
            f"{driver} on {case} in {dtype}, update {step + 1} alone",
            stack({0: before, 1: run.iterates()}),
            stack({0: before, 1: truth.iterates()}),
            TOLERANCES[dtype, "single step"],
        )
