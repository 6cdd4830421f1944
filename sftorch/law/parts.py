"""DTensors: a step moves the part that lies on this process, a plain tensor, as if it were all there is.

That is right because S6-S9 treat every element alike, and it is fast because kernels take plain tensors only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}


def is_divided(tensor: Tensor) -> bool:
    """Tells whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def is_fake(tensor: Tensor) -> bool:
    """Tells whether this has no values: it is of torch's FakeTensorMode, or on the device "meta"."""
    return hasattr(tensor, "fake_mode") or tensor.is_meta


def part(tensor: Tensor) -> Tensor:
    """Returns a DTensor's own part, which shares its memory, and any other tensor as it is."""
    if not is_divided(tensor):
        return tensor
    found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    # What a collective still fills is another subclass, whose memory is not there before wait().
    return found.wait() if hasattr(found, "wait") else found


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns `part` of each; with thousands of plain tensors, their types are all that is looked at."""
    found = list(tensors)
    return found if PLAIN.issuperset(map(type, found)) else [part(tensor) for tensor in found]


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Returns the part of each gradient that belongs to its parameter's; all processes must call it.

    A sparse one becomes dense: every element of y and z moves in every step.

    Raises:
        RuntimeError: if only one of a parameter and its gradient is a DTensor.
    """
    found = [p.grad for p in params if p.grad is not None]
    found = [grad if grad.layout is torch.strided else grad.to_dense() for grad in found]
    if PLAIN.issuperset(map(type, found)) and PLAIN.issuperset(map(type, params)):
        return found
    return [_gradient(p, grad) for p, grad in zip(params, found, strict=True)]


def _gradient(p: Any, grad: Any) -> Tensor:
    if is_divided(p) != is_divided(grad):
        raise RuntimeError(
            f"gradients must be DTensors where their parameters are, got {type(grad).__name__} for "
            f"{type(p).__name__} of shape {tuple(p.shape)}: divide it with distribute_tensor(grad, "
            "p.device_mesh, p.placements)"
        )
    if is_divided(p) and grad.placements != p.placements:  # whole, or a sum that is still to be taken
        grad = grad.redistribute(placements=p.placements)
    return part(grad)


def note_written(params: Iterable[Tensor]) -> None:
    """Lets autograd know that the parts of DTensors were written to, as an operation of torch does."""
    divided = [p for p in params if is_divided(p)]
    if divided:
        torch.autograd.graph.increment_version(divided)
