"""The first updates after a restart are watched, and a jump is reported once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore.hyperparameters import AdamW
from sfcore.watch import WATCHED_STEPS
from sfjax.checkpoint import Checkpoints, read
from sfjax.tests.checkpoint_runs import LR, begin, go, transformation

BEFORE = 30


def _train(
    checkpoints: Checkpoints, tx: Any, params: Any, opt_state: Any, first: int, last: int, **options: Any
) -> Any:
    """Takes micro-batches and shows each of them to the checkpoints."""
    for number in range(first, last):
        params, opt_state = go(tx, params, opt_state, number, number + 1)
        checkpoints.observe(params, opt_state, **options)
    return params, opt_state


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Yields (checkpoints, tx, params, opt_state) of a run that is saved after 30 updates."""
    tx, params = transformation("adamw"), begin()
    with Checkpoints(tmp_path) as checkpoints:
        params, opt_state = _train(checkpoints, tx, params, tx.init(params), 0, BEFORE, loss=1.0)
        checkpoints.save(BEFORE, params, opt_state, hyperparameters=AdamW(lr=LR, warmup_steps=3))
        yield checkpoints, tx, params, opt_state


def _reports(caplog: Any) -> list[str]:
    return [message for message in caplog.messages if "after the restart" in message]


def test_the_record_is_of_the_steps_before(run: Any) -> None:
    checkpoints, _, params, opt_state = run
    recent = checkpoints.restore(params, opt_state).meta.recent
    state = sfjax.find_state(opt_state)
    assert (recent["steps"], recent["loss"]) == (WATCHED_STEPS, 1.0)
    np.testing.assert_allclose([recent["c"], recent["lr"]], [state.c, state.lr], rtol=1e-6)
    assert 0 < recent["x_step"] < recent["update_norm"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "radam"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_exact_resume_reports_nothing_and_the_watch_ends(
    tmp_path: Path, caplog: Any, optimizer: str, accumulate: int
) -> None:
    tx, params = transformation(optimizer, accumulate), begin()
    taken = 24 * accumulate
    with Checkpoints(tmp_path) as checkpoints:
        params, opt_state = _train(checkpoints, tx, params, tx.init(params), 0, taken)
        checkpoints.save(24, params, opt_state)
        restored = checkpoints.restore(params, opt_state)
        assert restored is not None
        last = taken + (WATCHED_STEPS + 2) * accumulate
        _train(checkpoints, tx, restored.params, restored.opt_state, taken, last)
        assert checkpoints.metrics()["restart_steps"] == WATCHED_STEPS
        assert checkpoints.metrics()["restart_jump"] == 0
    assert _reports(caplog) == []


def test_the_way_of_x_is_its_distance_from_the_loaded_weights(run: Any) -> None:
    checkpoints, tx, params, opt_state = run
    before = sfjax.schedule_free_eval_params(opt_state, params)
    restored = checkpoints.restore(params, opt_state)
    params, opt_state = _train(checkpoints, tx, restored.params, restored.opt_state, BEFORE, BEFORE + 5)
    x = sfjax.schedule_free_eval_params(opt_state, params)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, x, before))
    np.testing.assert_allclose(checkpoints.metrics()["restart_moved"], distance, rtol=1e-5)


def test_an_average_that_began_anew_is_reported_once_with_cause_and_fix(run: Any, caplog: Any) -> None:
    checkpoints, tx, params, opt_state = run
    restored = checkpoints.restore(params, opt_state)
    clip, state = restored.opt_state
    zero = jnp.zeros_like(state.weight_sum)  # what a state without its clocks would do
    forgotten = (clip, state._replace(weight_sum=zero, weight_sum_low=zero))
    with caplog.at_level(logging.WARNING, "sfjax.checkpoint"):
        _train(checkpoints, tx, restored.params, forgotten, BEFORE, BEFORE + 5)
    (report,) = _reports(caplog)
    assert "the averaging began anew" in report
    assert "prior_steps" in report
    assert checkpoints.metrics()["restart_jump"] == 1


def test_a_larger_lr_is_named_as_the_cause(run: Any, caplog: Any) -> None:
    checkpoints, _, params, _ = run
    tx = transformation("adamw", learning_rate=10 * LR)
    larger = AdamW(lr=10 * LR, warmup_steps=3)
    restored = checkpoints.restore(params, tx.init(params), hyperparameters=larger)
    _train(checkpoints, tx, restored.params, restored.opt_state, BEFORE, BEFORE + 3)
    (report,) = _reports(caplog)
    assert "by the changed lr" in report


def test_a_loss_that_jumps_is_reported(run: Any, caplog: Any) -> None:
    checkpoints, tx, params, opt_state = run
    restored = checkpoints.restore(params, opt_state)
    _train(checkpoints, tx, restored.params, restored.opt_state, BEFORE, BEFORE + 8, loss=3.0)
    (report,) = _reports(caplog)
    assert "the mean loss is 3, 3 times the 1 before" in report
    assert "the data or the model is not what it was" in report


def test_a_start_from_weights_alone_is_watched(run: Any, caplog: Any) -> None:
    checkpoints, tx, params, _ = run
    path = f"weights:{checkpoints.folder}"
    for prior, count in ((None, 0), (1, 1)):
        given = {"lr": LR} | ({} if prior is None else {"prior_steps": prior})
        restored = checkpoints.restore(params, tx.init(params), resume=path, hyperparameters=given)
        # The policy takes the 30 steps that the checkpoint says: c is 1 / 31 and falls.
        _train(checkpoints, tx, restored.params, restored.opt_state, 0, 5)
        assert len(_reports(caplog)) == count


def test_before_a_restore_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).metrics() == {}


def test_a_loss_may_be_an_array_of_one_at_any_time(run: Any) -> None:
    checkpoints, tx, params, opt_state = run
    _train(checkpoints, tx, params, opt_state, BEFORE, BEFORE + 2, loss=jnp.full((1,), 4.0))
    path = checkpoints.save(BEFORE + 2, params, opt_state)
    checkpoints.wait()
    assert read(path)[0].recent["loss"] > 1.0
