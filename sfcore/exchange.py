"""The framework-free checkpoint: named NumPy arrays in safetensors, checked leaf by leaf.

Arrays are named "ROLE/PARAMETER"; the roles are in `roles()`. bfloat16 arrays have the dtype of
ml_dtypes, which both twins' extras install.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from sfcore import _safetensors, checks, codes, laws
from sfcore._safetensors import Leaf as Leaf
from sfcore._safetensors import Made as Made
from sfcore.beside import beside, each
from sfcore.checks import nearest

# In the header of weights that are read alone: the record of their leaves, and a CRC-32 of all its text. Two
# of these words make a header ours, so that damage to one of them is noticed.
_LEAVES, _CRC, _OURS = "leaves", "crc32", {"weights_hold", "leaves", "crc32"}
_MOST_CRC = 0xFFFFFFFF
_MOST_TEXT = 1 << 26  # of the record of as many leaves as a file may have
OLDER = "restore an older checkpoint, resume='latest-good' finds one"


Array = TypeVar("Array", bound=Leaf)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names file, leaf, finding and way out."""


@laws.derived
def roles() -> Mapping[str, str]:
    """Returns role -> what it is: those of every checkpoint, and the buffers of all laws.

    Example:
        >>> from sfcore.exchange import roles
        >>> roles()["z"], roles()["v"]
        ('base iterate', 'second moment')
    """
    return {**laws.COMMON_ROLES, **{role: one.doc for role, one in laws.roles().items()}}


def split(leaf: str) -> tuple[str, str]:
    """Returns (role, parameter) of a leaf's name.

    Raises:
        CheckpointError: if it does not begin with a role.

    Example:
        >>> from sfcore.exchange import split
        >>> split("y/layers/0/kernel")
        ('y', 'layers/0/kernel')
    """
    checks.require(TypeError, leaf=(checks.TEXT, leaf))
    role, slash, parameter = leaf.partition("/")
    if not slash or role not in roles():
        raise CheckpointError(
            f"leaf {leaf!r} must be named ROLE/NAME with ROLE one of {', '.join(roles())}, got "
            f"{leaf!r}: such as y/NAME"
        )
    return role, parameter


def of_role(tensors: Mapping[str, Array], role: str) -> dict[str, Array]:
    """Returns parameter -> array of one role, in the order of `tensors`.

    Example:
        >>> import numpy as np
        >>> from sfcore.exchange import of_role
        >>> list(of_role({"y/w": np.zeros(2), "z/w": np.zeros(2)}, "z"))
        ['w']
    """
    checks.require(TypeError, tensors=(checks.MAPPING, tensors), role=(checks.TEXT, role))
    start = role + "/"
    return {leaf.removeprefix(start): array for leaf, array in tensors.items() if leaf.startswith(start)}


def describe(array: Leaf, crc32: int | None = None) -> dict[str, Any]:
    """Returns what is recorded of a leaf: dtype, shape and CRC-32, taken of its bytes if it is None."""
    if crc32 is None:
        crc32 = 0
        for piece in _safetensors.bytes_of(array):
            crc32 = zlib.crc32(piece, crc32)
    return {"dtype": array.dtype.name, "shape": list(array.shape), "crc32": crc32}


