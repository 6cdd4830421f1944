"""Every way a disk can fail: a clear error, and live state that has not changed."""

import errno
import logging
import os
import re
import shutil

import pytest
import torch

from sfcore import exchange, store
from sftorch.checkpoint import CheckpointError, Checkpoints
from sftorch.tests.checkpoint_runs import Case, build, saved_twice, train

CASE = Case("adamw", "float32", 4, 6, "train")
STATE = "state.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A folder with the steps 1 and 2."""
    return saved_twice(tmp_path, CASE)


def flip(path, place):
    """Flips one bit; a place below 0 counts from the end."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(path, change):
    """Writes the state again with other leaves, under a record that still asks for the old ones."""
    tensors = exchange.read_tensors(path / STATE)
    change(tensors)
    exchange.write_tensors(path / STATE, tensors)


def pop(leaf):
    return lambda path: rewrite(path, lambda tensors: tensors.pop(leaf))


def replace(leaf, by):
    return lambda path: rewrite(path, lambda tensors: tensors.update({leaf: by(tensors[leaf])}))


def newer(path):
    text = (path / "meta.json").read_text().replace('"format_version": 1', '"format_version": 99')
    (path / "meta.json").write_text(text)


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def refuse_reading(path, monkeypatch):
    real = open

    def open_(file, *args, **options):
        if str(file) == str(path / STATE):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *args, **options)

    monkeypatch.setattr("builtins.open", open_)


# name -> (what happens to the newest checkpoint, what the error says, what it tells the user to do)
DAMAGE = {
    "truncated": (
        lambda path: os.truncate(path / STATE, os.path.getsize(path / STATE) - 100),
        r"state\.safetensors is damaged: it is truncated in leaf",
        "latest-good",
    ),
    "flipped byte in a leaf": (
        lambda path: flip(path / STATE, -9),
        r"state\.safetensors is damaged: leaf 'rng/torch' must have crc32 \d+, got \d+",
        "latest-good",
    ),
    "flipped byte in the header": (
        lambda path: flip(path / STATE, 20),
        r"state\.safetensors is damaged",
        "latest-good",
    ),
    "flipped byte in the record": (
        lambda path: flip(path / "meta.json", 60),
        r"meta\.json is damaged",
        "latest-good",
    ),
    "missing leaf": (pop("z/0.weight"), r"must hold the leaf 'z/0\.weight', got none", "latest-good"),
    "wrong shape": (
        replace("z/0.weight", lambda a: a.T),
        r"leaf 'z/0\.weight' must have shape \[6, 4\], got \[4, 6\]",
        "latest-good",
    ),
    "wrong dtype": (
        replace("v/0.bias", lambda a: a.astype("float64")),
        r"leaf 'v/0\.bias' must have dtype float32, got float64",
        "latest-good",
    ),
    "missing file": (lambda path: (path / STATE).unlink(), r"state\.safetensors is missing", "latest-good"),
    "empty folder": (empty, r"must be a folder with meta\.json, got an empty folder", "latest-good"),
    "newer format": (newer, "must have format version <= 2, got 99", "pip install -U schedulefree-twin"),
}


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


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_changes_nothing(saved, name):
    damage, finding, advice = DAMAGE[name]
    newest = store.newest(saved)
    damage(newest)
    model, optimizer = build(CASE, seed=7)
    train(model, optimizer, CASE, 0, 3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    books, generator = repr(optimizer.state_dict()), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=finding) as caught:
        Checkpoints(saved).restore(model, optimizer)
    assert advice in str(caught.value)
    assert newest.name in str(caught.value)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert repr(optimizer.state_dict()) == books
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", DAMAGE)
def test_latest_good_falls_back_and_says_what_it_skipped_and_why(saved, name, caplog):
    damage, finding, _ = DAMAGE[name]
    newest = store.newest(saved)
    damage(newest)
    model, optimizer = build(CASE, seed=7)
    with caplog.at_level(logging.WARNING, "sftorch.checkpoint"):
        restored = Checkpoints(saved).restore(model, optimizer, resume="latest-good")
    assert restored.meta.step == 1
    assert [skip.path for skip in restored.skipped] == [newest]
    assert re.search(finding, restored.skipped[0].why)
    assert any("was skipped" in message and newest.name in message for message in caplog.messages)


def test_when_nothing_verifies_latest_good_gives_every_reason(saved):
    for path in store.steps(saved).values():
        flip(path / STATE, -9)
    error = restore_fails(saved, "latest-good", "must hold a checkpoint that verifies, got none")
    assert len(re.findall("is damaged", str(error))) == 2


def test_a_file_without_permission_is_named(saved, monkeypatch):
    newest = store.newest(saved)
    refuse_reading(newest, monkeypatch)
    restore_fails(saved, "auto", r"state\.safetensors cannot be read \(Permission denied\): give this user")
