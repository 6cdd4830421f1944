"""A kill between any two file operations: the newest complete checkpoint is found, never half of one."""

import builtins
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from sfcore import store
from sfcore.tests import examples

CALLS = ["mkdir", "open", "fsync", "close", "rename", "unlink", "rmdir", "scandir", "listdir"]


class Killed(BaseException):
    """What stands for SIGKILL: from its first raise on, no operation of the process works."""


class Killer:
    """Lets `after` file operations pass and raises at every one that follows."""

    def __init__(self, patch, after):
        self.left = after
        for name in CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(builtins, "open", self._opened(builtins.open))
        patch.setattr(store, "writing", lambda folder: nullcontext())  # the system's lock ends with a process

    def _count(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def _counted(self, function):
        def counted(*args, **kwargs):
            self._count()
            return function(*args, **kwargs)

        return counted

    def _opened(self, function):
        def opened(*args, **kwargs):
            self._count()
            file = function(*args, **kwargs)
            if file.writable():
                _Unbuffered.wrap(file, self._count)
            return file

        return opened


class _Unbuffered:
    """Makes every write of a file an operation of its own, flushed, so that files get cut in the middle."""

    @staticmethod
    def wrap(file, count):
        write = file.write

        def counted(data):
            count()
            written = write(data)
            file.flush()
            return written

        file.write = counted


def _kill(folder, after, action):
    """Runs an action that dies after so many file operations; tells whether it died."""
    with pytest.MonkeyPatch.context() as patch:
        Killer(patch, after)
        try:
            action()
        except Killed:
            return True
    return False


def _deaths(tmp_path, prepare, action):
    """Yields (folder after the death, folder as it was before) for a death at every operation in turn."""
    for after in itertools.count():
        folder = tmp_path / str(after)
        folder.mkdir()
        prepare(folder)
        died = _kill(folder, after, lambda folder=folder: action(folder))
        yield folder
        if not died:
            assert after > 3, "the action made too few operations to mean anything"
            return
        shutil.rmtree(folder)


def _save(folder, step, note=""):
    state = examples.state(step)
    return store.write(folder, examples.meta(step, extra={"note": note}), state, examples.inference(step))


def _whole(folder):
    """Returns the steps of a folder, after checking every one of them in full."""
    for step, path in store.steps(folder).items():
        for file, leaves in ((store.STATE, examples.state), (store.INFERENCE, examples.inference)):
            assert examples.same(store.read(path, file)[1], leaves(step))
    return list(store.steps(folder))


def test_a_save_killed_anywhere_leaves_the_older_one_or_both(tmp_path):
    seen = set()
    for folder in _deaths(tmp_path, lambda f: _save(f, 1), lambda f: _save(f, 2)):
        held = _whole(folder)
        seen.add(tuple(held))
        store.clean(folder)
        assert _whole(folder) == held
        assert len(examples.listed(folder)) == len(held)
    assert seen == {(1,), (1, 2)}


def test_a_first_save_killed_anywhere_leaves_none_or_one(tmp_path):
    seen = set()
    for folder in _deaths(tmp_path, lambda f: None, lambda f: _save(f / "run", 1)):
        held = _whole(folder / "run")
        seen.add(tuple(held))
        store.clean(folder / "run")
        assert not (folder / "run").exists() or len(examples.listed(folder / "run")) == len(held)
    assert seen == {(), (1,)}


def test_a_step_saved_again_and_killed_anywhere_is_always_there(tmp_path):
    notes = set()
    for folder in _deaths(tmp_path, lambda f: _save(f, 1, "old"), lambda f: _save(f, 1, "new")):
        assert _whole(folder) == [1]
        note = store.read_meta(store.newest(folder)).extra["note"]
        notes.add(note)
        store.clean(folder)
        assert len(examples.listed(folder)) == 1
        assert store.read_meta(store.newest(folder)).extra["note"] == note
    assert notes == {"old", "new"}


def test_a_prune_killed_anywhere_keeps_what_is_to_be_kept(tmp_path):
    def prepare(folder):
        for step in (1, 2, 3):
            _save(folder, step)

    left = set()
    for folder in _deaths(tmp_path, prepare, lambda f: store.prune(f, keep_newest=1, keep_best=0)):
        held = _whole(folder)
        assert held[-1] == 3
        left.add(len(held))
        store.clean(folder)
        assert len(examples.listed(folder)) == len(held)
    assert left == {1, 2, 3}


def test_a_clean_killed_anywhere_can_be_done_again(tmp_path):
    def prepare(folder):
        _save(folder, 1)
        shutil.copytree(folder / "step_000000001", folder / ".partial-a")
        shutil.copytree(folder / "step_000000001", folder / "step_000000001.1")

    for folder in _deaths(tmp_path, prepare, store.clean):
        assert _whole(folder) == [1]
        store.clean(folder)
        assert examples.listed(folder) == ["step_000000001.1"]


SAVER = """
import sys
from contextlib import nullcontext
from pathlib import Path
from sfcore import store
from sfcore.tests import examples
folder = Path(sys.argv[1])
first = max(store.steps(folder), default=0) + 1
print("ready", flush=True)
for step in range(first, 10**6):
    store.write(folder, examples.meta(step), examples.state(step), examples.inference(step))
    store.prune(folder, keep_newest=2, keep_best=0)
"""


def test_a_process_killed_at_random_moments_always_resumes_from_a_whole_checkpoint(tmp_path):
    rng, reached, before = random.Random(0), 0, 0
    for _ in range(8):
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        held = _whole(tmp_path)
        assert max(held, default=0) >= reached
        reached = max(held, default=0)
        store.clean(tmp_path)
        # Killed between its first save and its first prune, a process leaves one more than it found.
        assert len(examples.listed(tmp_path)) == len(held) <= max(3, before + 1)
        before = len(held)
    assert reached > 0
    store.prune(tmp_path, keep_newest=2, keep_best=0)
    assert _whole(tmp_path) == held[-2:]
