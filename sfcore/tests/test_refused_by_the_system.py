"""No permission, a full disk, a file in the way: an error with the reason, and nothing half done."""

import errno
import os
from pathlib import Path

import pytest

from sfcore import files, store
from sfcore.exchange import CheckpointError
from sfcore.tests import examples


@pytest.fixture
def saved(tmp_path):
    return store.write(tmp_path / "run", examples.meta(1), examples.state(), examples.inference())


def _raises(code, filename="f"):
    def function(*args, **kwargs):
        raise OSError(code, os.strerror(code), filename)

    return function


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk or the quota is full; free space"),
        (errno.EDQUOT, "the disk or the quota is full; free space"),
        (errno.EACCES, "no permission; choose a folder"),
        (errno.EROFS, "no permission; choose a folder"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_save_that_the_system_refuses_leaves_nothing(tmp_path, monkeypatch, code, message, call):
    older = store.write(tmp_path, examples.meta(1), examples.state(), {})
    with monkeypatch.context() as patch:
        # pathlib of Python 3.10 took os.mkdir over before the patch.
        patch.setattr(Path if call == "mkdir" else os, call, _raises(code))
        with pytest.raises(CheckpointError, match=f"cannot write a checkpoint into .*{message}.*untouched"):
            store.write(tmp_path, examples.meta(2), examples.state(2), {})
    assert examples.listed(tmp_path) == [older.name]
    assert examples.same(store.read(older)[1], examples.state())


def test_a_file_in_place_of_the_folder_says_so(tmp_path):
    (tmp_path / "run").touch()
    for folder in (tmp_path / "run", tmp_path / "run" / "below" / "it"):
        with pytest.raises(CheckpointError, match="run is a file; choose a folder"):
            store.write(folder, examples.meta(), {}, {})
    with pytest.raises(CheckpointError, match="run cannot be read"):
        store.steps(tmp_path / "run")


@pytest.mark.parametrize("file", [store.STATE, store.META])
def test_a_file_without_permission_says_so(saved, monkeypatch, file):
    real = open

    def refusing(path, *args, **kwargs):
        if str(path).endswith(file):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read \(Permission denied\): give"):
        store.read(saved)


def test_a_folder_without_permission_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", _raises(errno.EACCES))
    with pytest.raises(CheckpointError, match="give this user read permission"):
        store.newest(tmp_path)


def test_a_disk_too_full_to_remove_keeps_the_checkpoint(saved, monkeypatch):
    monkeypatch.setattr(os, "rename", _raises(errno.ENOSPC))
    assert not files.remove(saved)
    assert examples.same(store.read(saved)[1], examples.state())
