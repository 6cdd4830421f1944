"""Which moves the kernels take, and how; everything else is left to the other paths.

On the CPU that is the native kernel. On a CUDA device it is Triton's, with fused=True
only: its bits are right in Triton's interpreter, but no GPU has run it yet, and None must be safe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sftorch._native import build, call
from sftorch._native.call import Element, Kind
from sftorch._parts import PLAIN
from sftorch._triton import launch

if TYPE_CHECKING:
    from sftorch._directed import Move

_NARROW = {torch.bfloat16: Element.BFLOAT16}
_WIDE = (torch.float32, torch.float64)
DTYPES = {
    "cpu": (*_WIDE, *_NARROW, torch.complex64, torch.complex128),
    "cuda": (torch.float32, torch.bfloat16, torch.complex64),
}
_NUMBERS = ("b2", "eps", "m1", "correction2", "correction1")


def chosen(group: dict[str, Any], params: list[Tensor]) -> bool:
    """Tells whether a kernel is to step these parameters of a group, which share a device and a dtype.

    Raises:
        RuntimeError: if the group has fused=True and they cannot be.
    """
    option, device, dtype = group["fused"], params[0].device, params[0].dtype
    if option is False or (option is None and group["foreach"] is False):
        return False
    if group.get("precision") == "lean":
        why = "precision must be 'exact', got 'lean': the kernel has no random rounding"
    elif device.type not in DTYPES:
        why = f"parameters must be on the CPU or a CUDA device, got {device}: elsewhere steps are foreach"
    elif dtype not in DTYPES[device.type]:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES[device.type])
        why = f"parameters on {device} must be of one of {names}, got {dtype}"
    elif device.type == "cuda" and option is None:
        return False
    else:
        kernel = build.find() if device.type == "cpu" else launch.find()
        if not isinstance(kernel, str):
            return True
        why = kernel
        if option is None:
            build.give_notice(why)
    if option:
        raise RuntimeError(f"fused must be None or False here, got True: {why}")
    return False


def _runner(device: torch.device) -> Callable[..., object]:
    """Returns what runs a step on a device for which `chosen` holds."""
    return call.run if device.type == "cpu" else launch.run


class Shares(NamedTuple):
    """How a move is shared out.

    Attributes:
        taken: indices of the parameters that the kernel takes, by the dtype of their gradients.
        left: those of the others.
    """

    taken: dict[torch.dtype, list[int]]
    left: list[int]


def shared(move: Move, required: bool) -> Move:
    """Returns a move with its shares, and with gradients of odd kinds copied, so that the kernel takes them.

    Args:
        move: of parameters for which `chosen` holds.
        required: whether all must be taken.

    Raises:
        RuntimeError: if they must, and are not; nothing has changed then.
    """
    tables, count = _tables(move), len(move.ys)
    if not (move.rests and move.xs) and _all_fit(tables):
        return move._replace(shares=Shares({move.grads[0].dtype: list(range(count))}, []))
    grads = list(move.grads)
    taken: dict[torch.dtype, list[int]] = {}
    left: dict[int, str] = {}
    for i in range(count):
        row = {name: tensors[i] for name, tensors in tables.items()}
        if why := _why_left(row):
            left[i] = why
        else:
            grads[i] = _walkable(row["g"], row["y"], row["z"].dtype)
            taken.setdefault(grads[i].dtype, []).append(i)
    if left and required:
        first, why = next(iter(left.items()))
        raise RuntimeError(
            f"fused must be None or False here, got True: {why}, in {len(left)} of {count} parameters, the "
            f"first of shape {tuple(move.ys[first].shape)}"
        )
    return move._replace(grads=grads, shares=Shares(taken, list(left)))


def run(move: Move, scalars: list[float]) -> None:
    """Runs S6 to S9* of the kernel's share of a move, in one pass.

    Args:
        move: with its shares.
        scalars: the numbers of `move.scalars`.
    """
    assert move.shares is not None
    tables = _tables(move)
    for of_grad, rows in move.shares.taken.items():
        whole = len(rows) == len(move.ys)
        taken = tables if whole else {name: [t[i] for i in rows] for name, t in tables.items()}
        y_type, g_type = (_NARROW.get(d, Element.AS_Z) for d in (move.ys[rows[0]].dtype, of_grad))
        y_type = Element.BFLOAT16_REST if move.rests else y_type
        _runner(move.ys[0].device)(_kind(move), taken, _numbers(move, scalars), y_type, g_type)
        # As an operation of torch does, so that autograd notices a graph that needs the old values.
        torch.autograd.graph.increment_version(taken["y"])


def _tables(move: Move) -> dict[str, list[Tensor]]:
    tables = {"y": move.ys, "rest": move.rests, "z": move.zs, "g": move.grads, "x": move.xs}
    tables |= {"v": move.buffers.get("exp_avg_sq", []), "m": move.buffers.get("exp_avg", [])}
    return {name: tensors for name, tensors in tables.items() if tensors}


def _kind(move: Move) -> Kind:
    kind: Kind = move.direction.kind
    return Kind.ADAMW_MOMENTUM if "exp_avg" in move.buffers else kind


def _numbers(move: Move, scalars: list[float]) -> dict[str, float]:
    """Returns the numbers of a job, each computed as the single-tensor path computes it."""
    lr_t, weight_decay, c, beta, *own = scalars
    of_direction = dict.fromkeys(_NUMBERS, 0.0) | dict(zip(_NUMBERS, own, strict=False))
    return {
        "sign": -1.0 if move.maximize else 1.0,
        "lr_t": lr_t,
        "weight_decay": weight_decay,
        "c": c,
        "k": 1.0 - beta * (1.0 - c),
        "share2": 1.0 - of_direction["b2"],
        "share1": 1.0 - of_direction["m1"],
        **{name: of_direction[name] for name in ("eps", "correction2", "correction1")},
    }


def _all_fit(tables: dict[str, list[Tensor]]) -> bool:
    """Tells whether all parameters can be walked as flat memory, and all in the same dtypes.

    A list at a time, because with thousands of small tensors these questions are most of a step.
    """
    return (
        len({g.dtype for g in tables["g"]}) == 1
        and _same_kinds(tables)
        and all({t.is_contiguous() for t in ts} == {True} for ts in tables.values())
    )


def _why_left(row: dict[str, Tensor]) -> str | None:
    """Returns why the kernel does not take a parameter, None if it does; its gradient can be copied."""
    y, z = row["y"], row["z"]
    if "rest" in row and "x" in row:
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


def _kind_of(tensor: Tensor) -> str:
    sign = " with a pending sign" if tensor.is_neg() else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}{sign}"


def _walkable(grad: Tensor, y: Tensor, wide: torch.dtype) -> Tensor:
    """Returns a gradient as it is, or a copy, in a dtype that the kernel knows and in the layout of y."""
    dtype = grad.dtype if grad.dtype in _NARROW and wide == torch.float32 else wide
    if grad.dtype == dtype and type(grad) in PLAIN and not grad.is_neg() and _same_dense_layout(y, grad):
        return grad
    return torch.empty_like(y, dtype=dtype).copy_(grad)


def _same_kinds(tables: dict[str, list[Tensor]]) -> bool:
    """Tells whether the kernel knows the dtypes, and tensors of a parameter match in all but layout."""
    ys, grads, of_y, device = tables["y"], tables["g"], tables["y"][0].dtype, tables["y"][0].device
    others = {name: tensors for name, tensors in tables.items() if name != "y"}  # ys are of one batch
    dtypes = {name: {t.dtype for t in tensors} for name, tensors in others.items()}
    wide = torch.promote_types(of_y, torch.float32)
    narrow = set(_NARROW) if wide == torch.float32 else set()
    counts = [y.numel() for y in ys]
    return (
        wide in _WIDE
        and all(PLAIN.issuperset(map(type, tensors)) for tensors in tables.values())
        and dtypes.pop("x", {of_y}) == {of_y}
        and dtypes.pop("rest", {torch.int16}) == {torch.int16}
        and dtypes.pop("g") <= {wide} | narrow
        and all(found == {wide} for found in dtypes.values())
        and all([t.numel() for t in tensors] == counts for tensors in others.values())
        and all(_are_on(device, tensors) for tensors in others.values())
        and {t.is_neg() for t in (*ys, *grads)} == {False}
    )


def _are_on(device: torch.device, tensors: list[Tensor]) -> bool:
    if device.type == "cpu":
        return {t.is_cpu for t in tensors} == {True}  # takes two thirds of the time
    return {t.device for t in tensors} == {device}


def alike(first: Tensor, *others: Tensor) -> bool:
    """Tells whether plain CPU tensors have one wide dtype and one dense layout."""
    return (
        first.dtype in _WIDE
        and type(first) in PLAIN
        and all(t.is_cpu and t.dtype == first.dtype for t in others)
        and not any(t.is_neg() for t in (first, *others))
        and _same_dense_layout(first, *others)
    )


def _same_dense_layout(first: Tensor, *others: Tensor) -> bool:
    """Tells whether tensors have the same shape and strides, and these leave no gap and no overlap."""
    step = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return all(t.stride() == first.stride() and t.shape == first.shape for t in others)
