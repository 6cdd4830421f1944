"""Scalars are float32 whatever the parameters are, buffers at least float32, updates as the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfjax
from sfjax.tests import runs

SCALARS = ("b1", "lr", "lr_max", "c", "weight_sum", "weight_sum_low")


def scalar_dtypes(state):
    return {getattr(state, name).dtype.name for name in SCALARS}


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float8_e4m3fn", "float32"),
        ("complex64", "complex64"),
    ],
)
@pytest.mark.parametrize("name", runs.FACTORIES)
def test_buffers_are_wide_and_updates_are_the_parameters(name, dtype, wide):
    options = {"inner_momentum": 0.5} if name == "adamw" else {}
    params = {"w": jnp.ones(3, dtype), "single": jnp.ones(2, jnp.float32)}
    tx = runs.FACTORIES[name](0.1, **options)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    buffers = [
        state.z,
        *jax.tree.leaves(state.base_optimizer_state, is_leaf=lambda node: isinstance(node, dict)),
    ]
    for buffer in buffers:
        assert (buffer["w"].dtype, buffer["single"].dtype) == (wide, "float32")
    assert len(buffers) == {"sgd": 1, "adamw": 3, "radam": 2}[name]
    assert scalar_dtypes(state) == {"float32"}
    assert state.step.dtype == "int32"


@pytest.mark.usefixtures("x64")
def test_scalars_are_float64_where_jax_has_it_and_buffers_follow_their_leaf():
    params = {"single": jnp.ones(2, jnp.float32), "double": jnp.ones(2), "complex": jnp.ones(2, complex)}
    tx = sfjax.schedule_free_adamw(0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert scalar_dtypes(state) == {"float64"}
    assert state.step.dtype == "int32"
    want = {"single": "float32", "double": "float64", "complex": "complex128"}
    for tree in (updates, state.z, state.base_optimizer_state.nu):
        assert {key: leaf.dtype.name for key, leaf in tree.items()} == want


@pytest.mark.parametrize("state_dtype", ["bfloat16", jnp.float16, np.float32, jnp.dtype("float32")])
def test_state_dtype_is_that_of_z_alone(state_dtype):
    params = {"w": jnp.ones(3, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64)}
    tx = sfjax.schedule_free_adamw(0.1, state_dtype=state_dtype)
    for state in (tx.init(params), tx.update(params, tx.init(params), params)[1]):
        assert state.z["w"].dtype == jnp.dtype(state_dtype)
        assert state.z["c"].dtype == "complex64"
        assert state.base_optimizer_state.nu["w"].dtype == "float32"


@pytest.mark.parametrize("low", ["bfloat16", "float16"])
def test_a_low_precision_leaf_changes_nothing_for_the_others(low):
    params, grads = runs.leaf(), runs.gradients(30, like=runs.leaf())
    alone, state = runs.run(sfjax.schedule_free_adamw(1e-4), runs.typed(params, jnp.float32), grads)
    mixed = {**runs.typed(params, jnp.float32), "low": jnp.ones(3, low)}
    both, mixed_state = runs.run(
        sfjax.schedule_free_adamw(1e-4), mixed, [{**g, "low": np.ones(3)} for g in grads]
    )
    # Another program, so an ulp or so; bfloat16 scalars would be 1e-2 off.
    runs.assert_close({"w": both["w"]}, alone, 3e-7)
    runs.assert_close({"w": mixed_state.z["w"]}, state.z, 3e-7)
    assert float(mixed_state.c) == float(state.c)


@pytest.mark.parametrize(("low", "ulp"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_a_low_precision_run_keeps_z_and_its_scalars_exact(low, ulp):
    params = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, low), float), runs.leaf())
    grads = runs.gradients(300, like=params)
    grads = jax.tree.map(lambda g: np.asarray(jnp.asarray(g, low), float), grads)
    y, state = runs.run(sfjax.schedule_free_sgd(1e-4), runs.typed(params, low), grads)
    points = runs.plain_points("sgd", params, grads, lr=1e-4)
    # z and c never see y's rounding (measured: 5e-7).
    runs.assert_close(state.z, runs.of(points, "z"), 2e-6)
    np.testing.assert_allclose(float(state.c), 1 / 300, rtol=1e-6)
    # y does, by half an ulp a step at most; in fp16 an lr of 1e-4 must still move it.
    assert (
        np.abs(np.asarray(y["w"], float) - points["w"].y).max() <= 300 * ulp / 2 * np.abs(points["w"].y).max()
    )
    assert not np.array_equal(np.asarray(state.z["w"]), params["w"])


def test_a_low_state_dtype_does_not_let_x_wander():
    params = runs.leaf()
    grads = runs.gradients(2000, like=params)
    tx = sfjax.schedule_free_sgd(0.01, state_dtype=jnp.bfloat16)
    y, state = runs.run(tx, runs.typed(params, jnp.float32), grads)
    # The same run with z rounded to bfloat16 by hand: x is stored, so it cannot wander.
    z = np.asarray(jnp.asarray(params["w"], jnp.bfloat16), float)
    x = (params["w"] - 0.1 * z) / 0.9
    for t, g in enumerate(grads, start=1):
        z = np.asarray(jnp.asarray(z - 0.01 * np.float32(g["w"]), jnp.bfloat16), float)
        x = x + (z - x) / t
    # Measured: 6e-7 after 2000 steps; 3e-3 if y were built on z before its rounding.
    runs.assert_close(sfjax.schedule_free_eval_params(state, y), {"w": x}, 2e-5)
    np.testing.assert_array_equal(np.asarray(state.z["w"], float), z)


def test_a_low_state_dtype_at_b1_0_rounds_x_and_not_the_parameters():
    params, grads = runs.leaf(), runs.gradients(10, like=runs.leaf())
    tx = sfjax.schedule_free_sgd(0.01, b1=0.0, state_dtype=jnp.bfloat16)
    y, state = runs.run(tx, runs.typed(params, jnp.float32), grads)
    points = runs.plain_points("sgd", params, grads, lr=0.01, b1=0.0)
    runs.assert_close(y, runs.of(points, "z"), 1e-6)  # measured: 1e-7
    # Ten roundings of x by half an ulp of bfloat16 each.
    runs.assert_close(sfjax.schedule_free_eval_params(state, y), runs.of(points, "x"), 10 * 2.0**-9)


@pytest.mark.parametrize("name", runs.FACTORIES)
@pytest.mark.usefixtures("x64")
def test_complex_leaves_run_as_pairs_of_reals(name):
    rng = np.random.default_rng(3)
    params = {"w": rng.standard_normal(4) + 1j * rng.standard_normal(4)}
    grads = [{"w": rng.standard_normal(4) + 1j * rng.standard_normal(4)} for _ in range(12)]
    options = {"weight_decay": 0.1, **runs.OPTIONS[name]}
    y, state = runs.run(runs.FACTORIES[name](0.1, **options), runs.typed(params, complex), grads)
    # Measured: at most 1e-15.
    runs.assert_iterates(state, y, runs.plain_points(name, params, grads, **options), 1e-13)
