"""Saves that the system refuses, and checkpoints that are intact and do not fit."""

import errno
import os
import re

import numpy as np
import pytest
import torch

import sftorch
from sfcore import store
from sftorch.checkpoint import CheckpointError, Checkpoints
from sftorch.tests.checkpoint_runs import Case, build, saved_twice, train

CASE = Case("adamw", "float32", 4, 6, "train")
STATE = "state.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A folder with the steps 1 and 2."""
    return saved_twice(tmp_path, CASE)


def restore_fails(saved, resume, *patterns):
    """Restores into a run that is at another place, and returns the error; the run must not change."""
    model, optimizer = build(CASE, seed=7)
    train(model, optimizer, CASE, 0, 3)
    before = torch.get_rng_state(), repr(optimizer.state_dict()), repr(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(saved).restore(model, optimizer, resume=resume)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), caught.value
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (repr(optimizer.state_dict()), repr(model.state_dict())) == before[1:]
    return caught.value


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("code", "finding"),
    [(errno.ENOSPC, "the disk or the quota is full"), (errno.EACCES, "no permission; choose")],
)
def test_a_save_that_the_system_refuses_is_an_error_and_leaves_the_older_ones(
    saved, monkeypatch, background, code, finding
):
    def refuse(handle):
        raise OSError(code, os.strerror(code))

    model, optimizer = build(CASE, seed=7)
    train(model, optimizer, CASE, 0, 6)
    before = repr(optimizer.state_dict())
    listing = sorted(path.name for path in saved.iterdir())
    checkpoints = Checkpoints(saved, background=background)

    def save():
        checkpoints.save(model, optimizer, step=9)
        checkpoints.wait()

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        with pytest.raises(CheckpointError, match=finding):
            save()
    assert repr(optimizer.state_dict()) == before
    assert sorted(path.name for path in saved.iterdir()) == listing
    checkpoints.save(model, optimizer, step=9)
    assert checkpoints.wait().name == "step_000000009"


def test_an_error_of_the_thread_is_logged_and_raised_by_the_next_save_once(saved, monkeypatch, caplog):
    model, optimizer = build(CASE)
    checkpoints = Checkpoints(saved)
    with monkeypatch.context() as patch:
        patch.setattr("sfcore.store.write", lambda *args: 1 / 0)
        checkpoints.save(model, optimizer, step=9)
        checkpoints._background._idle.wait()
    assert any("the save of step 9 failed: ZeroDivisionError" in message for message in caplog.messages)
    with pytest.raises(CheckpointError, match="the save of step 9 failed"):
        checkpoints.save(model, optimizer, step=10)
    checkpoints.save(model, optimizer, step=10)
    assert checkpoints.wait().name == "step_000000010"


def test_a_save_whose_thread_cannot_be_started_leaves_the_next_one_possible(saved, monkeypatch):
    model, optimizer = build(CASE)
    checkpoints = Checkpoints(saved)
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", lambda thread: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(model, optimizer, step=9)
    checkpoints.save(model, optimizer, step=9)
    assert checkpoints.wait().name == "step_000000009"


def test_an_error_in_the_block_is_not_hidden_by_the_save_that_failed(saved, monkeypatch):
    model, optimizer = build(CASE)
    monkeypatch.setattr("sfcore.store.write", lambda *args: 1 / 0)

    def block():
        with Checkpoints(saved) as checkpoints:
            checkpoints.save(model, optimizer, step=9)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()


def test_leftovers_of_a_killed_save_are_never_found_and_go_with_the_next_save(saved):
    (saved / ".partial-killed").mkdir()
    (saved / ".partial-killed" / STATE).write_bytes(b"half")
    model, optimizer = build(CASE)
    checkpoints = Checkpoints(saved, background=False)
    assert checkpoints.restore(model, optimizer).meta.step == 2
    checkpoints.save(model, optimizer)
    assert not list(saved.glob(".partial*"))


