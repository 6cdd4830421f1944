"""Calls of the C kernel for the forms that are rounded at random, "lean" and "8bit" (sfcore/native/eight.h).

A parameter whose tensors lie in another order than its elements are counted in is left to the operations of
torch, and so is a part of a DTensor that is cut in three dimensions, or in two of which none is the first. In
8 bits so is one that is cut in any but the first: several processes make the exponents of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sftorch.kernels import call
from sftorch.kernels.call import Element, Job, Kind
from sftorch.law.parts import PLAIN, Place

HASHES = 2  # of a tensor, as in eight.h: of gap and v, and of m
_RESTS = {(torch.bfloat16, True): torch.int8, (torch.bfloat16, False): torch.int16}
_GAPS = {(torch.bfloat16, True): torch.int8, (torch.float32, True): torch.int16}


def place_of(at: Place | None, size: int) -> tuple[int, int, int] | None:
    """Returns where a part's elements lie in the whole, as job.h has it; None where it takes more numbers.

    Args:
        at: None for what is whole.
        size: elements in all.

    Example:
        >>> from sftorch.kernels.drawn import place_of
        >>> from sftorch.law.parts import Place
        >>> place_of(Place((4, 3), (2, 0), (2, 3)), 6), place_of(Place((4, 3), (0, 1), (4, 2)), 8)
        ((6, 6, 12), (1, 2, 3))
    """
    if at is None:
        return 0, size, size
    cut = [i for i, (whole, own) in enumerate(zip(at.shape, at.sizes, strict=True)) if whole != own]
    last = max(cut, default=0)
    if not {*cut} <= {0, last}:
        return None
    first = sum(offset * math.prod(at.shape[i + 1 :]) for i, offset in enumerate(at.offsets))
    return first, math.prod(at.sizes[last:]), math.prod(at.shape[last:])


def places_of(ys: Sequence[Tensor], places: Sequence[Place | None]) -> np.ndarray:
    """Returns `place_of` of each tensor, int64 of shape (tensors, 3); no places mean that all are whole."""
    of_all = zip(ys, places or [None] * len(ys), strict=True)
    return np.array([place_of(at, y.numel()) for y, at in of_all], dtype=np.int64).reshape(-1, 3)


def _dtypes(of_y: torch.dtype, in_codes: bool) -> dict[str, torch.dtype | None]:
    """Returns what the state beside a parameter must be of; None where the kernels know nothing like it."""
    narrow = torch.bfloat16
    return {
        "rest": _RESTS.get((of_y, in_codes)),
        "z": _GAPS.get((of_y, in_codes), narrow),
        "v": torch.uint8 if in_codes else narrow,
        "m": torch.int8 if in_codes else narrow,
        "scale": torch.int8,
    }


def all_fit(tables: call.Tables, places: Sequence[Place | None]) -> bool:
    """Tells whether the kernels take all parameters of a batch with the gradients that are there.

    A list at a time, as `call.all_fit`; where it says no, `why_left` tells of each.
    """
    ys, grads = tables["y"], tables["g"]
    wanted, shapes = _dtypes(ys[0].dtype, "scale" in tables), [y.shape for y in ys]
    every = [tensor for tensors in tables.values() for tensor in tensors]
    return (
        not any(places)
        and PLAIN.issuperset(map(type, every))
        and {t.device for t in every} == {ys[0].device}
        and {t.is_contiguous() for t in every} == {True}
        and len(of_g := {g.dtype for g in grads}) == 1
        and of_g <= {torch.float32, *call.NARROW}
        and {g.is_neg() for g in grads} == {False}
        and all(
            {t.dtype for t in tables[name]} == {dtype} for name, dtype in wanted.items() if name in tables
        )
        and all([t.shape for t in ts] == shapes for name, ts in tables.items() if name != "scale")
    )


def why_left(row: Mapping[str, Tensor], at: Place | None) -> str | None:
    """Returns why the kernel does not take a parameter, None if it does; its gradient can be copied.

    Args:
        row: tensors by the names of job.h, "scale" among them for "8bit".
        at: where it lies in a larger one.
    """
    y, in_codes = row["y"], "scale" in row
    if not all(type(tensor) in PLAIN for name, tensor in row.items() if name != "g"):
        return f"parameters must be plain tensors, got {type(y).__name__}"
    if any(row[name].dtype != dtype for name, dtype in _dtypes(y.dtype, in_codes).items() if name in row):
        return "state must be of its parameter's kind"
    if any(tensor.device != y.device for name, tensor in row.items() if name != "g"):
        return f"state must be on the device of its parameter, {y.device}"
    if not all(tensor.is_contiguous() for name, tensor in row.items() if name != "g"):
        return "parameters and state must be contiguous"
    if not all(tensor.shape == y.shape for name, tensor in row.items() if name != "scale"):
        return "state must be of its parameter's shape"
    return (
        None
        if place_of(at, y.numel())
        else "a DTensor must be cut in its first dimension and one more at most"
    )


def give_words(job: Job, keys: Tensor) -> None:
    """Gives a job of `job_of` the random words of its next step, those of a `Move`."""
    words = job.arrays["keys"] = np.zeros((len(keys), HASHES, 2), dtype=np.uint32)
    words[:, : keys.shape[1]] = keys.numpy()
    job.keys = words.ctypes.data


def job_of(kind: Kind, tables: Mapping[str, Sequence[Tensor]], places: Sequence[Any]) -> Job:
    """Returns what will run again while the tensors are the same, but for its random words.

    Args:
        kind: of the step.
        tables: as for a `Job`, and "scale" for "8bit".
        places: where each lies in a larger one; empty if all are whole.
    """
    narrow = [call.NARROW.get(tables[name][0].dtype, Element.AS_Z) for name in ("y", "g")]
    job = Job(kind, Element.BFLOAT16_REST if narrow[0] else Element.AS_Z, narrow[1])
    ys = tables["y"]
    rows = np.array([y.shape[0] if y.ndim else 1 for y in ys], dtype=np.int64)
    lie = places_of(ys, places)
    job.arrays = {"rows": rows, "places": lie}
    job.rows, job.places = rows.ctypes.data, lie.ctypes.data
    return job
