"""Launches of the Triton kernel: lists of tensors become one table of addresses on their device.

The table is kept while addresses stay; where they change, it is sent without waiting for the device.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sftorch.kernels.call import NUMBERS, ZEROS, Element, Kind

# Four elements a thread: loads of 16 bytes in float32. AdamW then takes 48 registers; with eight elements it
# takes 98, which leaves room for a quarter of the threads (compiled for sm_90 by Triton 3.7).
BLOCK = 1024
WARPS = 8
KEPT = 64  # tables; a batch needs one. step_in_backward needs one a parameter, and may send them anew
_ADDRESSES = ("y", "rest", "z", "v", "m", "x", "g")  # in the order of triton_step.COLUMNS


@functools.cache
def find() -> ModuleType | str:
    """Returns the kernel's module, or why there is none. The first call imports Triton.

    Example:
        >>> from sftorch.kernels import launch
        >>> launch.find() is launch.find()
        True
    """
    try:
        return importlib.import_module("sftorch.kernels.triton_step")
    except ImportError as error:
        return f"triton must be importable, got {error}: install the version that your torch names"


def run(
    kind: Kind,
    tables: Mapping[str, Sequence[Tensor]],
    numbers: Sequence[float],
    y_type: Element = Element.AS_Z,
    g_type: Element = Element.AS_Z,
) -> None:
    """Runs a step over lists of tensors in one launch, on the current stream of their device.

    Args:
        kind: SGD, YOUNG, ADAMW or ADAMW_MOMENTUM.
        tables: as for a `call.Job`, with z, v and m in float32; checked no more than there.
        numbers: those of `call.NUMBERS`, as for a `call.Job`.
        y_type: AS_Z or BFLOAT16_REST.
        g_type: AS_Z or BFLOAT16.

    Raises:
        RuntimeError: if there is no kernel.
        ValueError: for another kind or type, which it would take for float32 numbers.
    """
    if kind > Kind.ADAMW_MOMENTUM or y_type not in (Element.AS_Z, Element.BFLOAT16_REST):
        raise ValueError(
            f"kind and y_type must be those of a step, got {kind!r}, {y_type!r}: use another path"
        )
    kernel = find()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    given = dict(zip(NUMBERS, (*numbers, *ZEROS), strict=False))
    for moment, decay in (("1", "m1"), ("2", "b2")):  # in doubles, as on the other paths
        given[f"share{moment}"] = 1.0 - given.pop(decay)
        given[f"per{moment}"] = 1.0 / (given.pop(f"correction{moment}") or 1.0)
    ys = tables["y"]
    sizes = np.array([y.numel() for y in ys], dtype=np.int64)
    addresses = np.zeros((len(_ADDRESSES), len(ys)), dtype=np.int64)
    for name, tensors in tables.items():
        addresses[_ADDRESSES.index(name)] = [t.data_ptr() for t in tensors]
    device = ys[0].device
    on_device: AbstractContextManager[object] = nullcontext()
    stream = 0
    if device.type == "cuda":
        on_device = torch.cuda.device(device)
        # What is sent on one stream is used and freed on it alone.
        stream = torch.cuda.current_stream(device).cuda_stream
    with on_device:
        owners = _owners(device, stream, sizes.tobytes())
        if len(owners) == 0:
            return
        kernel.step[(len(owners),)](
            _table(device, stream, sizes.tobytes(), addresses.tobytes()),
            owners,
            **given,
            HAS_V=kind != Kind.SGD,
            HAS_M=kind == Kind.ADAMW_MOMENTUM,
            SCALED=kind in (Kind.ADAMW, Kind.ADAMW_MOMENTUM),
            AT_Z=given["wd_z"] != 0,
            TO_X="x" in tables,
            HALVES=y_type == Element.BFLOAT16_REST,
            NARROW_G=g_type == Element.BFLOAT16,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _programs(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // BLOCK)


@functools.lru_cache(maxsize=KEPT)
def _owners(device: torch.device, stream: int, sizes: bytes) -> Tensor:
    """Returns the row of each program, int32; tensors have one program a BLOCK."""
    programs = _programs(np.frombuffer(sizes, dtype=np.int64))
    return _sent(np.repeat(np.arange(len(programs), dtype=np.int32), programs), device)


@functools.lru_cache(maxsize=KEPT)
def _table(device: torch.device, stream: int, sizes: bytes, addresses: bytes) -> Tensor:
    """Returns the table of triton_step.py, (tensors, WIDTH) int64."""
    size = np.frombuffer(sizes, dtype=np.int64)
    columns = np.frombuffer(addresses, dtype=np.int64).reshape(len(_ADDRESSES), len(size))
    programs = _programs(size)
    aligned = np.bitwise_or.reduce(columns, axis=0) % 16 == 0
    rows = np.stack([programs.cumsum() - programs, size, aligned, *columns], axis=1)
    return _sent(rows, device)


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    # From pinned memory a copy waits for nothing; torch keeps that memory until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
