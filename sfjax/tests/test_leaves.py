"""Leaves of every kind are handled or refused, with the place and the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs

REFUSED = {
    "integer": (lambda: jnp.arange(3), "got int32"),
    "bool": (lambda: jnp.ones(3, bool), "got bool"),
    "key": (lambda: jax.random.key(0), r"got key<fry>"),
    "float": (lambda: 1.0, "arrays, got float"),
    "text": (lambda: "layer", "arrays, got str"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_leaf_that_cannot_be_trained_is_refused_with_its_place(kind):
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"params must be .*{message}") as error:
        sfjax.schedule_free_sgd(0.1).init({"w": jnp.ones(3), "deep": [make()]})
    assert error.match(r"at params\['deep'\]\[0\]")


def test_integer_and_key_leaves_may_be_left_out_by_partition():
    params = {"w": jnp.ones(3), "count": jnp.arange(3), "key": jax.random.key(0)}
    tx = optax.partition(
        {"train": sfjax.schedule_free_sgd(0.5), "keep": optax.set_to_zero()},
        {"w": "train", "count": "keep", "key": "keep"},
    )
    state = tx.init(params)
    grads = {"w": jnp.ones(3), "count": jnp.zeros(3, jnp.int32), "key": jnp.zeros(())}
    updates, state = tx.update(grads, state, params)
    y = {**params, "w": params["w"] + updates["w"]}
    x = sfjax.schedule_free_eval_params(state, y)
    np.testing.assert_allclose(x["w"], 0.5)
    assert x["count"] is params["count"]
    assert x["key"] is params["key"]


@pytest.mark.parametrize("name", runs.FACTORIES)
@pytest.mark.usefixtures("x64")
def test_none_empty_and_0_d_leaves_are_part_of_a_tree(name):
    params = {"none": None, "empty": np.ones((0, 3)), "number": np.asarray(1.5), "w": np.ones(2)}
    grads = runs.gradients(6, like=params)
    y, state = runs.run(
        runs.FACTORIES[name](0.1, weight_decay=0.1, **runs.OPTIONS[name]), runs.typed(params), grads
    )
    runs.assert_iterates(state, y, runs.plain_points(name, params, grads, weight_decay=0.1), 1e-13)
    assert y["none"] is None
    assert y["empty"].shape == (0, 3)


@pytest.mark.parametrize("name", runs.FACTORIES)
@pytest.mark.parametrize("tree", [{}, (), {"a": None}])
def test_an_empty_tree_trains_to_an_empty_tree(name, tree):
    tx = runs.FACTORIES[name](0.1, weight_decay=0.1)
    y, state = runs.run(tx, tree, [tree] * 2)
    assert y == tree
    assert sfjax.schedule_free_eval_params(state, y) == tree
    assert int(state.step) == 2


@pytest.mark.parametrize("name", runs.FACTORIES)
def test_masked_nodes_in_the_parameters_pass_through(name):
    params = {"w": jnp.ones(2), "out": optax.MaskedNode()}
    y, state = runs.run(
        runs.FACTORIES[name](0.1, **runs.OPTIONS[name]),
        params,
        [{"w": np.ones(2), "out": optax.MaskedNode()}] * 6,
    )
    alone, alone_state = runs.run(
        runs.FACTORIES[name](0.1, **runs.OPTIONS[name]), {"w": jnp.ones(2)}, [{"w": np.ones(2)}] * 6
    )
    runs.assert_same(y["w"], alone["w"])
    x = sfjax.schedule_free_eval_params(state, y)
    runs.assert_same(x["w"], sfjax.schedule_free_eval_params(alone_state, alone)["w"])
    assert isinstance(x["out"], optax.MaskedNode)


def test_gradients_may_be_wider_or_narrower_than_their_parameter():
    params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2)}
    tx = sfjax.schedule_free_adamw(0.25)
    turned = {"half": jnp.full(2, 0.5), "single": jnp.full(2, 0.5, jnp.bfloat16)}
    straight = {"half": jnp.full(2, 0.5, jnp.bfloat16), "single": jnp.full(2, 0.5)}
    runs.assert_same(tx.update(turned, tx.init(params), params), tx.update(straight, tx.init(params), params))


def test_a_bare_array_is_a_tree():
    y, state = runs.run(sfjax.schedule_free_sgd(0.5), jnp.ones(2), [np.ones(2)] * 2)
    np.testing.assert_allclose(state.z, [0.0, 0.0])
    np.testing.assert_allclose(sfjax.schedule_free_eval_params(state, y), [0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(y, [0.225, 0.225], rtol=1e-6)
