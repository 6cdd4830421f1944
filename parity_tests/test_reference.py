"""The reference against closed forms, so that the truth is not only what we typed."""

from __future__ import annotations

import ast
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from parity_tests import golden, problems, reference
from parity_tests.cases import DEFAULTS, SCHEDULES
from parity_tests.reference import Reference

SMOOTH = golden.load_record("smooth")
STEPS = 50
# Sums of 50 terms near 1 in another order than the recursion's: 50 * 2^-53.
CLOSED_FORM = 1e-14


def reference_run(optimizer: str, schedule: str = "constant", steps: int = STEPS, **changed: float):
    """Returns the run, and lists of its (x, y, z) of all leaves in one vector, and of its c."""
    options = DEFAULTS[optimizer] | {"lr": 0.05} | changed
    run = Reference(optimizer, SMOOTH.params, options)
    noted, weights = [_flat(run)], []
    for step in range(steps):
        run.update(SMOOTH.step(step), options["lr"] * SCHEDULES[schedule](step))
        noted.append(_flat(run))
        weights.append(run.c)
    x, y, z = np.swapaxes(noted, 0, 1)
    return x, y, z, np.array(weights)


def _flat(run: Reference) -> np.ndarray:
    return np.stack([np.concatenate([a.ravel() for a in s.values()]) for s in (run.x, run.y, run.z)])


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(np.asarray(a) - b).max() <= CLOSED_FORM * max(1.0, np.abs(b).max()))


def test_it_imports_numpy_and_the_standard_library_only():
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert {module.partition(".")[0] for module in modules} <= {"numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_c_is_one_over_t_at_constant_lr(optimizer: str, power: float):
    *_, c = reference_run(optimizer, weight_lr_power=power)
    assert _close(c * np.arange(1, STEPS + 1), np.ones(STEPS))


def test_c_is_two_over_t_plus_one_when_the_average_weighs_step_t_by_t():
    *_, c = reference_run("sgd", r=1.0)
    t = np.arange(1, STEPS + 1)
    assert _close(c, 2 / (t + 1))


def test_c_weighs_by_the_largest_lr_so_far_squared():
    *_, c = reference_run("sgd", schedule="sawtooth")
    lr_max = np.maximum.accumulate([SCHEDULES["sawtooth"](step) for step in range(STEPS)])
    assert _close(c, lr_max**2 / np.cumsum(lr_max**2))


def test_beta_1_is_primal_averaging():
    x, y, z, _ = reference_run("adamw", beta=1.0)
    means = np.cumsum(z[1:], axis=0) / np.arange(1, STEPS + 1)[:, None]
    assert np.array_equal(x, y)
    assert _close(x[1:], means)


def test_beta_0_is_polyak_ruppert_averaging_of_plain_sgd():
    x, y, z, _ = reference_run("sgd", beta=0.0)
    start = z[0]
    grads = np.stack([np.concatenate([g[k].ravel() for g in SMOOTH.grads.values()]) for k in range(STEPS)])
    plain = start - 0.05 * np.cumsum(grads, axis=0)
    assert np.array_equal(y, z)
    assert _close(z[1:], plain)
    assert _close(x[1:], np.cumsum(plain, axis=0) / np.arange(1, STEPS + 1)[:, None])


@pytest.mark.parametrize("optimizer", DEFAULTS)
@pytest.mark.parametrize("power", [0, 2])
def test_lr_0_stays_put(optimizer: str, power: float):
    x, y, z, c = reference_run(optimizer, lr=0.0, weight_lr_power=power)
    assert np.isfinite(c).all()
    # x passes through (1 - c) x + c x, which rounds: one unit in the last place a step at most.
    assert all(np.abs(s - s[0]).max() <= STEPS * 2**-53 for s in (x, y, z))


@pytest.mark.parametrize("prior", [1, 10, 400])
def test_prior_steps_count_the_start_as_that_many_steps(prior: int):
    x, _, z, _ = reference_run("sgd", prior_steps=prior)
    t = np.arange(1, STEPS + 1)[:, None]
    assert _close(x[1:], (prior * x[0] + np.cumsum(z[1:], axis=0)) / (prior + t))


def test_prior_steps_continue_the_weights_of_r():
    x, _, z, _ = reference_run("sgd", prior_steps=10, r=1.0)
    t = np.arange(1, STEPS + 1)[:, None]
    expected = (55 * x[0] + np.cumsum((t + 10) * z[1:], axis=0)) / (55 + np.cumsum(t + 10, axis=0))
    assert _close(x[1:], expected)


@pytest.mark.parametrize("beta", [0, 0.5, 0.9, 1])
def test_the_fold_is_s8_and_s9(beta: float):
    _, y, z, c = reference_run("sgd", beta=beta, steps=200, weight_decay=0.1, warmup_steps=20)
    folded = [y[0]]
    for k, weight in enumerate(c):
        delta = z[k + 1] - z[k]
        folded.append(folded[-1] + weight * (z[k] - folded[-1]) + (1 - beta * (1 - weight)) * delta)
    assert np.abs(np.array(folded) - y).max() <= 1e-14  # measured 1.8e-15


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.98])
def test_x_can_be_recovered_from_y_and_z(beta: float):
    x, y, z, _ = reference_run("adamw", beta=beta)
    assert _close((y - (1 - beta) * z) / beta, x)


