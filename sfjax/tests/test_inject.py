"""Every numeric hyperparameter can be injected, traced and changed on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs

SHARED = {"b1": 0.8, "weight_decay": 0.1, "weight_lr_power": 1.5, "r": 0.5, "prior_steps": 7}
ADAPTIVE = {"b2": 0.9, "eps": 1e-3}
EVERYTHING = {
    "sgd": {**SHARED, "warmup_steps": 4},
    "adamw": {**SHARED, **ADAPTIVE, "warmup_steps": 4, "inner_momentum": 0.5},
    "radam": {**SHARED, **ADAPTIVE},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", runs.FACTORIES)
def test_all_hyperparameters_at_once_may_be_traced(name):
    options = EVERYTHING[name]
    params = runs.leaf()
    grads = runs.gradients(10, like=params)
    tx = optax.inject_hyperparams(runs.FACTORIES[name])(0.1, **options)
    state = jax.jit(tx.init)(runs.typed(params))
    rules = {"c_warmup", "refined_c", "window", "decay_power"}
    rules |= {"b1_max", "b1_anneal_steps", "b1_hold_steps", "rho"}
    assert set(state.hyperparams) == {"learning_rate", "seed", *rules, *options}  # every number, says optax
    y, state = runs.run(tx, runs.typed(params), grads, state)
    # Measured: at most 3e-15.
    runs.assert_iterates(state, y, runs.plain_points(name, params, grads, **options), 1e-13)


@pytest.mark.parametrize("name", runs.FACTORIES)
def test_float32_is_as_good_traced_as_static(name):
    options = EVERYTHING[name]
    params = runs.leaf()
    grads = runs.gradients(10, like=params)
    tx = optax.inject_hyperparams(runs.FACTORIES[name])(0.1, **options)
    y, state = runs.run(tx, runs.typed(params, jnp.float32), grads)
    # Measured: at most 3e-7.
    runs.assert_iterates(state, y, runs.plain_points(name, params, grads, **options), 2e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_lr_and_b1_may_change_on_the_fly(name):
    lrs, betas = (
        [0.1, 0.1, 0.02, 0.3, 0.05, 0.05, 0.2, 0.0, 0.1],
        [0.9, 0.9, 0.5, 0.98, 0.0, 0.0, 0.9, 1.0, 0.0],
    )
    params = runs.leaf()
    grads = runs.gradients(len(lrs), like=params)
    tx = optax.inject_hyperparams(runs.FACTORIES[name])(lrs[0])
    update, y = jax.jit(tx.update), runs.typed(params)
    state = tx.init(y)
    for i, g in enumerate(grads):
        state.hyperparams["learning_rate"] = jnp.asarray(lrs[i])
        state.hyperparams["b1"] = jnp.asarray(betas[i])
        updates, state = update(runs.typed(g), state, y)
        y = optax.apply_updates(y, updates)
        points = runs.plain_points(name, params, grads[: i + 1], lr=lrs.__getitem__, b1=betas.__getitem__)
        # Measured: at most 2e-15 in each of the steps.
        runs.assert_iterates(state, y, points, 1e-13)
    assert update._cache_size() == 1


def test_the_state_is_the_same_whether_b1_is_static_or_injected():
    params = runs.typed(runs.leaf(), jnp.float32)
    grads = runs.gradients(5, like=runs.leaf())
    y, state = runs.run(sfjax.schedule_free_sgd(0.1), params, grads)
    injected = optax.inject_hyperparams(sfjax.schedule_free_sgd)(0.1)
    same_y, same_state = runs.run(injected, params, grads)
    # XLA may contract a product and a sum where a value is known: an ulp of 2^-24.
    runs.assert_close(same_y, y, 2e-7)
    runs.assert_close(sfjax.find_state(same_state).z, state.z, 2e-7)
    assert jax.tree.structure(sfjax.find_state(same_state)) == jax.tree.structure(state)


def test_hyperparameters_in_low_precision_are_refused_where_they_can_be_seen():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"b2 must be a number in \[0, 1\), got 1.0"):
        optax.inject_hyperparams(sfjax.schedule_free_adamw)(0.1).init(params)
    tx = optax.inject_hyperparams(sfjax.schedule_free_adamw, hyperparam_dtype=jnp.float32)(0.1)
    y, state = runs.run(tx, params, [{"w": np.ones(3)}] * 3)
    alone, alone_state = runs.run(sfjax.schedule_free_adamw(0.1), params, [{"w": np.ones(3)}] * 3)
    runs.assert_same(y, alone)
    runs.assert_close(sfjax.find_state(state).z, alone_state.z, 1e-6)  # measured: 2.6e-7


def test_complex_hyperparameters_of_complex_parameters_count_as_real():
    params = {"w": jnp.asarray([1.0 + 2.0j, -0.5j], jnp.complex64)}
    grads = [{"w": np.array([0.3 - 0.1j, 1.0j])}] * 4
    tx = optax.inject_hyperparams(sfjax.schedule_free_adamw)(0.1)
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        y, _ = runs.run(tx, params, grads, state)
        alone, _ = runs.run(sfjax.schedule_free_adamw(0.1), params, grads)
        runs.assert_close(y, alone, 2e-7)
