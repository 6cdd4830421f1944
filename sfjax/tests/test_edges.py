"""The edges: beta of 0 and 1, learning rates of 0, and closed forms that need no optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs


@pytest.mark.usefixtures("x64")
def test_at_constant_lr_sgd_averages_all_its_points_alike():
    params, grads = runs.leaf(), runs.gradients(20, like=runs.leaf())
    y, state = runs.run(sfjax.schedule_free_sgd(0.1), runs.typed(params), grads)
    points = params["w"] - 0.1 * np.cumsum([g["w"] for g in grads], axis=0)
    np.testing.assert_allclose(state.z["w"], points[-1], rtol=1e-13)
    np.testing.assert_allclose(
        sfjax.schedule_free_eval_params(state, y)["w"], points.mean(axis=0), rtol=1e-13
    )
    np.testing.assert_allclose(float(state.c), 1 / 20, rtol=1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", runs.FACTORIES)
def test_at_b1_0_the_parameters_are_z_and_at_1_they_are_x(name):
    params, grads = runs.leaf(), runs.gradients(12, like=runs.leaf())
    for b1, field in ((0.0, "z"), (1.0, "x")):
        tx = runs.FACTORIES[name](0.1, b1=b1, weight_decay=0.1, **runs.OPTIONS[name])
        y, state = runs.run(tx, runs.typed(params), grads)
        points = runs.plain_points(name, params, grads, b1=b1, weight_decay=0.1)
        runs.assert_iterates(state, y, points, 1e-13)
        runs.assert_close(y, runs.of(points, field), 1e-13)


@pytest.mark.parametrize(("name", "b1"), [("sgd", 0.9), ("sgd", 1.0), ("adamw", 0.0), ("radam", 0.9)])
def test_at_lr_0_everything_stays_put(name, b1):
    params = runs.typed(runs.leaf(), jnp.float32)
    tx = runs.FACTORIES[name](0.0, b1=b1, weight_decay=0.1, **runs.OPTIONS[name])
    y, state = runs.run(tx, params, runs.gradients(8, like=params))
    for tree in sfjax.iterates(state, y):
        runs.assert_same(tree, params)
    assert float(state.c) == float(state.lr_max) == float(state.weight_sum) == 0.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sgd", "radam"])
def test_a_schedule_may_begin_at_0(name):
    def lr(step):
        return (
            0.05 * max(0, step - 1)
            if isinstance(step, int)
            else 0.05 * jnp.maximum(0, step - 1).astype(float)
        )

    params, grads = runs.leaf(), runs.gradients(10, like=runs.leaf())
    y, state = runs.run(runs.FACTORIES[name](lr, **runs.OPTIONS[name]), runs.typed(params), grads)
    # Measured: at most 2e-15.
    runs.assert_iterates(state, y, runs.plain_points(name, params, grads, lr=lr), 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["adamw", "radam"])
def test_a_falling_schedule_is_weighed_by_its_largest_value(name):
    lrs = [0.1, 0.3, 0.2, 0.05, 0.0, 0.0, 0.1, 0.01, 0.0]
    params, grads = runs.leaf(), runs.gradients(len(lrs), like=runs.leaf())
    tx = runs.FACTORIES[name](lambda step: jnp.asarray(lrs)[step], **runs.OPTIONS[name])
    y, state = runs.run(tx, runs.typed(params), grads)
    points = runs.plain_points(name, params, grads, lr=lrs.__getitem__)
    runs.assert_iterates(state, y, points, 1e-13)
    np.testing.assert_allclose(float(state.lr_max), points["w"].lr_max, rtol=1e-13)


def test_silent_radam_waits_and_then_takes_full_averages():
    params, grads = runs.leaf(), runs.gradients(5, like=runs.leaf())
    y, state = runs.run(sfjax.schedule_free_radam(0.1), runs.typed(params, jnp.float32), grads[:4])
    runs.assert_same(y, runs.typed(params, jnp.float32))
    assert float(sfjax.metrics(state)["c"]) == 0.0
    y, state = runs.run(sfjax.schedule_free_radam(0.1), y, grads[4:5], state)
    assert float(sfjax.metrics(state)["c"]) == 1.0
    points = runs.plain_points("radam", params, grads[:5], b2=0.999)
    runs.assert_iterates(state, y, points, 1e-6)


def test_decay_alone_shrinks_by_the_equations():
    tx = sfjax.schedule_free_sgd(0.5, weight_decay=0.5, b1=1.0)
    params = jnp.ones(3)
    updates, state = tx.update(jnp.zeros(3), tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates), 0.75)
    np.testing.assert_allclose(jax.tree.leaves(state.z)[0], 0.75)
