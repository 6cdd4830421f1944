"""The safetensors file format on plain NumPy: streamed out and synced, checked field by field on the way in.

The format is a length (8 bytes, little endian), a JSON header name -> {dtype, shape, data_offsets}, and
the bytes of every leaf. The package safetensors reads what is written here; it is not used for writing
because it hides a full disk and a missing permission behind an error type of its own.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from sfcore.beside import beside

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_KNOWN = _NUMPY | _ML_DTYPES
_CODES = {name: code for code, name in _KNOWN.items()}
_METADATA = "__metadata__"
_MOST_AXES = 64  # of an array of NumPy
# More than any model has, and read in under two seconds.
_LONGEST_HEADER, _MOST_LEAVES = 1 << 24, 1 << 16
_AT_ONCE = 1 << 26  # bytes that are synced together, long enough for a disk to be busy with


@dataclass(frozen=True)
class Made:
    """An array that is made when it is asked for, a piece at a time, so that it never takes its memory.

    Attributes:
        dtype, shape: of all of it.
        pieces: returns flat arrays, which follow each other in C order; called from any thread, any number of
            times.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return math.prod(self.shape) * self.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.empty(self.shape, self.dtype)
        flat, done = found.reshape(-1), 0
        for piece in self.pieces():
            flat[done : done + piece.size] = piece.reshape(-1)
            done += piece.size
        return found if dtype is None else found.astype(dtype, copy=False)


Leaf = np.ndarray | Made


class Damaged(ValueError):
    """The bytes are not what the format asks for; the message says where."""


def write(
    path: Path,
    leaves: Mapping[str, Leaf],
    metadata: Mapping[str, str] | None = None,
    late: Callable[[Mapping[str, int]], Mapping[str, str]] | None = None,
) -> None:
    """Writes a file and syncs it to the disk.

    Args:
        path: the file, overwritten if it is there.
        leaves: name -> array of a dtype that `storable` accepts, any memory layout and byte order. A leaf
            cannot be called "__metadata__".
        metadata: text that goes into the header.
        late: returns the text instead, once the leaves are written, from the CRC-32 of each one's bytes. It
            must not be longer than `metadata`, which keeps its place.

    Raises:
        OSError: as the system gives it (disk full, no permission).
    """
    header: dict[str, Any] = {}
    end = 0
    # Wide items first, so that every leaf is aligned to its item size.
    order = sorted(leaves, key=lambda name: (-leaves[name].itemsize, name))
    for name in order:
        leaf, start = leaves[name], end
        end += leaf.nbytes
        header[name] = {
            "dtype": _CODES[leaf.dtype.name],
            "shape": list(leaf.shape),
            "data_offsets": [start, end],
        }

    def text_with(said: Mapping[str, str] | None) -> bytes:
        whole = {_METADATA: dict(said), **header} if said else header
        return json.dumps(whole, separators=(",", ":")).encode()

    text = text_with(metadata)
    length = len(text) + -len(text) % 8
    crcs = dict.fromkeys(order, 0)

    def pieces() -> Iterator[memoryview | bytes]:
        for name in order:
            for piece in bytes_of(leaves[name]):
                if late:
                    crcs[name] = zlib.crc32(piece, crcs[name])
                yield piece

    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length))
        file.write(text.ljust(length))
        _write_all(file, pieces())
        if late:
            text = text_with(late(crcs))
            if len(text) > length:
                raise ValueError(f"late must return at most {length} bytes of header, got {len(text)}")
            file.seek(8)
            file.write(text.ljust(length))
        file.flush()
        os.fsync(file.fileno())


def _write_all(file: BufferedWriter, pieces: Iterator[memoryview | bytes]) -> None:
    """Writes pieces; of a large file, what is written goes to the disk while more is."""

    def write_some() -> bool:
        written = 0
        for piece in pieces:
            file.write(piece)
            written += len(piece)
            if written >= _AT_ONCE:
                file.flush()
                return True
        return False

    more = write_some()
    while more:
        with beside(partial(os.fsync, file.fileno())) as synced:
            more = write_some()
        synced()  # the system tells only once that it could not


def storable(dtype: np.dtype[Any]) -> bool:
    """Tells whether the format has this dtype."""
    return dtype.name in _CODES


def bytes_of(leaf: Leaf) -> Iterator[memoryview | bytes]:
    """Yields the bytes of a leaf, in little-endian C order, as they are or as they are made."""
    yield from map(as_bytes, leaf.pieces() if isinstance(leaf, Made) else [leaf])


