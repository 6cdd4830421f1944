"""Which tensors the kernels can walk: plain, dense, all of a parameter in one layout, of known dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from sftorch.kernels.call import Element
from sftorch.law.parts import PLAIN

NARROW = {torch.bfloat16: Element.BFLOAT16}
_WIDE = (torch.float32, torch.float64)
Tables = dict[str, list[Tensor]]  # by the names of call.TABLES


def all_fit(tables: Tables) -> bool:
    """Tells whether all parameters can be walked as flat memory, and all in the same dtypes.

    A list at a time, because with thousands of small tensors these questions are most of a step.
    """
    return (
        not tables.keys() >= {"rest", "x"}
        and len({g.dtype for g in tables["g"]}) == 1
        and _same_kinds(tables)
        and all({t.is_contiguous() for t in ts} == {True} for ts in tables.values())
    )


def why_left(row: dict[str, Tensor]) -> str | None:
    """Returns why a kernel does not take a parameter, None if it does; its gradient can be copied."""
    y, z = row["y"], row["z"]
    if row.keys() >= {"rest", "x"}:
        return "16-bit parameters must be in a class without 'Closure' in its name: there x comes whole"
    if type(y) not in PLAIN:
        return f"parameters must be plain tensors, got {type(y).__name__}"
    others = {name: [tensor] for name, tensor in row.items()}
    if not _same_kinds(others | {"g": [torch.empty_like(y, dtype=z.dtype)]}):
        kinds = ", ".join(f"{name} {_kind_of(t)}" for name, t in row.items() if name != "g")
        return f"state must be of its parameter's kind, and in float32 at least, got {kinds}"
    if not _same_dense_layout(*(tensor for name, tensor in row.items() if name != "g")):
        strides = ", ".join(f"{name} {t.stride()}" for name, t in row.items() if name != "g")
        return f"parameters and state must fill their memory in one order, got the strides {strides}"
    return None


def walkable(grad: Tensor, y: Tensor, wide: torch.dtype) -> Tensor:
    """Returns a gradient as it is, or a copy, in a dtype that the kernels know and in the layout of y."""
    dtype = grad.dtype if grad.dtype in NARROW and wide == torch.float32 else wide
    if grad.dtype == dtype and type(grad) in PLAIN and not grad.is_neg() and _same_dense_layout(y, grad):
        return grad
    return torch.empty_like(y, dtype=dtype).copy_(grad)


def alike(first: Tensor, *others: Tensor) -> bool:
    """Tells whether plain CPU tensors have one wide dtype and one dense layout."""
    return (
        first.dtype in _WIDE
        and type(first) in PLAIN
        and all(t.is_cpu and t.dtype == first.dtype for t in others)
        and not any(t.is_neg() for t in (first, *others))
        and _same_dense_layout(first, *others)
    )


def _kind_of(tensor: Tensor) -> str:
    sign = " with a pending sign" if tensor.is_neg() else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}{sign}"


def _same_kinds(tables: Tables) -> bool:
    """Tells whether the kernels know the dtypes, and tensors of a parameter match in all but layout."""
    ys, grads, of_y, device = tables["y"], tables["g"], tables["y"][0].dtype, tables["y"][0].device
    others = {name: tensors for name, tensors in tables.items() if name != "y"}  # ys are of one batch
    dtypes = {name: {t.dtype for t in tensors} for name, tensors in others.items()}
    wide = torch.promote_types(of_y, torch.float32)
    narrow = set(NARROW) if wide == torch.float32 else set()
    counts = [y.numel() for y in ys]
    return (
        wide in _WIDE
        and all(PLAIN.issuperset(map(type, tensors)) for tensors in tables.values())
        and dtypes.pop("x", {of_y}) == {of_y}
        and dtypes.pop("rest", {torch.int16}) == {torch.int16}
        and dtypes.pop("g") <= {wide} | narrow
        and all(found == {wide} for found in dtypes.values())
        and all([t.numel() for t in tensors] == counts for tensors in others.values())
        and all({t.device for t in tensors} == {device} for tensors in others.values())
        and {t.is_neg() for t in (*ys, *grads)} == {False}
    )


def _same_dense_layout(first: Tensor, *others: Tensor) -> bool:
    """Tells whether tensors have the same shape and strides, and these leave no gap and no overlap."""
    step = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return all(t.stride() == first.stride() and t.shape == first.shape for t in others)
