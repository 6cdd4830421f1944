"""The framework-free checkpoint: named NumPy arrays in safetensors, checked leaf by leaf.

Arrays are named "ROLE/PARAMETER"; the roles are in `roles()`. bfloat16 arrays have the dtype of
ml_dtypes, which both twins' extras install.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import _safetensors, checks, laws
from sfcore.checks import nearest

OLDER = "restore an older checkpoint, resume='latest-good' finds one"


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


def of_role(tensors: Mapping[str, np.ndarray], role: str) -> dict[str, np.ndarray]:
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


def describe(array: np.ndarray) -> dict[str, Any]:
    """Returns what is recorded of a leaf: dtype, shape and CRC-32 of its bytes."""
    crc32 = zlib.crc32(_safetensors.as_bytes(array))
    return {"dtype": array.dtype.name, "shape": list(array.shape), "crc32": crc32}


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes a safetensors file, synced to the disk; returns leaf -> `describe(leaf)` to read it back by.

    Args:
        path: the file, overwritten if it is there.
        tensors: leaf -> array: bool, integers to 64 bits, float16/32/64, bfloat16, float8, complex64/128.
        metadata: text for the file's header, such as {"format": "pt"}.

    Raises:
        CheckpointError: naming the first leaf whose dtype cannot be stored; nothing is written then.
        OSError: as the system gives it (disk full, no permission).
    """
    checks.require(
        TypeError,
        path=(checks.PATH, path),
        tensors=(checks.MAPPING, tensors),
        metadata=(checks.optional(checks.MAPPING), metadata),
    )
    stored = {leaf: _as_stored(leaf, np.asarray(array)) for leaf, array in tensors.items()}
    _safetensors.write(path, stored, metadata)
    return {leaf: describe(np.asarray(array)) for leaf, array in tensors.items()}


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
    with reading(path):
        header = _safetensors.read_metadata(path)
    step = header.get("step", "")
    notices = []
    if header.get("weights_hold") == "y":
        notices.append(f"{path} says that it holds y, which is taken for x: save x (eval mode) to ship it")
    return (int(step) if step.isdecimal() else None), notices


def read_tensors(path: Path, record: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Args:
        path: the file.
        record: what `write_tensors` returned; every leaf is checked against it. None checks only that
            the file keeps the format.

    Raises:
        CheckpointError: naming the first leaf that is missing or unknown, or has another dtype, shape or
            content.
    """
    checks.require(TypeError, path=(checks.PATH, path), record=(checks.optional(checks.MAPPING), record))
    with reading(path):
        stored = _safetensors.read(path)
    if record is None:
        return stored
    unknown = set(stored) - set(record)
    missing = set(record) - set(stored)
    if unknown or missing:
        raise CheckpointError(f"{path} is damaged: {_difference(missing, unknown)}; {OLDER}")
    found = {leaf: _from_stored(stored[leaf], described["dtype"]) for leaf, described in record.items()}
    for leaf, array in found.items():
        check_leaf(path, leaf, array, record[leaf])
    return found


def check_metadata(path: Path, expected: Mapping[str, str]) -> None:
    """Raises `CheckpointError` if a readable file's header text is neither the expected one nor empty."""
    found = _safetensors.read_metadata(path)
    if found not in ({}, expected):
        raise CheckpointError(f"{path} is damaged: its header must say {expected}, got {found}; {OLDER}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever keeps a file or folder from being read into a `CheckpointError` with the way out."""
    try:
        yield
    except _safetensors.Damaged as error:
        raise CheckpointError(f"{path} is damaged: {error}; {OLDER}") from error
    except ImportError as error:
        raise CheckpointError(f"{path} needs the package {error.name}: pip install {error.name}") from error
    except OSError as error:
        raise CheckpointError(cannot_read(path, error)) from error


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


def _as_stored(leaf: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of a dtype that safetensors has; complex128 goes as pairs of float64."""
    if array.dtype.name == "complex128":
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


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
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
        array = np.asarray(tensors[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(_safetensors.as_bytes(array))
    return digest.hexdigest()
