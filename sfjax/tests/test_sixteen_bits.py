"""A run with 16-bit parameters goes where the float32 run goes, given the same gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfjax.state import forms
from sfjax.tests import runs

DTYPES = {"a": jnp.bfloat16, "b": jnp.float16, "c": {"d": jnp.float16, "e": jnp.bfloat16}}
# Measured over 300 steps: the same bits. Without the rest, 1e-2 of the largest entry and 3e-3.
TOLERANCE = 3e-7
STEPS = 300


def problem(steps: int = STEPS) -> tuple[Any, Any]:
    """Returns (params, stacked gradients) in float32 that the dtypes can hold."""

    def held(leaf: Any, dtype: Any) -> jax.Array:
        return jnp.asarray(leaf, dtype).astype(jnp.float32)

    grads = jax.tree.map(lambda *g: np.stack(g), *runs.gradients(steps))
    return jax.tree.map(held, runs.start(), DTYPES), jax.tree.map(held, grads, DTYPES)


def low(params: Any) -> Any:
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, DTYPES)


def scanned(tx: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    """Returns (params, state) after a step for each of the stacked gradients, in the params' dtypes."""

    def step(carry: Any, g: Any) -> Any:
        p, state = carry
        g = jax.tree.map(lambda leaf, y: leaf.astype(y.dtype), g, p)
        updates, state = tx.update(g, state, p)
        return (optax.apply_updates(p, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), grads)[0])(params)


def assert_same_x(narrow: tuple[Any, Any], wide: tuple[Any, Any], tolerance: float = TOLERANCE) -> None:
    """Raises unless x and z of two (params, state) agree, and the parameters are y rounded once."""
    (y_low, state_low), (y, state) = narrow, wide
    x = sfjax.schedule_free_eval_params(state_low, y_low, jnp.float32)
    runs.assert_close(x, sfjax.schedule_free_eval_params(state, y), tolerance)
    runs.assert_close(sfjax.find_state(state_low).z, sfjax.find_state(state).z, tolerance)
    for p, leaf in zip(jax.tree.leaves(y_low), jax.tree.leaves(y), strict=True):
        runs.assert_close(p.astype(leaf.dtype), leaf, 0.5 * float(jnp.finfo(p.dtype).eps))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "b1"),
    [
        *(("sgd", b1) for b1 in (0.0, 0.5)),
        *(pytest.param("sgd", b1, marks=pytest.mark.slow) for b1 in (0.9, 1.0)),
        ("adamw", 0.9),
        pytest.param("adamw", 0.0, marks=pytest.mark.slow),
        pytest.param("radam", 0.5, marks=pytest.mark.slow),
        ("radam", 1.0),
    ],
)
def test_x_is_that_of_the_float32_run(name: str, b1: float) -> None:
    tx = runs.FACTORIES[name](1e-3, b1=b1, weight_decay=0.1, r=0.5, **runs.OPTIONS[name])
    params, grads = problem()
    assert_same_x(scanned(tx, low(params), grads), scanned(tx, params, grads))


def test_x_is_that_of_the_float32_run_without_jit() -> None:
    tx = sfjax.schedule_free_adamw(1e-3, weight_decay=0.1)
    params, grads = problem(8)
    found = []
    for p in (low(params), params):
        state = tx.init(p)
        for i in range(8):
            updates, state = tx.update(
                jax.tree.map(lambda g, y, i=i: g[i].astype(y.dtype), grads, p), state, p
            )
            p = optax.apply_updates(p, updates)
        found.append((p, state))
    assert_same_x(*found)


def twice(tx: Any) -> Any:
    return optax.MultiSteps(tx, 2).gradient_transformation()


