"""The 8-bit form: the codes of `sfcore.codes` in torch, and how a parameter's state lies in them.

Beside a bfloat16 parameter 16 bits hold y and z - y: the upper 8 bits of the gap are "gap", and "y_rest" has
in its upper 6 bits what y is more than the parameter and in its lower 2 the end of the gap. A float32
parameter is y, and "gap" has 16 bits. "scale" has the exponents of every row, a column for the gap and one
for each moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfcore import codes, laws

SCALE = "scale"
DTYPES = (torch.bfloat16, torch.float32)
NEAREST = 1 << 15  # in place of a random draw from [0, 65536)


def exponents(value: Tensor, over: Sequence[Any] = ()) -> Tensor:
    """Returns the exponents of a float32 tensor's rows, int8 of shape (rows,); `over` as for `scale_of`."""
    return scale_of([value], over)[:, 0]


def scale_of(values: Sequence[Tensor], over: Sequence[Any] = ()) -> Tensor:
    """Returns the exponents of the rows of float32 tensors, with some room above.

    Args:
        values: n of them, of one shape with `rows` first.
        over: process groups that have the other parts of the rows, as `meshes.row_groups` names them. All of
            their processes must call it.

    Returns:
        int8 of shape (rows, n).
    """
    rows = values[0].shape[0]
    if values[0].numel():
        most = torch.stack([value.abs().flatten(1).amax(1) for value in values], 1)
    else:
        most = torch.zeros(rows, len(values), device=values[0].device)
    if over:
        bits = most.view(torch.int32) & 0x7FFFFFFF  # in the order of the numbers, with NaN above all
        for group, device in over:
            some = bits.to(device)
            torch.distributed.all_reduce(some, torch.distributed.ReduceOp.MAX, group=group)
            bits = some.to(bits.device)
        most = bits.view(torch.float32)
    most = most * 1.0625
    bits = torch.bitwise_right_shift(most.view(torch.int32), 23) - 126
    broken = (bits >= codes.BROKEN) | most.isnan()
    return torch.where(broken, codes.BROKEN, bits.clamp(min=codes.LEAST)).to(torch.int8)


def _power(exponent: Tensor, dim: int, sign: int = 1) -> Tensor:
    """Returns 2^E, or its inverse, to be multiplied with a tensor of some axes; NaN for a broken row."""
    whole = exponent.to(torch.int32)
    power = ((whole * sign + 127) * 0x800000).view(torch.float32)
    return torch.where(whole == codes.BROKEN, float("nan"), power).view(-1, *[1] * (dim - 1))


def linear(value: Tensor, exponent: Tensor, bits: int, draw: Tensor | int = NEAREST) -> Tensor:
    """Returns codes in the upper bits of int32 numbers of 16.

    Args:
        value: float32.
        exponent: of its rows.
        bits: that are kept.
        draw: how many of 65,536 parts of the way to the next code a number is put up; what is then not whole
            is cut off.
    """
    parts = value * _power(exponent, value.dim(), -1) * 2.0 ** (bits + 15)
    code = torch.bitwise_right_shift(parts.round().nan_to_num(0.0).to(torch.int32) + draw, 16)
    return code * (1 << (16 - bits))


def log(value: Tensor, exponent: Tensor, draw: Tensor | int = NEAREST) -> Tensor:
    """Returns the codes of numbers that are not negative; arguments as of `linear`."""
    bits = (value * _power(exponent, value.dim(), -1)).view(torch.int32)
    code = torch.bitwise_right_shift(bits + draw * 8, codes.SHIFT) - codes.FIRST
    return torch.where(value > 0, code.clamp(1, 255), 0).to(torch.uint8)


def decoded(code: Tensor, exponent: Tensor) -> Tensor:
    """Returns the float32 numbers of codes: int8 and integers of 16 bits are LINEAR, uint8 LOG."""
    power = _power(exponent, code.dim())
    if code.dtype is torch.uint8:
        bits = (code.to(torch.int32) + codes.FIRST) * (1 << codes.SHIFT)
        return torch.where(code == 0, 0.0, bits.view(torch.float32)) * power
    return code.to(torch.float32) * 2.0 ** -(7 if code.dtype is torch.int8 else 15) * power


def gap_code(state: Mapping[str, Any]) -> Tensor:
    """Returns the whole code of a gap, of 16 bits."""
    gap: Tensor = state["gap"]
    if gap.dtype is not torch.int8:  # int32 in the state dict of parts
        return gap.to(torch.int16)
    end = state["y_rest"].to(torch.int16) & 3 if "y_rest" in state else 0
    return gap.to(torch.int16) * 256 + end * 64


def rest_of(rest: Tensor) -> Tensor:
    """Returns what a rest of 8 bits is in the units of one of 16."""
    return torch.bitwise_right_shift(rest.to(torch.int32), 2) * 1024


