"""Between torch and the framework-free checkpoint: tensors as NumPy arrays, nested state as JSON."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfcore.exchange import CheckpointError

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# What NumPy has only through ml_dtypes, under the same name there.
_EXTENDED = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
_TAG = "__is__"


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name, the same in NumPy: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _ml_dtype(name: str) -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise CheckpointError(
            f"{name} tensors need ml_dtypes, got {error}: pip install 'schedulefree-twin[torch]'"
        ) from error
    return np.dtype(getattr(ml_dtypes, name))


def dtype_of(dtype: torch.dtype) -> np.dtype[Any]:
    """Returns NumPy's dtype of the same numbers."""
    name = name_of(dtype)
    return _ml_dtype(name) if name in _EXTENDED else np.dtype(name)


def check_dense(tensor: Tensor, name: str) -> None:
    """Raises CheckpointError, naming the tensor, if it is sparse or quantized, or NumPy cannot hold it."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else tensor.layout
        raise CheckpointError(
            f"{name} must be a dense tensor, got {kind}: convert it, or leave it out of the model's state"
        )
    if name_of(tensor.dtype) in _EXTENDED:
        _ml_dtype(name_of(tensor.dtype))


def to_numpy(tensor: Tensor, name: str = "tensor") -> np.ndarray:
    """Returns a dense host tensor as an array that shares its memory where it can.

    Raises:
        CheckpointError: naming the tensor, if it is sparse, quantized or without values (meta), or has no
            elements and axes that NumPy cannot count.
    """
    check_dense(tensor, name)
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if name_of(plain.dtype) in _EXTENDED:
        return plain.view(_SAME_SIZE[plain.element_size()]).numpy().view(_ml_dtype(name_of(plain.dtype)))
    try:
        return plain.numpy()
    except ValueError as error:
        raise CheckpointError(f"{name} must have a possible shape, got {tuple(tensor.shape)}") from error


def to_tensor(array: np.ndarray) -> Tensor:
    """Returns an array as a tensor of the same bits, in the same memory if that is plain and writable."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype.name in _EXTENDED:
        plain = array.view({1: np.uint8, 2: np.int16}[array.dtype.itemsize])
        return torch.from_numpy(plain).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


def encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Returns JSON for nested state (a scheduler's, a GradScaler's, your own) that `decode` undoes.

    Args:
        value: dicts with any plain keys, Counter, list, tuple, set, str, numbers, None, and tensors or
            arrays, which go into `tensors`.
        tensors: receives path -> tensor.
        path: names the value, in errors and as the tensors' prefix.

    Raises:
        CheckpointError: naming the entry that has no JSON form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        # A subclass (an enum, numpy.float64) comes back as the plain number that it is.
        return value if type(value) in (bool, int, float, str, type(None)) else _plain_number(value)
    if isinstance(value, np.generic):
        return encode(value.item(), tensors, path)
    if isinstance(value, Tensor | np.ndarray):
        while path in tensors:  # {"a": {"b": ...}, "a/b": ...}, or the keys 1 and "1"
            path += "'"
        try:
            tensors[path] = value if isinstance(value, Tensor) else to_tensor(value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} must be an array of numbers, got dtype {value.dtype!r}: convert it, or leave it out"
            ) from error
        return {_TAG: "array" if isinstance(value, np.ndarray) else "tensor", "leaf": path}
    if isinstance(value, Mapping):
        return _encode_mapping(value, tensors, path)
    if isinstance(value, list | tuple | set | frozenset):
        items = [encode(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
        kind = next(k for k in ("list", "tuple", "set", "frozenset") if isinstance(value, _KINDS[k]))
        return items if kind == "list" else {_TAG: kind, "items": items}
    raise CheckpointError(
        f"{path} must be JSON-like or a tensor, got {type(value).__name__}: save its state_dict(), "
        "or leave it out"
    )


def _plain_number(value: Any) -> Any:
    return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))


def _encode_mapping(value: Mapping[Any, Any], tensors: dict[str, Tensor], path: str) -> Any:
    kind = "counter" if isinstance(value, Counter) else "dict"
    if kind == "dict" and all(isinstance(key, str) for key in value) and _TAG not in value:
        return {str(key): encode(item, tensors, f"{path}/{key}") for key, item in value.items()}
    pairs = [
        [encode(key, tensors, f"{path}/key"), encode(item, tensors, f"{path}/{key}")]
        for key, item in value.items()
    ]
    return {_TAG: kind, "items": pairs}


_KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def decode(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns what `encode` was given; tensors come back on the CPU."""
    if isinstance(value, list):
        return [decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: decode(item, arrays) for key, item in value.items()}
    if kind in ("tensor", "array"):
        array = arrays[value["leaf"]]
        return to_tensor(array) if kind == "tensor" else np.array(array)
    items = [decode(item, arrays) for item in value["items"]]
    if kind in _KINDS:
        return _KINDS[kind](items)
    pairs = OrderedDict((key, item) for key, item in items)
    return Counter(pairs) if kind == "counter" else dict(pairs)
