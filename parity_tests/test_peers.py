"""The other programs on every golden: equal, or different exactly where `known_differences.py` says."""

from __future__ import annotations

import pytest

from parity_tests import golden, recorded
from parity_tests.cases import CASES
from parity_tests.compare import assert_same
from parity_tests.drivers import PEERS, on_golden
from parity_tests.known_differences import KNOWN_DIFFERENCES, known
from parity_tests.mistakes import MISTAKES, planted
from parity_tests.tolerances import TOLERANCES

SUPPORTED = [(driver.name, case.id) for driver in PEERS for case in CASES.values() if driver.supports(case)]


def _compare(driver: str, case: str) -> None:
    got, want = on_golden(driver, case), golden.load(case)
    assert_same(f"{driver} on {case}", got, want, TOLERANCES["float64", "peers"])


@pytest.mark.parametrize(("driver", "case"), [s for s in SUPPORTED if not known(s[0], CASES[s[1]])])
def test_a_peer_follows_the_golden(driver: str, case: str):
    _compare(driver, case)


@pytest.mark.parametrize(("driver", "case"), [s for s in SUPPORTED if known(s[0], CASES[s[1]])])
def test_a_known_difference_is_still_there(driver: str, case: str):
    difference = known(driver, CASES[case])
    assert difference is not None
    try:
        _compare(driver, case)
    except Exception as error:
        raised = error
    else:
        pytest.fail(f"{difference.id} is gone from {driver} on {case}: take it out of known_differences.py")
    assert type(raised) is difference.raises
    # Numbers must differ, and not the shape of the run.
    assert difference.raises is not AssertionError or "after step" in str(raised)


@pytest.mark.parametrize(
    ("program", "mistake", "case"),
    [
        *(
            (recorded.PLUS, "norm corrected twice", f"plus-{name}")
            for name in ("smoothed", "long", "c-warmup")
        ),
        (recorded.AMUSE, "y decoded with the beta of the step", "adamw-warmup-amuse"),
    ],
)
def test_a_planted_mistake_is_all_that_a_program_does_otherwise(program: str, mistake: str, case: str):
    (wrong,) = (planted(one) for one in MISTAKES if one.id == mistake)
    got = wrong.run(
        CASES[case], golden.load_record(CASES[case].problem), noted=golden.load(case).steps.tolist()
    )
    assert_same(f"{mistake} on {case}", got, on_golden(program, case), TOLERANCES["float64", "peers"])


def test_every_known_difference_is_shown_by_a_case_and_can_be_read_about():
    shown = {difference.id for driver, case in SUPPORTED if (difference := known(driver, CASES[case]))}
    assert shown == {difference.id for difference in KNOWN_DIFFERENCES}
    assert all(difference.link.startswith("https://") for difference in KNOWN_DIFFERENCES)
