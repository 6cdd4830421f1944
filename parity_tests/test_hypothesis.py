"""Both twins against the reference anywhere in the hyperparameter space, on short runs; the same
examples every time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests import golden
from parity_tests.cases import SCHEDULES, Case
from parity_tests.compare import assert_same
from parity_tests.drivers import DRIVERS
from parity_tests.problems import PROBLEMS
from parity_tests.tolerances import TOLERANCES
from sfcore import laws

STEPS = 12
ALIKE = settings(derandomize=True, deadline=None, database=None)
# Recovering x divides by beta, so rounding grows as 1 / beta between 0, where x is stored, and here.
BETA = st.sampled_from([0.0, 1.0]) | st.floats(0.25, 0.99)
SHARED = {
    "lr": st.just(0.0) | st.floats(1e-3, 10.0),
    "beta": BETA,
    "r": st.just(0.0) | st.floats(0.1, 3.0),
    "weight_lr_power": st.just(0.0) | st.floats(0.1, 4.0),
    "weight_decay": st.just(0.0) | st.floats(1e-4, 0.5),
}
OFF = st.just(0)
OWN: dict[str, st.SearchStrategy[Any]] = {
    "c_warmup": OFF | st.integers(1, 8),
    "refined_c": OFF | st.floats(1.0, 30.0),
    "window": OFF | st.integers(1, 20),
    "window_rule": st.sampled_from(["floor", "constant"]),
    "weight_lr": st.sampled_from(["max", "current"]),
    "beta_rule": st.sampled_from(["constant", "constant", "anneal", "amuse"]),
    "beta_max": st.floats(0.25, 0.99),
    "beta_anneal_steps": st.integers(1, 20),
    "beta_hold_steps": st.integers(2, 20),
    "rho": st.floats(0.1, 3.0),
    "decay_at": st.sampled_from(["y", "z"]),
    "decay_power": st.sampled_from([1, 2, "normalized"]),
    "warmup_steps": st.integers(0, 20),
    "eps": st.floats(1e-10, 1.0),
    "b2": st.just(0.0) | st.floats(0.1, 0.999),
    "inner_momentum": st.just(0.0) | st.floats(0.1, 0.99),
    "silent_sgd_phase": st.booleans(),
    "mu": st.just(0.0) | st.floats(0.1, 0.99),
    "ns_steps": st.integers(1, 6),
    "nesterov": st.booleans(),
    "normalize": st.sampled_from(["none", "rows"]),
    "b2_rows": st.just(0.0) | st.floats(0.1, 0.999),
    "adjust_lr": st.sampled_from(["match_rms_adamw", "original"]),
    "output_axis": st.sampled_from(["first", "last"]),
    "adam_lr_ratio": OFF | st.floats(0.1, 3.0),
}
# Where rho_t passes 4 the last bit decides whether a step is taken: values that stay clear of it.
RECTIFIED = {"b2": st.sampled_from([0.7, 0.9, 0.95, 0.99, 0.999])}
OPTIMIZERS = list(laws.directed())
TWINS = ("sfjax traced", "sftorch fused", "sftorch foreach", "sftorch single", "sftorch closure")
# A law in JAX and all in torch by default; the goldens hold every path to the same laws.
SHORT = [("sfjax traced", "sgd"), *(("sftorch single", optimizer) for optimizer in OPTIMIZERS)]
FOLLOWERS = [
    pytest.param(twin, optimizer, marks=[] if (twin, optimizer) in SHORT else pytest.mark.slow)
    for twin in TWINS
    for optimizer in OPTIMIZERS
    if optimizer in DRIVERS[twin].runs()
]


def options_of(optimizer: str) -> dict[str, st.SearchStrategy[Any]]:
    """Returns what to draw each option of a law from, but for prior_steps."""
    law = laws.LAWS[optimizer]
    every = SHARED | OWN | (RECTIFIED if law.step_size == "rectified" else {})
    return {name: every[name] for name in law.defaults if name != "prior_steps"}


@st.composite
def cases(draw: st.DrawFn, optimizer: str) -> Case:
    """Draws a valid case."""
    changed = draw(st.fixed_dictionaries(options_of(optimizer)))
    # What is refused together: two lengths of an average, one that is constant without any.
    if changed["window"]:
        changed["refined_c"] = 0
    else:
        changed["window_rule"] = "floor"
    if changed["beta_rule"] != "constant":
        changed["beta"] = min(max(changed["beta"], 0.25), changed["beta_max"])
    can = changed["lr"] > 0 and not changed["c_warmup"]  # a prior of weight 0, or that is thrown away
    prior = draw(st.integers(0, 50)) if can else 0
    schedule = draw(st.sampled_from([name for name in SCHEDULES if not prior or SCHEDULES[name](0) == 1]))
    problem = draw(st.sampled_from(list(PROBLEMS)))
    return Case(
        "drawn", "drawn", "drawn", optimizer, changed | {"prior_steps": prior}, schedule, problem, STEPS
    )


def check(driver: str, case: Case) -> None:
    """Holds one run against the reference's."""
    recorded = golden.load_record(case.problem)
    got, want = DRIVERS[driver].run(case, recorded), golden.replay(case, recorded)
    assert_same(f"{driver} on {case}", got, want, TOLERANCES["float64", "hypothesis"])


@pytest.mark.parametrize(("driver", "optimizer"), FOLLOWERS)
def test_a_twin_follows_the_reference_everywhere(driver: str, optimizer: str):
    # Words decide what is compiled: of Muon's are so many that a program serves one case.
    of_jax = 10 if optimizer == "muon" else 40
    examples = of_jax if driver.startswith("sfjax") else 100

    @settings(ALIKE, max_examples=examples)
    @given(cases(optimizer))
    def follow(case: Case) -> None:
        check(driver, case)

    follow()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sfjax_follows_the_reference_with_numbers_that_are_constants(optimizer: str):
    @settings(ALIKE, max_examples=10 if optimizer == "muon" else 100)
    @given(cases(optimizer))
    def follow(case: Case) -> None:
        check("sfjax", case)

    follow()
