"""One folder of checkpoints has one writer: a second process that would write into it is refused, by name.

The lock is the operating system's (flock, or what filelock has in its place), so it ends with its owner,
however that ends, and never keeps a restart waiting. Who owns it is written beside it, for the message.
Readers take none.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sfcore import files
from sfcore.exchange import CheckpointError

LOCK, OWNER = ".writer.lock", ".writer.json"


class WriterLock:
    """The right to write into a folder: of one process, and in it of all who ask for it.

    Args:
        folder: where the checkpoints lie; made when the lock is taken, if it is not there.
        wait: seconds to wait for another process to give the folder up, >= 0, default 0.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sfcore.lock import WriterLock, owner
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = WriterLock(Path(folder))
        ...     lock.take()
        ...     owner(Path(folder))["process"] == os.getpid()
        ...     lock.release()
        True
    """

    def __init__(self, folder: Path, wait: float = 0.0):
        self.folder, self.wait = folder, wait
        # Shared in the process; a thread of its own may write, and another one end the run.
        self._lock = FileLock(folder / LOCK, thread_local=False, is_singleton=True)
        self._process: int | None = None

    def take(self) -> None:
        """Takes the lock, if it is not taken yet.

        Raises:
            CheckpointError: naming the process that writes into the folder; or if no lock can be made there.
        """
        if self._process == os.getpid():
            return
        with files.cannot(f"write a checkpoint into {self.folder}"):
            files.make(self.folder)
            try:
                self._lock.acquire(timeout=self.wait, poll_interval=0.05)
            except Timeout as error:
                raise CheckpointError(_refusal(self.folder, self.wait)) from error
        self._process = os.getpid()
        record = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
        with suppress(OSError):  # the lock holds without it
            (self.folder / OWNER).write_text(json.dumps(record), encoding="utf-8")

    def release(self) -> None:
        """Gives the folder up. In a fork of its owner, does nothing."""
        if self._process == os.getpid():
            self._process = None
            if self._lock.lock_counter == 1:
                with suppress(OSError):
                    (self.folder / OWNER).unlink()
            self._lock.release()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def owner(folder: Path) -> dict[str, Any]:
    """Returns what is written of the last writer: "host", "process", "since"; {} if nothing can be read."""
    try:
        found = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(folder: Path, waited: float) -> str:
    return (
        f"{folder} must have one writer, got a second one after {waited:g} s: {writer(folder)}. "
        "Let that one end (or close its Checkpoints), give this run a folder of its own, or wait longer "
        "with wait_for_writer=SECONDS"
    )


def writer(folder: Path) -> str:
    """Returns who writes into a folder, as a sentence."""
    found = owner(folder)
    who = f"process {found.get('process', 'unknown')} on {found.get('host', 'an unknown host')}"
    return f"{who} writes into it" + (f" since {found['since']}" if "since" in found else "")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds the lock inside a `with` block; raises as `WriterLock.take`."""
    lock = WriterLock(folder)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def is_written_to(folder: Path, wait: float = 0.0) -> bool:
    """Tells whether another process writes into a folder, and goes on for so many seconds."""
    if not (folder / LOCK).exists():
        return False
    lock = WriterLock(folder)._lock
    try:
        lock.acquire(timeout=wait, poll_interval=0.05)
    except Timeout:
        return True
    except OSError:
        return False  # a reader may lack the right to lock, and so to write
    lock.release()
    return False