class TestAnotherModel:
    """A checkpoint that is intact and does not fit."""

    def fails(self, saved, model, *patterns):
        optimizer = sftorch.AdamWScheduleFree(model.parameters())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="nothing has changed") as caught:
            Checkpoints(saved).restore(model, optimizer)
        for pattern in patterns:
            assert re.search(pattern, str(caught.value)), caught.value
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not optimizer.state

    def test_every_wrong_shape_is_reported(self, saved):
        model, _ = build(CASE)
        model[0], model[3] = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
        self.fails(
            saved,
            model,
            r"'y/0\.weight' must have the shape \(6, 4\) of the checkpoint, got \(6, 5\)",
            r"'y/3\.weight' must have the shape \(2, 6\)",
            r"'y/3\.bias' must have the shape \(2,\)",
        )

    def test_another_dtype_is_reported(self, saved):
        model, _ = build(CASE)
        self.fails(saved, model.bfloat16(), r"'y/0\.weight' must have the dtype float32 .* got bfloat16")

    def test_missing_and_unknown_names_are_reported(self, saved):
        model, _ = build(CASE)
        other = torch.nn.Sequential(*model[:3], torch.nn.Identity(), model[3])
        self.fails(
            saved,
            other,
            r"'y/4\.weight' must be in the checkpoint, got none",
            r"'y/3\.weight' must be in the model and its optimizer, got none",
        )

    def test_a_missing_buffer_is_reported(self, saved):
        model, _ = build(CASE)
        model[1] = torch.nn.BatchNorm1d(6, track_running_stats=False)
        self.fails(saved, model, r"'buffer/1\.running_mean' must be in the model")


def rewrite(saved, change):
    """Changes the record of the newest checkpoint."""
    file = store.newest(saved) / store.META
    meta = store.read_meta(file.parent)
    change(meta)
    file.write_text(meta.to_json())


def test_a_checkpoint_from_jax_is_refused_with_the_command_that_converts_it(saved):
    rewrite(saved, lambda meta: setattr(meta, "framework", "jax"))
    restore_fails(
        saved, "auto", "must be a torch checkpoint, got framework 'jax'", "sfcore convert .* --to torch"
    )


def test_a_checkpoint_that_came_from_jax_without_hyperparameters_is_refused(saved):
    rewrite(saved, lambda meta: meta.groups[0]["hyperparameters"].pop("lr"))
    restore_fails(saved, "auto", "must record the lr of every group, got none: save it in JAX with")


def test_a_step_that_is_not_there_is_answered_with_those_that_are(saved):
    restore_fails(saved, 7, r"must hold step 7, got the steps \[1, 2\]")


@pytest.mark.parametrize("resume", ["lattest-good", "7", True, False, None, 2.0])
def test_an_unknown_resume_is_refused(saved, resume):
    restore_fails(saved, resume, rf"resume must be 'auto'.*got {resume!r}: check the spelling")


def test_an_accumulation_that_is_a_pair_is_refused(saved):
    model, optimizer = build(CASE)
    before = repr(optimizer.state_dict())
    with pytest.raises(
        CheckpointError, match=r"accumulation must be the number of micro-batches.*got \(4, 2\)"
    ):
        Checkpoints(saved).restore(model, optimizer, accumulation=(4, 2))
    assert repr(optimizer.state_dict()) == before


@pytest.mark.parametrize("call", ["save", "restore"])
def test_an_optimizer_of_others_is_refused(saved, call):
    model, _ = build(CASE)
    for optimizer, name in ((torch.optim.AdamW(model.parameters()), "AdamW"), (model, "Sequential")):
        with pytest.raises(TypeError, match=f"optimizer must be one of sftorch's, got {name}: .*unwrap"):
            getattr(Checkpoints(saved), call)(model, optimizer)


def test_a_buffer_that_cannot_be_written_to_is_refused_before_anything_changes(tmp_path):
    model, optimizer = build(CASE)
    model.register_buffer("ones", torch.ones(1).expand(3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, optimizer)
    train(model, optimizer, CASE, 0, 4)
    before = repr(model.state_dict())
    with pytest.raises(CheckpointError, match=r"'buffer/ones' must have elements of its own"):
        checkpoints.restore(model, optimizer)
    assert repr(model.state_dict()) == before


def test_a_step_may_be_a_number_of_numpy(saved):
    model, optimizer = build(CASE)
    assert Checkpoints(saved).restore(model, optimizer, resume=np.int64(1)).meta.step == 1


def test_a_path_that_is_not_there_is_refused(saved, tmp_path):
    restore_fails(saved, tmp_path / "nowhere", "nothing of that name: check the path")
