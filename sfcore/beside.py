"""Work in a thread beside other work: hashes of what is being written, which run without Python's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Found = TypeVar("Found")


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


@contextmanager
def checking() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yields what takes checks, which a thread does in their order while the block goes on.

    The block ends when they are done. The first that failed raises then, also where the block has raised.

    Example:
        >>> from sfcore.beside import checking
        >>> found = []
        >>> with checking() as later:
        ...     later(lambda: found.append(1))
        >>> found
        [1]
    """
    with ThreadPoolExecutor(1, "sfcore-checking") as thread:
        begun = []

        def later(check: Callable[[], None]) -> None:
            try:
                begun.append(thread.submit(check))
            except RuntimeError:  # the interpreter is going down
                check()

        try:
            yield later
        finally:
            for one in begun:
                one.result()
