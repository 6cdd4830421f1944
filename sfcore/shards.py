"""One array in pieces: several files of a checkpoint, one a rank, hold a part of it each.

A piece is recorded as any leaf is, with its dtype, its own shape and CRC-32, and beside that where it begins
in the whole ("start") and what shape that has ("of"). It is read whole, and held against its record, whatever
part of it is wanted; so any number of processes can read what any other wrote, and damage is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from sfcore.exchange import OLDER, CheckpointError, Reader, read_all

Indices = Sequence[int]


class Place(NamedTuple):
    """Where a piece lies.

    Attributes:
        leaf: the name of the whole.
        start: its first index on every axis.
        of: the shape of the whole.
    """

    leaf: str
    start: Indices
    of: Indices

    def as_record(self) -> dict[str, Any]:
        """Returns what is recorded beside dtype, shape and CRC-32."""
        return {"leaf": self.leaf, "start": list(self.start), "of": list(self.of)}


@dataclass(frozen=True)
class Piece:
    """A part of an array.

    Attributes:
        start: its first index on every axis of the whole.
        shape: its own.
        read: returns it, verified.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass
class Spread:
    """An array in pieces, which is read when it is asked for.

    Attributes:
        name: for messages.
        dtype, shape: of the whole.
        pieces: in any order; together they hold every element once.

    Example:
        >>> import numpy as np
        >>> from sfcore.shards import Piece, Spread
        >>> halves = [Piece((i,), (2,), lambda i=i: np.arange(i, i + 2.0)) for i in (0, 2)]
        >>> Spread("w", np.dtype(float), (4,), halves).region((1,), (2,))
        array([1., 2.])
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def region(self, start: Indices, shape: Indices) -> np.ndarray:
        """Returns a part of the whole, of the pieces that have some of it.

        Raises:
            CheckpointError: if a piece is damaged, or there is none for some element.
        """
        found = np.empty(tuple(shape), self.dtype)
        filled = 0
        for piece in self.pieces if found.size else []:
            low = [max(a, b) for a, b in zip(start, piece.start, strict=True)]
            ends = [
                min(a + n, b + m) for a, n, b, m in zip(start, shape, piece.start, piece.shape, strict=True)
            ]
            if all(a < b for a, b in zip(low, ends, strict=True)):
                held = piece.read()[_cut(low, ends, piece.start)]
                found[_cut(low, ends, start)] = held
                filled += held.size
        if filled != found.size:
            raise CheckpointError(
                f"leaf {self.name!r} must have all its elements in the files of the ranks, got {filled} of "
                f"the {found.size} that are needed: a file is missing or damaged; {OLDER}"
            )
        return found

    def astype(self, dtype: Any) -> np.ndarray:
        """Returns the whole in another dtype."""
        return np.asarray(self).astype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.region([0] * len(self.shape), self.shape)
        return whole if dtype is None else whole.astype(dtype)


def _cut(low: Indices, ends: Indices, start: Indices) -> tuple[slice, ...]:
    return tuple(slice(a - s, b - s) for a, b, s in zip(low, ends, start, strict=True))


def joined(files: Mapping[str, Mapping[str, Any]], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Returns leaf -> array of the record of several files; those in pieces come as `Spread`.

    Args:
        files: file -> leaf -> what is recorded of it.
        readers: file -> what `sfcore.exchange.open_tensors` gave for it.

    Raises:
        CheckpointError: if the pieces of a leaf do not fit together.
    """
    found: dict[str, Any] = {}
    whole: dict[str, Reader] = {}
    for file, leaves in files.items():
        for key, about in leaves.items():
            if "of" not in about:
                found[key], whole[key] = None, readers[file]
                continue
            leaf = about["leaf"]
            of = tuple(about["of"])
            spread = found.setdefault(leaf, Spread(leaf, _dtype(about["dtype"]), of))
            if not isinstance(spread, Spread) or (spread.shape, spread.dtype) != (of, _dtype(about["dtype"])):
                raise CheckpointError(f"{file} has a piece of {leaf!r} that does not fit the others; {OLDER}")
            place = tuple(about["start"]), tuple(about["shape"])
            spread.pieces.append(Piece(*place, partial(_read, readers[file], key)))
    return found | read_all(whole)


def _read(reader: Reader, leaf: str) -> np.ndarray:
    return reader(leaf)()


def _dtype(name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
