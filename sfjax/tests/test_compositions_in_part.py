"""x is right where Schedule-Free has only a part of the tree; the other leaves come back as they are."""

import jax
import optax
import pytest

import sfjax
from sfjax.tests import runs

LR, STEPS = 0.1, 8
# Measured in float32: at most 3e-7. A leaf or step too many or too few is 1e-2.
TOLERANCE = 2e-6
pytestmark = pytest.mark.usefixtures("standard_promotion")


def labels(params):
    return {"a": "one", "b": "two", "c": jax.tree.map(lambda _: "one", params["c"])}


def expected(params, grads, y, of_leaf, field):
    """Returns the tree of x or z: of a plain run where of_leaf names an optimizer, else y."""
    points = {name: runs.plain_points(name, params, grads, lr=LR) for name in set(of_leaf.values()) - {None}}
    return {key: runs.of(points[name], field)[key] if name else y[key] for key, name in of_leaf.items()}


def assert_parts(tx, of_leaf):
    params, grads = runs.start(), runs.gradients(STEPS)
    y, state = runs.run(tx, runs.typed(params), grads)
    x, same_y, z = sfjax.iterates(state, y)
    runs.assert_same(same_y, y)
    runs.assert_close(x, expected(params, grads, y, of_leaf, "x"), TOLERANCE)
    runs.assert_close(z, expected(params, grads, y, of_leaf, "z"), TOLERANCE)
    jitted = jax.jit(sfjax.schedule_free_eval_params)(state, y)
    runs.assert_close(jitted, expected(params, grads, y, of_leaf, "x"), TOLERANCE)
    for key, name in of_leaf.items():
        if name is None:
            runs.assert_same(x[key], y[key])
    return state, y


def test_masked_by_a_full_tree():
    mask = {"a": True, "b": False, "c": {"d": True, "e": False}}
    params, grads = runs.start(), runs.gradients(STEPS)
    y, state = runs.run(optax.masked(sfjax.schedule_free_sgd(LR), mask), runs.typed(params), grads)
    x, points = sfjax.schedule_free_eval_params(state, y), runs.plain_points("sgd", params, grads, lr=LR)
    runs.assert_close(x["a"], points["a"].x, TOLERANCE)
    runs.assert_close(x["c"]["d"], points["c"]["d"].x, TOLERANCE)
    runs.assert_same((x["b"], x["c"]["e"]), (y["b"], y["c"]["e"]))


def test_masked_by_a_prefix():
    tx = optax.masked(sfjax.schedule_free_sgd(LR), {"a": True, "b": True, "c": False})
    assert_parts(tx, {"a": "sgd", "b": "sgd", "c": None})


def test_partition_with_one_part():
    tx = optax.partition({"one": sfjax.schedule_free_adamw(LR), "two": optax.adam(0.1)}, labels)
    state, _ = assert_parts(tx, {"a": "adamw", "b": None, "c": "adamw"})
    assert len(sfjax.find_states(state)) == 1


def test_partition_with_a_prefix_of_labels():
    tx = optax.partition(
        {"one": sfjax.schedule_free_sgd(LR), "two": optax.set_to_zero()}, {"a": "two", "b": "one", "c": "one"}
    )
    assert_parts(tx, {"a": None, "b": "sgd", "c": "sgd"})


def test_partition_with_two_parts_of_different_kinds():
    tx = optax.partition({"one": sfjax.schedule_free_adamw(LR), "two": sfjax.schedule_free_sgd(LR)}, labels)
    state, _ = assert_parts(tx, {"a": "adamw", "b": "sgd", "c": "adamw"})
    found = sfjax.find_states(state)
    assert len(found) == 2
    assert [int(sfjax.metrics(one)["step"]) for one in found] == [STEPS, STEPS]
    with pytest.raises(
        ValueError, match="must hold one Schedule-Free state, got 2: take them from find_states"
    ):
        sfjax.find_state(state)


def test_partition_four_levels_deep():
    inner = optax.partition(
        {
            "one": optax.chain(optax.identity(), optax.masked(sfjax.schedule_free_adamw(LR), True)),
            "two": optax.sgd(0.1),
        },
        labels,
    )
    outer = {"rest": optax.adam(0.1), "deep": optax.apply_if_finite(optax.chain(optax.identity(), inner), 3)}
    tx = optax.partition(outer, {"a": "deep", "b": "deep", "c": "rest"})
    assert_parts(tx, {"a": "adamw", "b": None, "c": None})


def test_several_parts_four_levels_deep():
    inner = optax.partition(
        {"one": sfjax.schedule_free_sgd(LR), "two": sfjax.schedule_free_adamw(LR)}, labels
    )
    outer = {
        "rest": sfjax.schedule_free_radam(LR, b2=0.9),
        "deep": optax.apply_if_finite(optax.chain(inner), 3),
    }
    tx = optax.partition(outer, {"a": "deep", "b": "deep", "c": "rest"})
    assert_parts(tx, {"a": "sgd", "b": "adamw", "c": "radam"})


def test_selective_transform():
    tx = optax.transforms.selective_transform(
        sfjax.schedule_free_adamw(LR), freeze_mask={"a": False, "b": False, "c": True}
    )
    _, y = assert_parts(tx, {"a": "adamw", "b": "adamw", "c": None})
    runs.assert_same(y["c"], runs.typed(runs.start()["c"]))


def test_frozen_leaves_before_it_in_a_chain_stay_put():
    tx = optax.chain(
        optax.transforms.freeze({"a": False, "b": False, "c": True}), sfjax.schedule_free_adamw(LR)
    )
    params, grads = runs.start(), runs.gradients(STEPS)
    y, state = runs.run(tx, runs.typed(params), grads)
    stopped = [{**g, "c": jax.tree.map(lambda leaf: 0.0 * leaf, g["c"])} for g in grads]
    runs.assert_iterates(state, y, runs.plain_points("adamw", params, stopped, lr=LR), TOLERANCE)
    runs.assert_same(sfjax.schedule_free_eval_params(state, y)["c"], runs.typed(params["c"]))
