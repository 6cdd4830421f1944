"""A start from weights alone protects them; every word of the user's own wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore import exchange, restart
from sfcore.checks import HyperparameterError
from sfcore.convert import convert
from sfcore.hyperparameters import AdamW
from sfjax.checkpoint import (
    CheckpointError,
    Checkpoints,
    export_exchange,
    import_exchange,
    start_from_weights,
)
from sfjax.tests.checkpoint_runs import begin, go, saved, transformation
from sfjax.tests.runs import assert_close, assert_same

PRIOR = restart.WEIGHTS_ONLY["prior_steps"]
LR = 0.05


def _weights() -> Any:
    return jax.tree.map(lambda leaf: leaf * 3 + 1, begin())


def test_the_weights_are_x_y_and_z_and_count_as_earlier_steps() -> None:
    tx, params, weights = transformation("adamw", warmup_steps=0), begin(), _weights()
    start = start_from_weights(weights, params, tx.init(params), hyperparameters=AdamW(lr=LR))
    for iterate in sfjax.iterates(start.opt_state, start.params):
        assert_same(iterate, weights)
    assert any("no optimizer state: starting from x" in notice for notice in start.notices)
    assert any(f"average of {PRIOR} earlier steps" in notice for notice in start.notices)
    after = go(tx, start.params, start.opt_state, 0, 1)
    np.testing.assert_allclose(sfjax.metrics(after[1])["c"], 1 / (PRIOR + 1), rtol=1e-5)


def test_it_is_the_start_of_a_transformation_built_with_prior_steps() -> None:
    params, weights = begin(), _weights()
    plain, built = sfjax.schedule_free_adamw(LR), sfjax.schedule_free_adamw(LR, prior_steps=PRIOR)
    start = start_from_weights(weights, params, plain.init(params), hyperparameters={"lr": LR})
    expected = go(built, weights, built.init(weights), 0, 5)
    # The sum of weights is rounded to float32 once more or less.
    assert_close(go(plain, start.params, start.opt_state, 0, 5)[0], expected[0], 1e-6)


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({"prior_steps": 7}, AdamW(lr=LR), 7),
        ({"prior_steps": 7}, None, 7),
        ({}, {"lr": LR, "prior_steps": 9}, 9),
        ({}, AdamW(lr=LR, prior_steps=9), 9),
        ({}, {"prior_steps": 0}, 0),
    ],
    ids=["built", "built, nothing given", "dict", "dataclass", "switched off"],
)
def test_explicit_prior_steps_win(options: Any, given: Any, expected: int) -> None:
    tx, params = sfjax.schedule_free_adamw(LR, **options), begin()
    start = start_from_weights(_weights(), params, tx.init(params), hyperparameters=given)
    np.testing.assert_allclose(sfjax.find_state(start.opt_state).weight_sum, expected * LR**2, rtol=1e-6)


def test_trained_steps_can_be_told() -> None:
    tx, params = sfjax.schedule_free_adamw(LR), begin()
    start = start_from_weights(
        _weights(), params, tx.init(params), hyperparameters={"lr": LR}, trained_steps=5000
    )
    np.testing.assert_allclose(sfjax.find_state(start.opt_state).weight_sum, 5000 * LR**2, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [(None, "must give lr > 0"), ({"lr": LR, "r": 1.0}, "must give r = 0")],
    ids=["lr", "r"],
)
def test_what_the_policy_needs_is_asked_for(given: Any, message: str) -> None:
    tx, params = sfjax.schedule_free_adamw(LR), begin()
    with pytest.raises(
        CheckpointError, match=f"{message}.*or build the transformation with prior_steps={PRIOR}"
    ):
        start_from_weights(_weights(), params, tx.init(params), hyperparameters=given)


def test_the_sum_of_a_state_that_has_run_is_not_taken_for_prior_steps() -> None:
    tx, params = transformation("adamw"), begin()
    run, opt_state = go(tx, params, tx.init(params), 0, 5)
    start = start_from_weights(_weights(), run, opt_state, hyperparameters={"lr": LR})
    expected = start_from_weights(_weights(), params, tx.init(params), hyperparameters={"lr": LR})
    assert_same(sfjax.find_state(start.opt_state), sfjax.find_state(expected.opt_state))


def test_a_state_that_was_donated_is_a_target_too() -> None:
    tx, params = sfjax.schedule_free_adamw(LR), begin()
    donated = tx.init(params)
    for leaf in jax.tree.leaves(donated):
        leaf.delete()
    start = start_from_weights(_weights(), params, donated, hyperparameters=AdamW(lr=LR))
    expected = start_from_weights(_weights(), params, tx.init(params), hyperparameters=AdamW(lr=LR))
    assert_same((start.params, start.opt_state), (expected.params, expected.opt_state))


def test_wrapped_states_start_as_well() -> None:
    params = begin()
    inner = sfjax.schedule_free_sgd(LR)
    labels = {"a": "x", "b": "y", "c": "x"}
    for tx, count in (
        (optax.MultiSteps(optax.chain(optax.clip(1.0), inner), 4), 1),
        (optax.partition({"x": inner, "y": sfjax.schedule_free_adamw(LR)}, labels), 2),
    ):
        start = start_from_weights(_weights(), params, tx.init(params), hyperparameters={"lr": LR})
        states = sfjax.find_states(start.opt_state)
        assert len(states) == count
        assert all(float(state.weight_sum) == np.float32(PRIOR * LR**2) for state in states)
        assert_same(sfjax.schedule_free_eval_params(start.opt_state, start.params), _weights())


def test_the_vector_of_a_flattened_state_is_not_begun_anew_beside_weights_from_elsewhere(
    tmp_path: Path,
) -> None:
    tx, params = optax.flatten(sfjax.schedule_free_sgd(LR)), begin()
    other = sfjax.schedule_free_sgd(LR)
    path = export_exchange(tmp_path / "store", params, other.init(params), step=0)
    for take in (
        lambda: start_from_weights(_weights(), params, tx.init(params), hyperparameters={"lr": LR}),
        lambda: import_exchange(path, params, tx.init(params)),
    ):
        with pytest.raises(CheckpointError, match=r"z must be a tree like params, got the one vector of opt"):
            take()
    with pytest.raises(
        CheckpointError, match=r"must hold z as a tree like params, got the one vector of opt"
    ):
        export_exchange(tmp_path / "none", params, tx.init(params), step=0)
    with Checkpoints(tmp_path / "run") as checkpoints:
        saved_as = checkpoints.save(0, params, tx.init(params))
    with pytest.raises(CheckpointError, match="must hold z of every parameter, got the one vector of opt"):
        convert(saved_as, tmp_path / "torch", "torch")


def test_weights_come_from_files_checkpoints_and_folders(tmp_path: Path) -> None:
    with saved(tmp_path / "run") as (checkpoints, params, opt_state):
        x = jax.jit(sfjax.schedule_free_eval_params)(opt_state, params)
        inference = tmp_path / "run" / "3" / "inference" / "inference.safetensors"
        store = export_exchange(tmp_path / "store", params, opt_state, step=3)
        tx = transformation("sgd")
        for path in (inference, tmp_path / "run" / "3", tmp_path / "run", store, tmp_path / "store"):
            start = checkpoints.restore(
                params, tx.init(params), hyperparameters={"lr": LR}, resume=f"weights:{path}"
            )
            assert start is not None
            assert_same(start.params, x)
            assert start.notices[0] == f"{path}: no optimizer state: starting from x"
            # Each says for how many steps its weights were trained.
            assert any("average of 3 earlier steps" in notice for notice in start.notices)


def test_weights_are_converted_to_the_programs_dtype_with_a_word(tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_sgd(LR), begin(jnp.bfloat16)
    exchange.write_tensors(
        tmp_path / "w.safetensors", {"a": np.full((3, 2), 1.5), "b": np.ones(()), "more": np.ones(1)}
    )
    target = {"a": params["a"], "b": params["b"]}
    start = start_from_weights(
        tmp_path / "w.safetensors", target, tx.init(target), hyperparameters={"lr": LR}
    )
    assert start.params["a"].dtype == jnp.bfloat16
    assert sfjax.find_state(start.opt_state).z["a"].dtype == jnp.float32
    assert any("'a': float64 to bfloat16" in notice for notice in start.notices)
    assert any("the first 'more'" in notice for notice in start.notices)


def test_weights_that_do_not_fit_are_named_all_at_once(tmp_path: Path) -> None:
    tx, params = sfjax.schedule_free_sgd(LR), begin()
    weights = _weights() | {"a": jnp.ones(2)}
    del weights["b"]
    with pytest.raises(CheckpointError) as caught:
        start_from_weights(weights, params, tx.init(params), hyperparameters={"lr": LR})
    assert "b must be in it, got none" in str(caught.value)
    assert "a must have the shape (3, 2) of the program, got (2,)" in str(caught.value)
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoints(tmp_path).restore(params, tx.init(params), resume=f"weights:{tmp_path}/none.safetensors")


def test_a_lora_alone_leaves_the_other_weights_as_they_are_and_says_so(tmp_path: Path) -> None:
    params = {"base": jnp.ones((3, 3)), "lora": jnp.zeros((3, 1))}
    transforms = {"trained": sfjax.schedule_free_adamw(LR), "frozen": optax.set_to_zero()}
    tx = optax.multi_transform(transforms, {"base": "frozen", "lora": "trained"})
    given = {"hyperparameters": {"lr": LR}}
    exchange.write_tensors(tmp_path / "lora.safetensors", {"lora": np.full((3, 1), 2, np.float32)})
    start = start_from_weights(tmp_path / "lora.safetensors", params, tx.init(params), **given)
    assert_same(start.params, {"base": params["base"], "lora": jnp.full((3, 1), 2.0)})
    assert any("are missing: they stay, the first 'base'" in notice for notice in start.notices)
    with pytest.raises(CheckpointError, match="lora must be in it, got none"):
        start_from_weights({"base": params["base"]}, params, tx.init(params), **given)


def test_an_abstract_state_cannot_start() -> None:
    tx, params = sfjax.schedule_free_sgd(LR), begin()
    with pytest.raises(CheckpointError, match=r"opt_state must be tx\.init\(params\) itself"):
        start_from_weights(_weights(), params, jax.eval_shape(tx.init, params), hyperparameters={"lr": LR})


@pytest.mark.parametrize(
    ("prior_steps", "trained_steps"), [(-5, None), (0.5, None), (None, -5)], ids=["< 0", "a share", "trained"]
)
def test_prior_steps_out_of_range_are_refused(prior_steps: Any, trained_steps: Any) -> None:
    tx, params = sfjax.schedule_free_adamw(LR), begin()
    given = {"lr": LR} | ({} if prior_steps is None else {"prior_steps": prior_steps})
    rule = "prior_steps must be" if trained_steps is None else "trained_steps must be None or"
    with pytest.raises(HyperparameterError, match=f"^{rule} a whole number of optimizer steps"):
        start_from_weights(
            _weights(), params, tx.init(params), hyperparameters=given, trained_steps=trained_steps
        )
