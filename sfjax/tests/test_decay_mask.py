"""The mask picks the leaves that decay: a tree, a prefix of it, or a function of the parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest

import sfjax
from sfjax.tests import runs

STEPS = 6
FULL = {"a": True, "b": False, "c": {"d": False, "e": True}}
PREFIX = {"a": False, "b": True, "c": True}
MASKS = {
    "none": (None, {"a": True, "b": True, "c": {"d": True, "e": True}}),
    "tree": (FULL, FULL),
    "prefix": (PREFIX, {"a": False, "b": True, "c": {"d": True, "e": True}}),
    "callable": (lambda p: jax.tree.map(lambda leaf: leaf.ndim == 2, p), FULL),
    "callable-prefix": (lambda p: PREFIX, {"a": False, "b": True, "c": {"d": True, "e": True}}),
    "false": (False, {"a": False, "b": False, "c": {"d": False, "e": False}}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", MASKS)
def test_masked_leaves_decay_and_the_others_do_not(mask):
    given, decays = MASKS[mask]
    params, grads = runs.start(), runs.gradients(STEPS)
    y, state = runs.run(
        sfjax.schedule_free_adamw(0.1, weight_decay=0.3, mask=given), runs.typed(params), grads
    )
    with_decay = runs.plain_points("adamw", params, grads, weight_decay=0.3)
    without = runs.plain_points("adamw", params, grads)
    points = jax.tree.map(lambda flag, a, b: a if flag else b, decays, with_decay, without)
    runs.assert_iterates(state, y, points, 1e-13)


@pytest.mark.parametrize("name", runs.FACTORIES)
def test_every_factory_takes_a_mask(name):
    params = {"yes": runs.leaf()["w"], "no": runs.leaf()["w"]}
    g = runs.gradients(1, like=runs.leaf())[0]["w"]
    options = {"silent_sgd_phase": False} if name == "radam" else {}
    tx = runs.FACTORIES[name](0.1, weight_decay=0.3, mask={"yes": True, "no": False}, **options)
    y, _ = runs.run(tx, runs.typed(params, jnp.float32), [{"yes": g, "no": g}])
    runs.assert_close(y["yes"], y["no"] - 0.1 * 0.3 * jnp.asarray(params["yes"], jnp.float32), 1e-6)


def test_a_mask_of_the_whole_tree_serves_a_part_of_it():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    sf = sfjax.schedule_free_sgd(0.5, weight_decay=0.5, mask={"a": True, "b": False})
    tx = optax.masked(sf, {"a": True, "b": False})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert updates["a"].tolist() == [-0.25, -0.25]
    assert updates["b"].tolist() == [0.0, 0.0]


def test_a_mask_may_be_injected_as_a_static_argument():
    params, grads = runs.leaf(), runs.gradients(3, like=runs.leaf())
    tx = optax.inject_hyperparams(sfjax.schedule_free_sgd, static_args="mask")(
        0.1, weight_decay=0.3, mask=lambda p: jax.tree.map(lambda _: False, p)
    )
    y, _ = runs.run(tx, runs.typed(params, jnp.float32), grads)
    runs.assert_close(y, runs.of(runs.plain_points("sgd", params, grads), "y"), 1e-6)


def test_a_mask_of_another_tree_is_refused():
    params = {"a": jnp.ones(2)}
    tx = sfjax.schedule_free_sgd(0.1, weight_decay=0.1, mask={"b": True})
    with pytest.raises(
        ValueError,
        match=r"mask must be a tree of bools like params or a prefix of it, got .*: pass a function",
    ):
        tx.update(params, tx.init(params), params)
