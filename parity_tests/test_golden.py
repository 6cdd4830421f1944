"""Every twin on every golden, open loop; and the goldens against the program that wrote them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from parity_tests import golden, make_golden
from parity_tests.cases import CASES, DEFAULTS, FAMILIES
from parity_tests.compare import assert_same
from parity_tests.drivers import TWINS, Driver, first_of_their_family, first_of_their_optimizer, on_golden
from parity_tests.problems import PROBLEMS, SHAPES
from parity_tests.tolerances import TOLERANCES

# Where numbers are constants each case compiles. All cases run traced, so one of a family, which has its
# option as a constant, is enough here, and in float64; and the wrapper shares what averages.
SHORT = {
    "sfjax": first_of_their_family,
    "sfjax native": first_of_their_family,  # its scalars are those of "sfjax traced", its C is sftorch's
    "sfjax wrapper": first_of_their_optimizer,
}
# Of these a case of each optimizer is compiled as it is for users, by default too. Slow cases all are.
OPTIMIZED = ("sfjax", "sfjax traced")


def _in_float64(driver: Driver) -> set[str]:
    """Returns the cases that run by default; of Muon, whose steps compile long, one of a family in JAX."""
    if driver.name in SHORT:
        return set(SHORT[driver.name](driver))
    first = set(first_of_their_family(driver))
    heavy = driver.name.startswith("sfjax")
    return {case.id for case in CASES.values() if not heavy or case.optimizer != "muon" or case.id in first}


def _runs() -> list:
    """Returns (driver, case, dtype) for all that a twin supports; float64 catches every planted mistake."""
    found = []
    for driver in TWINS:
        in_float64 = _in_float64(driver)
        in_float32 = set() if driver.name in SHORT else set(first_of_their_optimizer(driver))
        fast = {"float64": in_float64, "float32": in_float32}
        as_users_do = set(first_of_their_optimizer(driver) if driver.name in OPTIMIZED else ())
        for case in filter(driver.supports, CASES.values()):
            for dtype in fast:
                marks = [] if case.id in fast[dtype] else [pytest.mark.slow]
                if case.id in as_users_do:
                    marks.append(pytest.mark.optimized)
                found.append(pytest.param(driver.name, case.id, dtype, marks=marks))
    return found


@pytest.mark.parametrize(("driver", "case", "dtype"), _runs())
def test_a_twin_follows_the_golden(driver: str, case: str, dtype: str):
    got = on_golden(driver, case, dtype)
    allowed = TOLERANCES.get((dtype, f"golden, {case}"), TOLERANCES[dtype, "golden"])
    assert_same(f"{driver} on {case} in {dtype}", got, golden.load(case), allowed)


@pytest.mark.parametrize("driver", [driver.name for driver in TWINS])
def test_a_run_starts_where_it_was_told_to(driver: str):
    run, start = on_golden(driver, "sgd-beta-half"), golden.load_record("smooth").params
    for sequence in (run.x, run.y, run.z):
        assert all(np.array_equal(sequence[leaf][0], start[leaf]) for leaf in SHAPES)


def test_goldens_are_what_the_generator_writes():
    assert make_golden.find_problems() == []


def _edit(path: Path, array: str, change: float) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    arrays[array].flat[-1] += np.asarray(change, arrays[array].dtype)
    np.savez(path, allow_pickle=False, **arrays)


def test_the_check_finds_every_kind_of_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "golden"
    shutil.copytree(golden.FOLDER, folder)
    _edit(folder / "adamw-decay.npz", "x", 1e-13)
    _edit(folder / "sgd-decay.npz", "steps", 1)
    _edit(folder / "problem-smooth.npz", "grads-kernel", 1e-6)
    (folder / "sgd-long.npz").unlink()
    (folder / "nobodys.npz").write_bytes(b"")
    found = make_golden.find_problems(folder)
    named = {sentence.split(".npz")[0] for sentence in found}
    assert named == {"adamw-decay", "sgd-decay", "problem-smooth", "sgd-long", "nobodys"}
    assert make_golden.main(["--check"], folder) == 1
    assert "x['large'][1, 0, 2] after step 60: got" in capsys.readouterr().out
    assert make_golden.main([], folder) == 0
    assert make_golden.main(["--check"], folder) == 0


def test_every_case_says_why_and_every_option_is_varied():
    assert all(len(case.why.split()) >= 3 for case in CASES.values())
    assert all(len(problem.why.split()) >= 3 for problem in PROBLEMS.values())
    for optimizer, defaults in DEFAULTS.items():
        cases = [case for case in CASES.values() if case.optimizer == optimizer]
        assert {name for case in cases for name in case.changed} == set(defaults)
        assert all(set(case.options) == set(defaults) for case in cases)
        assert {case.problem for case in cases} == set(PROBLEMS)
    assert len(FAMILIES) == 14


def test_goldens_stay_small():
    assert sum(path.stat().st_size for path in golden.FOLDER.iterdir()) < 3e6