AROUND = {
    "wrapper": sfjax.schedule_free(optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3)), 1e-3),
    "wrapper at b1 0": sfjax.schedule_free(optax.sgd(1e-3, momentum=0.5), 1e-3, b1=0.0),
    "chain": optax.chain(optax.clip(0.5), sfjax.schedule_free_adamw(1e-3)),
    "masked": optax.masked(sfjax.schedule_free_sgd(1e-3), True),
    "partition": optax.partition(
        {"sf": sfjax.schedule_free_adamw(1e-3)}, lambda p: jax.tree.map(lambda _: "sf", p)
    ),
    "injected": optax.inject_hyperparams(sfjax.schedule_free_adamw, hyperparam_dtype=jnp.float32)(1e-3),
    "inner momentum": sfjax.schedule_free_adamw(1e-3, inner_momentum=0.5),
    "finite": optax.apply_if_finite(sfjax.schedule_free_adamw(1e-3), 3),
}


@pytest.mark.parametrize(
    "around",
    [
        pytest.param(
            name, marks=[] if name in ("wrapper", "injected", "inner momentum") else pytest.mark.slow
        )
        for name in AROUND
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_x_is_that_of_the_float32_run_in(around: str) -> None:
    params, grads = problem(100)
    tx = AROUND[around]
    assert_same_x(scanned(tx, low(params), grads), scanned(tx, params, grads))


@pytest.mark.usefixtures("standard_promotion")
def test_x_is_that_of_the_float32_run_in_multi_steps() -> None:
    params, grads = problem(100)
    # Pairs of equal gradients: MultiSteps itself adds up in 16 bits, and their mean is then exact.
    grads = jax.tree.map(lambda g: jnp.repeat(g[:50], 2, axis=0), grads)
    tx = twice(sfjax.schedule_free_adamw(1e-3))
    assert_same_x(scanned(tx, low(params), grads), scanned(tx, params, grads))


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_any_y_is_kept_and_the_update_gets_there_as_optax_adds_it(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-6, 1, 5000)
    p = jnp.asarray(rng.standard_normal(5000) * scale, dtype)
    near = p.astype(jnp.float32) * (1 + rng.standard_normal(5000).astype(np.float32) * 1e-3)
    far = jnp.asarray(rng.standard_normal(5000) * rng.permutation(scale), jnp.float32)
    for y in (near, far, far * 0.0):
        update, rest = jax.jit(forms.split)(y, p)
        eager = forms.split(y, p)
        runs.assert_same((update, rest), eager)
        held = optax.apply_updates(p, update)
        # Right to the last bit but for strides over many binades.
        np.testing.assert_allclose(forms.whole(held, rest), y, rtol=1.2e-7)
    # A short stride leaves the parameter at y rounded once; a long one may miss it by a bit.
    update, _ = forms.split(near, p)
    np.testing.assert_array_equal(optax.apply_updates(p, update), near.astype(dtype))


def test_only_narrow_leaves_have_a_rest_and_float32_states_keep_their_leaves() -> None:
    tx = sfjax.schedule_free_sgd(0.1)
    mixed = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(2), "complex": jnp.ones(2, jnp.complex64)}
    rest = tx.init(mixed).y_rest
    assert (rest["half"].dtype, rest["single"], rest["complex"]) == ("float32", None, None)
    wide = tx.init({"single": mixed["single"]})
    assert wide.y_rest is None
    assert len(jax.tree.leaves(wide)) == 7 + 1


def test_rests_that_do_not_belong_to_the_parameters_are_refused() -> None:
    tx, p = sfjax.schedule_free_sgd(0.1), {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"y_rest must have a leaf for every parameter of 16 bits.*got none"):
        tx.update(p, tx.init(p)._replace(y_rest=None), p)
    wide = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"got one for one of float32: keep tx.init's dtypes"):
        tx.update(wide, tx.init(p), wide)


def test_a_stall_of_the_parameter_type_is_none_of_ours() -> None:
    tx, p = sfjax.schedule_free_sgd(1e-4), {"w": jnp.ones(3, jnp.bfloat16)}
    y, state = scanned(tx, p, {"w": jnp.ones((300, 3))})
    # 300 steps of 1e-4, each a fortieth of bfloat16's ulp below 1; x is their average. Measured: 5e-6.
    np.testing.assert_allclose(
        sfjax.schedule_free_eval_params(state, y, jnp.float32)["w"], 1 - 0.01505, rtol=1e-5
    )
    assert sfjax.schedule_free_eval_params(state, y)["w"].dtype == jnp.bfloat16
