"""The saves of one run: one at a time, in the background or not, and what of the folder stays after each."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - its hook at exit must be registered before the one below
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from sfcore import checks, store
from sfcore.checks import HyperparameterError, Rule
from sfcore.exchange import CheckpointError
from sfcore.lock import WriterLock, is_written_to, writer
from sfcore.ranks import Ranks
from sfcore.store import Layout

Self = TypeVar("Self", bound="Saving")


class Background:
    """One piece of work at a time in a thread, done before the program ends; its error waits to be asked for.

    Args:
        name: of the thread.
        enabled: False does the work at once, in the caller's thread.
    """

    def __init__(self, name: str, enabled: bool):
        self._name, self._enabled = name, enabled
        # Not join(), which in Python 3.11 takes a thread for ended once Ctrl-C has interrupted it.
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None

    @property
    def is_used(self) -> bool:
        """False where the work is done at once."""
        # Nobody waits for a thread that is started while the program ends, in a function of atexit.
        return self._enabled and threading.main_thread().is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Starts the work; the caller has waited for what was started before."""
        if not self.is_used:
            work()
            return
        claim = threading.Lock()

        def run() -> None:
            if claim.acquire(blocking=False):
                try:
                    work()
                except BaseException as error:
                    self._error = error
                finally:
                    self._end()

        try:
            self._idle.clear()
            _unfinished.add(self._idle)
            # No daemon: a program that ends normally waits for its last save.
            threading.Thread(target=run, name=self._name).start()
        except BaseException:  # no more threads, or Ctrl-C, which leaves open whether there is one now
            if claim.acquire(blocking=False):
                self._end()
            raise

    def wait(self) -> None:
        """Waits for the work; raises its error, once."""
        self._idle.wait()  # a Ctrl-C in here leaves it to be waited for
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _end(self) -> None:
        _unfinished.discard(self._idle)
        self._idle.set()


# What is waited for when nobody holds the Background that started it any more.
_unfinished: set[threading.Event] = set()


def finish() -> None:
    """Waits for whatever any Background of this process is at."""
    for idle in list(_unfinished):
        idle.wait()  # an error is logged where it happens


# Python accepts no new threads, such as Orbax starts, once the main one has ended, and atexit comes after
# that: a save in flight would fail. This hook, which concurrent.futures itself uses, comes before.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(finish)
# A fork has no thread that would finish the work, and would wait for it forever when it ends.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unfinished.clear)


_METRIC = Rule("a name", checks.TEXT.holds, "save(metrics=...) has it")
_LIMIT = Rule(
    "a number > 0 of seconds", lambda v: checks.SECONDS.holds(v) and 0 < v < float("inf"), "600 is usual"
)
_WAIT = Rule(checks.SECONDS.text, lambda v: checks.SECONDS.holds(v) and v < float("inf"), "0 does not wait")


def _at_least(least: int) -> Rule:
    return Rule(
        f"a whole number >= {least}",
        lambda v: checks.COUNT.holds(v) and v >= least,
        "2 and 1 are usual",
    )


# How many Checkpoints of a folder have asked who the ranks are: the same number on all of them.
_teams: dict[str, int] = {}


class Saving:
    """What `Checkpoints` of both twins do alike.

    Args:
        folder, keep_newest, keep_best, metric, background, wait_for_writer, wait_for_ranks: as for
            `Checkpoints`.
        layout: of the folder.
        log: of the package; its name is that of the thread too.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_newest: int,
        keep_best: int,
        metric: str,
        background: bool,
        wait_for_writer: float,
        wait_for_ranks: float,
        layout: Layout,
        log: logging.Logger,
    ):
        checks.require(
            HyperparameterError,
            keep_newest=(_at_least(1), keep_newest),
            keep_best=(_at_least(0), keep_best),
            folder=(checks.PATH, folder),
            metric=(_METRIC, metric),
            background=(checks.FLAG, background),
            wait_for_writer=(_WAIT, wait_for_writer),
            wait_for_ranks=(_LIMIT, wait_for_ranks),
        )
        self.folder = Path(folder).absolute()  # a save in the background must not follow a chdir
        self._writer = WriterLock(self.folder, wait_for_writer)
        self.metric, self._limit = metric, wait_for_ranks
        self._team: Ranks | None = None
        self._keep, self._layout, self._log = (keep_newest, keep_best), layout, log
        self._background = Background(log.name, background)
        # A signal may save from another thread (sfcore.preemption) while the main one is in here.
        self._lock = threading.RLock()
        self._cleaned = False
        self._path: Path | None = None

    def wait(self) -> Path | None:
        """Waits until the last save is on disk; returns its path.

        Raises:
            CheckpointError: if it failed; the older checkpoints are untouched.
        """
        with self._lock:
            self._background.wait()
            return self._path

    def close(self) -> None:
        """Waits, frees the copies on the host, and gives up the folder; a later save takes both again.

        Raises:
            CheckpointError: if the last save failed.
        """
        with self._lock:
            try:
                self._background.wait()
            finally:
                self._free()
                self._writer.release()

    def _free(self) -> None:
        """Frees what is kept from save to save."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None:  # it is logged; the one that ends the block matters more
                raise

    def _make_ranks(self, name: str, limit: float) -> Ranks:
        """Returns the ranks of the run, of which this process is one."""
        return Ranks()

    @property
    def ranks(self) -> Ranks:
        """The processes that call this together, for `sfcore.preemption.Preemption`; one in a run of one."""
        # At first use: a program may make its Checkpoints before it joins the others.
        if self._team is None:
            name = str(self.folder)
            count = _teams[name] = _teams.get(name, 0) + 1
            self._team = self._make_ranks(f"{self._log.name}/{name}/{count}", self._limit)
        return self._team

    def _heed_writer(self) -> None:
        """Waits, before a restore, as a save would; says who goes on writing."""
        if self.ranks.is_first and is_written_to(self.folder, self._writer.wait):
            self._log.warning(
                "%s: %s, so what is restored may not be its last, and this run may not save before it ends",
                self.folder,
                writer(self.folder),
            )

    def _clean(self) -> None:
        """Removes leftovers, once: not at construction, because another process may be saving until then."""
        if not self._cleaned:
            store.clean(self.folder, self._layout)
            self._cleaned = True

    def _start(self, step: int, write: Callable[[], Path]) -> None:
        """Starts a save of a step; `write` writes it and returns its path."""
        self.ranks.agree("save", self._writer.take if self.ranks.is_first else _nothing)
        self._background.start(lambda: self._save(step, write))

    def _save(self, step: int, write: Callable[[], Path]) -> None:
        try:
            ranks = self.ranks
            ranks.agree("make room", lambda: self._make_room(step) if ranks.is_first else None)
            self._path = write()
            ranks.agree("remove what is old", self._prune if ranks.is_first else _nothing)
        except CheckpointError as error:
            self._log.error("%s", error)
            raise
        except Exception as error:
            self._log.error("the save of step %d failed: %r", step, error)
            raise CheckpointError(f"the save of step {step} failed: {error!r}") from error

    def _make_room(self, step: int) -> None:
        self._clean()
        for newer in store.set_aside(self.folder, step, self._layout):
            self._log.warning("%s is newer than step %d, where this run is: it was set aside", newer, step)

    def _prune(self) -> None:
        store.prune(self.folder, *self._keep, self.metric, self._layout)
        assert self._path is not None
        self._layout.read_meta(self._path)  # it is there: nothing else has been at work in the folder


def _nothing() -> None:
    """Is the part of a rank in what rank 0 does for all."""
