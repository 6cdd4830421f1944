"""One writer a folder: another process is refused by name or waits, and a dead owner keeps nobody waiting."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sfcore import store
from sfcore.exchange import CheckpointError
from sfcore.lock import LOCK, OWNER, WriterLock, is_written_to, owner
from sfcore.saving import Saving

HOLD = """
import os, sys, time
from pathlib import Path
from sfcore.lock import WriterLock
lock = WriterLock(Path(sys.argv[1]), float(sys.argv[2]))
lock.take()
print("holds", flush=True)
if sys.argv[3] == "fork" and os.fork() == 0:
    time.sleep(20)
    os._exit(0)
sys.stdin.read()  # until it is closed
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that takes the lock of tmp_path and holds it until its input is closed."""
    started = []

    def begin(wait=0.0, how=""):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), str(wait), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_process_is_refused_by_the_name_of_the_first(start, tmp_path):
    first = start()
    assert first.stdout.readline() == "holds\n"
    assert is_written_to(tmp_path)
    assert owner(tmp_path)["process"] == first.pid
    with pytest.raises(CheckpointError, match=f"must have one writer, .* process {first.pid} on "):
        WriterLock(tmp_path).take()
    assert owner(tmp_path)["process"] == first.pid
    second = start()
    assert second.wait(60) == 1
    assert f"process {first.pid} on" in second.stderr.read()
    first.stdin.close()
    assert first.wait(60) == 0
    WriterLock(tmp_path).take()
    assert not is_written_to(tmp_path)  # by another
    assert owner(tmp_path)["process"] == os.getpid()


def test_who_waits_goes_on_as_soon_as_the_owner_ends(start, tmp_path):
    first = start()
    first.stdout.readline()
    second = start(60.0)
    time.sleep(0.3)
    assert second.poll() is None
    first.stdin.close()
    assert second.stdout.readline() == "holds\n"
    assert owner(tmp_path)["process"] == second.pid


@pytest.mark.parametrize("how", ["", "fork"])
def test_a_killed_owner_keeps_nobody_waiting(how, start, tmp_path):
    """Nor do its children that live on, such as a loader's workers."""
    first = start(how=how)
    first.stdout.readline()
    time.sleep(0.2 if how else 0.0)
    first.kill()
    first.wait()
    lock = WriterLock(tmp_path)
    lock.take()
    lock.release()


def test_one_process_shares_its_right(tmp_path):
    first, second = WriterLock(tmp_path), WriterLock(tmp_path)
    first.take()
    first.take()  # again: nothing
    second.take()
    first.release()
    assert second._lock.is_locked
    second.release()
    assert not second._lock.is_locked
    second.release()


def test_a_lock_that_nobody_holds_on_to_ends(tmp_path):
    WriterLock(tmp_path).take()
    assert not WriterLock(tmp_path)._lock.is_locked


def test_an_owner_that_cannot_be_read_is_unknown(start, tmp_path):
    start().stdout.readline()
    for text in ("", "[]", '{"process": '):
        (tmp_path / OWNER).write_text(text)
        with pytest.raises(CheckpointError, match="process unknown on an unknown host writes into it"):
            WriterLock(tmp_path).take()


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    assert not is_written_to(tmp_path / "none")
    (tmp_path / LOCK).mkdir()
    with pytest.raises(CheckpointError, match=f"cannot write a checkpoint into {tmp_path}: "):
        WriterLock(tmp_path).take()


def test_a_restore_beside_a_writer_says_so_and_a_save_is_refused(start, tmp_path, caplog):
    first = start()
    first.stdout.readline()
    second = Saving(tmp_path, 2, 1, "loss", False, 0.0, 600.0, store.PLAIN, logging.getLogger("second"))
    second._heed_writer()
    assert f"process {first.pid} on" in caplog.text
    with pytest.raises(CheckpointError, match=f"must have one writer, .* process {first.pid} on "):
        second._start(1, lambda: pytest.fail("it must not write"))
    waiting = Saving(tmp_path, 2, 1, "loss", False, 60.0, 600.0, store.PLAIN, logging.getLogger("waiting"))
    caplog.clear()
    threading.Timer(0.3, first.stdin.close).start()
    waiting._heed_writer()
    assert (first.wait(60), caplog.text) == (0, "")
