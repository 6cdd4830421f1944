"""Which checkpoints stay, which make way, and what a killed save leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sfcore import exchange
from sfcore.checks import HyperparameterError
from sfcore.tests.examples import listed
from sfjax.checkpoint import CheckpointError, Checkpoints
from sfjax.checkpoint._save import Job
from sfjax.tests.checkpoint_runs import begin, go, saved, snapshot, transformation


def _state() -> tuple[Any, Any]:
    params = begin()
    return params, transformation("sgd").init(params)


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_the_newest_and_the_best_stay(background: bool, tmp_path: Path) -> None:
    losses = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3, 5: 0.9}
    with Checkpoints(tmp_path, keep_newest=2, keep_best=1, background=background) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, *_state(), metrics={"loss": loss})
    assert listed(tmp_path) == ["2", "4", "5"]


def test_the_best_stays_when_another_process_goes_on(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
        checkpoints.save(1, *_state(), metrics={"loss": 0.1})
        checkpoints.save(2, *_state(), metrics={"loss": 0.2})
    with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
        checkpoints.save(3, *_state(), metrics={"loss": 0.3})
    assert listed(tmp_path) == ["1", "3"]


def test_another_metric_can_rank_and_may_be_missing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_newest=1, metric="error") as checkpoints:
        checkpoints.save(1, *_state(), metrics={"error": 1.0, "loss": 9.0})
        checkpoints.save(2, *_state(), metrics={"loss": 0.0})
        checkpoints.save(3, *_state())
    assert listed(tmp_path) == ["1", "3"]


def test_a_checkpoint_ranks_by_its_own_metric_and_not_by_that_of_the_one_it_replaced(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
        checkpoints.save(1, *_state(), metrics={"loss": 0.1})
        checkpoints.save(1, *_state())
        checkpoints.save(2, *_state(), metrics={"loss": 0.5})
        checkpoints.save(3, *_state())
    assert listed(tmp_path) == ["2", "3"]


def test_options_out_of_range_are_refused_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError) as caught:
        Checkpoints(tmp_path, keep_newest=0, keep_best=-1)
    assert [problem.split(" must")[0] for problem in caught.value.problems] == ["keep_newest", "keep_best"]


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_a_step_that_is_no_count_is_refused(step: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step must be a whole number >= 0"):
        Checkpoints(tmp_path).save(step, *_state())


def test_an_unknown_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"resume must be 'auto'.*got 'lattest-good': check the spelling"
    ):
        Checkpoints(tmp_path).restore(*_state(), resume="lattest-good")


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        later = go(transformation("adamw"), params, opt_state, 3, 4)
        checkpoints.save(3, *later)
        checkpoints.wait()
        assert listed(tmp_path) == ["3"]
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert snapshot(restored.params) == snapshot(later[0]) != snapshot(params)


def test_a_failed_replacement_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with saved(tmp_path) as (checkpoints, params, opt_state):
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "write_tensors", fail)
            checkpoints.save(3, *go(transformation("adamw"), params, opt_state, 3, 4))
            with pytest.raises(CheckpointError, match="full"):
                checkpoints.wait()
        assert listed(tmp_path) == ["3"]
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert snapshot(restored.params) == snapshot(params)


def test_the_best_stays_the_best_when_its_replacement_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
        checkpoints.save(1, *_state(), metrics={"loss": 0.1})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "write_tensors", fail)
            checkpoints.save(1, *_state(), metrics={"loss": 9.0})
            with pytest.raises(CheckpointError, match="full"):
                checkpoints.wait()
        checkpoints.save(2, *_state(), metrics={"loss": 0.5})
    assert listed(tmp_path) == ["1", "2"]


def test_newer_checkpoints_of_an_abandoned_run_are_set_aside(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        checkpoints.save(9, params, opt_state)
        checkpoints.restore(params, opt_state, resume=3)
        checkpoints.save(5, params, opt_state)
        checkpoints.wait()
        assert listed(tmp_path) == ["3", "5", "set-aside"]
        assert listed(tmp_path / "set-aside") == ["9"]
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert restored.meta.step == 5


def test_saving_goes_on_beside_damaged_checkpoints(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        checkpoints.close()
        for name in ("_CHECKPOINT_METADATA", "meta/metadata", "state/_METADATA"):
            (tmp_path / "3" / name).write_text("{")
        checkpoints.save(4, params, opt_state)
        checkpoints.wait()
        restored = checkpoints.restore(params, opt_state)
    assert restored is not None
    assert restored.meta.step == 4


def test_leftovers_go_at_the_first_save_and_a_replaced_checkpoint_comes_back(tmp_path: Path) -> None:
    with saved(tmp_path):
        pass
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / ".removed" / "1").mkdir(parents=True)
    (tmp_path / ".replaced").mkdir()
    os.rename(tmp_path / "3", tmp_path / ".replaced" / "3")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, *_state())
    assert listed(tmp_path) == ["3", "5"]


def test_a_checkpoint_whose_replacement_was_killed_is_found_without_a_save(tmp_path: Path) -> None:
    with saved(tmp_path) as (_, params, opt_state):
        pass
    (tmp_path / ".replaced").mkdir()
    os.rename(tmp_path / "3", tmp_path / ".replaced" / "3")
    for resume in ("auto", 3):
        restored = Checkpoints(tmp_path).restore(params, opt_state, resume=resume)
        assert restored is not None
        assert restored.meta.step == 3


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with (
        saved(tmp_path) as (checkpoints, params, opt_state),
        pytest.raises(CheckpointError, match=r"must hold step 7, got the steps \[3\]"),
    ):
        checkpoints.restore(params, opt_state, resume=7)


def test_another_object_for_the_folder_does_not_clean_away_the_save_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, write = threading.Event(), Job.write_meta

    def slow(job: Job, folder: Path) -> None:
        begun.set()
        time.sleep(1)
        write(job, folder)

    monkeypatch.setattr(Job, "write_meta", slow)
    with Checkpoints(tmp_path) as old, Checkpoints(tmp_path) as new:
        old.save(1, *_state())
        begun.wait(60)
        new.save(2, *_state())
    assert listed(tmp_path) == ["1", "2"]


def test_reading_cleans_nothing_that_another_process_may_be_writing(tmp_path: Path) -> None:
    with saved(tmp_path):
        pass
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    params = begin()
    restored = Checkpoints(tmp_path).restore(params, transformation("adamw").init(params))
    assert restored is not None
    assert restored.meta.step == 3
    assert listed(tmp_path) == ["3", "4.orbax-checkpoint-tmp"]


CHILD = """
import sys, time
from sfcore import exchange
from sfjax.checkpoint import Checkpoints
from sfjax.tests.checkpoint_runs import begin, transformation

write, params = exchange.write_tensors, begin()
opt_state = transformation("sgd").init(params)
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, params, opt_state)
    checkpoints.wait()
    exchange.write_tensors = lambda *given, **named: (time.sleep(60), write(*given, **named))
    checkpoints.save(2, params, opt_state)
    print("saving", flush=True)
    time.sleep(60)
"""


def test_a_kill_inside_a_background_save_leaves_the_previous_step(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "saving\n"
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".partial-*/**/state*/**/*ocdbt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert list(tmp_path.glob(".partial-*"))
    params, opt_state = _state()
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(params, opt_state)
        assert restored is not None
        assert restored.meta.step == 1
        checkpoints.save(2, params, opt_state)
    assert listed(tmp_path) == ["1", "2"]
