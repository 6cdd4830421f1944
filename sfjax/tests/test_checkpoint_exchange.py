"""The framework-free store: identity there and back, torch's names and layouts, torch's kinds of state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore import names, store
from sfcore.exchange import of_role
from sfcore.hyperparameters import SGD, AdamW
from sfcore.meta import Meta
from sfjax.checkpoint import CheckpointError, export_exchange, import_exchange, read
from sfjax.tests.checkpoint_runs import begin, go, saved, transformation
from sfjax.tests.runs import assert_close, assert_same

LR = 0.05
MODEL = {
    "Dense_0": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.arange(3.0)},
    "Conv_0": {"kernel": np.arange(36.0).reshape(3, 3, 2, 2), "bias": np.ones(2)},
}


def _model(dtype: Any = jnp.float32) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), MODEL)


@jax.jit
def _zeros(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("b1", [0.9, 0.0, 1.0])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_there_and_back_is_the_identity_bit_for_bit(kind: str, b1: float, dtype: Any, tmp_path: Path) -> None:
    tx = transformation(kind, b1=b1)
    params = begin(dtype)
    params, opt_state = go(tx, params, tx.init(params), 0, 5)
    path = export_exchange(tmp_path, params, opt_state, step=5, epoch=1, position=20, metrics={"loss": 0.5})
    back = import_exchange(path, params, jax.eval_shape(tx.init, params), strict=True)
    assert_same((back.params, back.opt_state), (params, opt_state))
    assert (back.meta.step, back.meta.epoch, back.meta.position, back.meta.metrics) == (
        5,
        1,
        20,
        {"loss": 0.5},
    )


def test_a_partition_of_several_b1_is_there_and_back_the_same(tmp_path: Path) -> None:
    parts = {b1: sfjax.schedule_free_sgd(0.1, b1=b1) for b1 in (0.0, 0.9)}
    tx = optax.partition(parts, {"a": 0.0, "b": 0.9})
    params = {name: jnp.ones(3) for name in "ab"}
    opt_state = tx.init(params)
    for _ in range(3):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
    path = export_exchange(tmp_path, params, opt_state, step=3)
    back = import_exchange(path, params, tx.init(params))
    assert_same((back.params, back.opt_state), (params, opt_state))


@pytest.mark.parametrize("steps", range(1, 13))
def test_the_sum_of_growing_weights_is_there_and_back_the_same(steps: int, tmp_path: Path) -> None:
    tx = sfjax.schedule_free_sgd(0.3, warmup_steps=9, weight_lr_power=3.0, r=2.0)
    params = jnp.ones(3)
    opt_state = tx.init(params)
    for _ in range(steps):
        _, opt_state = tx.update(params, opt_state, params)
    path = export_exchange(tmp_path, params, opt_state, step=steps)
    assert_same(import_exchange(path, params, tx.init(params)).opt_state, opt_state)


def test_inner_momentum_and_wrapped_bases_cross_too(tmp_path: Path) -> None:
    for number, tx in enumerate(
        (sfjax.schedule_free_adamw(LR, inner_momentum=0.5), sfjax.schedule_free(optax.rmsprop(LR), LR))
    ):
        params = begin()
        params, opt_state = go(tx, params, tx.init(params), 0, 3)
        path = export_exchange(tmp_path / str(number), params, opt_state, step=3)
        back = import_exchange(path, params, jax.eval_shape(tx.init, params), strict=True)
        assert_same((back.params, back.opt_state), (params, opt_state))


def test_torch_names_and_layouts_go_there_and_back(tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_adamw(LR), _model()
    params, opt_state = _one_step(tx, params)
    found = names.to_torch(
        {"Dense_0/kernel": (2, 3), "Dense_0/bias": (3,), "Conv_0/kernel": (3, 3, 2, 2), "Conv_0/bias": (2,)}
    )
    path = export_exchange(tmp_path, params, opt_state, step=1, names=found, hyperparameters=AdamW(lr=LR))
    meta, arrays = store.read(path)
    weight, conv = found.torch_name("Dense_0/kernel"), found.torch_name("Conv_0/kernel")
    np.testing.assert_array_equal(arrays[f"y/{weight}"], np.asarray(params["Dense_0"]["kernel"]).T)
    np.testing.assert_array_equal(
        arrays[f"z/{conv}"], np.asarray(opt_state.z["Conv_0"]["kernel"]).transpose(3, 2, 0, 1)
    )
    assert (meta.framework, meta.optimizer) == ("torch", "adamw")
    assert meta.parameters[weight]["shape"] == [3, 2]
    assert weight in meta.groups[0]["parameters"]
    back = import_exchange(path, params, tx.init(params), strict=True)
    assert_same((back.params, back.opt_state), (params, opt_state))


def test_torch_is_told_which_beta_built_y_whatever_is_configured_now(tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_adamw(LR, b1=0.5), _model()
    params, opt_state = _one_step(tx, params)
    shapes = {
        "Dense_0/kernel": (2, 3),
        "Dense_0/bias": (3,),
        "Conv_0/kernel": (3, 3, 2, 2),
        "Conv_0/bias": (2,),
    }
    found, now = names.to_torch(shapes), AdamW(lr=LR, beta=0.9)
    path = export_exchange(tmp_path, params, opt_state, step=1, names=found, hyperparameters=now)
    assert store.read_meta(path).groups[0]["torch"]["books"]["y_beta"] == 0.5


def _one_step(tx: Any, params: Any) -> tuple[Any, Any]:
    updates, opt_state = jax.jit(tx.update)(jax.tree.map(jnp.cos, params), tx.init(params), params)
    return optax.apply_updates(params, updates), opt_state


def test_buffers_cross_and_lie_beside_x_in_the_inference_weights(tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_sgd(LR), begin()
    buffers = {"mean": jnp.arange(2.0)}
    path = export_exchange(tmp_path, params, tx.init(params), step=0, buffers=buffers)
    back = import_exchange(path, params, tx.init(params), buffers=_zeros(buffers))
    assert_same(back.extra_state, buffers)
    assert "mean" in store.read(path, store.INFERENCE)[1]
    with pytest.raises(CheckpointError, match=r"buffer 'var' must be .* got none of that name"):
        import_exchange(path, params, tx.init(params), buffers={"var": jnp.zeros(2)})


def test_a_key_in_the_state_of_another_transformation_is_no_hindrance(tmp_path: Path) -> None:
    params = begin()
    tx = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), sfjax.schedule_free_sgd(LR))
    path = export_exchange(tmp_path, params, tx.init(params), step=0)
    back = import_exchange(path, params, tx.init(params))
    assert_same(back.params, params)
    assert any("is not in the checkpoint and starts anew" in notice for notice in back.notices)


def test_an_unfinished_accumulation_goes_back_to_the_last_update(tmp_path: Path) -> None:
    tx = transformation("adamw", 4)
    params = begin()
    params, opt_state = go(tx, params, tx.init(params), 0, 6)
    path = export_exchange(tmp_path, params, opt_state, step=1, position=6, accumulation=4)
    meta, arrays = store.read(path)
    assert (meta.position, meta.accumulation) == (4, {"steps": 4, "position": 0})
    assert of_role(arrays, "grad") == {}
    back = import_exchange(path, params, tx.init(params))
    assert_same(sfjax.find_state(back.opt_state), sfjax.find_state(opt_state))
    again, whole = go(tx, back.params, back.opt_state, 4, 8), go(tx, params, opt_state, 6, 8)
    assert_same(again[0], whole[0])


def _torch_file(folder: Path, *, weights_hold: str = "y", beta: float = 0.9, **meta: Any) -> Path:
    rng = np.random.default_rng(0)
    y, z = (rng.standard_normal((3, 2)).astype(np.float32) for _ in range(2))
    clock = {"step": 10, "lr_max": LR, "weight_sum": 10 * LR**2}
    about = {"shape": [3, 2], "dtype": "float32", "clock": dict(clock)}
    late = {"shape": [3], "dtype": "float32", "clock": None}
    record = Meta(
        framework="torch",
        optimizer="sgd",
        step=10,
        weights_hold=weights_hold,
        groups=[
            {"hyperparameters": {"lr": LR, "beta": beta}, "clock": clock, "parameters": ["weight", "bias"]}
        ],
        parameters={"weight": about, "bias": late},
        **meta,
    )
    state = {"y/weight": y, "z/weight": z, "y/bias": np.ones(3, np.float32)}
    return store.write(folder, record, state, {"weight": y})


def test_a_torch_checkpoint_is_taken_over_by_derived_names(tmp_path: Path) -> None:
    path = _torch_file(tmp_path)
    _, arrays = store.read(path)
    tx = sfjax.schedule_free_sgd(LR)
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    start = import_exchange(path, params, tx.init(params), hyperparameters=SGD(lr=LR))
    state = sfjax.find_state(start.opt_state)
    np.testing.assert_array_equal(start.params["kernel"], arrays["y/weight"].T)
    np.testing.assert_array_equal(state.z["kernel"], arrays["z/weight"].T)
    assert (int(state.step), float(state.b1)) == (10, np.float32(0.9))
    np.testing.assert_allclose(state.weight_sum, 10 * LR**2, rtol=1e-6)
    # A parameter without a gradient so far joins the clock of the others, from where it is.
    np.testing.assert_array_equal(state.z["bias"], np.ones(3))
    assert any(
        "1 parameters have a clock of their own, the first 'bias'" in notice for notice in start.notices
    )
    with pytest.raises(CheckpointError, match="strict=True"):
        import_exchange(path, params, tx.init(params), strict=True)


@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_a_torch_closure_checkpoint_holds_x_and_comes_back_as_y(beta: float, tmp_path: Path) -> None:
    path = _torch_file(tmp_path, weights_hold="x", beta=beta)
    _, arrays = store.read(path)
    tx = sfjax.schedule_free_sgd(LR, b1=beta)
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    start = import_exchange(path, params, tx.init(params))
    x, y, z = sfjax.iterates(start.opt_state, start.params)
    # One rounding of y and one of x decoded from it, in float32.
    assert_close(x["kernel"], arrays["y/weight"].T, 5e-7)
    assert_close(z["kernel"], arrays["z/weight"].T, 0)
    assert_close(y["kernel"], beta * arrays["y/weight"].T + (1 - beta) * arrays["z/weight"].T, 5e-7)


def test_gradients_that_torch_had_accumulated_are_left_behind_with_a_word(tmp_path: Path) -> None:
    path = _torch_file(tmp_path, accumulation={"steps": 4, "position": 3}, position=11)
    tx = sfjax.schedule_free_sgd(LR)
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    start = import_exchange(path, params, tx.init(params))
    assert start.meta.position == 8
    assert any("take them again from position 8" in notice for notice in start.notices)


def test_an_orbax_checkpoint_reads_as_roles_without_a_target(tmp_path: Path) -> None:
    for b1 in (0.9, 0.0):
        tx = transformation("adamw", b1=b1)
        with saved(tmp_path / str(b1), tx) as (_, params, opt_state):
            pass
        meta, state, inference = read(tmp_path / str(b1) / "3")
        x, y, z = sfjax.iterates(opt_state, params)
        np.testing.assert_array_equal(state["y/c/d"], y["c"]["d"])
        np.testing.assert_array_equal(state["z/c/d"], z["c"]["d"])
        # The saved x is computed in one fused kernel, which rounds once where the eager one rounds twice.
        np.testing.assert_allclose(inference["c/d"], x["c"]["d"], rtol=3e-7)
        np.testing.assert_array_equal(state["v/a"], sfjax.find_state(opt_state).base_optimizer_state.nu["a"])
        assert meta.step == 3
        assert ("x/a" in state) == (b1 == 0)


@pytest.mark.parametrize("accumulation", [(4, 4), (0, 0), (4, -1)])
def test_an_accumulation_that_cannot_be_is_refused(accumulation: Any, tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_sgd(LR), begin()
    with pytest.raises(CheckpointError, match="0 <= position < steps"):
        export_exchange(tmp_path, params, tx.init(params), step=1, accumulation=accumulation)
