"""Calls of the kernels: which tensors they can walk, and how lists of tensors become tables of addresses.

In C a table has an address for each tensor, and nothing there is checked. In Triton one table on the device
has them all: it is kept while addresses stay; where they change, it is sent without waiting for the device.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import struct
from array import array
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sfcore.native import build
from sfcore.native.kinds import Kind as Kind
from sftorch.law.parts import PLAIN

TABLES = ("y", "rest", "z", "v", "m", "x", "g")  # as in job.h and in triton_step.COLUMNS
_ADDRESSES = (*TABLES, "scale")  # of a launch of Triton
_ALIGNED = 2  # the row of `_facts`
NUMBERS = ("sign", "lr_t", "wd_y", "wd_z", "k1", "k2", "b2", "eps", "m1", "correction2", "correction1")
ZEROS = (0.0,) * len(NUMBERS)
Tables = Mapping[str, Sequence[Tensor]]  # by the names of TABLES
_log = logging.getLogger("sftorch")
_PACKED = struct.Struct(f"{len(NUMBERS)}d")
_WIDE = (torch.float32, torch.float64)
# Four elements a thread: loads of 16 bytes in float32. AdamW then takes 53 registers, 64 in the 8-bit form;
# with eight it takes 106 and 114, which leaves room for half the threads (compiled for sm_90 by Triton 3.7).
BLOCK = 1024
WARPS = 8
KEPT = 64  # tables; a batch needs one. step_in_backward needs one a parameter, and may send them anew


class Element(IntEnum):
    """Element types of y, x and g: as z, or 16 bits, with 16 more in `rest` that make y a float32."""

    AS_Z = 0
    BFLOAT16 = 1
    BFLOAT16_REST = 2


NARROW = {torch.bfloat16: Element.BFLOAT16}


def all_fit(tables: Tables) -> bool:
    """Tells whether all parameters can be walked as flat memory, and all in the same dtypes.

    A list at a time, because with thousands of small tensors these questions are most of a step.
    """
    return (
        not tables.keys() >= {"rest", "x"}
        and len({g.dtype for g in tables["g"]}) == 1
        and _same_kinds(tables)
        and all({t.is_contiguous() for t in ts} == {True} for ts in tables.values())
    )


def why_left(row: dict[str, Tensor]) -> str | None:
    """Returns why a kernel does not take a parameter, None if it does; its gradient can be copied."""
    y, z = row["y"], row["z"]
    if row.keys() >= {"rest", "x"}:
        return "16-bit parameters must be in a class without 'Closure' in its name: there x comes whole"
    if type(y) not in PLAIN:
        return f"parameters must be plain tensors, got {type(y).__name__}"
    held = {name: tensor for name, tensor in row.items() if name != "g"}
    alone = {name: [tensor] for name, tensor in held.items()}
    if not _same_kinds(alone | {"g": [torch.empty_like(y, dtype=z.dtype)]}):
        kinds = ", ".join(f"{name} {_kind_of(tensor)}" for name, tensor in held.items())
        return f"state must be of its parameter's kind, and in float32 at least, got {kinds}"
    if not _same_dense_layout(*held.values()):
        strides = ", ".join(f"{name} {tensor.stride()}" for name, tensor in held.items())
        return f"parameters and state must fill their memory in one order, got the strides {strides}"
    return None


def walkable(grad: Tensor, y: Tensor, wide: torch.dtype) -> Tensor:
    """Returns a gradient as it is, or a copy, in a dtype that the kernels know and in the layout of y."""
    dtype = grad.dtype if grad.dtype in NARROW and wide == torch.float32 else wide
    if grad.dtype == dtype and type(grad) in PLAIN and not grad.is_neg() and _same_dense_layout(y, grad):
        return grad
    return torch.empty_like(y, dtype=dtype).copy_(grad)


def alike(first: Tensor, *others: Tensor) -> bool:
    """Tells whether plain CPU tensors have one wide dtype and one dense layout."""
    return (
        first.dtype in _WIDE
        and type(first) in PLAIN
        and all(t.is_cpu and t.dtype == first.dtype for t in others)
        and not any(t.is_neg() for t in (first, *others))
        and _same_dense_layout(first, *others)
    )


def all_alike(columns: Sequence[Sequence[Tensor]]) -> bool:
    """Tells whether `alike` holds of every row of some columns, and all are contiguous and of one dtype."""
    every = [tensor for column in columns for tensor in column]
    shapes = [t.shape for t in columns[0]]
    return (
        PLAIN.issuperset(map(type, every))
        and len(dtypes := {t.dtype for t in every}) == 1
        and dtypes <= set(_WIDE)
        and {t.is_cpu and t.is_contiguous() and not t.is_neg() for t in every} == {True}
        and all([t.shape for t in column] == shapes for column in columns[1:])
    )


def _kind_of(tensor: Tensor) -> str:
    sign = " with a pending sign" if tensor.is_neg() else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}{sign}"


def _same_kinds(tables: Tables) -> bool:
    """Tells whether the kernels know the dtypes, and tensors of a parameter match in all but layout."""
    ys, grads, of_y, device = tables["y"], tables["g"], tables["y"][0].dtype, tables["y"][0].device
    others = {name: tensors for name, tensors in tables.items() if name != "y"}  # ys are of one batch
    dtypes = {name: {t.dtype for t in tensors} for name, tensors in others.items()}
    wide = torch.promote_types(of_y, torch.float32)
    narrow = set(NARROW) if wide == torch.float32 else set()
    counts = [y.numel() for y in ys]
    return (
        wide in _WIDE
        and all(PLAIN.issuperset(map(type, tensors)) for tensors in tables.values())
        and dtypes.pop("x", {of_y}) == {of_y}
        and dtypes.pop("rest", {torch.int16}) == {torch.int16}
        and dtypes.pop("g") <= {wide} | narrow
        and all(found == {wide} for found in dtypes.values())
        and all([t.numel() for t in tensors] == counts for tensors in others.values())
        and all({t.device for t in tensors} == {device} for tensors in others.values())
        and {t.is_neg() for t in (*ys, *grads)} == {False}
    )


def _same_dense_layout(first: Tensor, *others: Tensor) -> bool:
    """Tells whether tensors have the same shape and strides, and these leave no gap and no overlap."""
    step = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return all(t.stride() == first.stride() and t.shape == first.shape for t in others)


class Job(ctypes.Structure):
    """`struct job` of job.h, which may run again while the tensors are the same."""

    _fields_: ClassVar[Any] = (
        [("count", ctypes.c_int64), ("sizes", ctypes.c_void_p)]
        + [(name, ctypes.c_void_p) for name in TABLES]
        + [(name, ctypes.c_int32) for name in ("kind", "is_double", "y_type", "g_type")]
        + [(name, ctypes.c_double) for name in NUMBERS]
        + [(name, ctypes.c_void_p) for name in ("scale", "rows", "places", "keys", "marks")]
    )

    def __init__(self, kind: Kind, y_type: Element = Element.AS_Z, g_type: Element = Element.AS_Z):
        """Describes what to do.

        Args:
            kind: what to do.
            y_type: of y and x; with BFLOAT16_REST there is a table "rest" of int16.
            g_type: of the gradients.
        """
        super().__init__(kind=kind, y_type=y_type, g_type=g_type)
        self.columns: dict[str, array[int]] = {}  # the job points there
        self.arrays: dict[str, np.ndarray] = {}  # and there
        self.loaded: ctypes.CDLL | None = None  # from the first run on

    def run(self, tables: Tables, numbers: Sequence[float], threads: int | None = None) -> bool:
        """Does it.

        Args:
            tables: by the names of job.h, at least "y" and "z"; lists of one length, of CPU tensors that
                have the same number of elements in the same dense layout, z, v and m in one dtype, float32 or
                float64. None of this is checked here. A later run needs those that have others in them.
            numbers: those of NUMBERS, in their order; the last ones may be left out, and are 0.
            threads: at most so many; None (default) is torch's number.

        Returns:
            Whether HOLDS or PUT_BACK found a difference.

        Raises:
            Unavailable: if there is no kernel.
        """
        if self.loaded is None:
            found = build.find(build.DRAWN if self.keys else build.STEP)
            if isinstance(found, str):
                raise build.Unavailable(found)
            self.loaded = found
        for name, tensors in tables.items():
            column = self.columns[name] = array("Q", [t.data_ptr() for t in tensors])
            setattr(self, name, column.buffer_info()[0])
        if "z" in tables:
            sizes = self.columns["sizes"] = array("q", [y.numel() for y in tables["y"]])
            self.count, self.sizes = len(sizes), sizes.buffer_info()[0]
            self.is_double = bool(tables["z"]) and tables["z"][0].dtype == torch.float64
        _PACKED.pack_into(self, Job.sign.offset, *numbers, *ZEROS[len(numbers) :])
        threads = torch.get_num_threads() if threads is None else threads
        return bool(self.loaded.sf_run(ctypes.byref(self), threads))


@functools.cache
def give_notice(why: str) -> None:
    """Logs, once a process, that steps take the slower path."""
    _log.warning("the fused CPU step is not available, and steps take the foreach path: %s", why)


@functools.cache
def find_triton() -> ModuleType | str:
    """Returns the kernel's module, or why there is none. The first call imports Triton.

    Example:
        >>> from sftorch.kernels import call
        >>> call.find_triton() is call.find_triton()
        True
    """
    try:
        return importlib.import_module("sftorch.kernels.triton_step")
    except ImportError as error:
        return f"triton must be importable, got {error}: install the version that your torch names"


def launch(
    kind: Kind,
    y_type: Element,
    g_type: Element,
    tables: Tables,
    numbers: Sequence[float],
    keys: Tensor | None = None,
    places: np.ndarray | None = None,
) -> None:
    """Runs a step over lists of tensors in one launch, on the current stream of their device.

    Rows that loads can be wide for and other rows are a launch each.

    Args:
        kind: SGD, YOUNG, ADAMW or ADAMW_MOMENTUM.
        y_type: AS_Z or BFLOAT16_REST.
        g_type: AS_Z or BFLOAT16.
        tables: as for a `Job`, with z, v and m in float32; checked no more than there. With keys they are of
            the lean form, or with a table "scale" of the 8-bit one, in rows of less than 2^31 elements.
        numbers: those of NUMBERS, as for a `Job`.
        keys: of a `Move`, for these forms; default None.
        places: for these, of `drawn.places_of`; default None: all are whole.

    Raises:
        RuntimeError: if there is no kernel.
        ValueError: for another kind or type, which it would take for float32 numbers.
    """
    if kind > Kind.ADAMW_MOMENTUM or y_type not in (Element.AS_Z, Element.BFLOAT16_REST):
        raise ValueError(
            f"kind and y_type must be those of a step, got {kind!r}, {y_type!r}: use another path"
        )
    kernel = find_triton()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    given: dict[str, Any] = dict(zip(NUMBERS, (*numbers, *ZEROS), strict=False))
    for moment, decay in (("1", "m1"), ("2", "b2")):  # in doubles, as on the other paths
        given[f"share{moment}"] = 1.0 - given.pop(decay)
        given[f"per{moment}"] = 1.0 / (given.pop(f"correction{moment}") or 1.0)
    ys = tables["y"]
    device = ys[0].device
    constants: dict[str, Any] = {
        "HAS_V": kind != Kind.SGD,
        "HAS_M": kind == Kind.ADAMW_MOMENTUM,
        "SCALED": kind in (Kind.ADAMW, Kind.ADAMW_MOMENTUM),
        "AT_Z": given["wd_z"] != 0,
        "HALVES": y_type == Element.BFLOAT16_REST,
        "NARROW_G": g_type == Element.BFLOAT16,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }
    by_rows = "scale" in tables
    if keys is None:
        step, constants["TO_X"] = kernel.step, "x" in tables
    else:
        step, constants["HASHES"] = kernel.step_eight if by_rows else kernel.step_lean, keys.shape[1]
        given |= {"left": 1.0 - given["k1"], "direct": 1.0 - given["k2"]}
    facts = _facts(tables, places, by_rows)
    on_device: AbstractContextManager[object] = nullcontext()
    stream = 0
    if device.type == "cuda":
        on_device = torch.cuda.device(device)
        # What is sent on one stream is used and freed on it alone.
        stream = torch.cuda.current_stream(device).cuda_stream
    with on_device:
        for wide in (True, False) if by_rows else (None,):
            chosen = slice(None) if wide is None else facts[_ALIGNED] == wide
            of_launch = facts[:, chosen]
            owners = _owners(device, stream, of_launch[:_ALIGNED].tobytes())
            if len(owners) == 0:
                continue
            table = _table(device, stream, of_launch.tobytes(), of_launch.shape[1])
            if keys is not None:  # new in every step
                given["keys"] = _sent(keys.numpy()[chosen].astype(np.int32), device)
            if wide is not None:
                constants["WIDE"] = wide
            step[(len(owners),)](table, owners, **given, **constants)


def _facts(tables: Tables, places: np.ndarray | None, by_rows: bool) -> np.ndarray:
    """Returns all but the first of COLUMNS of triton_step.py, int64 of shape (columns, tensors)."""
    ys, count = tables["y"], len(tables["y"])
    sizes = np.array([y.numel() for y in ys], dtype=np.int64)
    lengths = np.array([y.numel() // max(y.shape[0], 1) if by_rows else 0 for y in ys], dtype=np.int64)
    lie = np.stack([np.zeros_like(sizes), sizes, sizes], axis=1) if places is None else places
    addresses = np.zeros((len(_ADDRESSES), count), dtype=np.int64)
    for name, tensors in tables.items():
        addresses[_ADDRESSES.index(name)] = [t.data_ptr() for t in tensors]
    # Exponents are read one by one.
    aligned = np.bitwise_or.reduce([*addresses[: len(TABLES)], lengths], axis=0) % 16 == 0
    return np.stack([sizes, lengths, aligned, *lie.T, *addresses])


def _programs(sizes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns how many programs each tensor has: one a row, or one a BLOCK where there are no rows."""
    return np.where(lengths > 0, sizes // np.maximum(lengths, 1), -(-sizes // BLOCK))


@functools.lru_cache(maxsize=KEPT)
def _owners(device: torch.device, stream: int, facts: bytes) -> Tensor:
    """Returns the row of the table of each program, int32."""
    programs = _programs(*np.frombuffer(facts, dtype=np.int64).reshape(_ALIGNED, -1))
    return _sent(np.repeat(np.arange(len(programs), dtype=np.int32), programs), device)


@functools.lru_cache(maxsize=KEPT)
def _table(device: torch.device, stream: int, facts: bytes, count: int) -> Tensor:
    """Returns the table of triton_step.py, (tensors, WIDTH) int64."""
    columns = np.frombuffer(facts, dtype=np.int64).reshape(-1, count)
    programs = _programs(*columns[:_ALIGNED])
    return _sent(np.stack([programs.cumsum() - programs, *columns], axis=1), device)


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    # From pinned memory a copy waits for nothing; torch keeps that memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
