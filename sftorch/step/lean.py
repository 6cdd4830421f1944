"""The lean form: the gap z - y and the moments in bfloat16, rounded at random; y in full as ever.

The equations in the gap: with w = gap + beta delta, the new gap is (1 - k1) w and y moves by
k1 w + (1 - beta) delta (S7 and S9* in other letters). It survives bfloat16, which z does not: the gap is
small where z is large.

The random bits of a rounding are a function of where and when, without a generator: of a seed, of the
parameter's ordinal, its step, the buffer and the element's index in logical order. So they are the same on
every device, in any number of threads, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sftorch.law.iterates import counts, delta_single
from sftorch.law.move import Move
from sftorch.state import forms

_MASK = (1 << 64) - 1
Key = tuple[int, int] | tuple[Tensor, Tensor]


def key_of(*words: int) -> tuple[int, int]:
    """Returns two well-mixed signed 32-bit numbers of some integers, in which order counts.

    Example:
        >>> from sftorch.step.lean import key_of
        >>> key_of(0, 1, 2) == key_of(0, 2, 1)
        False
    """
    state = 0
    for word in words:  # splitmix64, a word at a time
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return _signed(state >> 32), _signed(state & 0xFFFFFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _fold(bits: Tensor, shift: int) -> Tensor:
    """Returns bits ^ (bits >> shift), as for unsigned numbers."""
    return bits ^ (torch.bitwise_right_shift(bits, shift) & ((1 << (32 - shift)) - 1))


def noise(shape: torch.Size, key: Key, device: torch.device) -> Tensor:
    """Returns int32 numbers in [0, 65536), one for each element of a shape, as if drawn evenly.

    Args:
        shape: of the tensor.
        key: two 32-bit numbers, or int64 tensors of them.
        device: where.
    """
    # An integer hash of two multiplications (Wellons' lowbias32), with the second word halfway.
    size = shape.numel()
    count = torch.int32 if size < 1 << 31 else torch.int64
    place = torch.arange(size, dtype=count, device=device).to(torch.int32).view(shape)
    bits = _fold(place * -0x61C88647 + key[0], 16) * 0x7FEB352D
    bits = _fold(bits ^ key[1], 15) * -0x7B935975
    return _fold(bits, 16) & 0xFFFF


def rounded(value: Tensor, key: Key) -> Tensor:
    """Returns bfloat16 numbers that are a float32 value on average: up as often as it lies above.

    Example:
        >>> import torch
        >>> from sftorch.step.lean import key_of, rounded
        >>> third = torch.full((30_000,), 1 / 3)
        >>> found = rounded(third, key_of(0)).unique()  # its two neighbours
        >>> found.tolist()
        [0.33203125, 0.333984375]
    """
    bits = torch.where(value.isnan(), float("nan"), value).view(torch.int32)
    upper = torch.bitwise_right_shift(bits + noise(value.shape, key, value.device), 16)
    return upper.to(torch.int16).view(torch.bfloat16)


def keys(seed: int, ordinals: Iterable[int], step: int, buffers: int) -> Tensor:
    """Returns the random words of a batch's next step: int64 of shape (parameters, 1 + buffers, 2).

    A tensor, because torch.compile would compile numbers into its program, new ones in every step.
    """
    words = [[key_of(seed, n, step, b) for b in range(1 + buffers)] for n in ordinals]
    return torch.tensor(words, dtype=torch.int64, device="cpu").view(-1, 1 + buffers, 2)


def run(move: Move, numbers: Sequence[Any]) -> None:
    """Runs S6-S9 of a batch whose `zs` are gaps, in place, one tensor at a time."""
    assert move.keys is not None
    lr_t, wd_y, wd_z, k1, beta, *own = numbers
    rests: Sequence[Tensor | None] = move.rests or [None] * len(move.ys)
    compiling = torch.compiler.is_compiling()
    columns = (move.ys, rests, move.zs, move.grads, move.keys.unbind())
    for i, (p, rest, gap, grad, words) in enumerate(zip(*columns, strict=True)):
        of_p: list[Any] = [word.unbind() for word in words.unbind()] if compiling else words.tolist()
        y, wide_gap, grad = forms.join(p, rest), gap.to(torch.float32), grad.to(torch.float32)
        wide = {name: tensors[i].to(torch.float32) for name, tensors in move.buffers.items()}
        direction = move.direction.single(-grad if move.maximize else grad, wide, *own)
        z = y + wide_gap if counts(wd_z) else y
        delta = delta_single(y, z, direction, lr_t, wd_y, wd_z)
        w = wide_gap + beta * delta
        forms.put_halves_(p, rest, y + (k1 * w + (1.0 - beta) * delta))  # S9*
        gap.copy_(rounded((1.0 - k1) * w, of_p[0]))  # S7
        for (name, value), key in zip(wide.items(), of_p[1:], strict=True):
            move.buffers[name][i].copy_(rounded(value, key))
