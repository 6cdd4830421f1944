"""SIGTERM and Ctrl-C save at once and end the program, also in the middle of a compilation or an evaluation.

Python runs signal handlers in the main thread and only between two of its own instructions, so a handler
waits for a compilation to end. Here the C part of the handler wakes a thread, which saves while the main
thread is where it is. A lock keeps it from saving half an update.

Exit codes: 75 (EX_TEMPFAIL of sysexits.h: try again later) when the save succeeded, 74 (EX_IOERR) when it
did not and the newest older checkpoint counts. A second signal changes nothing, also while the program
ends; one that goes on all the same (a notebook) hears signals again `grace` seconds after the block.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from sfcore import checks
from sfcore.checks import HyperparameterError, Rule
from sfcore.exchange import CheckpointError
from sfcore.ranks import Ranks

EXIT_SAVED = 75
EXIT_UNSAVED = 74

_log = logging.getLogger("sfcore.preemption")
_CLOSE = b"\0"  # no signal has the number 0
_CATCHABLE = signal.valid_signals() - {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")}
_SAVE = Rule("a function", callable, "pass one that saves and returns where")
_SIGNALS = Rule(
    "a list of signals",
    lambda v: isinstance(v, Collection) and all(isinstance(one, int) for one in v),
    "(signal.SIGTERM, signal.SIGINT) is usual",
)
_RANKS = checks.optional(checks.kind_of("a sfcore.ranks.Ranks", Ranks, "Checkpoints.ranks is one"))
_GLANCE = 0.2  # seconds between two looks for a signal to another rank
_active: Preemption | None = None
_exit_code: int | None = None


class Preemption:
    """Saves and ends the program at a signal; a context manager for the main thread.

    Args:
        save: saves synchronously and returns where, to be shown. It runs in another thread, so what torch
            and JAX keep per thread (grad mode, default device, current mesh) is not that of the main one.
        signals: which ones, default SIGTERM and SIGINT (Ctrl-C).
        patience: seconds to wait for an update to end before giving up on a save, >= 0, default 25:
            schedulers usually send SIGKILL after 30.
        ranks: the processes of a run of several, `Checkpoints.ranks`, default this one alone: a signal to any
            of them saves on all, after the same update, and ends all. Every rank then makes the same calls of
            `updating`.
        grace: seconds in which the main thread may leave the block (through its `finally` clauses) after
            the save before the process is ended under it, >= 0, default 5. One in a long C call cannot.

    Raises:
        HyperparameterError: for a save that is no function, and for signals, patience or grace out of range
            (a ValueError).

    Example:
        >>> from sfcore.preemption import Preemption
        >>> state = {"step": 0}
        >>> with Preemption(lambda: f"step {state['step']}") as preemption:
        ...     for _ in range(3):
        ...         with preemption.updating():
        ...             state["step"] += 1
        >>> preemption.requested
        False
    """

    def __init__(
        self,
        save: Callable[[], Any],
        *,
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
        patience: float = 25.0,
        grace: float = 5.0,
        ranks: Ranks | None = None,
    ):
        checks.require(
            HyperparameterError,
            save=(_SAVE, save),
            signals=(_SIGNALS, signals),
            patience=(checks.SECONDS, patience),
            grace=(checks.SECONDS, grace),
            ranks=(_RANKS, ranks),
        )
        if not signals:
            raise HyperparameterError(
                ["signals must name at least one signal, got none: leave Preemption out instead"]
            )
        wrong = [number for number in signals if number not in _CATCHABLE]
        if wrong:
            raise HyperparameterError(
                [f"signals must be some that a program can catch, got {wrong}: leave them out"]
            )
        self._save, self._signals = save, tuple(dict.fromkeys(signals))
        self._patience, self._grace = min(patience, threading.TIMEOUT_MAX), min(grace, threading.TIMEOUT_MAX)
        self._ranks = (ranks or Ranks()).named("preemption", limit=2 * self._patience + 5.0)
        self._reset()

    def _reset(self) -> None:
        self.requested = False
        self._last: int | None = None
        self._code: int | None = None
        self._unwinding = False
        self._inside = 0
        self._update = threading.RLock()
        self._decided, self._left = threading.Event(), threading.Event()
        # Of several ranks: how many updates were begun and ended here, and after which all of them save.
        self._begun = self._ended = 0
        self._gate, self._agreed = threading.Condition(), False
        self._last_update: int | None = None

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Keeps a save out while what it reads is half changed; after a signal it ends the program instead.

        Hold it around everything that changes what `save` reads: the update, in torch the whole micro-batch
        (gradients and random states), `optimizer.train()` and `eval()`, and every other save. Do not hold
        it while compiling or evaluating: the save would wait for that. In JAX on several processes do hold it
        around all that their devices compute together, because a save does too.

        Raises:
            SystemExit: if a signal came, after the save.
        """
        # The save's own thread may hold it too: there it must not wait for itself.
        is_outer = not self._inside and threading.current_thread() is not self._thread
        if is_outer and not self._may_begin():
            self._decided.wait()
            raise SystemExit(self._code)
        with self._update:
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
                if is_outer:
                    with self._gate:
                        self._ended += 1
                        self._gate.notify_all()

    def _may_begin(self) -> bool:
        """Tells whether an update may begin; of several ranks some may have begun it when the signal came."""
        with self._gate:
            if self._ranks.count == 1:
                return not self.requested
            self._gate.wait_for(lambda: self._last_update is None or self._agreed)
            if self._last_update is not None and self._begun >= self._last_update:
                return False
            self._begun += 1
            return True

    def __enter__(self) -> Preemption:
        global _active, _exit_code
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "Preemption must be entered in the main thread, got another: only that one receives signals"
            )
        if _active is not None:
            raise RuntimeError(
                "one Preemption must be active at a time, got a second: leave the first before"
            )
        self._reset()
        _exit_code = None  # of a block before this one, after which the program went on all the same
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._outer_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._outer = {number: signal.signal(number, self._in_main_thread) for number in self._signals}
        _active = self
        self._thread = threading.Thread(target=self._watch, name="sfcore.preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _active is not self:
            return  # a forked child, which left its place in the parent's code: the rest is the parent's
        try:
            # The handlers stay until the thread has nothing left to do; it may be saving.
            self._sender.send(_CLOSE)
            self._decided.wait()
        finally:
            self._left.set()
            self._restore(deaf_for=0.0 if self._code is None else self._grace)
            self._thread.join()
            self._receiver.close()
            self._sender.close()
        if self._code is not None and not isinstance(error, SystemExit):
            raise SystemExit(self._code)
        if self._code is None and self._last is not None:
            signal.raise_signal(self._last)  # it came when the thread had just ended: let others have it

    def _restore(self, deaf_for: float = 0.0) -> None:
        global _active
        signal.set_wakeup_fd(self._outer_fd)
        for number, handler in self._outer.items():
            # None stands for a handler that is not Python's, which cannot be put back.
            outer = signal.SIG_DFL if handler is None else handler
            signal.signal(number, _deaf(outer, time.monotonic() + deaf_for) if deaf_for else outer)
        _active = None

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        """Unwinds the main thread, once, if the save is done; before that the thread is on its way."""
        self.requested, self._last = True, number
        with suppress(OSError):  # full is as good: someone in the block may have taken the wakeup descriptor
            self._sender.send(bytes([number]))
        if self._code is not None and not self._unwinding:
            self._unwinding = True
            raise SystemExit(self._code)

    def _watch(self) -> None:
        """Waits for a signal's number; passes on what belongs to others, such as asyncio."""
        if self._ranks.count > 1:
            self._receiver.settimeout(_GLANCE)
        while True:
            try:
                numbers = self._receiver.recv(64)
            except TimeoutError:
                if self._ranks.is_called():
                    self._stop(self._signals[0])
                    return
                continue
            if self._outer_fd != -1:
                _pass_on(self._outer_fd, numbers.replace(_CLOSE, b""))
            ours = [number for number in numbers if number in self._signals]
            if ours:
                self._stop(ours[0])
                return
            if _CLOSE in numbers or not numbers:
                self._decided.set()
                return

    def _stop(self, number: int) -> None:
        global _exit_code
        self.requested = True
        _log.warning("%s: saving before the end", _name(number))
        try:
            self._wait_for_update()
        except CheckpointError as error:
            _log.error("not saved: %s; the newest checkpoint counts. Exit code %d", error, EXIT_UNSAVED)
            self._code = EXIT_UNSAVED
        else:
            self._code = self._try_to_save()
        _exit_code = self._code
        self._decided.set()
        _interrupt_main_thread(number)
        if not self._left.wait(self._grace):
            _flush()
            os._exit(self._code)

    def _wait_for_update(self) -> None:
        """Waits for the update to end, of several ranks for the last that any of them has begun.

        Raises:
            CheckpointError: if it does not, within `patience`.
        """
        if self._ranks.count > 1:
            with suppress(RuntimeError):  # then nobody answers
                self._ranks.call()
            with self._gate:
                begun = self._last_update = self._begun  # from here on none begins
            told = [begun]
            try:
                _, told = self._ranks.agree("stop", lambda: begun, tell=int)
            finally:
                with self._gate:
                    self._last_update, self._agreed = max(told), True
                    self._gate.notify_all()
        self._ranks.agree("end its update", self._hold_update)

    def _hold_update(self) -> None:
        last = self._last_update
        with self._gate:
            ended = last is None or self._gate.wait_for(lambda: self._ended >= last, self._patience)
        # Never released: what was saved is what the program ends with.
        if not ended or not self._update.acquire(timeout=self._patience):
            raise CheckpointError(f"the update did not end within {self._patience:g} s")

    def _try_to_save(self) -> int:
        try:
            where = self._save()
        except BaseException:
            _log.exception("not saved; the newest checkpoint counts. Exit code %d", EXIT_UNSAVED)
            return EXIT_UNSAVED
        _log.warning("saved %s; start again to go on from there. Exit code %d", where, EXIT_SAVED)
        return EXIT_SAVED


def _deaf(outer: Any, until: float) -> Callable[[int, FrameType | None], None]:
    """Returns a handler that does nothing until a time of `time.monotonic`, and then gives way to `outer`."""

    def handler(number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= until:
            signal.signal(number, outer)
            signal.raise_signal(number)

    return handler


def _forget_in_child() -> None:
    """Leaves a forked child (a data loader's worker) with the handlers from before, and without the socket.

    Its signals would wake the parent, which would take the end of a worker for its own.
    """
    if _active is not None:
        preemption = _active
        preemption._restore()
        preemption._reset()


def _pass_on(descriptor: int, numbers: bytes) -> None:
    """Writes signal numbers to a wakeup descriptor that someone else set."""
    try:
        os.write(descriptor, numbers)
    except OSError:
        _log.debug("signal numbers %r found no reader", list(numbers))


def _name(number: int) -> str:
    """Returns a signal's name; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _interrupt_main_thread(number: int) -> None:
    """Lets the handler run in the main thread, out of a sleep or a read if the system can do that."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


def _flush() -> None:
    """Writes out what is still buffered for the standard streams."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # its reader is gone, or it is closed: the exit code counts
                stream.flush()


def _end_process() -> None:
    """Ends the process with the code, before the interpreter takes itself apart.

    A compilation that was abandoned still runs in XLA's threads and would crash there, which changes the
    exit code. What was registered with atexit after this module has run by now.
    """
    if _exit_code is not None:
        _flush()
        os._exit(_exit_code)


atexit.register(_end_process)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
