"""The lean form: the gap z - y and the moments in bfloat16, rounded at random; y in full as ever.

The equations in the gap: with w = gap + beta delta, the new gap is (1 - c) w and y moves by
c w + (1 - beta) delta (S7 and S9* in other letters). It survives bfloat16, which z does not: the gap is
small where z is large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sftorch import _halves, _noise
from sftorch._parts import is_divided

if TYPE_CHECKING:
    from sftorch._directed import Move

NARROW = torch.bfloat16
MOMENTS = ("exp_avg_sq", "exp_avg")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_problems(group: Mapping[str, Any], beta: Any, allowed: bool) -> list[str]:
    """Returns what is wrong with a group's precision and seed.

    Args:
        group: with its options and parameters; a wrapper's drawer, which has no precision.
        beta: its interpolation.
        allowed: whether the optimizer has a lean form.
    """
    precision, seed = group.get("precision", "exact"), group.get("seed", 0)
    found = []
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        found.append(f"seed must be a whole number >= 0, got {seed!r}: 0 is usual")
    if precision == "exact":
        return found
    start = f"precision must be 'exact' or 'lean', got {precision!r}"
    if precision != "lean":
        return [*found, f"{start}: 'exact' is usual"]
    start = "precision must be 'exact'"
    if not allowed:
        found.append(f"{start} in this class, got 'lean': use the class without 'Closure' in its name")
    if beta == 0:
        found.append(f"{start} at beta = 0, got 'lean': z is y there, and the gap between them says nothing")
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]  # with a name or without
    wrong = [p for p in params if p.dtype not in DTYPES or is_divided(p)]
    if wrong:
        kind = wrong[0].dtype if wrong[0].dtype not in DTYPES else "DTensor"
        found.append(f"{start} for {kind} parameters, got 'lean': give them a group of their own")
    return found


def keys(seed: int, ordinals: Iterable[int], step: int, buffers: int) -> Tensor:
    """Returns the random words of a batch's next step: int64 of shape (parameters, 1 + buffers, 2).

    A tensor, because torch.compile would compile numbers into its program, new ones in every step.
    """
    words = [[_noise.key_of(seed, n, step, b) for b in range(1 + buffers)] for n in ordinals]
    return torch.tensor(words, dtype=torch.int64, device="cpu").view(-1, 1 + buffers, 2)


def run(move: Move, scalars: Sequence[Any]) -> None:
    """Runs S6-S9 of a batch whose `zs` are gaps, in place, one tensor at a time."""
    assert move.keys is not None
    rests: Sequence[Tensor | None] = move.rests or [None] * len(move.ys)
    compiling = torch.compiler.is_compiling()
    columns = (move.ys, rests, move.zs, move.grads, move.keys.unbind())
    for i, (p, rest, gap, grad, words) in enumerate(zip(*columns, strict=True)):
        of_p: list[Any] = [word.unbind() for word in words.unbind()] if compiling else words.tolist()
        y = _halves.join(p, rest)
        wide = {name: tensors[i].to(torch.float32) for name, tensors in move.buffers.items()}
        grad = grad.to(torch.float32)
        direction = move.direction.single(-grad if move.maximize else grad, wide, *scalars[4:])
        y, new = advanced(y, gap.to(torch.float32), direction, *scalars[:4])
        if rest is None:
            p.copy_(y)
        else:
            _halves.split_(p, rest, y)
        gap.copy_(_noise.rounded(new, of_p[0]))
        for (name, value), key in zip(wide.items(), of_p[1:], strict=True):
            move.buffers[name][i].copy_(_noise.rounded(value, key))


def advanced(
    y: Tensor, gap: Tensor, direction: Tensor, lr_t: Any, weight_decay: Any, c: Any, beta: Any
) -> tuple[Tensor, Tensor]:
    """Returns y and the gap z - y after one step along -direction, in float32."""
    delta = -lr_t * (direction + weight_decay * y)  # S6
    w = gap + beta * delta
    return y + (c * w + (1.0 - beta) * delta), (1.0 - c) * w  # S7 S9*


def first(p: Tensor, lean: bool) -> dict[str, Tensor]:
    """Returns the z of a parameter that starts, as it is kept: x = y = z."""
    if lean:
        return {"gap": torch.zeros_like(p, dtype=NARROW, memory_format=torch.preserve_format)}
    wide = torch.promote_types(p.dtype, torch.float32)
    return {"z": p.detach().to(wide, copy=True, memory_format=torch.preserve_format)}


def convert_(state: dict[str, Any], y: Tensor, lean: bool) -> None:
    """Brings the state of a started parameter into the form wanted: to the nearest, where that rounds.

    Args:
        state: with z and moments in at least float32, or with the gap and moments in bfloat16.
        y: in full.
        lean: which.
    """
    if lean == ("gap" in state):
        return
    if lean:
        changed = {"gap": (state["z"] - y).to(NARROW)}
    else:
        changed = {"z": y + state["gap"].to(torch.float32)}
    dtype = NARROW if lean else torch.float32
    changed |= {name: state[name].to(dtype) for name in MOMENTS if name in state}
    others = {name: value for name, value in state.items() if name not in ("z", "gap", *changed)}
    state.clear()
    state.update(changed | others)
