"""The equations of scalars: the same from every namespace, and right in float32."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfcore import averaging
from sfcore.averaging import floats

TIMES = [1, 2, 3, 4, 5, 6, 7, 50, 1000, 100_000]
DECAYS = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999]
OPTIONS = [(0.0, 2.0, 0), (1.0, 2.0, 0), (0.5, 0.0, 10), (2.0, 1.0, 400)]


def close(found: object, expected: Any, rel: float = 1e-14) -> None:
    assert np.asarray(found, np.float64) + np.zeros(len(expected)) == pytest.approx(
        np.asarray(expected, np.float64), rel=rel, abs=1e-300
    )


def everywhere(function, *columns):  # type: ignore[no-untyped-def]
    """Returns what Python floats, NumPy and JAX in float64 make of the same numbers, one row each."""
    rows = list(zip(*columns, strict=True))
    arrays = [np.array(column, np.float64) for column in columns]
    with jax.enable_x64(True):
        of_jax = np.asarray(function(*map(jnp.asarray, arrays), jnp))
    return [function(*map(float, row), floats) for row in rows], function(*arrays, np), of_jax


@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_the_ramp_is_one_function(warmup_steps: int):
    by_hand = [min(1.0, t / warmup_steps) if warmup_steps else 1.0 for t in TIMES]
    for found in everywhere(lambda t, xp: averaging.ramp(t, warmup_steps, xp), TIMES):
        close(found, by_hand)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lr", [0.0, 1e-20, 0.5])
def test_the_weight_is_one_function(options: tuple[float, float, int], lr: float):
    r, power, prior = options
    by_hand = [(t + prior) ** r * lr**power for t in TIMES]
    for found in everywhere(lambda t, xp: averaging.step_weight(t, 0 * t + lr, *options, xp), TIMES):
        close(found, by_hand)


def test_the_averaging_weight_is_0_where_nothing_has_weighed():
    sums = [0.0, 0.5, 4.0]
    for found in everywhere(averaging.averaging_weight, [0.0, 0.5, 1.0], sums):
        close(found, [0.0, 1.0, 0.25])


@pytest.mark.parametrize("decay", DECAYS)
def test_the_bias_correction_is_one_function(decay: float):
    by_hand = [-math.expm1(t * math.log(decay)) if decay else 1.0 for t in TIMES]
    for found in everywhere(lambda t, xp: averaging.bias_correction(decay, t, xp), TIMES):
        close(found, by_hand)


@pytest.mark.parametrize("b2", DECAYS)
def test_the_rectification_is_the_published_one(b2: float):
    rho_inf = 2 / (1 - b2) - 1
    for rects, usables in (
        zip(*[averaging.rectification(b2, t) for t in TIMES], strict=True),
        averaging.rectification(b2, np.array(TIMES, float), np),
    ):
        for t, rect, usable in zip(TIMES, rects, usables, strict=True):
            rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
            assert bool(usable) == (rho > 4)
            if rho > 4:
                by_hand = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
                assert rect == pytest.approx(math.sqrt(by_hand), rel=1e-8)


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.9999])
def test_float32_keeps_the_bias_correction_and_the_rectification(b2: float):
    t = np.array(TIMES[5:])
    exact = averaging.bias_correction(b2, t, np), averaging.rectification(b2, t, np)[0]
    narrow = jnp.asarray(t, jnp.float32)
    close(averaging.bias_correction(b2, narrow, jnp), exact[0], rel=1e-6)
    close(averaging.rectification(b2, narrow, jnp)[0], exact[1], rel=1e-5)


def test_nothing_has_an_infinite_slope_at_lr_0():
    def weight(lr: jax.Array) -> jax.Array:
        return averaging.step_weight(jnp.float32(3.0), lr, 0.5, 0.5, 0, jnp)

    assert jax.grad(weight)(jnp.float32(0.0)) == 0


def test_prior_steps_weigh_what_as_many_steps_would_have():
    counted = averaging.sum_of_powers(3, 2.0)
    assert counted == 1 + 4 + 9
    assert averaging.prior_weight(counted, 0.5, 2.0) == 14 * 0.25
    assert averaging.prior_weight(averaging.sum_of_powers(0, 1.0), 0.5, 2.0) == 0


@pytest.mark.parametrize("beta", [0.1, 0.9, 0.965, 1.0])
@pytest.mark.parametrize("old_beta", [0.1, 0.9, 1.0])
def test_the_coefficients_are_the_two_lines_of_x_and_y(beta: float, old_beta: float):
    x, z, delta, c = 0.3, 2.0, -0.7, 0.2
    y = old_beta * x + (1 - old_beta) * z
    k1, k2 = averaging.coefficients(c, beta, beta - old_beta, old_beta)
    after = beta * ((1 - c) * x + c * (z + delta)) + (1 - beta) * (z + delta)
    assert y + k1 * (z - y) + k2 * delta == pytest.approx(after, rel=1e-14)
    if beta == old_beta:
        assert (k1, k2) == (c, 1 - beta * (1 - c))
        assert averaging.effective_lr(0.5, c, beta) == 0.5 * k2


RULES = [
    {"beta": 0.9, "beta_rule": "anneal", "beta_max": 0.965, "beta_anneal_steps": 30},
    {"beta": 0.5, "beta_rule": "anneal", "beta_max": 0.5, "beta_anneal_steps": 1},
    {"beta": 0.9, "beta_rule": "anneal", "beta_max": 0.9999, "beta_anneal_steps": 100_000},
    {"beta": 0.6, "beta_rule": "amuse", "beta_hold_steps": 2, "rho": 0.8},
    {"beta": 0.9, "beta_rule": "amuse", "beta_hold_steps": 900, "rho": 0.3},
]


def published(t: int, options: dict[str, Any]) -> float:
    """Returns 1 - beta as it is written."""
    q = 1 - options["beta"]
    if options["beta_rule"] == "anneal":
        u = min(max(t - 1, 0) / options["beta_anneal_steps"], 1.0)
        return q ** (1 - u) * (1 - options["beta_max"]) ** u
    hold = options["beta_hold_steps"]
    return q if t <= hold else q * ((hold - 1) / (t - 1)) ** options["rho"]


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_rule_of_beta_is_the_published_one_and_its_change_the_difference(options: dict[str, Any]):
    times = [*TIMES[:5], 30, 31, 32, 900, 901, 1000, 100_000, 100_001, 100_002]
    rule = averaging.BETAS[options["beta_rule"]]
    by_hand = [published(t, options) for t in times]
    for found in everywhere(lambda t, xp: rule(t, options, xp).q, times):
        close(found, by_hand)
    for found in everywhere(lambda t, xp: rule(t, options, xp).beta, times):
        close(found, [1 - q for q in by_hand])
    differences = [published(t - 1, options) - published(t, options) for t in times]
    for found in everywhere(lambda t, xp: 0.0 * t + rule(t, options, xp).change, times):
        assert np.asarray(found) == pytest.approx(differences, rel=1e-6, abs=1e-15)
    assert [averaging.beta_after(t, options) for t in times] == pytest.approx(
        1 - np.array(by_hand), rel=1e-14
    )
    assert averaging.beta_after(0, options) == options["beta"]


@pytest.mark.parametrize("options", RULES, ids=str)
def test_float32_keeps_beta_and_its_change(options: dict[str, Any]):
    times = np.unique([*range(2, 50), *np.logspace(2, 6, 200).astype(int)])
    rule = averaging.BETAS[options["beta_rule"]]
    exact = rule(times.astype(float), options, np)
    found = rule(jnp.asarray(times, jnp.float32), options, jnp)
    for name in ("beta", "q", "change"):  # of a difference of rounded betas, a digit would be left
        close(getattr(found, name), np.broadcast_to(getattr(exact, name), times.shape), rel=1e-6)


@pytest.mark.parametrize(("point", "expected"), [("y", (0.1, 0.0)), ("z", (0.0, 0.1))])
def test_decay_is_two_numbers(point: str, expected: tuple[float, float]):
    assert averaging.DECAYS[point](0.1) == expected
