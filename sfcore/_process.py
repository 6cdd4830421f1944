"""What a thread asks of its process: wake the main thread, pass signals on, write everything out."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
from contextlib import suppress

_log = logging.getLogger("sfcore.preemption")


def pass_on(descriptor: int, numbers: bytes) -> None:
    """Writes signal numbers to a wakeup descriptor that someone else set."""
    try:
        os.write(descriptor, numbers)
    except OSError:
        _log.debug("signal numbers %r found no reader", list(numbers))


def name(number: int) -> str:
    """Returns a signal's name; most real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def interrupt_main_thread(number: int) -> None:
    """Lets the handler run in the main thread, out of a sleep or a read if the system can do that."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


def flush() -> None:
    """Writes out what is still buffered for the standard streams."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):  # its reader is gone, or it is closed: the exit code counts
                stream.flush()
