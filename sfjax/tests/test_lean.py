"""The lean form: 8 bytes a parameter, right on average, the same bits from the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore import HyperparameterError
from sfjax.checkpoint import Checkpoints, export_exchange, import_exchange
from sfjax.step import lean
from sfjax.tests import runs
from sfjax.tests.test_sixteen_bits import low, problem, scanned

OPTIONS: dict[str, Any] = {"weight_decay": 0.1}


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "b1"),
    [
        pytest.param("sgd", 0.5, marks=pytest.mark.slow),
        ("adamw", 0.9),
        pytest.param("radam", 1.0, marks=pytest.mark.slow),
    ],
)
def test_x_stays_near_the_float32_run(name: str, b1: float) -> None:
    options = {"b1": b1, **OPTIONS, **runs.OPTIONS[name]}
    params, grads = problem()
    y, state = scanned(runs.FACTORIES[name](1e-3, precision="lean", **options), low(params), grads)
    want, want_state = scanned(runs.FACTORIES[name](1e-3, **options), params, grads)
    # Measured over 300 steps: 5e-4 of the largest entry for x, 2e-3 for z, where x has moved by 2e-2.
    x = sfjax.schedule_free_eval_params(state, y, jnp.float32)
    runs.assert_close(x, sfjax.schedule_free_eval_params(want_state, want), 2e-3)
    runs.assert_close(sfjax.iterates(state, y)[2], want_state.z, 5e-3)


def test_it_takes_8_bytes_a_parameter() -> None:
    params = {"w": jnp.ones(1000, jnp.bfloat16), "wide": jnp.ones(10)}
    state = sfjax.schedule_free_adamw(0.1, precision="lean").init(params)
    kept = [leaf["w"] for leaf in (params, state.z, state.y_rest, state.base_optimizer_state.nu)]
    assert sum(leaf.nbytes for leaf in kept) == 8 * 1000
    assert (state.z["wide"].dtype, state.base_optimizer_state.nu["wide"].dtype) == ("float32", "float32")


@pytest.mark.slow
@pytest.mark.optimized
def test_the_rounding_is_right_on_average_and_leaves_what_bfloat16_has() -> None:
    value = jnp.full((1000, 200), 1 + 2.0**-10)  # an eighth of an ulp above 1
    found = lean.rounded(value, lean.Draw(0, 0, jnp.int32(1)), lean.GAP).astype(jnp.float32)
    assert sorted(set(np.unique(found))) == [1.0, 1 + 2.0**-7]
    # The mean of 200,000 draws of standard deviation 2.6e-3: 6e-6; four of them.
    assert abs(float(found.mean()) - (1 + 2.0**-10)) < 2.4e-5
    for axis in (0, 1):  # no stripes
        assert float(found.mean(axis).std()) < 2 * 2.6e-3 / found.shape[axis] ** 0.5
    exact = jnp.asarray([0.0, -1.5, jnp.inf, -jnp.inf, 3.0])
    np.testing.assert_array_equal(lean.rounded(exact, lean.Draw(1, 2, jnp.int32(3)), 0), exact)
    assert jnp.isnan(lean.rounded(jnp.asarray([jnp.nan]), lean.Draw(1, 2, jnp.int32(3)), 0)).all()


@pytest.mark.optimized
def test_bits_depend_on_seed_leaf_step_and_number_alone() -> None:
    def draw(seed: Any = 0, leaf: int = 0, step: int = 0, number: int = 0) -> np.ndarray:
        return np.asarray(lean.drawn((64,), lean.Draw(seed, leaf, jnp.int32(step)), number))

    others = [draw(seed=1), draw(leaf=1), draw(step=1), *(draw(number=n) for n in (1, 2, 3))]
    assert all((draw() != other).mean() > 0.9 for other in others)
    np.testing.assert_array_equal(draw(), draw(jnp.float32(0)))
    np.testing.assert_array_equal(
        draw(), jax.jit(lambda: lean.drawn((8, 8), lean.Draw(0, 0, jnp.int32(0)), 0))().ravel()
    )


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_it_runs_inside_the_wrappers_of_optax() -> None:
    params, grads = problem(12)
    for tx in (
        optax.inject_hyperparams(sfjax.schedule_free_adamw, hyperparam_dtype=jnp.float32)(
            1e-3, precision="lean"
        ),
        optax.MultiSteps(sfjax.schedule_free_adamw(1e-3, precision="lean"), 2).gradient_transformation(),
        sfjax.accumulate(sfjax.schedule_free_radam(1e-3, b2=0.9, precision="lean", seed=3), 2),
    ):
        y, state = scanned(tx, low(params), grads)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((y, state)))
        assert int(sfjax.find_state(state).step) in (6, 12)


@pytest.mark.slow
def test_another_b1_moves_y_and_not_x() -> None:
    params, grads = problem(50)
    y, state = scanned(sfjax.schedule_free_sgd(1e-2, precision="lean"), low(params), grads)
    before = sfjax.schedule_free_eval_params(state, y, jnp.float32)
    still = sfjax.schedule_free_sgd(0.0, b1=0.5, precision="lean")
    updates, state = still.update(
        jax.tree.map(jnp.zeros_like, y), state._replace(weight_sum=state.weight_sum * 1e9), y
    )
    after = sfjax.schedule_free_eval_params(state, optax.apply_updates(y, updates), jnp.float32)
    # A rounding of the gap, which is 1e-1 here, to 8 bits; without the move of y 1e-2.
    runs.assert_close(after, before, 1e-3)


def test_a_resumed_run_ends_in_the_same_bits_and_other_precisions_are_converted(tmp_path: Path) -> None:
    params, grads = problem(20)
    p = low(params)
    narrow, exact = (sfjax.schedule_free_adamw(1e-2, precision=kind) for kind in ("lean", "exact"))
    y, state = scanned(narrow, p, grads)
    x = sfjax.schedule_free_eval_params(state, y, jnp.float32)
    with Checkpoints(tmp_path / "orbax") as checkpoints:
        checkpoints.save(20, y, state)
        same = checkpoints.restore(p, jax.eval_shape(narrow.init, p), strict=True)
        other = checkpoints.restore(p, jax.eval_shape(exact.init, p))
    assert same is not None
    assert other is not None
    runs.assert_same((same.params, same.opt_state), (y, state))
    runs.assert_close(sfjax.schedule_free_eval_params(other.opt_state, other.params, jnp.float32), x, 1e-6)
    runs.assert_close(sfjax.find_state(other.opt_state).z, sfjax.iterates(state, y)[2], 3e-7)
    assert any("precision: z and the moments are converted" in notice for notice in other.notices)
    path = export_exchange(tmp_path / "store", y, state, step=20)
    back = import_exchange(path, p, jax.eval_shape(narrow.init, p))
    # Up to the gap, rounded to the nearest in bfloat16.
    runs.assert_close(sfjax.schedule_free_eval_params(back.opt_state, back.params, jnp.float32), x, 1e-3)
    g = jax.tree.map(lambda leaf, q: leaf[0].astype(q.dtype), grads, p)
    with pytest.raises(ValueError, match="state must be of precision='exact', got another"):
        exact.update(g, state, y)


def test_what_does_not_go_with_it_is_refused_all_at_once() -> None:
    with pytest.raises(
        HyperparameterError, match=r"seed must be a whole number(.|\n)*b1 = 0(.|\n)*state_dtype must be None"
    ):
        sfjax.schedule_free_sgd(0.1, b1=0.0, state_dtype=jnp.float32, precision="lean", seed=-1)
    with pytest.raises(HyperparameterError, match="precision must be 'exact', 'lean' or '8bit', got 'bf16'"):
        sfjax.schedule_free_adamw(precision="bf16")


@pytest.mark.parametrize("seed", [None, "0", 1.0, True, -1, 2**32, np.arange(2), np.float32(1.5), 1 + 0j])
def test_a_seed_that_is_no_whole_number_of_32_bits_is_refused(seed: Any) -> None:
    with pytest.raises(HyperparameterError, match="seed must be a whole number >= 0 and < 2\\^32, got "):
        sfjax.schedule_free_adamw(precision="lean", seed=seed)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(3), jnp.asarray(3)])
def test_a_whole_number_of_any_package_is_a_seed(seed: Any) -> None:
    tx, params = sfjax.schedule_free_adamw(precision="lean", seed=seed), {"w": jnp.ones(2, jnp.bfloat16)}
    tx.update(params, tx.init(params), params)
