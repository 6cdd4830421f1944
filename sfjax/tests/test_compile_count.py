"""Many steps, one compilation."""

import jax
import jax.numpy as jnp
import optax
import pytest

import sfjax
from sfjax.tests import runs

MADE = {
    **{name: (lambda name=name: runs.FACTORIES[name](0.1)) for name in runs.FACTORIES},
    "array-lr": lambda: sfjax.schedule_free_adamw(jnp.asarray([0.1], jnp.bfloat16)),
    "schedule": lambda: sfjax.schedule_free_adamw(optax.linear_schedule(0.0, 0.1, 10)),
    "chain": lambda: optax.chain(optax.clip(1.0), sfjax.schedule_free_adamw(0.1, b1=0.0)),
    "injected": lambda: optax.inject_hyperparams(
        sfjax.schedule_free_sgd, static_args=("prior_steps", "warmup_steps")
    )(0.1),
    "wrapped": lambda: sfjax.schedule_free(optax.rmsprop(0.1), 0.1),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_run_compiles_once(make):
    tx = make()
    params = {"w": jnp.ones(2)}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert int(sfjax.metrics(state)["step"]) == 4


def test_a_changed_hyperparameter_compiles_nothing():
    tx = optax.inject_hyperparams(sfjax.schedule_free_sgd)(0.1)
    params = {"w": jnp.ones(2)}
    update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
    for lr, b1 in ((0.1, 0.9), (0.2, 0.0), (0.0, 1.0)):
        state.hyperparams.update(learning_rate=jnp.asarray(lr), b1=jnp.asarray(b1))
        _, state = update(params, state, params)
    assert update._cache_size() == 1


def test_evaluation_compiles_once():
    tx = sfjax.schedule_free_sgd(0.1)
    evaluate = jax.jit(
        lambda *of: sfjax.schedule_free_eval_params(*of)
    )  # a function, and so a cache, of its own
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(3):
        evaluate(state, params)
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert evaluate._cache_size() == 1
