"""Work in threads beside other work: reads, writes and their CRCs, all of which run without Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")
_AT_ONCE = min(max(os.cpu_count() or 2, 2), 4)  # more contend for memory


class _Work(Generic[Found]):
    def __init__(self, work: Callable[[], Found]):
        self._work, self._found, self._error = work, list[Found](), list[BaseException]()

    def run(self) -> None:
        try:
            self._found.append(self._work())
        except BaseException as error:  # it is the waiting thread's
            self._error.append(error)

    def result(self) -> Found:
        if self._error:
            raise self._error[0]
        return self._found[0]


@contextmanager
def beside(work: Callable[[], Found]) -> Iterator[Callable[[], Found]]:
    """Does some work while the block runs; yields what waits for it and returns what it found, or raises.

    An interpreter that is going down starts no thread any more: then it is done before the block.

    Example:
        >>> from sfcore.beside import beside
        >>> with beside(lambda: sum(range(5))) as total:
        ...     product = 3 * 4
        >>> total(), product
        (10, 12)
    """
    one = _Work(work)
    thread = threading.Thread(target=one.run, name="sfcore-beside")

    def waited() -> Found:
        if thread.ident is not None:
            thread.join()
        return one.result()

    try:
        thread.start()
    except RuntimeError:
        one.run()
    try:
        yield waited
    finally:
        if thread.ident is not None:
            thread.join()


def each(work: Callable[[Given], Found], given: Sequence[Given]) -> list[Found]:
    """Does some work on each of many things, a few at once in threads; returns what it found, in their order.

    The first that failed raises, and those that have not begun then are left. An interpreter that is going
    down starts no thread any more: then they are done one after the other.

    Example:
        >>> from sfcore.beside import each
        >>> each(abs, [-1, 2, -3])
        [1, 2, 3]
    """
    with ThreadPoolExecutor(_AT_ONCE, "sfcore-each") as threads:
        try:
            found = threads.map(work, given)
        except RuntimeError:
            return list(map(work, given))
        return list(found)
