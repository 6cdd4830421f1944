"""The optimizers take the steps that S1-S9 say, in every option."""

import numpy as np
import pytest

import sfjax
from sfjax.tests import runs

ALL = [
    {},
    {"b1": 0.0},
    {"b1": 0.5, "r": 1.0, "prior_steps": 7},
    {"b1": 1.0, "weight_lr_power": 0.0},
    {"weight_decay": 0.1, "weight_lr_power": 1.0, "r": 0.5},
]
RAMPED = [{"warmup_steps": 5, "weight_decay": 0.1}, {"warmup_steps": 100, "b1": 0.0}]
ADAPTIVE = [{"b2": 0.0}, {"b2": 0.5, "eps": 0.1}, {"b2": 0.9999}]
CASES = [
    *((name, options) for name in ("sgd", "adamw") for options in (*ALL, *RAMPED)),
    *(("radam", options) for options in (*ALL, {"b2": 0.95, "silent_sgd_phase": False, "b1": 0.5})),
    *(("adamw", options) for options in (*ADAPTIVE, {"inner_momentum": 0.6, "warmup_steps": 3})),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda value: str(value).strip("{}").replace(" ", "")
)
def test_a_run_is_that_of_the_equations(name, options):
    options = {**runs.OPTIONS[name], **options}
    params = runs.leaf()
    grads = runs.gradients(25, like=params)
    y, state = runs.run(runs.FACTORIES[name](0.1, **options), runs.typed(params), grads)
    # Measured: at most 4e-15 over 25 steps.
    runs.assert_iterates(state, y, runs.plain_points(name, params, grads, **options), 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", runs.FACTORIES)
def test_metrics_are_the_scalars_of_the_last_step(name):
    params = runs.leaf()
    grads = runs.gradients(9, like=params)
    _, state = runs.run(runs.FACTORIES[name](0.1, r=1.0, **runs.OPTIONS[name]), runs.typed(params), grads)
    last = runs.plain_points(name, params, grads, r=1.0)["w"]
    want = {k: getattr(last, k) for k in ("lr", "lr_max", "c", "weight_sum")}
    want |= {"step": 9, "effective_lr": last.lr * (1 - 0.9 * (1 - last.c))}
    got = sfjax.metrics(state)
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(float(got[key]), value, rtol=1e-13, err_msg=key)


@pytest.mark.parametrize("name", runs.FACTORIES)
def test_a_float32_run_stays_near_the_float64_one(name):
    params = runs.leaf()
    grads = runs.gradients(200, like=params)
    y, state = runs.run(runs.FACTORIES[name](0.01, **runs.OPTIONS[name]), runs.typed(params), grads)
    points = runs.plain_points(name, params, grads, lr=0.01)
    # Measured: at most 6e-7 after 200 steps.
    runs.assert_iterates(state, y, points, 5e-6)
