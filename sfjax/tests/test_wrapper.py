"""schedule_free around any optax optimizer: z follows the base, with gradients at y."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs

STEPS = 8


def schedule(step):
    return 0.1 / (1.0 + jnp.asarray(step, jnp.float32))


# The base, built with the learning rate that it is to read at the same step.
BASES = {
    "sgd": optax.sgd,
    "sgd-momentum": lambda lr: optax.sgd(lr, momentum=0.5),
    "adam": lambda lr: optax.adam(lr, b1=0.0),
    "adamw": lambda lr: optax.adamw(lr, b1=0.0, weight_decay=0.1),
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "adafactor": lambda lr: optax.adafactor(lr, min_dim_size_to_factor=2),
    "chain": lambda lr: optax.chain(optax.clip(0.5), optax.sgd(lr)),
    "masked": lambda lr: optax.chain(optax.masked(optax.scale(2.0), {"w": True, "v": False}), optax.sgd(lr)),
}


def by_hand(base, params, grads, lr, b1, decay_at="y"):
    """Returns (x, y, z) with the base unwrapped: it is handed y or z and moves z."""
    state = base.init(params)
    x = y = z = params
    lr_max = weight_sum = 0.0
    for step, g in enumerate(grads):
        delta, state = base.update(g, state, y if decay_at == "y" else z)
        lr_max = max(lr_max, float(lr(step)))
        weight_sum += lr_max**2
        c = lr_max**2 / weight_sum
        z = jax.tree.map(lambda a, d: a + d, z, delta)
        x = jax.tree.map(lambda a, b, c=c: (1 - c) * a + c * b, x, z)
        y = jax.tree.map(lambda a, b: b1 * a + (1 - b1) * b, x, z)
    return x, y, z


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("base", BASES)
def test_z_takes_the_steps_of_the_base_alone(base):
    b1 = 0.8
    params = {"w": runs.typed(runs.start()["a"], jnp.float32), "v": runs.typed(runs.leaf()["w"], jnp.float32)}
    grads = [runs.typed(g, jnp.float32) for g in runs.gradients(STEPS, like=params)]
    y, state = runs.run(sfjax.schedule_free(BASES[base](schedule), schedule, b1=b1), params, grads)
    want = by_hand(BASES[base](schedule), params, grads, schedule, b1)
    for got, right in zip(sfjax.iterates(state, y), want, strict=True):
        runs.assert_close(got, right, 2e-6)  # measured: at most 4e-7


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("b1", [0.0, 0.8])
def test_decay_inside_the_base_may_be_taken_at_z(b1):
    params, base = {"w": runs.typed(runs.start()["a"], jnp.float32)}, BASES["adamw"](schedule)
    grads = [runs.typed(g, jnp.float32) for g in runs.gradients(STEPS, like=params)]
    y, state = runs.run(sfjax.schedule_free(base, schedule, b1=b1, decay_at="z"), params, grads)
    found = sfjax.iterates(state, y)
    at_z, at_y = (by_hand(base, params, grads, schedule, b1, point) for point in "zy")
    for got, right in zip(found, at_z, strict=True):
        runs.assert_close(got, right, 2e-6)
    assert b1 == 0 or np.abs(found[0]["w"] - at_y[0]["w"]).max() > 1e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    [{"b1": 0.0}, {"b1": 1.0}, {"r": 1.0, "weight_lr_power": 1.0}, {"prior_steps": 5}],
    ids=lambda o: "-".join(o),
)
def test_around_plain_sgd_it_is_schedule_free_sgd(options):
    params, grads = runs.leaf(), runs.gradients(STEPS, like=runs.leaf())
    y, state = runs.run(sfjax.schedule_free(optax.sgd(0.1), 0.1, **options), runs.typed(params), grads)
    runs.assert_iterates(state, y, runs.plain_points("sgd", params, grads, **options), 1e-13)


def test_base_and_weight_read_the_schedule_at_the_same_step():
    seen = {"base": [], "weight": []}

    def recorder(name):
        def lr(step):
            jax.debug.callback(lambda s: seen[name].append(int(s)), step)
            return 0.1 * jnp.ones(())

        return lr

    tx = sfjax.schedule_free(optax.sgd(recorder("base")), recorder("weight"))
    runs.run(tx, {"w": jnp.ones(2)}, [{"w": np.ones(2)}] * 4)
    jax.effects_barrier()
    assert sorted(seen["base"]) == sorted(seen["weight"]) == [0, 1, 2, 3]


def test_extra_arguments_reach_the_base():
    def update(grads, state, params=None, *, gain, **_):
        return jax.tree.map(lambda g: -gain * g, grads), state

    tx = sfjax.schedule_free(optax.GradientTransformationExtraArgs(lambda params: (), update), 0.5)
    params = {"w": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params, gain=jnp.float32(0.25), unused=None)
    np.testing.assert_array_equal(state.z["w"], [0.75, 0.75])


def test_a_base_in_bfloat16_moves_a_float32_z():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = sfjax.schedule_free(optax.sgd(2.0**-10), 2.0**-10)
    y, state = runs.run(tx, params, [{"w": np.ones(2)}] * 3)
    # Each step is below half an ulp of y = 1, yet z has them all.
    np.testing.assert_array_equal(state.z["w"], np.float32(1 - 3 * 2.0**-10))
    assert y["w"].dtype == jnp.bfloat16
