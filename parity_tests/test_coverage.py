"""No law goes unproven: taking any part of one away is noticed, and named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

import sfjax
import sftorch
from parity_tests import cases, coverage, drivers, golden, reference
from parity_tests.cases import CASES, Case
from parity_tests.compare import assert_same
from parity_tests.invalid import BAD_OPTIONS, bad
from parity_tests.mistakes import reference_driver
from parity_tests.tolerances import TOLERANCES
from sfcore import checks, hyperparameters, laws
from sfcore.laws import Law


@dataclass(frozen=True)
class Options(hyperparameters.Decayed):
    """An option more than any law has, and no warm-up."""

    extra: float = hyperparameters.option(0.5, checks.NON_NEGATIVE, "means nothing")


ROW = Law(
    "imaginary", "Imaginary", Options, "ImaginaryScheduleFree", "schedule_free_imaginary", step_size="base"
)
PARTS: dict[str, Any] = {
    "torch": {"ImaginaryScheduleFree": object},
    "jax": object,
    "rule": reference.Rule(reference.gradient, reference.constant),
    "defaults": cases.AVERAGING | {"weight_decay": 0.0, "extra": 0.5},
    "more": [Case("imaginary-extra", "its own option", "moments", "imaginary", {"extra": 1.0})],
    "bad": [bad("extra", -1.0, "a finite number >= 0", "pass 0")],
}


def test_every_law_is_proven():
    assert coverage.find_gaps() == []


def test_a_law_that_joins_with_all_its_parts_lacks_nothing_and_leaves_nothing_behind():
    before = list(CASES), list(BAD_OPTIONS), list(reference.RULES), list(laws.LAWS)
    with coverage.joined(ROW, **PARTS):
        assert coverage.find_gaps() == []
        assert drivers.DRIVERS["sfjax"].supports(CASES["imaginary-decay"])
        assert drivers.DRIVERS["sftorch single"].supports(CASES["imaginary-extra"])
        assert not drivers.DRIVERS["schedulefree 1.4.1"].supports(CASES["imaginary-decay"])
        # Without warm-up, buffers and its own option it is SGD, in the reference too.
        recorded = golden.load_record("smooth")
        ours = reference_driver("imaginary").run(CASES["imaginary-decay"], recorded)
        theirs = reference_driver("sgd").run(CASES["sgd-decay"], recorded)
        assert_same("imaginary", ours, theirs, TOLERANCES["float64", "golden"])
    assert before == (list(CASES), list(BAD_OPTIONS), list(reference.RULES), list(laws.LAWS))
    assert not hasattr(sfjax, ROW.jax)
    assert not hasattr(sftorch, ROW.torch)


@pytest.mark.parametrize(
    ("part", "nothing", "gap"),
    [
        ("torch", {}, "sftorch.ImaginaryScheduleFree, got no such name: write the direction"),
        ("jax", None, "sfjax.schedule_free_imaginary, got no such name: write the direction"),
        ("rule", None, "a rule in parity_tests.reference.RULES"),
        ("defaults", None, "its defaults in parity_tests.cases.DEFAULTS"),
        ("defaults", PARTS["defaults"] | {"r": 1.0}, "the row's defaults"),
        ("more", [], "a case in parity_tests.cases.CASES that varies 'extra'"),
        ("bad", [], "a bad value of 'extra' in parity_tests.invalid.BAD_OPTIONS"),
    ],
)
def test_a_part_that_a_law_lacks_is_named(part: str, nothing: Any, gap: str):
    with coverage.joined(ROW, **(PARTS | {part: nothing})):
        found = coverage.find_gaps()
    assert any(one.startswith("law 'imaginary' must have ") and gap in one for one in found), found


@pytest.mark.parametrize("twin", coverage.TWINS)
def test_a_law_that_no_driver_runs_is_named(twin: str, monkeypatch: pytest.MonkeyPatch):
    deaf = [replace(one, optimizers=("sgd",)) if one.name.startswith(twin) else one for one in drivers.TWINS]
    monkeypatch.setattr(drivers, "TWINS", deaf)
    found = coverage.find_gaps()
    assert len(found) == 3
    for name, one in zip(("adamw", "radam", "muon"), found, strict=True):
        assert one.startswith(f"law {name!r} must have a driver of {twin} in parity_tests.drivers.TWINS")


def test_a_driver_that_runs_no_law_is_named(monkeypatch: pytest.MonkeyPatch):
    lost = replace(drivers.DRIVERS["sfjax"], optimizers=("sgd", "adagrad"))
    monkeypatch.setitem(drivers.DRIVERS, "sfjax", lost)
    assert coverage.find_gaps() == ["driver 'sfjax' must run laws, got 'adagrad': register its row"]


def test_a_driver_must_say_which_laws_it_runs():
    with pytest.raises(TypeError, match="optimizers"):
        drivers.Driver("silent", drivers.DRIVERS["sfjax"].start)  # type: ignore[call-arg]