def as_bytes(array: np.ndarray) -> memoryview | bytes:
    """Returns the bytes of an array in little-endian C order, without a copy where it already is that."""
    if not array.size:
        return b""
    plain = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return plain.reshape(-1).view(np.uint8).data


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads a file into new arrays.

    Raises:
        Damaged: naming the leaf that is wrong.
        OSError: as the system gives it.
        ImportError: for bfloat16 and float8 leaves without the package ml_dtypes.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(file, size)
        return {
            name: _read_leaf(file, name, field, start, size, _room(field)) for name, field in header.items()
        }


class Opened:
    """A file whose header was read and checked; its leaves are read one by one.

    Attributes:
        names: of the leaves.

    Raises:
        Damaged, OSError, ImportError: as `read`.
    """

    def __init__(self, path: Path):
        self._path = path
        with open(path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            self._header, self._start = _read_header(file, self._size)
        self.names = list(self._header)

    def reader(self, name: str) -> Callable[[], np.ndarray]:
        """Returns what reads one leaf, from any thread, into memory that is had here and now.

        Memory that a new thread asks for is fresh, and its page faults take longer than the reading.
        """
        field = self._header[name]
        raw = _room(field)

        def read() -> np.ndarray:
            with open(self._path, "rb") as file:
                return _read_leaf(file, name, field, self._start, self._size, raw)

        return read


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the text of a file's header, {} if it has none; raises as `read`."""
    with open(path, "rb") as file:
        found = _parse_header(file, os.fstat(file.fileno()).st_size)[0].get(_METADATA, {})
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _read_header(file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    """Returns the header's fields, checked, and the position at which the leaves begin."""
    header, start = _parse_header(file, size)
    header.pop(_METADATA, None)
    for name, field in header.items():
        problem = _field_problem(field)
        if problem:
            raise Damaged(f"the header's field for leaf {name!r} {problem}")
    _check_extent(header, size - start)
    return header, start


def _parse_header(file: BufferedReader, size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise Damaged(f"it must begin with 8 bytes of length, got {size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, _LONGEST_HEADER):
        most = f"the {size} bytes of the file and {_LONGEST_HEADER} bytes"
        raise Damaged(f"its header must fit into {most}, got a length of {length}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its header must be JSON ({error})") from error
    if not isinstance(header, dict):
        raise Damaged("its header must be a JSON object")
    if len(header) > _MOST_LEAVES:
        raise Damaged(f"its header must name at most {_MOST_LEAVES} leaves, got {len(header)}")
    return header, 8 + length


def _field_problem(field: Any) -> str | None:
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        return "must have dtype, shape and data_offsets"
    if not isinstance(field["dtype"], str) or field["dtype"] not in _KNOWN:
        return f"must have a known dtype, got {field['dtype']!r}"
    if not all(_whole_numbers(field[key]) for key in ("shape", "data_offsets")):
        return "must have whole numbers as shape and data_offsets"
    if len(field["shape"]) > _MOST_AXES:
        return f"must have at most {_MOST_AXES} axes, got {len(field['shape'])}"
    size, offsets = math.prod(field["shape"]) * _item_size(field["dtype"]), field["data_offsets"]
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        return f"must span the {size} bytes of its shape, got offsets {offsets}"
    return None


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_extent(header: Mapping[str, Any], available: int) -> None:
    """Refuses leaves that overlap, leave holes, or do not end where the file ends."""
    reached = 0
    for name, field in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = field["data_offsets"]
        if begin != reached:
            raise Damaged(f"leaf {name!r} must begin at byte {reached} of the data, got {begin}")
        if end > available:
            raise Damaged(
                f"it is truncated in leaf {name!r}: it must have {end} bytes of data, got {available}"
            )
        reached = end
    if reached != available:
        raise Damaged(f"it must end after {reached} bytes of data, got {available}")


def _room(field: Mapping[str, Any]) -> np.ndarray:
    return np.empty(field["data_offsets"][1] - field["data_offsets"][0], np.uint8)


def _read_leaf(
    file: BufferedReader, name: str, field: Mapping[str, Any], start: int, size: int, raw: np.ndarray
) -> np.ndarray:
    file.seek(start + field["data_offsets"][0])
    if file.readinto(raw.data) != raw.size:
        raise Damaged(f"it is truncated in leaf {name!r}: it must have {size} bytes, got fewer")
    try:
        return raw.view(_dtype(field["dtype"])).reshape(field["shape"])
    except ValueError as error:  # no elements, of which an axis is longer than memory
        raise Damaged(f"leaf {name!r} must have a possible shape, got {field['shape']}") from error


def _item_size(code: str) -> int:
    # Spelt out, so that a header can be read without ml_dtypes.
    return np.dtype(_NUMPY[code]).itemsize if code in _NUMPY else (2 if code == "BF16" else 1)


def _dtype(code: str) -> np.dtype[Any]:
    if code in _NUMPY:
        return np.dtype(_NUMPY[code]).newbyteorder("<")
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, _ML_DTYPES[code]))