def with_rest(rest: Tensor, lower: Tensor) -> Tensor:
    """Returns a rest of 8 bits with the nearest to another y in it, and the gap's end as it was."""
    upper = torch.bitwise_right_shift(lower.to(torch.int32) + 512, 10).clamp(-32, 31)
    return (upper * 4 + (rest.to(torch.int32) & 3)).to(torch.int8)


def rounded_y(y: Tensor, draw: Tensor) -> Tensor:
    """Returns a float32 y up or down at random to the bits that a bfloat16 parameter and its rest have.

    Of the draw, which is the second moment's, it takes what counts least there.
    """
    bits = y.view(torch.int32) + (draw & 0x3FF)
    return torch.where(y.isfinite(), (bits & ~0x3FF).view(torch.float32), y)


def put_(state: Mapping[str, Any], lower: Tensor | None, gap: Tensor) -> None:
    """Puts a code of a gap where it lies, and with it what y is more than its bfloat16 parameter.

    Args:
        state: of which "gap" and "y_rest" are written to.
        lower: in the units of a rest of 16 bits; None leaves what is there.
        gap: int32 in the range of 16 bits.
    """
    if state["gap"].dtype is torch.int16:
        state["gap"].copy_(gap)
        return
    state["gap"].copy_(torch.bitwise_right_shift(gap, 8))
    rest = state["y_rest"].to(torch.int32) if lower is None else torch.bitwise_right_shift(lower, 10) * 4
    state["y_rest"].copy_((rest & ~3) | (torch.bitwise_right_shift(gap, 6) & 3))


def gap_bits(state: Mapping[str, Any]) -> int:
    """Returns how many bits a gap has."""
    return 16 if state["gap"].dtype is torch.int16 else codes.GAP_BITS


def put_gap_(state: Mapping[str, Any], gap: Tensor, over: Sequence[Any] = ()) -> None:
    """Puts the nearest to a gap in its place; `over` as for `scale_of`."""
    exponent = exponents(gap, over)
    put_(state, None, linear(gap, exponent, gap_bits(state)))
    state[SCALE][:, 0] = exponent


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of a buffer's codes, by its name in torch: uint8 is LOG, int8 LINEAR."""
    is_log = any(one.torch == name and one.code == codes.LOG for one in laws.roles().values())
    return torch.uint8 if is_log else torch.int8


def columns(state: Mapping[str, Any]) -> dict[str, int]:
    """Returns the column of "scale" of each moment of a state."""
    return codes.columns([name for name, one in state.items() if _is_code(one)], "torch")


def _is_code(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int8, torch.uint8)


def opened(state: Mapping[str, Any], name: str) -> Tensor:
    """Returns a moment, or with the name "gap" z - y, in float32."""
    if name == "gap":
        return decoded(gap_code(state), state[SCALE][:, 0])
    return decoded(state[name], state[SCALE][:, columns(state)[name]])


def open_(state: dict[str, Any]) -> None:
    """Makes a state hold gap and moments in float32, and its rest in 16 bits; one without codes stays."""
    if SCALE not in state:
        return
    state |= {name: opened(state, name) for name in ("gap", *columns(state))}
    if "y_rest" in state and state["y_rest"].dtype is torch.int8:
        state["y_rest"] = rest_of(state["y_rest"]).to(torch.int16)
    del state[SCALE]


def pack_(state: dict[str, Any]) -> None:
    """Puts a gap of 16 bits and a rest of 16, as a checkpoint gives them, into 8 and 8; others stay."""
    if SCALE not in state or "y_rest" not in state or state["gap"].dtype is not torch.int16:
        return
    gap, lower = state["gap"].to(torch.int32), state["y_rest"].to(torch.int32)
    state |= {name: torch.empty_like(state[name], dtype=torch.int8) for name in ("gap", "y_rest")}
    put_(state, lower, gap)


def encode(dtype: torch.dtype, value: Tensor, exponent: Tensor, draw: Tensor | int = NEAREST) -> Tensor:
    """Returns the codes of a moment; arguments as of `linear`."""
    if dtype is torch.uint8:
        return log(value, exponent, draw)
    return torch.bitwise_right_shift(linear(value, exponent, 8, draw), 8).to(torch.int8)


def in_codes(
    gap: Tensor, rest: Tensor | None, moments: Mapping[str, Tensor], over: Sequence[Any] = ()
) -> dict[str, Tensor]:
    """Returns the entries of a parameter's state, to the nearest.

    Args:
        gap: z - y in float32.
        rest: of 8 bits, beside a bfloat16 parameter; None for a float32 one.
        moments: in float32, by name.
        over: as for `scale_of`.
    """
    at = codes.columns(tuple(moments), "torch")
    scale = scale_of([gap, *map(moments.__getitem__, at)], over)
    found = {"gap": torch.zeros_like(gap, dtype=torch.int16 if rest is None else torch.int8), SCALE: scale}
    if rest is not None:
        found["y_rest"] = rest
    put_(found, None, linear(gap, scale[:, 0], gap_bits(found)))
    for name, column in at.items():
        found[name] = encode(dtype_of(name), moments[name], scale[:, column])
    return found
