"""Accumulation goes where optax.MultiSteps goes, resumes anywhere, and leaves alone what has not changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore import store
from sfjax.checkpoint import Checkpoints, export_exchange
from sfjax.tests import runs

LR = 0.05
pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.MultiSteps cannot do without


def adamw() -> Any:
    return optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(LR, 3, weight_decay=0.1))


def go(tx: Any, params: Any, state: Any, first: int, last: int) -> tuple[Any, Any]:
    step = jax.jit(tx.step)
    for g in runs.gradients(last)[first:]:
        params, state = step(params, state, gradients=runs.typed(g, jnp.float32))
    return params, state


@pytest.mark.parametrize("form", ["step", "update"])
def test_it_goes_where_multi_steps_goes(form: str) -> None:
    params, grads = runs.typed(runs.start(), jnp.float32), runs.gradients(14)
    tx, theirs = sfjax.accumulate(adamw(), 4), optax.MultiSteps(adamw(), 4)
    y, state = go(tx, params, tx.init(params), 0, 14) if form == "step" else runs.run(tx, params, grads)
    want, want_state = runs.run(theirs, params, grads)
    # Other programs, so an ulp or so; measured: 2e-7.
    runs.assert_close(y, want, 1e-6)
    runs.assert_close(sfjax.find_state(state).z, sfjax.find_state(want_state).z, 1e-6)
    runs.assert_close(state.acc_grads, want_state.acc_grads, 1e-6)
    assert (int(state.mini_step), int(state.gradient_step)) == (2, 3)
    assert int(sfjax.metrics(state)["step"]) == 3


def test_micro_steps_change_the_mean_alone() -> None:
    tx, params = sfjax.accumulate(adamw(), 4), runs.typed(runs.start(), jnp.float32)
    y, state = go(tx, params, tx.init(params), 0, 4)
    later, later_state = go(tx, y, state, 4, 7)
    runs.assert_same((later, later_state.inner_opt_state), (y, state.inner_opt_state))
    updates, _ = jax.jit(tx.update)(params, state, y)
    runs.assert_same(updates, jax.tree.map(jnp.zeros_like, y))


@pytest.mark.parametrize("position", [5, 8])
def test_a_run_resumes_in_the_same_bits_in_the_middle_of_an_accumulation(
    position: int, tmp_path: Path
) -> None:
    tx, params = sfjax.accumulate(adamw(), 4), runs.typed(runs.start(), jnp.float32)
    y, state = go(tx, params, tx.init(params), 0, position)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(position // 4, y, state, position=position, accumulation=4)
        back = checkpoints.restore(params, jax.eval_shape(tx.init, params), accumulation=4, strict=True)
    assert back is not None
    assert back.meta.accumulation == {"steps": 4, "position": position % 4}
    runs.assert_same((back.params, back.opt_state), (y, state))
    whole = go(tx, y, state, position, 14)
    runs.assert_same(go(tx, back.params, back.opt_state, position, 14), whole)


def test_a_checkpoint_of_multi_steps_goes_on_in_it(tmp_path: Path) -> None:
    params, grads = runs.typed(runs.start(), jnp.float32), runs.gradients(14)
    theirs, tx = optax.MultiSteps(adamw(), 4), sfjax.accumulate(adamw(), 4)
    y, state = runs.run(theirs, params, grads[:6])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, y, state, accumulation=4)
        back = checkpoints.restore(params, tx.init(params), accumulation=4, strict=True)
    assert back is not None
    want, _ = runs.run(theirs, y, grads[6:], state)
    got, _ = go(tx, back.params, back.opt_state, 6, 14)
    runs.assert_close(got, want, 1e-6)


def test_the_exchange_store_goes_back_to_the_last_update(tmp_path: Path) -> None:
    tx, params = sfjax.accumulate(adamw(), 4), runs.typed(runs.start(), jnp.float32)
    y, state = go(tx, params, tx.init(params), 0, 6)
    meta, _ = store.read(export_exchange(tmp_path, y, state, step=1, position=6, accumulation=4))
    assert (meta.position, meta.accumulation) == (4, {"steps": 4, "position": 0})


def test_a_schedule_says_how_many_micro_steps_an_update_takes() -> None:
    tx, params = sfjax.accumulate(adamw(), lambda update: update + 1), runs.typed(runs.start(), jnp.float32)
    state, places = tx.init(params), []
    for last in range(6):
        params, state = go(tx, params, state, last, last + 1)
        places.append((int(state.gradient_step), int(state.mini_step)))
    assert places == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0)]


def test_a_nan_is_gone_with_the_update_that_it_spoilt() -> None:
    tx = sfjax.accumulate(optax.apply_if_finite(adamw(), 3), 2)
    params = runs.typed(runs.start(), jnp.float32)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    y, state = params, tx.init(params)
    step = jax.jit(tx.step)
    for g in (bad, params, params, params):
        y, state = step(y, state, gradients=g)
    assert int(sfjax.find_state(state).step) == 1
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((y, state.acc_grads)))


def test_means_of_16_bit_gradients_are_float32() -> None:
    tx, params = sfjax.accumulate(sfjax.schedule_free_sgd(1.0), 2), {"w": jnp.ones(3, jnp.bfloat16)}
    y, state = params, tx.init(params)
    for g in (1.0, 2.0**-8):
        y, state = jax.jit(tx.step)(y, state, gradients={"w": jnp.full(3, g, jnp.bfloat16)})
    z = 1 - (1 + 2.0**-8) / 2
    np.testing.assert_array_equal(sfjax.find_state(state).z["w"], np.full(3, z, np.float32))


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None, "4"])
def test_every_must_be_a_number_or_a_schedule(every: Any) -> None:
    with pytest.raises(ValueError, match="every must be a whole number >= 1 or a schedule, got"):
        sfjax.accumulate(adamw(), every)


def test_every_may_be_a_number_of_numpy() -> None:
    tx, p = sfjax.accumulate(optax.sgd(1.0), np.int64(2)), jnp.ones(2)
    _, state = tx.step(p, tx.init(p), gradients=p)
    assert int(state.mini_step) == 1


@pytest.mark.parametrize("positions", [2, 3])
def test_gradients_by_position_are_refused(positions: int) -> None:
    tx, p = sfjax.accumulate(optax.sgd(1.0), 2), jnp.ones(2)
    arguments = (p, tx.init(p), p)[:positions]
    match = f"gradients must be passed to step.. by name, got {positions} arguments by position"
    for step in (tx.step, jax.jit(tx.step, donate_argnums=(0, 1))):
        with pytest.raises(TypeError, match=match):
            step(*arguments)