@pytest.mark.parametrize("changed", [{}, {"b2": 0.0}, {"inner_momentum": 0.9}])
def test_adamws_first_step_is_the_sign_of_the_gradient(changed: dict[str, float]):
    _, _, z, _ = reference_run("adamw", steps=1, eps=1e-300, **changed)
    signs = np.concatenate([np.sign(g[0]).ravel() for g in SMOOTH.grads.values()])
    assert _close((z[0] - z[1]) / 0.05, signs)


def test_warmup_reaches_the_full_lr_in_its_last_step():
    _, _, z, _ = reference_run("sgd", warmup_steps=4, steps=6)
    grads = np.stack([np.concatenate([g[k].ravel() for g in SMOOTH.grads.values()]) for k in range(6)])
    used = np.abs(z[1:] - z[:-1]).sum(axis=1) / np.abs(grads).sum(axis=1)
    assert _close(used, 0.05 * np.array([0.25, 0.5, 0.75, 1, 1, 1]))


def _exact_rect(b2: Fraction, t: int) -> float | None:
    rho_inf = 2 / (1 - b2) - 1
    rho_t = rho_inf - 2 * t * b2**t / (1 - b2**t)
    if rho_t <= 4:
        return None
    return math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))


@pytest.mark.parametrize("b2", [0.5, 0.9, 0.99, 0.999])
def test_rectification_agrees_with_exact_arithmetic(b2: float):
    for t in range(1, 40):
        exact = _exact_rect(Fraction(b2), t)
        # rho_t is a difference of numbers near rho_inf = 1999: 2000 * 2^-53 / (rho_t - 4).
        assert abs(reference.rectification(b2, t) - (exact or 0.0)) <= 1e-12


@pytest.mark.parametrize(("silent", "moving"), [(True, range(5, 11)), (False, range(1, 11))])
def test_radam_is_silent_until_its_variance_is_usable(silent: bool, moving: range):
    _, _, z, _ = reference_run("radam", steps=10, silent_sgd_phase=silent)
    moved = [t for t in range(1, 11) if not np.array_equal(z[t], z[t - 1])]
    assert moved == list(moving)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_one_minus_a_power_keeps_every_digit(decay: float):
    for t in (1, 2, 10, 1000):
        exact = 1 - Fraction(decay) ** t
        assert abs(Fraction(reference.one_minus_power(decay, t)) - exact) <= exact * Fraction(2) ** -51


def test_recorded_numbers_are_the_same_in_float32():
    for problem in problems.PROBLEMS:
        recorded = golden.load_record(problem)
        for a in [*recorded.params.values(), *recorded.grads.values()]:
            assert np.array_equal(a, a.astype(np.float32))
