"""x, y and z are right through every wrapper that takes in the whole tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs

LR, STEPS = 0.1, 12
# Measured in float32: at most 3e-7. A leaf or step too many or too few is 1e-2.
TOLERANCE = 2e-6
pytestmark = pytest.mark.usefixtures("standard_promotion")


def as_they_are(grads):
    return grads


def doubled(grads):
    return [jax.tree.map(lambda g: 2.0 * g, tree) for tree in grads]


def in_pairs(grads):
    return [
        jax.tree.map(lambda a, b: (a + b) / 2.0, *pair) for pair in zip(grads[::2], grads[1::2], strict=True)
    ]


def every_other(grads):
    return grads[::2]


def all_labelled(params):
    return jax.tree.map(lambda _: "sf", params)


def even(step, *_, **__):
    return step % 2 == 0


# id -> (wrapper of a transformation, what the transformation inside sees of the gradients)
WHOLE = {
    "bare": (lambda sf: sf, as_they_are),
    "chain": (lambda sf: optax.chain(optax.scale(2.0), sf), doubled),
    "chain-in-chain": (lambda sf: optax.chain(optax.chain(optax.scale(2.0), sf), optax.identity()), doubled),
    "named_chain": (lambda sf: optax.named_chain(("scale", optax.scale(2.0)), ("sf", sf)), doubled),
    "MultiSteps": (lambda sf: optax.MultiSteps(sf, 2), in_pairs),
    "MultiSteps.gradient_transformation": (
        lambda sf: optax.MultiSteps(sf, 2).gradient_transformation(),
        in_pairs,
    ),
    "apply_if_finite": (lambda sf: optax.apply_if_finite(sf, 3), as_they_are),
    "inject_hyperparams": (lambda _: optax.inject_hyperparams(sfjax.schedule_free_sgd)(LR), as_they_are),
    "inject_hyperparams-static": (
        lambda _: optax.inject_hyperparams(sfjax.schedule_free_sgd, static_args=("learning_rate", "b1"))(LR),
        as_they_are,
    ),
    "masked": (lambda sf: optax.masked(sf, True), as_they_are),
    "partition": (lambda sf: optax.partition({"sf": sf}, all_labelled), as_they_are),
    "multi_transform": (lambda sf: optax.multi_transform({"sf": sf}, all_labelled), as_they_are),
    "conditionally_mask": (lambda sf: optax.conditionally_mask(sf, even), every_other),
    "flatten": (optax.flatten, as_they_are),
    "flatten-in-chain": (lambda sf: optax.chain(optax.scale(2.0), optax.flatten(sf)), doubled),
    "freeze": (lambda sf: optax.chain(optax.transforms.freeze(False), sf), as_they_are),
    "selective_transform": (
        lambda sf: optax.transforms.selective_transform(sf, freeze_mask=False),
        as_they_are,
    ),
    "four-deep": (
        lambda sf: optax.apply_if_finite(
            optax.chain(
                optax.scale(2.0),
                optax.partition({"sf": optax.MultiSteps(optax.masked(sf, True), 2)}, all_labelled),
            ),
            3,
        ),
        lambda grads: in_pairs(doubled(grads)),
    ),
}


@pytest.mark.parametrize("wrapper", WHOLE)
def test_x_is_right_through(wrapper):
    wrap, seen = WHOLE[wrapper]
    params, grads = runs.start(), runs.gradients(STEPS)
    y, state = runs.run(wrap(sfjax.schedule_free_sgd(LR)), runs.typed(params), grads)
    points = runs.plain_points("sgd", params, seen(grads), lr=LR)
    runs.assert_iterates(state, y, points, TOLERANCE)
    jitted = jax.jit(sfjax.schedule_free_eval_params)(state, y)
    runs.assert_close(jitted, runs.of(points, "x"), TOLERANCE)
    assert int(sfjax.find_state(state).step) == int(sfjax.metrics(state)["step"]) == len(seen(grads))
    assert len(sfjax.find_states(state)) == 1
    np.testing.assert_allclose(float(sfjax.metrics(state)["c"]), points["b"].c, rtol=1e-6)


def test_conditionally_transform_passes_gradients_on_and_keeps_the_state():
    tx = optax.conditionally_transform(sfjax.schedule_free_sgd(LR), even)
    params, grads = runs.start(), runs.gradients(2)
    y, state = runs.run(tx, runs.typed(params), grads[:1])
    updates, skipped = tx.update(runs.typed(grads[1]), state, y)
    runs.assert_same(updates, runs.typed(grads[1]))
    runs.assert_iterates(skipped, y, runs.plain_points("sgd", params, grads[:1], lr=LR), TOLERANCE)


def test_a_step_that_is_not_finite_leaves_no_trace():
    params, grads = runs.start(), runs.gradients(6)
    bad = [
        *grads[:3],
        {**grads[3], "b": np.asarray(np.nan)},
        {**grads[3], "a": np.full((3, 2), np.inf)},
        *grads[3:],
    ]
    y, state = runs.run(optax.apply_if_finite(sfjax.schedule_free_adamw(LR), 5), runs.typed(params), bad)
    runs.assert_iterates(state, y, runs.plain_points("adamw", params, grads, lr=LR), TOLERANCE)
    bare, _ = runs.run(sfjax.schedule_free_adamw(LR), runs.typed(params), bad)
    assert bool(jnp.isnan(bare["b"]))  # without the wrapper, NaN goes where it goes in optax
