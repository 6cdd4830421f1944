"""A run that was saved and restored goes on bit for bit as one that was not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from safetensors.numpy import load_file

import sfjax
from sfcore.tests.examples import listed
from sfjax.checkpoint import CheckpointError, Checkpoints, export_exchange
from sfjax.checkpoint._save import Job
from sfjax.state.find import _pure
from sfjax.tests.checkpoint_runs import KINDS, LR, begin, go, saved, transformation
from sfjax.tests.runs import assert_same, gradients


@pytest.mark.parametrize("accumulate", [1, 4], ids=["plain", "in the middle of an accumulation"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", list(KINDS))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    optimizer: str, dtype: Any, accumulate: int, tmp_path: Path
) -> None:
    tx = transformation(optimizer, accumulate)
    params = begin(dtype)
    expected = go(tx, params, tx.init(params), 0, 14)
    params, opt_state = go(tx, params, tx.init(params), 0, 6)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, params, opt_state)
    del params, opt_state
    target = jax.eval_shape(lambda: begin(dtype))
    restored = Checkpoints(tmp_path).restore(target, jax.eval_shape(tx.init, target), strict=True)
    assert restored is not None
    assert restored.meta.accumulation["position"] == (2 if accumulate == 4 else 0)
    assert_same(go(tx, restored.params, restored.opt_state, 6, 14), expected)


@pytest.mark.parametrize("step", [0, 2])
def test_parameters_begun_with_python_numbers_resume_beside_bfloat16(step: int, tmp_path: Path) -> None:
    def weak() -> dict[str, Any]:
        return {"scale": jnp.asarray(2.6592), "layer_scale": jnp.full(3, 0.1), "w": jnp.eye(3)}

    @jax.jit
    def train(params: Any, opt_state: Any) -> tuple[Any, Any]:
        def loss(p: Any) -> Any:
            # In bfloat16 while the scales have a weak type, in float32 once they have been updated.
            return jnp.sum((p["scale"] * (p["layer_scale"] * p["w"].astype(jnp.bfloat16) + 0.3)) ** 3)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    tx = transformation("adamw")
    run = weak(), tx.init(weak())
    with jax.numpy_dtype_promotion("standard"), Checkpoints(tmp_path) as checkpoints:
        for _ in range(step):
            run = train(*run)
        checkpoints.save(step, *run)
        restored = checkpoints.restore(weak(), jax.eval_shape(tx.init, weak()))
        assert restored is not None
        expected, compiled = train(*run), train._cache_size()
        assert_same(train(restored.params, restored.opt_state), expected)
        assert train._cache_size() == compiled


def test_float32_state_of_bfloat16_parameters_stays_float32(tmp_path: Path) -> None:
    tx = transformation("adamw")
    params = begin(jnp.bfloat16)
    params, opt_state = go(tx, params, tx.init(params), 0, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, params, opt_state)
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert {leaf.dtype for leaf in jax.tree.leaves(sfjax.find_state(restored.opt_state).z)} == {
        np.dtype("float32")
    }
    assert restored.meta.precision == "bfloat16"


def test_inference_weights_are_x_and_plain_safetensors(tmp_path: Path) -> None:
    with saved(tmp_path, buffers={"mean": jnp.full(2, 7.0)}) as (_, params, opt_state):
        pass
    found = load_file(tmp_path / "3" / "inference" / "inference.safetensors")
    x = jax.jit(sfjax.schedule_free_eval_params)(opt_state, params)
    np.testing.assert_array_equal(found["c/d"], x["c"]["d"])
    assert not np.array_equal(found["c/d"], params["c"]["d"])
    assert sorted(found) == ["a", "b", "c/d", "c/e", "mean"]


def test_buffers_are_shipped_as_they_were_when_save_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), Job.write_meta
    monkeypatch.setattr(Job, "write_meta", lambda job, at: may_write.wait(60) and write(job, at))
    buffers = {"mean": jnp.full(2, 7.0), "var": np.full(2, 5.0)}
    tx, params = transformation("sgd"), begin()
    with Checkpoints(tmp_path) as checkpoints:
        path = checkpoints.save(0, params, tx.init(params), buffers=buffers)
        buffers["mean"].delete()  # as a step does to which it is donated
        buffers["var"][:] = 0
        may_write.set()
    found = load_file(path / "inference" / "inference.safetensors")
    assert (found["mean"].tolist(), found["var"].tolist()) == ([7.0, 7.0], [5.0, 5.0])


def test_a_buffer_with_the_name_of_a_parameter_is_not_shipped_in_its_place(tmp_path: Path) -> None:
    tx, params = transformation("sgd"), begin()
    given = {"params": params, "opt_state": tx.init(params), "step": 0, "buffers": {"a": jnp.zeros(2)}}
    for save in (Checkpoints(tmp_path / "run").save, partial(export_exchange, tmp_path / "store")):
        with pytest.raises(
            CheckpointError, match="buffers must have other names than params, got 'a' in both"
        ):
            save(**given)
    assert listed(tmp_path) == []


def group_c(opt_state: Any) -> float:
    return float(sfjax.metrics(opt_state)["c"])


def test_the_record_says_what_was_saved(tmp_path: Path) -> None:
    hyperparameters = KINDS["adamw"](lr=LR, warmup_steps=3)
    with saved(
        tmp_path, hyperparameters=hyperparameters, epoch=2, position=5, accumulation=(4, 1),
        metrics={"loss": jnp.float32(0.5)}, extra={"note": "mine"},
    ) as (checkpoints, params, opt_state):  # fmt: skip
        meta = checkpoints.restore(params, opt_state, hyperparameters=hyperparameters).meta  # type: ignore[union-attr]
    assert (meta.framework, meta.optimizer, meta.step, meta.epoch, meta.position) == ("jax", "adamw", 3, 2, 5)
    assert (meta.weights_hold, meta.precision, meta.accumulation) == (
        "y",
        "float32",
        {"steps": 4, "position": 1},
    )
    assert (meta.metrics, meta.extra) == ({"loss": 0.5}, {"note": "mine"})
    assert (meta.recent["steps"], meta.recent["c"]) == (1, pytest.approx(group_c(opt_state)))
    (group,) = meta.groups
    assert group["parameters"] == ["a", "b", "c/d", "c/e"]
    assert group["clock"]["step"] == 3
    assert group["hyperparameters"]["warmup_steps"] == 3
    assert meta.parameters["a"]["shape"] == [3, 2]
    assert "jax" in meta.versions
    assert meta.tensors["state"]["opt_state/1/z/a"]["role"] == "z/a"


def test_restore_leaves_the_target_alone_and_its_arrays_usable(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        before = jax.tree.map(np.array, (params, opt_state))
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert_same((params, opt_state), before)
    assert_same((restored.params, restored.opt_state), before)


def test_nothing_to_resume_from_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "empty")
    params = begin()
    opt_state = transformation("sgd").init(params)
    assert checkpoints.restore(params, opt_state) is None
    assert checkpoints.restore(params, opt_state, resume="latest-good") is None
    with saved(tmp_path) as (full, *_):
        assert full.restore(params, opt_state, resume="none") is None


def test_a_step_and_a_path_can_be_asked_for(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        later = go(transformation("adamw"), params, opt_state, 3, 5)
        checkpoints.save(5, *later)
        for resume, step in ((3, 3), ("auto", 5), (tmp_path / "3", 3), (str(tmp_path), 5)):
            restored = checkpoints.restore(params, opt_state, resume=resume)
            assert restored is not None
            assert (restored.meta.step, restored.path) == (step, tmp_path / str(step))


@pytest.mark.slow
def test_every_wrapper_of_optax_resumes(tmp_path: Path) -> None:
    inner = sfjax.schedule_free_adamw(LR, inner_momentum=0.5)
    labels = {"a": "x", "b": "y", "c": "x"}
    many = {
        "inject": optax.inject_hyperparams(sfjax.schedule_free_adamw)(LR),
        "finite": optax.apply_if_finite(inner, 3),
        "partition": optax.partition({"x": inner, "y": sfjax.schedule_free_sgd(LR)}, labels),
        "label of no parameter": optax.partition(
            {"w": sfjax.schedule_free_sgd(LR), "x": inner, "y": sfjax.schedule_free_sgd(1.0)}, lambda _: "x"
        ),
        "masked": optax.chain(optax.masked(inner, {"a": True, "b": False, "c": True})),
        "flatten": optax.flatten(inner),
        "wrapped": sfjax.schedule_free(optax.rmsprop(LR), LR),
        "polyak": sfjax.schedule_free_sgd(LR, b1=0.0),
    }
    for name, tx in many.items():
        params = begin()
        params, opt_state = go(tx, params, tx.init(params), 0, 3)
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(3, params, opt_state)
            restored = checkpoints.restore(params, jax.eval_shape(tx.init, params), strict=True)
        assert restored is not None
        assert_same((restored.params, restored.opt_state), (params, opt_state))


def test_the_state_of_flax_nnx_resumes(tmp_path: Path) -> None:
    nnx = pytest.importorskip("sfjax.nnx", exc_type=ImportError).nnx  # older flax, as it says itself

    def fresh() -> tuple[Any, Any]:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, sfjax.schedule_free_adamw(LR), wrt=nnx.Param)

    def train(model: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            grads = nnx.grad(lambda m: (m(jnp.ones((1, 3))) ** 2).sum())(model)
            optimizer.update(model, grads)

    model, optimizer = fresh()
    train(model, optimizer, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, nnx.state(model, nnx.Param), optimizer.opt_state)
        other, other_optimizer = fresh()
        restored = checkpoints.restore(nnx.state(other, nnx.Param), other_optimizer.opt_state)
    assert restored is not None
    nnx.update(other, restored.params)
    other_optimizer.opt_state = restored.opt_state
    train(model, optimizer, 2)
    train(other, other_optimizer, 2)
    assert_same(_pure(nnx.state(other)), _pure(nnx.state(model)))


def test_a_checkpoint_of_the_framework_free_store_can_be_asked_for(tmp_path: Path) -> None:
    with saved(tmp_path / "run") as (checkpoints, params, opt_state):
        path = export_exchange(tmp_path / "store", params, opt_state, step=3)
        for resume in (path, tmp_path / "store"):
            restored = checkpoints.restore(params, opt_state, resume=resume)
            assert restored is not None
            assert_same((restored.params, restored.opt_state), (params, opt_state))


def test_another_thread_can_save_while_this_one_does(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state), ThreadPoolExecutor() as pool:
        saves = [pool.submit(checkpoints.save, step, params, opt_state) for step in (5, 5, 5)]
        checkpoints.save(5, params, opt_state)
        assert [one.result() for one in saves] == [tmp_path / "5"] * 3
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert_same((restored.params, restored.opt_state), (params, opt_state))
    assert listed(tmp_path) == ["3", "5"]


def test_orbax_v1_reads_the_layout(tmp_path: Path) -> None:
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    if tuple(map(int, orbax.checkpoint.__version__.split(".")[:3])) < (0, 11, 39):
        pytest.skip("Orbax v1 wanted a file of metadata in every item")
    with saved(tmp_path) as (_, params, opt_state):
        pass
    whole = {"params": params, "opt_state": opt_state}
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), whole
    )
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest.step == 3
        assert_same(checkpointer.load_checkpointables(3, {"state": shapes})["state"], whole)
    everything = v1.load_checkpointables(tmp_path / "3")
    assert sorted(everything) == ["inference", "meta", "state"]
    assert everything["meta"]["step"] == 3


def test_gradients_of_the_tests_differ_from_step_to_step() -> None:
    first, second = gradients(2)
    assert not np.array_equal(first["a"], second["a"])
