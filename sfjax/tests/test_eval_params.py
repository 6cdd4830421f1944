"""schedule_free_eval_params keeps what it should keep, and refuses what it cannot know."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.tests import runs


def trained(tx, dtype="float32", steps=6):
    return runs.run(tx, runs.typed(runs.leaf(), dtype), runs.gradients(steps, like=runs.leaf()))


def _whole(y, rest):
    return np.float64(y) + np.float64(rest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_x_and_y_have_the_dtype_of_params_and_z_its_own(dtype):
    y, state = trained(sfjax.schedule_free_adamw(0.1), dtype)
    x, same_y, z = sfjax.iterates(state, y)
    assert (x["w"].dtype, same_y["w"].dtype, z["w"].dtype) == (dtype, dtype, "float32")
    y = y if state.y_rest is None else jax.tree.map(_whole, y, state.y_rest)
    exact = (np.float64(y["w"]) - (1 - np.float64(np.float32(0.9))) * np.float64(z["w"])) / np.float64(
        np.float32(0.9)
    )
    # x is computed in float32 and rounded once: half an ulp, and 2e-7 for the float32 arithmetic.
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(x["w"]), exact, rtol=half_ulp + 2e-7)


def test_the_parameters_stay_as_they_are():
    y, state = trained(sfjax.schedule_free_sgd(0.1))
    before = jax.tree.map(jnp.copy, y)
    x = sfjax.schedule_free_eval_params(state, y)
    runs.assert_same(y, before)
    assert not np.array_equal(x["w"], y["w"])


@pytest.mark.parametrize("b1", [0.0, 1.0])
def test_x_of_x_is_x_where_the_interpolation_has_no_say(b1):
    y, state = trained(sfjax.schedule_free_sgd(0.1, b1=b1))
    x = sfjax.schedule_free_eval_params(state, y)
    runs.assert_same(sfjax.schedule_free_eval_params(state, x), x)


def test_x_of_x_is_x_before_the_first_update():
    params = runs.typed(runs.leaf(), jnp.float32)
    state = sfjax.schedule_free_sgd(0.1).init(params)
    x = sfjax.schedule_free_eval_params(state, params)
    runs.assert_same(x, params)
    runs.assert_same(sfjax.schedule_free_eval_params(state, x), params)


def test_x_is_read_at_full_precision_behind_a_low_state_dtype():
    params = {"w": jnp.asarray([1.001, -3.3333], jnp.float32)}
    state = sfjax.schedule_free_sgd(0.1, state_dtype=jnp.bfloat16).init(params)
    z = np.float64(state.z["w"])
    want = (np.float64(params["w"]) - 0.1 * z) / 0.9
    # Measured: 1e-7. In bfloat16, x would be off by 1e-3.
    np.testing.assert_allclose(
        np.float64(sfjax.schedule_free_eval_params(state, params)["w"]), want, rtol=5e-7
    )


def test_a_vmapped_state_is_refused_with_the_way_out():
    tx, many = sfjax.schedule_free_sgd(0.1), {"w": jnp.ones((2, 2))}
    states = jax.vmap(tx.init)(many)
    with pytest.raises(ValueError, match=r"state must be of one run, .* call jax.vmap"):
        sfjax.schedule_free_eval_params(states, many)
    runs.assert_same(jax.vmap(sfjax.schedule_free_eval_params)(states, many), many)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones((1,))}, r"params must have the shapes that tx.init got, got \(1,\) for \(5,\)"),
        ({"w": {"deeper": jnp.ones(5)}}, r"params must have the shapes that tx.init got, got dict"),
        ({"v": jnp.ones(5)}, "params must have the tree that tx.init got"),
        ({"w": jnp.ones(5), "v": jnp.ones(5)}, "params must have the tree that tx.init got"),
    ],
)
def test_parameters_of_another_shape_or_tree_are_refused(params, message):
    _, state = trained(sfjax.schedule_free_sgd(0.1), steps=1)
    with pytest.raises(ValueError, match=message):
        sfjax.schedule_free_eval_params(state, params)


def test_a_flattened_state_of_other_parameters_is_refused():
    tx = optax.flatten(sfjax.schedule_free_sgd(0.1))
    state = tx.init({"a": jnp.ones(2), "b": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"params must have the 6 numbers that tx.init got, got 4"):
        sfjax.schedule_free_eval_params(state, {"a": jnp.ones(2), "b": jnp.ones((1, 2))})


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda p: optax.sgd(0.1, momentum=0.9).init(p), "got tuple, optax.*TraceState, optax.*EmptyState:"),
        (lambda p: optax.contrib.schedule_free_sgd(0.1).init(p), "got optax.contrib.ScheduleFreeState"),
        (lambda p: p, "got dict"),
        (lambda p: (), "got tuple"),
        (lambda p: None, "got NoneType"),
        (
            lambda p: sfjax.schedule_free_sgd(0.1).init(p)._asdict(),
            "got .*dict.* restore a checkpoint with jax.eval_shape",
        ),
    ],
    ids=["sgd", "optax.contrib", "params", "empty", "none", "restored-as-a-dict"],
)
def test_a_state_without_schedule_free_is_refused_with_what_was_found(make, found):
    params = {"w": jnp.ones(2)}
    state = make(params)
    for read in (sfjax.find_state, sfjax.metrics, lambda s: sfjax.schedule_free_eval_params(s, params)):
        with pytest.raises(
            ValueError, match=r"opt_state must hold a ScheduleFreeState of sfjax, .*"
        ) as error:
            read(state)
        assert error.match(found)
    assert sfjax.find_states(state) == []


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx)])
def test_a_whole_equinox_module_is_refused_with_what_to_pass(wrap):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, width_size=4, depth=1, key=jax.random.key(0))  # its activation is no array
    params = eqx.filter(model, eqx.is_inexact_array)
    state = wrap(sfjax.schedule_free_adamw(0.1)).init(params)
    with pytest.raises(ValueError, match=r"params must have the tree .* with Equinox, what eqx\.filter gave"):
        sfjax.schedule_free_eval_params(state, model)
    x = sfjax.schedule_free_eval_params(state, params)
    assert eqx.tree_equal(eqx.combine(x, model), model)
