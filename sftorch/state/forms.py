"""What a parameter and its state hold together: y, x and z in full precision, whatever they are stored as.

A 16-bit parameter holds the nearest number of its dtype, and its state the rest: "y_rest" beside y,
"x_rest" in the closure forms, whose parameters hold x. State without one, of an earlier version or of
another program, has the rest 0. In eval mode y lies in "y", with the same rest. Beside y there is "z" or,
in the lean form, the "gap" z - y, which with the moments is in bfloat16; the 8-bit form, which tells by its
"scale", has codes of `eight` in their place, and its rest is an int8.

A float32 number in two halves: for bfloat16 the rest is an int16 in units of the last bit of float32, so that
both halves together are as large as the float32 number; float16 has other exponents, and its rest is the
float32 difference. Bits are shifted by a function and a product: torch 2.13's operators >> and << leave a
DTensor as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfcore import laws
from sftorch.law.iterates import interpolate, recover_x
from sftorch.law.parts import is_divided, like, note_written, part, parts_of
from sftorch.state import eight
from sftorch.state.meshes import row_groups

Y_REST, X_REST = "y_rest", "x_rest"
RESTS = (Y_REST, X_REST)
NARROW = torch.bfloat16
LEAN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RESTS = {torch.bfloat16: torch.int16, torch.float16: torch.float32}
EXACT, LEAN, EIGHT = "exact", "lean", "8bit"


def rest_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Returns the dtype of the rest beside a parameter, None for a dtype that needs none."""
    return _RESTS.get(dtype)


def new_rest(p: Tensor) -> Tensor | None:
    """Returns the rest of a parameter whose value is exact: zeros like it, or None if it needs none.

    Example:
        >>> import torch
        >>> from sftorch.state.forms import new_rest
        >>> new_rest(torch.ones(2, dtype=torch.bfloat16))
        tensor([0, 0], dtype=torch.int16)
    """
    dtype = rest_dtype(p.dtype)
    if dtype is None:
        return None
    return torch.zeros_like(p, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)


