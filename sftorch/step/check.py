"""A kernel is tried before it is first used: on scratch memory, against the single-tensor path, bit for bit.

No GPU has run the Triton kernels yet. So nothing depends on a promise: each variant takes two steps on the
device that it is for, over a list with an empty tensor, ragged ends and addresses that are no multiples of
16 bytes. Every byte of that memory, gradients and the canaries between and around the tensors included, must
be what the operations of torch leave, one tensor at a time. Parameters and state are not touched.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfcore.averaging import bias_correction
from sftorch.law.parts import Place

VARIABLE = "SFTORCH_TRITON"
# Around the 1,024 elements of a program; every second one begins an element after a multiple of 16 bytes.
SHAPES: Sequence[tuple[int, ...]] = ((1003,), (0,), (2049,), (15,), (1024,), (2500,), (1,))
# Of some columns, as DTensors may have; they are drawn for as of the whole.
PLACES = (None, None, Place((5, 700), (1, 10), (3, 683)), None, None, Place((60, 70), (3, 7), (50, 50)), None)
# For "8bit", where a program has a row.
ROWS = ((2, 2064), (2, 1025), (2, 48), (0, 20), (3, 59), (1, 2500), (1, 1024))
ROW_PLACES = (
    Place((9, 2064), (3, 0), (2, 2064)),
    None,
    None,
    None,
    Place((8, 59), (5, 0), (3, 59)),
    None,
    None,
)
SCALE = "scale"  # the table of exponents there
EXPONENTS = (-20, 4)
GAP = 32  # elements at least, canaries before each tensor and at the end
STEPS = 2
_log = logging.getLogger("sftorch")

Tables = Mapping[str, Sequence[Tensor]]
Run = Callable[[Tables, int], Any]  # (tables, number of the step) -> None; in place


def wish() -> bool | None:
    """Returns what SFTORCH_TRITON says: True for "1", use it by default; False for "0", never; None if unset.

    Raises:
        ValueError: for anything else.
    """
    found = os.environ.get(VARIABLE, "")
    if found not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE} must be 1 (the Triton step is the default on CUDA), 0 (it is not used) or unset, "
            f"got {found!r}"
        )
    return {"": None, "0": False, "1": True}[found]


def why_wrong(dtypes: Mapping[str, torch.dtype], device: torch.device, run: Run, wanted: Run) -> str:
    """Returns what is wrong with a kernel, "" if it does what it should; waits for the device once.

    Args:
        dtypes: of the tables that it reads and writes, by name. Where there is a "scale", tensors have rows.
        device: where.
        run: the kernel, which may raise anything.
        wanted: what it is held to.

    Example:
        >>> import torch
        >>> from sftorch.step.check import why_wrong
        >>> def doubled(tables, number):
        ...     torch._foreach_mul_(tables["y"], 2.0)
        >>> def added(tables, number):
        ...     torch._foreach_add_(tables["y"], tables["y"])
        >>> why_wrong({"y": torch.float32}, torch.device("cpu"), added, doubled)
        ''
    """
    try:
        shapes = {name: _shapes(name, dtypes) for name in dtypes}
        memory = {name: _numbers(name, dtypes, shapes[name]) for name in dtypes}
        runs = []
        for step in (run, wanted):
            mine = {name: flat.to(device, copy=True) for name, flat in memory.items()}
            tables = {name: _tensors(flat, shapes[name]) for name, flat in mine.items()}
            for number in range(STEPS):
                step(tables, number)
            runs.append(mine)
        differ = [(_bits(runs[0][name]) != _bits(runs[1][name])).sum() for name in memory]
        counts: list[int] = torch.stack(differ).tolist()
    except Exception as error:
        return f"it must run, got {type(error).__name__}: {str(error).strip() or 'without a message'}"
    wrong = {name: count for name, count in zip(memory, counts, strict=True) if count}
    if not wrong:
        return ""
    listed = ", ".join(f"{count} of {len(memory[name])} in {name}" for name, count in wrong.items())
    return f"it must have the bits of the single-tensor path, got others: {listed}"


def give_notice(form: str, device: torch.device, why: str) -> None:
    """Logs that steps of a precision take other operations on a device."""
    others = "the lists" if form == "exact" else "torch's operations"
    _log.warning(
        "the Triton step of precision=%r is not used on %s, and steps take %s: %s", form, device, others, why
    )


def _shapes(name: str, dtypes: Mapping[str, torch.dtype]) -> Sequence[tuple[int, ...]]:
    """Returns the shapes of the tensors of a table."""
    if SCALE not in dtypes:
        return SHAPES
    columns = sum(one in dtypes for one in ("z", "v", "m"))
    return [(rows, columns) for rows, _ in ROWS] if name == SCALE else ROWS


def _numbers(name: str, dtypes: Mapping[str, torch.dtype], shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """Returns memory for a table: numbers of many sizes, none below 0, which a second moment cannot be."""
    dtype, length = dtypes[name], sum(map(math.prod, shapes)) + (len(shapes) + 1) * 2 * GAP
    random = torch.Generator().manual_seed(list(dtypes).index(name))
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        low, high = EXPONENTS if name == SCALE else (limits.min, limits.max)
        return torch.randint(low, high, (length,), generator=random).to(dtype)
    binades = torch.randint(-20, 3, (length,), generator=random)
    return (torch.randn(length, generator=random).abs() * 2.0**binades).to(dtype)


def _tensors(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Returns the tensors that lie in memory, with canaries around each."""
    found, at = [], GAP
    for place, shape in enumerate(shapes):
        begin, size = at + place % 2, math.prod(shape)
        found.append(flat[begin : begin + size].view(shape))
        at = (begin + size + 2 * GAP - 1) // GAP * GAP
    return found


def _bits(flat: Tensor) -> Tensor:
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def numbers_of(direction: str, t: int, wd_y: float, wd_z: float) -> tuple[float, ...]:
    """Returns the numbers of step t of a direction, by the kernels' name of it, as a `Move` has them."""
    b2, m1 = 0.99, 0.9
    own = (b2, 1e-8, m1, bias_correction(b2, t), bias_correction(m1, t))
    count = {"SGD": 0, "YOUNG": 1}.get(direction, len(own))
    return (0.01, wd_y, wd_z, 1 / (t + 1), 1 - 0.9 * (1 - 1 / (t + 1)), *own[:count])
