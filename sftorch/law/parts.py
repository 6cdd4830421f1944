"""DTensors: a step moves the part that lies on this process, a plain tensor, as if it were all there is.

That is right because S6-S9 treat every element alike, and it is fast because kernels take plain tensors only.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}
# What `DTensor.__tensor_flatten__` names. `to_local()` makes a new view of a parameter each time, in 2 us.
_LOCAL = attrgetter("_local_tensor")
_LAYOUT = attrgetter("placements", "device_mesh")


class Place(NamedTuple):
    """Where a block of elements lies in a whole tensor.

    Attributes:
        shape: of the whole.
        offsets: of the block, one a dimension.
        sizes: of the block, one a dimension.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def is_divided(tensor: Tensor) -> bool:
    """Tells whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def is_fake(tensor: Tensor) -> bool:
    """Tells whether this has no values: it is of torch's FakeTensorMode, or on the device "meta"."""
    return hasattr(tensor, "fake_mode") or tensor.is_meta


def part(tensor: Tensor) -> Tensor:
    """Returns a DTensor's own part, which shares its memory and no graph, and any other tensor as it is."""
    if type(tensor) in PLAIN or not is_divided(tensor):
        return tensor
    found: Tensor = _LOCAL(tensor)
    # What a collective still fills is another subclass, whose memory is not there before wait().
    return found.wait() if hasattr(found, "wait") else found


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns `part` of each; with thousands of tensors, their types are all that is looked at."""
    found = list(tensors)
    kinds = set(map(type, found))
    if kinds <= PLAIN:
        return found
    if len(kinds) == 1 and is_divided(found[0]):
        locals_ = list(map(_LOCAL, found))
        if PLAIN.issuperset(map(type, locals_)):
            return locals_
    return [part(tensor) for tensor in found]


def parts_of(state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a parameter with the part of each tensor."""
    return {name: part(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def like(tensor: Tensor, own: Tensor, is_of_rows: bool = False) -> Tensor:
    """Returns a part of any dtype as a tensor that lies as another one does, around the same memory.

    Args:
        tensor: whose layout is wanted.
        own: of the shape of its part.
        is_of_rows: whether it is of another shape behind the first axis: all that belongs to the rows of that
            part, whichever other axes are cut.
    """
    if not is_divided(tensor):
        return own
    divided: Any = tensor
    shape, stride, placements = divided.shape, divided.stride(), divided.placements
    if is_of_rows:
        shape, placements = torch.Size((shape[0], *own.shape[1:])), _of_rows(placements)
        stride = own.stride()
    found: Tensor = type(divided).from_local(
        own, divided.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return found


def _of_rows(placements: Iterable[Any]) -> list[Any]:
    """Returns how what belongs to rows lies, beside a tensor of these placements."""
    from torch.distributed.tensor import Replicate

    return [one if getattr(one, "dim", 0) == 0 else Replicate() for one in placements]


def whole(tensor: Tensor, own: Tensor) -> Tensor:
    """Returns all of which `own` is the part that lies here, as of a tensor; all processes must call it."""
    if not is_divided(tensor):
        return own
    found: Tensor = like(tensor, own).full_tensor()  # type: ignore[attr-defined]
    return found


def laid_out_like(tensor: Tensor, value: Tensor) -> Tensor:
    """Returns a value in parts where a tensor is in parts, and whole where it is whole.

    Args:
        tensor: whose layout is wanted.
        value: of the same shape, or of another one behind the first axis that belongs to the rows; whole and
            the same on all processes, or a DTensor, which all processes of its mesh must bring.
    """
    if is_divided(tensor) == is_divided(value):
        return value
    divided: Any = tensor
    if not is_divided(tensor):
        found: Tensor = value.full_tensor()  # type: ignore[attr-defined]
        return found
    from torch.distributed.tensor import distribute_tensor

    placements = divided.placements if value.shape == tensor.shape else _of_rows(divided.placements)
    return distribute_tensor(value, divided.device_mesh, placements, src_data_rank=None)


def place(tensor: Tensor) -> Place | None:
    """Returns where a DTensor's own part lies in the whole; None for a tensor that is whole.

    Raises:
        RuntimeError: for a part that is not one block.
    """
    if not is_divided(tensor):
        return None
    divided: Any = tensor
    found, size = divided.__create_chunk_list__(), tuple(part(tensor).shape)
    if len(found) != 1 or (tuple(found[0].sizes) != size and part(tensor).numel()):
        raise RuntimeError(
            f"DTensors must lie in one block on a process, got {[tuple(one.sizes) for one in found]} for "
            f"{size} of {tuple(tensor.shape)}: shard another dimension"
        )
    return Place(tuple(tensor.shape), tuple(found[0].offsets), size)


def indices(at: Place, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns the logical index of each element of a block in the whole tensor, in the block's shape."""
    found, stride = torch.zeros((), dtype=dtype, device=device), 1
    for dim in reversed(range(len(at.shape))):
        along = torch.arange(at.sizes[dim], dtype=dtype, device=device) + at.offsets[dim]
        found = (along * stride).view(-1, *[1] * (len(at.shape) - 1 - dim)) + found
        stride *= at.shape[dim]
    return found.expand(at.sizes)


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Returns the part of each gradient that belongs to its parameter's; all processes must call it.

    A gradient that is a DTensor exactly where its parameter is one; `arguments.check_gradients` sees to it.
    A sparse one becomes dense: every element of y and z moves in every step.
    """
    found: list[Any] = [p.grad for p in params]
    found = [grad if grad.layout is torch.strided else grad.to_dense() for grad in found]
    if PLAIN.issuperset(map(type, found)) and PLAIN.issuperset(map(type, params)):
        return found
    if is_divided(found[0]) and len(set(map(type, found))) == 1:
        alike = list(map(_LAYOUT, found)) == list(map(_LAYOUT, params))
        return parts(found if alike else map(_redistributed, params, found))
    return [part(_redistributed(p, grad)) for p, grad in zip(params, found, strict=True)]


def _redistributed(p: Any, grad: Any) -> Any:
    """Returns a gradient that lies as its parameter does; it may be whole, or a sum that is to be taken."""
    if is_divided(p) and grad.placements != p.placements:
        return grad.redistribute(placements=p.placements)
    return grad


def note_written(params: Iterable[Tensor]) -> None:
    """Lets autograd know that the parts of DTensors were written to, as an operation of torch does."""
    divided = [p for p in params if type(p) not in PLAIN and is_divided(p)]
    if divided:
        torch.autograd.graph.increment_version(divided)
