"""Calls of the kernel: lists of tensors become tables of addresses. Nothing here decides what fits."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from sftorch.kernels import build

TABLES = ("y", "rest", "z", "v", "m", "x", "g")
NUMBERS = ("sign", "lr_t", "wd_y", "wd_z", "k1", "k2", "b2", "eps", "m1", "correction2", "correction1")
ZEROS = (0.0,) * len(NUMBERS)
_PACKED = struct.Struct(f"{len(NUMBERS)}d")


class Kind(IntEnum):
    """What a job does; the names and their order are those of step.c."""

    SGD = 0
    YOUNG = 1
    ADAMW = 2
    ADAMW_MOMENTUM = 3
    RECOVER = 4
    PUT_ASIDE = 5
    HOLDS = 6
    FLOOR_SGD = 7
    FLOOR_ADAMW = 8


class Element(IntEnum):
    """Element types of y, x and g: as z, or 16 bits, with 16 more in `rest` that make y a float32."""

    AS_Z = 0
    BFLOAT16 = 1
    BFLOAT16_REST = 2


class Job(ctypes.Structure):
    """`struct job` of step.c, which may run again while the tensors are the same."""

    _fields_: ClassVar[Any] = (
        [("count", ctypes.c_int64), ("sizes", ctypes.c_void_p)]
        + [(name, ctypes.c_void_p) for name in TABLES]
        + [(name, ctypes.c_int32) for name in ("kind", "is_double", "y_type", "g_type")]
        + [(name, ctypes.c_double) for name in NUMBERS]
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

    def run(
        self, tables: Mapping[str, Sequence[Tensor]], numbers: Sequence[float], threads: int | None = None
    ) -> bool:
        """Does it.

        Args:
            tables: by the names of step.c, at least "y" and "z"; lists of one length, of CPU tensors that
                have the same number of elements in the same dense layout, z, v and m in one dtype, float32 or
                float64. None of this is checked here. A later run needs those that have others in them.
            numbers: those of NUMBERS, in their order; the last ones may be left out, and are 0.
            threads: at most so many; None (default) is torch's number.

        Returns:
            Whether HOLDS found a difference.

        Raises:
            Unavailable: if there is no kernel.
        """
        library = build.find()
        if isinstance(library, str):
            raise build.Unavailable(library)
        for name, tensors in tables.items():
            column = self.columns[name] = array("Q", [t.data_ptr() for t in tensors])
            setattr(self, name, column.buffer_info()[0])
        if "z" in tables:
            sizes = self.columns["sizes"] = array("q", [y.numel() for y in tables["y"]])
            self.count, self.sizes = len(sizes), sizes.buffer_info()[0]
            self.is_double = bool(tables["z"]) and tables["z"][0].dtype == torch.float64
        _PACKED.pack_into(self, Job.sign.offset, *numbers, *ZEROS[len(numbers) :])
        threads = torch.get_num_threads() if threads is None else threads
        return bool(library.sf_run(ctypes.byref(self), threads))


def floor(tables: Mapping[str, Sequence[Tensor]], threads: int | None = None) -> None:
    """Moves the bytes of a step and computes next to nothing: what a step cannot be faster than.

    Reads y, z, g (and v) and writes y, z (and v), so it ruins them.

    Args:
        tables: lists "y", "z", "g", for AdamW and RAdam "v" too, all contiguous and of one dtype.
        threads: as for a `Job`.
    """
    Job(Kind.FLOOR_ADAMW if "v" in tables else Kind.FLOOR_SGD).run(tables, (), threads)
