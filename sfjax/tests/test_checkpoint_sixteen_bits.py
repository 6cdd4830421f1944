"""16-bit parameters are saved with the rest of their y, and resume in the same bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfjax
from sfcore import store
from sfcore.hyperparameters import AdamW
from sfjax.checkpoint import Checkpoints, export_exchange, import_exchange, read, start_from_weights
from sfjax.state import forms
from sfjax.tests.checkpoint_runs import LR, begin, go, transformation
from sfjax.tests.runs import assert_close, assert_same

LOW = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])


def after(steps: int, dtype: Any, tx: Any) -> tuple[Any, Any]:
    params = begin(dtype)
    return go(tx, params, tx.init(params), 0, steps)


def in_full(params: Any, opt_state: Any) -> Any:
    return jax.tree.map(forms.whole, params, sfjax.find_state(opt_state).y_rest)


@LOW
def test_a_resumed_run_ends_in_the_same_bits(dtype: Any, tmp_path: Path) -> None:
    tx = transformation("adamw", 2)
    params, opt_state = after(7, dtype, tx)
    assert any(jnp.any(rest != 0) for rest in jax.tree.leaves(sfjax.find_state(opt_state).y_rest))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, params, opt_state, accumulation=2)
        restored = checkpoints.restore(params, jax.eval_shape(tx.init, params), accumulation=2, strict=True)
    assert restored is not None
    assert_same((restored.params, restored.opt_state), (params, opt_state))
    assert_same(go(tx, restored.params, restored.opt_state, 7, 12), go(tx, params, opt_state, 7, 12))


@pytest.mark.parametrize("b1", [0.9, 0.0])
@LOW
def test_the_store_holds_y_in_float32_and_gives_it_back(dtype: Any, b1: float, tmp_path: Path) -> None:
    tx = transformation("adamw", b1=b1)
    params, opt_state = after(40, dtype, tx)
    path = export_exchange(tmp_path, params, opt_state, step=40)
    meta, arrays = store.read(path)
    y = in_full(params, opt_state)
    np.testing.assert_array_equal(arrays["y/c/d"], y["c"]["d"])
    assert arrays["y/c/d"].dtype == np.float32
    assert meta.parameters["c/d"]["dtype"] == jnp.dtype(dtype).name
    if b1 == 0:
        np.testing.assert_array_equal(arrays["z/c/d"], y["c"]["d"])
    back = import_exchange(path, params, jax.eval_shape(tx.init, params), strict=True)
    assert_same(in_full(back.params, back.opt_state), y)
    assert_same(sfjax.find_state(back.opt_state).z, sfjax.find_state(opt_state).z)
    # The parameter is y rounded once; after a long stride optax may have left it a bit beside that.
    assert_close(back.params, params, float(jnp.finfo(dtype).eps))


def test_an_orbax_checkpoint_reads_with_y_in_full(tmp_path: Path) -> None:
    tx = transformation("sgd", b1=0.0)
    params, opt_state = after(5, jnp.bfloat16, tx)
    with Checkpoints(tmp_path) as checkpoints:
        path = checkpoints.save(5, params, opt_state)
    _, state, inference = read(path)
    y = in_full(params, opt_state)
    np.testing.assert_array_equal(state["y/a"], y["a"])
    np.testing.assert_array_equal(state["z/a"], y["a"])
    assert inference["a"].dtype == jnp.bfloat16
    assert not any(role.startswith("rest/") for role in state)


def test_a_checkpoint_from_before_the_rest_goes_on_from_the_parameters_that_it_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tx = sfjax.schedule_free_adamw(LR)
    params, opt_state = after(5, jnp.bfloat16, tx)
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        checkpoints.save(5, params, opt_state._replace(y_rest=None))
        restored = checkpoints.restore(params, tx.init(params), strict=True)
    assert restored is not None
    zeros = jax.tree.map(jnp.zeros_like, opt_state.y_rest)
    assert_same((restored.params, restored.opt_state), (params, opt_state._replace(y_rest=zeros)))
    assert caplog.records == []


def test_weights_of_someone_elses_start_without_a_rest() -> None:
    tx = sfjax.schedule_free_adamw(LR)
    params, opt_state = after(5, jnp.bfloat16, tx)
    weights = jax.tree.map(lambda p: np.asarray(p, np.float32) * np.float32(1.001), params)
    start = start_from_weights(weights, params, opt_state, hyperparameters=AdamW(lr=LR))
    rests = jax.tree.leaves(sfjax.find_state(start.opt_state).y_rest)
    assert len(rests) == 4
    assert not any(jnp.any(rest != 0) for rest in rests)
    assert_same(sfjax.schedule_free_eval_params(start.opt_state, start.params), start.params)


@pytest.mark.parametrize("precision", ["exact", "lean"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_alone_are_z_too_in_every_precision(dtype: Any, precision: str) -> None:
    tx, params = sfjax.schedule_free_adamw(LR, precision=precision), {"w": jnp.array([1.123, 0.3], dtype)}
    start = start_from_weights(params, params, tx.init(params), hyperparameters={"lr": LR})
    *_, z = sfjax.iterates(start.opt_state, start.params)
    np.testing.assert_array_equal(np.asarray(z["w"], np.float32), np.asarray(params["w"], np.float32))