def split(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Returns the nearest numbers of a dtype and what they leave; `join` makes the same bits of them again.

    NaN becomes the one quiet NaN. What is beyond the dtype becomes inf; for bfloat16 the rest still leads
    back, for float16 it does not.

    Args:
        y: float32 where dtype is 16 bits wide; any dtype otherwise, and then the rest is None.
        dtype: of the parameter.

    Example:
        >>> import torch
        >>> from sftorch.state.forms import join, split
        >>> p, rest = split(torch.tensor([1.001]), torch.bfloat16)
        >>> p, rest
        (tensor([1.], dtype=torch.bfloat16), tensor([8389], dtype=torch.int16))
        >>> join(p, rest)
        tensor([1.0010])
    """
    if dtype is torch.bfloat16:
        # Any other NaN could lose its last set bit to the rest and become inf, or carry into the sign.
        bits = torch.where(y.isnan(), float("nan"), y).view(torch.int32)
        upper = torch.bitwise_right_shift(bits + 0x8000, 16)
        return upper.to(torch.int16).view(dtype), bits.to(torch.int16)  # which keeps the lower bits
    p = y.to(dtype)
    if dtype is torch.float16:
        return p, (y - p).nan_to_num_(0.0, 0.0, 0.0)
    return p, None


def put_halves_(p: Tensor, rest: Tensor | None, y: Tensor) -> None:
    """Puts the halves of a float32 y into a 16-bit p and its rest; y itself where there is no rest."""
    upper, lower = (y, None) if rest is None else split(y, p.dtype)
    p.copy_(upper)
    if rest is not None and lower is not None:
        rest.copy_(eight.with_rest(rest, lower) if rest.dtype is torch.int8 else lower)


def join(p: Tensor, rest: Tensor | None) -> Tensor:
    """Returns the float32 number of which p and rest are the halves; p itself without a rest.

    A rest that does not belong to p, because someone else has written to p, moves it by half an ulp at
    most; where no number has these halves the result is p.

    Example:
        >>> import torch
        >>> from sftorch.state.forms import join
        >>> join(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([-3], dtype=torch.int16))
        tensor([0.])
    """
    if rest is None:
        return p
    if p.dtype is torch.bfloat16:
        lower = eight.rest_of(rest) if rest.dtype is torch.int8 else rest
        y = (p.view(torch.int16).to(torch.int32) * 0x10000 + lower).view(torch.float32)
        return torch.where(y.isnan(), p, y)  # zero or infinity, with a rest that leads beyond it
    wide = p.to(torch.float32)
    whole = wide + rest
    return torch.where((rest != 0) & (whole.to(p.dtype) == p), whole, wide)


def has_started(state: Mapping[str, Any]) -> bool:
    """Tells whether this is the state of a parameter that has had a gradient."""
    return "z" in state or "gap" in state


def joined(p: Tensor, state: Mapping[str, Any], rest: str = Y_REST) -> Tensor:
    """Returns the number that p and its rest are; p itself where it has none."""
    return join(p, state.get(rest))


def y_of(p: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Returns the y of a parameter that holds y, or x with y put aside."""
    return joined(state.get("y", p), state)


def z_of(y: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Returns z, which the lean form tells by its distance from y."""
    z: Tensor = state["z"] if "z" in state else y.to(torch.float32) + gap_of(state)
    return z


def gap_of(state: Mapping[str, Any]) -> Tensor:
    """Returns z - y in float32, of a state that is kept by it."""
    gap: Tensor = eight.opened(state, "gap") if eight.SCALE in state else state["gap"].to(torch.float32)
    return gap


def form_of(state: Mapping[str, Any]) -> str:
    """Returns which form a started state is in."""
    return EIGHT if eight.SCALE in state else LEAN if "gap" in state else EXACT


def x_from_y(y: Tensor, state: Mapping[str, Any], beta: float) -> Tensor:
    """Returns x in z's dtype; at beta = 0 it must be stored."""
    if beta and "gap" in state:
        return y.to(torch.float32) - (1.0 / beta - 1.0) * gap_of(state)
    if beta:
        return recover_x(y, state["z"], beta)
    return state["x"] if "x" in state else z_of(y, state)


def y_from_x(x: Tensor, state: Mapping[str, Any], beta: float) -> Tensor:
    """Returns y in z's dtype; in the lean form x must be more than z, so that beta > 0."""
    if "gap" in state:
        return x.to(torch.float32) + (1.0 / beta - 1.0) * gap_of(state)
    return interpolate(x, state["z"], beta)


def is_in_codes(state: Mapping[str, Any], buffers: Collection[str]) -> bool:
    """Tells whether a state is in the 8-bit form, these of its moments too."""
    return eight.SCALE in state and set(buffers) <= eight.columns(state).keys()


def has_rest(p: Tensor, state: Mapping[str, Any], rest: str) -> bool:
    """Tells whether a state has the rest that its parameter's dtype needs, or rightly none."""
    wanted = rest_dtype(p.dtype)
    if wanted is torch.int16 and eight.SCALE in state:
        wanted = torch.int8
    return (state[rest].dtype if rest in state else None) == wanted


def fit_rest(p: Tensor, state: dict[str, Any], rest: str) -> None:
    """Makes sure that a parameter has the rest that its dtype needs, which may have changed."""
    if not has_rest(p, state, rest):
        state.pop(rest, None)
        new = new_rest(p)
        if new is not None:
            state[rest] = new


def put_(p: Tensor, state: dict[str, Any], value: Tensor, rest: str = Y_REST) -> None:
    """Makes a parameter hold a value in full: the nearest of its dtype, and the rest in its state."""
    if rest_dtype(p.dtype) is None:
        p.copy_(value)
        return
    fit_rest(p, state, rest)
    put_halves_(p, state[rest], value.to(torch.float32))


def move_y_(p: Tensor, state: dict[str, Any], x: Tensor, beta: float) -> None:
    """Makes a parameter hold the y that another beta makes of x and of the z that it has."""
    fit_rest(p, state, Y_REST)
    own, of_part = part(p), parts_of(state)
    z = z_of(joined(own, of_part), of_part)
    put_(own, of_part, interpolate(part(x), z, beta))
    note_written([p])
    if eight.SCALE in state:
        eight.put_gap_(of_part, z - joined(own, of_part), row_groups(p))
    elif "gap" in state:
        of_part["gap"].copy_(z - joined(own, of_part))


def first_iterate(p: Tensor, form: str) -> dict[str, Tensor]:
    """Returns the z of a parameter that starts, as it is kept: x = y = z; exact before it is in codes."""
    if form == LEAN:
        return {"gap": torch.zeros_like(p, dtype=NARROW, memory_format=torch.preserve_format)}
    wide = torch.promote_types(p.dtype, torch.float32)
    return {"z": p.detach().to(wide, copy=True, memory_format=torch.preserve_format)}


def put_parts_(p: Tensor, state: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Makes a parameter's state that of which others are the parts: what `parts_of` gave, and what is new.

    Args:
        p: the parameter.
        state: of which tensors that stay are kept as they are.
        own: in the order wanted.
    """
    found = {}
    for name, value in own.items():
        old = state.get(name)
        if isinstance(old, Tensor) and part(old) is value:
            value = old
        elif isinstance(value, Tensor) and (not isinstance(old, Tensor) or is_divided(old)):
            value = like(p, value, name == eight.SCALE)
        found[name] = value
    state.clear()
    state.update(found)


def convert_(p: Tensor, state: dict[str, Any], y: Tensor, form: str) -> None:
    """Brings the state of a started parameter into the form wanted: to the nearest, where that rounds.

    Args:
        p: the parameter; where `meshes.row_groups` has groups, all their processes must call this.
        state: in any form; beside a bfloat16 parameter with its rest, if it is to be in 8 bits.
        y: in full. Of a DTensor it and the state are either DTensors, or the parts that lie here.
        form: which.
    """
    if form == form_of(state):
        return
    names = [one.torch for one in laws.roles().values() if one.torch in state]
    own, of_y = parts_of(state), part(y)
    eight.open_(own)
    if form == EIGHT:
        changed = _in_codes(own, of_y, names, row_groups(p))
    elif form == LEAN:
        gap = own["gap"] if "gap" in own else own["z"] - of_y
        changed = {"gap": gap.to(NARROW)} | {name: own[name].to(NARROW) for name in names}
    else:
        changed = {"z": z_of(of_y, own)} | {name: own[name].to(torch.float32) for name in names}
    others = {name: value for name, value in own.items() if name not in ("z", "gap", *changed)}
    put_parts_(y, state, changed | others)


def _in_codes(
    state: Mapping[str, Any], y: Tensor, names: list[str], over: Sequence[Any]
) -> dict[str, Tensor]:
    """Returns the entries of the 8-bit form, to the nearest, for a state in another."""
    z, rest = z_of(y, state), None
    if Y_REST in state:
        upper, lower = split(y, torch.bfloat16)
        assert lower is not None
        rest = eight.with_rest(torch.zeros_like(lower, dtype=torch.int8), lower)
        y = join(upper, rest)
    moments = {name: state[name].to(torch.float32) for name in names}
    return eight.in_codes(z - y, rest, moments, over)
