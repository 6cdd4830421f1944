"""A 64-bit print of a tensor's bits, cheap enough to take of every parameter on its own device.

It tells whether weights are the ones a state dict was saved with; it is no protection against forgery.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Fixed, because the print depends on it: 2 MB of weights, which stay in a processor's cache.
_CHUNK = 1 << 18
_SPREAD = -7046029254386353131  # 2^64 over the golden ratio, odd
_CHAIN = 6364136223846793005  # odd, so that a chunk's place counts


@lru_cache(maxsize=16)
def _weights(device: torch.device) -> Tensor:
    """Returns one odd number for each place in a chunk; none is a simple multiple of another."""
    spread = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device) * _SPREAD
    return (spread ^ (spread >> 32)) | 1


@torch.no_grad()
def take(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the print of each tensor, one after the other, with one wait for each device.

    The bits are read as signed integers in logical order, weighed by place and summed modulo 2^64;
    chunks of 2^18 are chained. So equal bits give equal prints whatever the strides or the device,
    and a changed or moved element gives another, but for a chance of about 2^-50.

    Args:
        tensors: dense tensors of any dtype, shape and device.

    Example:
        >>> import torch
        >>> from sftorch.state.prints import take
        >>> a, b = take([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])])
        >>> a == b
        False
    """
    sums = [_sum(tensor.detach()) for tensor in tensors]
    found = [0] * len(sums)
    for device in {s.device for s in sums}:
        here = [i for i, s in enumerate(sums) if s.device == device]
        for i, value in zip(here, torch.stack([sums[i] for i in here]).tolist(), strict=True):
            found[i] = value
    return found


def _sum(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.resolve_neg().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    weights = _weights(bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        total = total * _CHAIN + (chunk * weights[: len(chunk)]).sum()
    return total
