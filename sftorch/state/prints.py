"""A 64-bit print of a tensor's bits, cheap enough to take of every parameter on its own device.

It tells whether weights are the ones a state dict was saved with; it is no protection against forgery. It is
a sum over elements, so that the parts of a DTensor add up to the print of the whole, in every layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from sftorch.law.parts import Place, indices, part, place
from sftorch.state import meshes

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
    chunks of 2^18 are chained. So equal bits give equal prints whatever the strides, the device or the
    layout, and a changed or moved element gives another, but for a chance of about 2^-50. Of DTensors all
    processes of their mesh must take them; there is one sum over the processes for all tensors.

    Args:
        tensors: dense tensors of any dtype, shape and device.

    Example:
        >>> import torch
        >>> from sftorch.state.prints import take
        >>> a, b = take([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])])
        >>> a == b
        False
    """
    sums, layouts = [], []
    for tensor in tensors:  # one at a time: they may be made as they are asked for
        sums.append(_sum(part(tensor), place(tensor)))
        layouts.append(meshes.layout(tensor))
    found = [0] * len(sums)
    for device in {s.device for s in sums}:
        here = [i for i, s in enumerate(sums) if s.device == device]
        stacked = torch.stack([sums[i] for i in here])
        meshes.add_up_(stacked, [layouts[i] for i in here])
        for i, value in zip(here, stacked.tolist(), strict=True):
            found[i] = value
    return found


def _sum(tensor: Tensor, at: Place | None) -> Tensor:
    """Returns the share of a tensor, or of the part that lies at some place, in the print of the whole."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
        at = at and Place((*at.shape, 2), (*at.offsets, 0), (*at.sizes, 2))
    bits = tensor.resolve_neg().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    weights = _weights(bits.device)
    if at is None:
        return _run(bits, 0, bits.numel(), weights)
    if not bits.numel():
        return torch.zeros((), dtype=torch.int64, device=bits.device)
    whole = math.prod(at.shape)
    if at.sizes[1:] == at.shape[1:]:  # some of the rows
        return _run(bits, at.offsets[0] * (whole // at.shape[0]) if at.shape else 0, whole, weights)
    factors = _factors(-(-whole // _CHUNK), bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    size = bits.numel() // at.sizes[0]
    rows = max(1, _CHUNK // size)  # at once, as the indices are as large as eight bytes an element
    for first in range(0, at.sizes[0], rows):
        some = bits[first * size : (first + rows) * size]
        block = (at.offsets[0] + first, *at.offsets[1:]), (len(some) // size, *at.sizes[1:])
        index = indices(Place(at.shape, *block), bits.device).reshape(-1)
        total += (some * weights[index % _CHUNK] * factors[index // _CHUNK]).sum()
    return total


def _run(bits: Tensor, start: int, whole: int, weights: Tensor) -> Tensor:
    """Returns the share of elements that follow each other from `start` on, among `whole`."""
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    done = min(_CHUNK - start % _CHUNK, len(bits))  # up to the end of a chunk
    first = start % _CHUNK
    total = total + (bits[:done] * weights[first : first + done]).sum()
    for chunk in bits[done:].split(_CHUNK) if done < len(bits) else ():
        total = total * _CHAIN + (chunk * weights[: len(chunk)]).sum()
    after = -(-whole // _CHUNK) - -(-(start + len(bits)) // _CHUNK)
    return total * _power(after) if after > 0 else total


def _power(exponent: int) -> int:
    """Returns a power of _CHAIN modulo 2^64, as a signed number."""
    found = pow(_CHAIN, exponent, 1 << 64)
    return found - (1 << 64) if found >> 63 else found


@lru_cache(maxsize=16)
def _factors(chunks: int, device: torch.device) -> Tensor:
    """Returns what the sum of each chunk is multiplied by, in a chain of so many."""
    return torch.tensor([_power(chunks - 1 - i) for i in range(chunks)], dtype=torch.int64, device=device)
