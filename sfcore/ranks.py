"""The processes of one run, its ranks: they do a thing together or not at all, and none waits for ever.

What they tell each other goes through the key-value store that the framework's launcher set up, not through
collectives: those belong to the run's own thread, break when one rank is late, and name nobody. Rank 0
collects what the others say and gives it to all of them, so that all know the same.
"""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from sfcore.exchange import CheckpointError

T = TypeVar("T")
# Seconds between two looks into the store: short at first, because the others are usually there already.
_SOON, _SELDOM = 0.002, 0.05


class KeyValues(Protocol):
    """What the ranks share: a store of bytes by key."""

    def put(self, key: str, value: bytes) -> None:
        """Sets a key."""

    def get(self, key: str) -> bytes | None:
        """Returns what a key has, None if it was not set; never waits for it."""

    def drop(self, key: str) -> None:
        """Forgets a key, if it is there."""


class Ranks:
    """The ranks of one run, as one of them; by default the only one.

    Args:
        rank: of this process, from 0.
        count: of the processes, >= 1.
        store: shared by them; None for one.
        name: the same on all of them, and of no other `Ranks` that shares the store.
        limit: seconds that one waits for another. None waits longer than twice that: for rank 0, and then for
            those that rank 0 waits for.

    Example:
        >>> from sfcore.ranks import Ranks
        >>> Ranks().agree("count", lambda: 3, tell=str)
        (3, ['3'])
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        store: KeyValues | None = None,
        name: str = "",
        limit: float = 600.0,
    ):
        self.rank, self.count, self.limit = rank, count, limit
        self._store, self._name, self._calls, self._named = store, name, 0, 0
        self._parted: str | None = None
        self._met = False

    @property
    def is_first(self) -> bool:
        """Whether this rank does what one does for all."""
        return self.rank == 0

    @property
    def label(self) -> str:
        """This rank's place, for messages and names: "rank 1 of 4"."""
        return self._label(self.rank)

    def _label(self, rank: int) -> str:
        return f"rank {rank} of {self.count}"

    def agree(
        self, what: str, work: Callable[[], T], tell: Callable[[T], Any] = lambda value: None
    ) -> tuple[T, list[Any]]:
        """Does something on every rank; if it fails on one, every rank raises.

        Args:
            what: the name of the thing, the same on all ranks: a rank that does another is noticed.
            work: may raise anything.
            tell: what the others are to know of its result, JSON.

        Returns:
            The result here, and what every rank told.

        Raises:
            CheckpointError: naming the ranks on which it failed, or that did not come in time.
            BaseException: what `work` raised here, if it is no `CheckpointError` or the same on all ranks.
        """
        value, told, error = None, None, None
        try:
            value = work()
            told = tell(value)
        except BaseException as caught:  # a Ctrl-C too: the others must not wait for this rank
            error = caught
        if self.count == 1:
            if error is not None:
                raise error
            return value, [told]  # type: ignore[return-value]
        said = self._gather(what, {"error": _text(error), "told": told})
        failed = {rank: one["error"] for rank, one in enumerate(said) if one["error"] is not None}
        if error is not None and (
            not isinstance(error, CheckpointError) or list(failed.values()) == [_text(error)] * self.count
        ):
            raise error
        if failed:
            rank, text = next(iter(failed.items()))
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise CheckpointError(f"{self._label(rank)}{more} cannot {what}, so none does: {text}") from error
        return value, [one["told"] for one in said]  # type: ignore[return-value]

    def named(self, name: str, limit: float) -> Ranks:
        """Returns the same ranks with a limit and a name of their own, such as for another thread."""
        if self.count > 1:
            self._meet(f"begin {name}")
        self._named += 1  # all ranks ask for them in the same order
        child = Ranks(self.rank, self.count, self._store, f"{self._name}/{name} {self._named}", limit)
        child._met = True
        return child

    def call(self) -> None:
        """Lets all ranks know of something at once; see `is_called`.

        Raises:
            RuntimeError: as the store gives it.
        """
        if self._store is not None:
            self._store.put(f"{self._name}/called", b"1")

    def is_called(self) -> bool:
        """Tells whether any rank has called; False too where the store is gone."""
        try:
            return self._store is not None and self._store.get(f"{self._name}/called") is not None
        except (RuntimeError, OSError, ValueError):
            return False

    def require_same(self, what: str, values: Sequence[Any], fix: str) -> None:
        """Raises `CheckpointError` unless all ranks told the same of something."""
        for rank, value in enumerate(values):
            if value != values[0]:
                raise CheckpointError(
                    f"{what} must be the same on every rank, got {values[0]!r} on {self._label(0)} and "
                    f"{value!r} on {self._label(rank)}: {fix}"
                )

    def _gather(self, what: str, value: Any) -> list[Any]:
        """Returns what every rank says under a name."""
        assert self._store is not None
        if self._parted is not None:
            raise CheckpointError(f"{self._parted} Start all of them again")
        self._meet(what)
        call, self._calls = self._calls, self._calls + 1
        begin = f"{self._name}/{call}"
        try:
            self._store.put(f"{begin}/{self.rank}", _packed({"what": what, "value": value}))
            if self.is_first:
                self._store.put(f"{begin}/all", self._collected(begin))
                for rank in range(self.count) if call else ():  # whoever is here has read what was before
                    self._store.drop(f"{self._name}/{call - 1}/{rank}")
            found = self._wait(f"{begin}/all", f"{begin}/0")
            if self.is_first and call:
                self._store.drop(f"{self._name}/{call - 1}/all")
        except (RuntimeError, OSError, ValueError) as error:
            raise self._unreachable(what, error) from error
        said: list[Any] = [None] + [{}] * (self.count - 1) if found is None else _unpacked(found)
        missing = [rank for rank, one in enumerate(said) if one is None]
        if missing:
            raise self._no_word(what, missing)
        for rank, one in enumerate(said):
            if one["what"] != what:
                self._parted = (
                    f"every rank must make the same calls, got {self._label(rank)} at {one['what']!r} where "
                    f"{self.label} is at {what!r}."
                )
                raise CheckpointError(self._parted)
        return [one["value"] for one in said]

    def _unreachable(self, what: str, error: Exception) -> CheckpointError:
        self._parted = f"{self.label} cannot reach the others for {what} ({error})."
        return CheckpointError(f"{self._parted} Start all of them again")

    def _no_word(self, what: str, missing: Sequence[int]) -> CheckpointError:
        names = ", ".join(map(self._label, missing))
        self._parted = (
            f"every rank must {what}, got no word of {names} within {self.limit:g} s: make the same calls on "
            "every rank, or see why it stopped."
        )
        return CheckpointError(self._parted)

    def _meet(self, what: str) -> None:
        """Agrees on a name that no earlier run has used in the same store, as torchrun keeps it for the next.

        So nothing found there is believed: rank 0 takes an answer that has its own new word, and the others
        a list that has theirs.
        """
        if self._met or self._parted is not None:
            return
        assert self._store is not None
        word = uuid.uuid4().hex
        try:
            found = self._invite(word) if self.is_first else self._answer(word)
        except (RuntimeError, OSError, ValueError) as error:
            raise self._unreachable(what, error) from error
        missing = [0] if found is None else found["missing"]
        if found is None or missing:
            raise self._no_word(what, missing)
        self._name, self._met = f"{self._name}/{found['first']}", True

    def _invite(self, word: str) -> dict[str, Any]:
        assert self._store is not None
        self._store.put(f"{self._name}/first", word.encode())
        end, words = time.monotonic() + self.limit, {}
        for rank in range(1, self.count):
            answer = self._poll(f"{self._name}/answer/{rank}", end, lambda one: _unpacked(one)[0] == word)
            words[str(rank)] = None if answer is None else _unpacked(answer)[1]
        missing = [int(rank) for rank, one in words.items() if one is None]
        found = {"first": word, "words": words, "missing": missing}
        self._store.put(f"{self._name}/met", _packed(found))
        return found

    def _answer(self, word: str) -> dict[str, Any] | None:
        assert self._store is not None
        end, pause, answered = time.monotonic() + 2.1 * self.limit, _SOON, None
        while time.monotonic() < end:
            first = self._store.get(f"{self._name}/first")
            if first is not None and first != answered:
                self._store.put(f"{self._name}/answer/{self.rank}", _packed([first.decode(), word]))
                answered = first
            met = self._store.get(f"{self._name}/met")
            found: dict[str, Any] = {} if met is None else _unpacked(met)
            if found and found["words"].get(str(self.rank)) == word:
                return found
            time.sleep(pause)
            pause = min(2 * pause, _SELDOM)
        return None

    def _collected(self, begin: str) -> bytes:
        """Returns what the ranks said, with None for those that did not come in time."""
        end = time.monotonic() + self.limit
        found = [self._poll(f"{begin}/{rank}", end) for rank in range(self.count)]
        return _packed([None if one is None else _unpacked(one) for one in found])

    def _wait(self, key: str, first: str) -> bytes | None:
        """Returns what rank 0 collected; it is waited for as long as it may wait itself, once it is there."""
        assert self._store is not None
        if self.is_first or self._poll(first, time.monotonic() + self.limit, or_key=key) is not None:
            return self._poll(key, time.monotonic() + self.limit * 1.1 + 5.0)
        return None

    def _poll(
        self,
        key: str,
        end: float,
        is_right: Callable[[bytes], bool] = lambda found: True,
        or_key: str = "",
    ) -> bytes | None:
        assert self._store is not None
        pause = _SOON
        while True:
            for one in (key, or_key) if or_key else (key,):
                found = self._store.get(one)
                if found is not None and is_right(found):
                    return found
            if time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _SELDOM)


def _text(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _packed(value: Any) -> bytes:
    return zlib.compress(json.dumps(value).encode(), 1)


def _unpacked(value: bytes) -> Any:
    return json.loads(zlib.decompress(value))
