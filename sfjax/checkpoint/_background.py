"""One thing at a time in the background, finished before the program ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for


class Background:
    """A thread for work that nobody waits for, until they ask whether it went well.

    Args:
        enabled: False does the work at once, in the caller's thread.
    """

    def __init__(self, enabled: bool):
        self._enabled = enabled
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Starts the work; the caller has waited for what was started before."""
        if not self._enabled:
            work()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="sfjax-save")
        self._pending = self._pool.submit(work)
        _unfinished.add(self._pending)
        self._pending.add_done_callback(_unfinished.discard)

    def wait(self) -> None:
        """Waits for the work; raises its error, once."""
        if self._pending is None:
            return
        wait_for([self._pending])  # a Ctrl-C in here leaves it to be waited for
        pending, self._pending = self._pending, None
        pending.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            pool, self._pool = self._pool, None
            if pool is not None:
                pool.shutdown()


# The work itself, so that it is waited for when nobody holds the Background that started it any more.
_unfinished: set[Future[None]] = set()


def finish() -> None:
    """Waits for whatever any Background of this process is at."""
    wait_for(list(_unfinished))  # an error is logged where it happens


# Python accepts no new threads once the main one has ended, and atexit comes after that: a save in flight
# would fail. This hook, which concurrent.futures itself uses, comes before.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(finish)
# A fork has no thread that would finish the work, and would wait for it forever when it ends.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unfinished.clear)
