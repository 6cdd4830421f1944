"""The framework-free checkpoint: named NumPy arrays in safetensors, checked leaf by leaf.

Arrays are named "ROLE/PARAMETER"; the roles are in `ROLES`. bfloat16 arrays have the dtype of
ml_dtypes. Needs the packages safetensors and ml_dtypes, which both twins' extras install.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROLES = {
    "y": "gradient point, what the parameters hold while training",
    "x": "average, what is evaluated and shipped; in the state only where it cannot be recomputed",
    "z": "base iterate",
    "v": "second moment",
    "m": "first moment (inner momentum)",
    "base": "state of a wrapped optimizer, as base/PARAMETER/KEY",
    "grad": "gradient accumulated so far, in the middle of an accumulation",
    "buffer": "model state without gradient, such as BatchNorm statistics",
    "rng": "random number generator states",
    "extra": "arrays of the user's own",
}

_INSTALL = "install it with pip install 'schedulefree-twin[torch]' or '[jax]'"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names file, leaf, finding and way out."""


def _safetensors() -> Any:
    try:
        import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
        import safetensors.numpy
    except ImportError as error:
        raise CheckpointError(f"checkpoints need the package {error.name}: {_INSTALL}") from error
    return safetensors.numpy


def describe(array: np.ndarray) -> dict[str, Any]:
    """Returns what is recorded of a leaf: dtype, shape and CRC-32 of its bytes."""
    plain = np.ascontiguousarray(array).reshape(array.shape)
    return {"dtype": plain.dtype.name, "shape": list(plain.shape), "crc32": _crc(plain)}


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data) if array.size else 0


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes a safetensors file and returns leaf -> `describe(leaf)`, the record to read it back by."""
    stored = {name: _as_stored(np.asarray(array)) for name, array in tensors.items()}
    _safetensors().save_file(stored, str(path))
    return {name: describe(np.asarray(array)) for name, array in tensors.items()}


def read_tensors(path: Path, record: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Args:
        path: the file.
        record: what `write_tensors` returned; every leaf is checked against it. None checks nothing.

    Raises:
        CheckpointError: naming the first leaf that is missing, or has another dtype, shape or content.
    """
    try:
        stored = _safetensors().load_file(str(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: restore an older checkpoint or copy it again") from error
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): give this user read permission") from error
    except Exception as error:  # safetensors raises its own type for every kind of damage
        raise CheckpointError(
            f"{path} is damaged ({error}): restore an older checkpoint, resume='latest-good' finds one"
        ) from error
    if record is None:
        return stored
    return {name: _checked(path, name, stored, described) for name, described in record.items()}


def _checked(path: Path, name: str, stored: Mapping[str, np.ndarray], described: Mapping[str, Any]) -> np.ndarray:
    if name not in stored:
        raise CheckpointError(f"{path} must hold the leaf {name!r}, got none of that name: restore an older checkpoint")
    array = _from_stored(stored[name], described["dtype"])
    for what, found in (("dtype", array.dtype.name), ("shape", list(array.shape)), ("crc32", _crc(array))):
        if found != described[what]:
            raise CheckpointError(
                f"{path}: leaf {name!r} must have {what} {described[what]}, got {found}: "
                "the file was changed or damaged; restore an older checkpoint, resume='latest-good' finds one"
            )
    return array


def _as_stored(array: np.ndarray) -> np.ndarray:
    """Returns a contiguous array; safetensors has no complex128, so that goes as pairs of float64."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype == np.complex128:
        return array.reshape(-1).view(np.float64).reshape(*array.shape, 2)
    return array


def _from_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "complex128" and array.dtype == np.float64 and array.shape[-1:] == (2,):
        return np.ascontiguousarray(array).reshape(-1).view(np.complex128).reshape(array.shape[:-1])
    return array


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns a SHA-256 over names, dtypes, shapes and bytes, whatever the order of the mapping.

    Example:
        >>> import numpy as np
        >>> from sfcore.exchange import fingerprint
        >>> fingerprint({"w": np.zeros(2)})[:8]
        '465c0cc0'
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        if array.size:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
