"""One folder of checkpoints has one writer: a second process that would write into it is refused, by name.

The lock is the operating system's (flock, or what filelock has in its place), so it ends with its owner,
however that ends, and never keeps a restart waiting. Who owns it is written beside it, for the message.
Readers take none.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
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
        folder: where the checkpoints lie; it must be there when the lock is taken.
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
        try:
            self._lock.acquire(timeout=self.wait, poll_interval=0.05)
        except Timeout as error:
            raise CheckpointError(refusal(self.folder, self.wait)) from error
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.folder}: {files.why(error)}") from error
        self._process = os.getpid()
        record = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
        with suppress(OSError):  # the lock holds without it
            partial = self.folder / f"{OWNER}.{os.getpid()}"
            partial.write_text(json.dumps(record), encoding="utf-8")
            os.replace(partial, self.folder / OWNER)

    def release(self) -> None:
        """Gives the folder up. In a fork of its owner, does nothing."""
        if self._process == os.getpid():
            self._process = None
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


def refusal(folder: Path, waited: float) -> str:
    """Returns the message for a process that may not write."""
    found = owner(folder)
    who = f"process {found.get('process', 'unknown')} on {found.get('host', 'an unknown host')}"
    since = f" since {found['since']}" if "since" in found else ""
    return (
        f"{folder} must have one writer, got a second one after {waited:g} s: {who} writes into it{since}. "
        "Let that one end (or close its Checkpoints), give this run a folder of its own, or wait longer "
        "with wait_for_writer=SECONDS"
    )


def is_written_to(folder: Path) -> bool:
    """Tells whether another process writes into a folder now."""
    if not (folder / LOCK).exists():
        return False
    lock = WriterLock(folder)
    if lock._lock.is_locked:  # by this process
        return False
    try:
        lock._lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False  # a reader may lack the right to lock
    lock._lock.release()
    return False