def crc_of(body: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of what is JSON, whatever the order of its keys."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def write_tensors(
    path: Path,
    tensors: Mapping[str, Leaf],
    metadata: Mapping[str, str] | None = None,
    sealed: bool = False,
    places: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a safetensors file, synced to the disk; returns leaf -> `describe(leaf)` to read it back by.

    Args:
        path: the file, overwritten if it is there.
        tensors: leaf -> array, or what is `Made` while it is written: bool, integers to 64 bits,
            float16/32/64, bfloat16, float8, complex64/128.
        metadata: text for the file's header, such as {"format": "pt"}.
        sealed: let the header say what is returned, for a file that is read without a record: "leaves" is
            that as JSON, and "crc32" the CRC-32 of all the header's text. Default False.
        places: leaf -> `sfcore.shards.Place`, of those that are pieces of an array.

    Raises:
        CheckpointError: naming the first leaf whose dtype cannot be stored; nothing is written then.
        OSError: as the system gives it (disk full, no permission).
    """
    checks.require(
        TypeError,
        path=(checks.PATH, path),
        tensors=(checks.MAPPING, tensors),
        metadata=(checks.optional(checks.MAPPING), metadata),
        sealed=(checks.FLAG, sealed),
        places=(checks.optional(checks.MAPPING), places),
    )
    arrays = {leaf: one if isinstance(one, Made) else np.asarray(one) for leaf, one in tensors.items()}
    stored = codes.put_together({leaf: _as_stored(leaf, array) for leaf, array in arrays.items()})

    def described(crcs: Mapping[str, int] | None = None) -> dict[str, Any]:
        # What lies in the file with another has no bytes of its own there.
        found = {leaf: describe(array, (crcs or {}).get(leaf)) for leaf, array in arrays.items()}
        for leaf, place in (places or {}).items():
            found[leaf] |= place.as_record()
        return found

    def said(record: Mapping[str, Any]) -> dict[str, str]:
        text = {**(metadata or {}), _LEAVES: json.dumps(record, separators=(",", ":"))}
        return text | {_CRC: str(crc_of(text))}

    if not sealed:
        with beside(described) as waited:
            _safetensors.write(path, stored, metadata)
        return waited()
    record: dict[str, Any] = {}

    def seal(crcs: Mapping[str, int]) -> dict[str, str]:
        record.update(described(crcs))
        return said(record)

    # Room for the longest numbers, until the right ones are known.
    widest = said(described(dict.fromkeys(arrays, _MOST_CRC))) | {_CRC: str(_MOST_CRC)}
    _safetensors.write(path, stored, widest, seal)
    return record


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Returns the text in the header of a safetensors file, and the record of leaves that a sealed one has.

    The record is None of a file of anyone else, and of an older one of ours.

    Raises:
        CheckpointError: if it cannot be read, or its header is not what was written.
    """
    with reading(path):
        text = _safetensors.read_metadata(path)
    if len(_OURS & text.keys()) < 2:
        return text, None
    said = text.pop(_CRC, None)
    if said != str(crc_of(text)):
        raise CheckpointError(
            f"{path} is damaged: the CRC-32 of its header is not the recorded {said}; {OLDER}"
        )
    return text, _as_record(path, text.pop(_LEAVES, ""))


def _as_record(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    known = {"dtype", "shape", "crc32"}
    if not isinstance(record, dict) or any(
        not isinstance(one, dict) or set(one) - {"start", "of", "leaf"} != known for one in record.values()
    ):
        raise CheckpointError(
            f"{path} is damaged: {_LEAVES!r} in its header must be a record of leaves; {OLDER}"
        )
    return record


def said_of_weights(path: Path) -> tuple[int | None, list[str]]:
    """Returns what the header of a safetensors file says of the weights: steps trained, and a notice.

    Args:
        path: a file of ours or of anyone else; another kind of file says nothing.

    Returns:
        Optimizer steps, None if it does not say; and a sentence if the file holds y and not x.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if path.suffix != ".safetensors":
        return None, []
    header, _ = read_header(path)
    step = header.get("step", "")
    notices = []
    if header.get("weights_hold") == "y":
        notices.append(f"{path} says that it holds y, which is taken for x: save x (eval mode) to ship it")
    return (int(step) if step.isdecimal() else None), notices


def read_tensors(path: Path, record: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Args:
        path: the file.
        record: what `write_tensors` returned; every leaf is checked against it. None takes the one in the
            header of a sealed file, and checks of any other only that it keeps the format.

    Raises:
        CheckpointError: naming the first leaf that is missing or unknown, or has another dtype, shape or
            content.
    """
    checks.require(TypeError, path=(checks.PATH, path), record=(checks.optional(checks.MAPPING), record))
    record = read_header(path)[1] if record is None else record
    if record is not None:
        return read_all(dict.fromkeys(record, open_tensors(path, record)))
    with reading(path):
        found = _safetensors.read(path)
        return {leaf: _apart(leaf, found[one], leaf != one) for leaf, one in _held(found).items()}


Reader: TypeAlias = Callable[[str], Callable[[], np.ndarray]]


def read_all(readers: Mapping[str, Reader]) -> dict[str, np.ndarray]:
    """Returns leaf -> array, by what `open_tensors` gave for the file of each; a few at once in threads."""
    found = each(lambda read: read(), [reader(leaf) for leaf, reader in readers.items()])
    return dict(zip(readers, found, strict=True))


def open_tensors(path: Path, record: Mapping[str, Any]) -> Reader:
    """Returns leaf -> what reads that leaf of a safetensors file, from any thread, and checks it.

    Raises:
        CheckpointError: as `read_tensors`; of a leaf's content when that is read.
    """
    with reading(path):
        opened = _safetensors.Opened(path)
        held = _held(opened.names)
    _check_names(path, held, record)

    def reader(leaf: str) -> Callable[[], np.ndarray]:
        read_stored = opened.reader(held[leaf])

        def read() -> np.ndarray:
            with reading(path):
                stored = _apart(leaf, read_stored(), leaf != held[leaf])
            found = _from_stored(stored, record[leaf]["dtype"])
            check_leaf(path, leaf, found, record[leaf])
            return found

        return read

    return reader


def _held(names: Iterable[str]) -> dict[str, str]:
    """Returns leaf -> what it lies in, of the names in a file."""
    held: dict[str, str] = {}
    for one in names:
        for leaf in codes.names_of(one):
            if leaf in held:
                raise _safetensors.Damaged(f"it must hold {leaf!r} once, got {held[leaf]!r} and {one!r}")
            held[leaf] = one
    return held


def _apart(leaf: str, stored: np.ndarray, is_part: bool) -> np.ndarray:
    try:
        return codes.taken_apart(leaf, stored) if is_part else stored
    except ValueError as error:
        raise _safetensors.Damaged(str(error)) from error


def _check_names(path: Path, stored: Iterable[str], record: Mapping[str, Any]) -> None:
    unknown = set(stored) - set(record)
    missing = set(record) - set(stored)
    if unknown or missing:
        raise CheckpointError(f"{path} is damaged: {_difference(missing, unknown)}; {OLDER}")


def check_metadata(path: Path, expected: Mapping[str, str]) -> None:
    """Raises `CheckpointError` if a readable file's header text is neither the expected one nor empty."""
    found, _ = read_header(path)
    if found not in ({}, expected):
        raise CheckpointError(f"{path} is damaged: its header must say {expected}, got {found}; {OLDER}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever keeps a file or folder from being read into a `CheckpointError` with the way out."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # which may never end
            raise CheckpointError(f"{path} is damaged: it must be a file, got a pipe or a device; {OLDER}")
        yield
    except _safetensors.Damaged as error:
        raise CheckpointError(f"{path} is damaged: {error}; {OLDER}") from error
    except ImportError as error:
        raise CheckpointError(f"{path} needs the package {error.name}: pip install {error.name}") from error
    except OSError as error:
        raise CheckpointError(cannot_read(path, error)) from error


def read_text(path: Path) -> str:
    """Returns the text of a file of JSON; to be called in `reading`.

    Raises:
        OSError: as the system gives it.
        CheckpointError: if it is no text, or larger than any record.
    """
    size = path.stat().st_size
    if size > _MOST_TEXT:
        raise CheckpointError(
            f"{path} is damaged: it must have at most {_MOST_TEXT} bytes, got {size}; {OLDER}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: it must be JSON ({error}); {OLDER}") from error


def cannot_read(path: Path, error: OSError) -> str:
    """Returns the sentence for a file that the system does not let us read."""
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing: check the path, or {OLDER}"
    if isinstance(error, PermissionError):
        return f"{path} cannot be read ({error.strerror}): give this user read permission"
    return f"{path} cannot be read ({error.strerror or error}): check the path and the disk, or {OLDER}"


def _difference(missing: set[str], unknown: set[str]) -> str:
    if not missing:
        return f"it must hold only the leaves of its record, got {min(unknown)!r} as well"
    leaf = min(missing)
    near = nearest(leaf, unknown)
    return f"it must hold the leaf {leaf!r}, got none of that name" + (f" but {near!r}" if near else "")


def check_leaf(
    path: Path,
    leaf: str,
    array: np.ndarray,
    described: Mapping[str, Any],
    changed: str = "the file was changed after it was written",
) -> None:
    """Raises `CheckpointError` unless an array is as its record describes it."""
    for what, found in describe(array).items():
        if found != described[what]:
            raise CheckpointError(
                f"{path} is damaged: leaf {leaf!r} must have {what} {described[what]}, got {found}: "
                f"{changed}; {OLDER}"
            )


def _as_stored(leaf: str, array: Leaf) -> Leaf:
    """Returns an array of a dtype that safetensors has; complex128 goes as pairs of float64."""
    if array.dtype.name == "complex128":
        array = np.asarray(array)
        return np.stack([array.real, array.imag], axis=-1)
    if not _safetensors.storable(array.dtype):
        raise CheckpointError(
            f"leaf {leaf!r} must have a dtype of safetensors, got {array.dtype}: convert it"
        )
    return array


def _from_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "complex128" and array.dtype == np.float64 and array.shape[-1:] == (2,):
        return array.reshape(-1).view(np.complex128).reshape(array.shape[:-1])
    return array


def fingerprint(tensors: Mapping[str, Leaf]) -> str:
    """Returns a SHA-256 over names, dtypes, shapes and bytes, whatever the order of the mapping.

    Example:
        >>> import numpy as np
        >>> from sfcore.exchange import fingerprint
        >>> fingerprint({"w": np.zeros(2)})[:8]
        '465c0cc0'
    """
    checks.require(TypeError, tensors=(checks.MAPPING, tensors))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        array = array if isinstance(array, Made) else np.asarray(array)
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        for piece in _safetensors.bytes_of(array):
            digest.update(piece)
    return digest.hexdigest()
