"""One state tree for every value of every hyperparameter, and updates that never change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs

MIXED = {
    "half": jnp.ones(3, jnp.bfloat16),
    "single": jnp.ones((2, 2)),
    "number": jnp.ones(()),
    "empty": jnp.ones((0, 3)),
}
SHARED = [
    {"learning_rate": 0.0},
    {"learning_rate": jnp.asarray([0.1], jnp.bfloat16)},
    {"learning_rate": optax.linear_schedule(0.0, 1.0, 10)},
    {"b1": 0.0},
    {"b1": 1},
    {"b1": jnp.float16(0.5)},
    {"weight_decay": 0.1},
    {"weight_decay": None},
    {"weight_lr_power": 0},
    {"r": 1.0, "prior_steps": 5},
    {"prior_steps": np.int64(5)},
    {"mask": {"half": True, "single": False, "number": False, "empty": True}, "weight_decay": 0.1},
]
OWN = {
    "sgd": [{"warmup_steps": 5}, {"warmup_steps": None}],
    "adamw": [{"warmup_steps": 5}, {"b2": 0.0}, {"eps": 1.0}],
    "radam": [{"b2": 0.9}, {"b2": 0.5, "silent_sgd_phase": False}],
}
CASES = [(name, options) for name in runs.FACTORIES for options in (*SHARED, *OWN[name])]


def signature(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value)[:60])
def test_the_state_has_one_signature_before_and_after_an_update(name, options):
    tx, default = runs.FACTORIES[name](**options), runs.FACTORIES[name]()
    state = jax.eval_shape(tx.init, MIXED)
    updates, after = jax.eval_shape(tx.update, MIXED, state, MIXED)
    assert signature(state) == signature(jax.eval_shape(default.init, MIXED))
    assert signature(after) == signature(state)
    assert signature(updates) == signature(jax.eval_shape(lambda p: p, MIXED))
    assert signature(jax.eval_shape(lambda: tx.init(MIXED))) == signature(state)  # concrete parameters too


def test_only_inner_momentum_adds_a_buffer():
    without, given = sfjax.schedule_free_adamw(), sfjax.schedule_free_adamw(inner_momentum=0.5)
    assert without.init(MIXED).base_optimizer_state.mu is None
    one, other = (
        jax.eval_shape(tx.init, MIXED) for tx in (given, sfjax.schedule_free_adamw(inner_momentum=0.9))
    )
    assert signature(one) == signature(other)
    _, after = jax.eval_shape(given.update, MIXED, one, MIXED)
    assert signature(after) == signature(one)


def test_an_injected_inner_momentum_of_0_keeps_its_buffer_under_jit():
    params = runs.typed(runs.leaf(), jnp.float32)
    tx = optax.inject_hyperparams(sfjax.schedule_free_adamw)(0.1)
    state = tx.init(params)
    assert signature(state) == signature(jax.jit(tx.init)(params))
    y, after = runs.run(tx, params, runs.gradients(3, like=runs.leaf()), state)
    assert signature(jax.eval_shape(lambda: state)) == signature(jax.eval_shape(lambda: after))
    runs.assert_close(
        y, runs.of(runs.plain_points("adamw", runs.leaf(), runs.gradients(3, like=runs.leaf())), "y"), 1e-6
    )


def test_wrapped_bases_keep_the_signature_too():
    for base in (
        optax.sgd(0.1),
        optax.adam(0.1, b1=0.0),
        optax.rmsprop(0.1),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
    ):
        tx = sfjax.schedule_free(base, 0.1)
        state = jax.eval_shape(tx.init, MIXED)
        with jax.numpy_dtype_promotion("standard"):  # optax's own bias correction mixes dtypes
            _, after = jax.eval_shape(tx.update, MIXED, state, MIXED)
        assert signature(after) == signature(state)


@pytest.mark.parametrize("lr", [0.1, jnp.asarray([0.1], jnp.bfloat16), optax.linear_schedule(0.0, 0.1, 10)])
def test_updates_run_under_scan(lr):
    tx = sfjax.schedule_free_adamw(lr)
    params = {"w": jnp.asarray([1.0, -2.0], jnp.bfloat16), "v": jnp.ones(2)}
    grads = {"w": jnp.ones((6, 2), jnp.bfloat16), "v": jnp.ones((6, 2))}

    def step(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        return (optax.apply_updates(p, updates), state), None

    (scanned, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    looped, looped_state = runs.run(tx, params, [jax.tree.map(lambda g: g[0], grads)] * 6)
    runs.assert_close(scanned["v"], looped["v"], 1e-6)  # measured: 1e-7
    runs.assert_close(state.z, looped_state.z, 1e-6)
    assert int(state.step) == 6
