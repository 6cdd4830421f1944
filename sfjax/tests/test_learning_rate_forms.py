"""A learning rate may come as any number, array of one element, or schedule; each means the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore import HyperparameterError
from sfjax.tests import runs

# 0.25 is exact in every dtype.
FORMS = {
    "float32-array": lambda: jnp.float32(0.25),
    "bfloat16-array": lambda: jnp.asarray(0.25, jnp.bfloat16),
    "float16-of-shape-1": lambda: jnp.asarray([0.25], jnp.float16),
    "numpy-float32": lambda: np.float32(0.25),
    "numpy-float64": lambda: np.float64(0.25),
    "numpy-array-of-shape-1-1": lambda: np.array([[0.25]]),
    "numpy-0-d": lambda: np.array(0.25),
    "schedule": lambda: lambda step: 0.25,
    "schedule-of-bfloat16": lambda: lambda step: jnp.asarray(0.25, jnp.bfloat16),
    "schedule-of-shape-1": lambda: lambda step: jnp.asarray([0.25]),
    "optax-schedule": lambda: optax.constant_schedule(0.25),
}
PARAMS = {"half": jnp.asarray([1.0, -2.0], jnp.bfloat16)}
GRADS = [{"half": np.ones(2) * i} for i in (1.0, -0.5, 0.25)]


@functools.cache
def with_a_python_float():
    return runs.run(sfjax.schedule_free_sgd(0.25, prior_steps=3), PARAMS, GRADS)


@pytest.mark.parametrize("form", FORMS)
def test_it_takes_the_same_steps_as_a_python_float(form):
    got = runs.run(sfjax.schedule_free_sgd(FORMS[form](), prior_steps=3), PARAMS, GRADS)
    runs.assert_same(got, with_a_python_float())


def test_an_integer_is_a_number_too():
    want = runs.run(sfjax.schedule_free_sgd(1.0), PARAMS, GRADS)
    for one in (1, np.int32(1), jnp.int32(1)):
        runs.assert_same(runs.run(sfjax.schedule_free_sgd(one), PARAMS, GRADS), want)


def test_every_hyperparameter_may_be_an_array_of_one_element():
    numbers = {"b1": 0.5, "b2": 0.75, "eps": 0.125, "weight_decay": 0.25, "r": 1.0, "weight_lr_power": 1.0}
    counts = {"prior_steps": 3, "warmup_steps": 2}
    want = runs.run(sfjax.schedule_free_adamw(0.25, **numbers, **counts), PARAMS, GRADS)
    for wrap in (lambda v: jnp.asarray([v]), lambda v: jnp.asarray(v, jnp.bfloat16), np.asarray):
        arrays = {name: wrap(value) for name, value in (numbers | counts).items()}
        runs.assert_same(runs.run(sfjax.schedule_free_adamw(0.25, **arrays), PARAMS, GRADS), want)


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_schedule_is_read_from_step_0_and_its_largest_value_weighs_the_prior_steps(name):
    def triangle(step):
        return 0.1 - 0.025 * abs(step - 4)  # 0 at first, 0.1 at step 4, and down again

    params = runs.leaf()
    grads = runs.gradients(8, like=params)
    tx = runs.FACTORIES[name](triangle, prior_steps=3, weight_lr_power=1.0)
    y, state = runs.run(tx, runs.typed(params), grads)
    points = runs.plain_points(name, params, grads, lr=triangle, prior_steps=3, weight_lr_power=1.0)
    # Measured: 2e-15.
    runs.assert_iterates(state, y, points, 1e-13)
    np.testing.assert_allclose(float(tx.init(runs.typed(params)).weight_sum), 0.3, rtol=1e-14)


def test_a_learning_rate_of_many_numbers_is_refused():
    with pytest.raises(HyperparameterError, match="learning_rate must be a finite number >= 0, got Array"):
        sfjax.schedule_free_sgd(jnp.asarray([0.1, 0.2]))
    with pytest.raises(TypeError, match="reshape"):
        jax.jit(lambda lr: sfjax.schedule_free_sgd(lr).init(PARAMS))(jnp.asarray([0.1, 0.2]))
