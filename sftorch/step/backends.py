"""Who runs a move: an ordered list, of which the first that takes it does.

Each backend says why it does not take a move, and so why fused=True cannot be had. On a CUDA device the
kernel needs fused=True: its bits are right in Triton's interpreter, but no GPU has run it yet, and None must
be safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sftorch.kernels import build, call, fit, launch
from sftorch.kernels.call import Element, Kind
from sftorch.law import iterates
from sftorch.law.move import Move
from sftorch.state import forms
from sftorch.step import lean

Numbers = Sequence[Any]  # of `Move`: Python floats, or 0-d tensors under torch.compile


class Backend(NamedTuple):
    """One way to run a move.

    Attributes:
        name: as messages have it.
        takes: move -> None, or why not; it looks at options, devices and dtypes.
        run: (move, numbers) -> None; runs S6 to S9* of it, in place.
        device: of the parameters it runs on; "" is any.
        is_kernel: whether this is what fused=True asks for.
    """

    name: str
    takes: Callable[[Move], str | None]
    run: Callable[[Move, Numbers], None]
    device: str = ""
    is_kernel: bool = False


def run_compiled(move: Move, scalars: Tensor) -> None:
    """Runs S6-S9 of a move under torch.compile: one tensor at a time, with the numbers as tensors."""
    (_run_single if move.keys is None else lean.run)(move, list(scalars.unbind()))


def assign(move: Move) -> list[tuple[Backend, Move]]:
    """Returns who runs which part of a move; nothing has changed then.

    A kernel that takes a move leaves parameters whose tensors it cannot walk to `SINGLE`.

    Raises:
        RuntimeError: if the group has fused=True and no kernel runs, or it leaves some.
    """
    whys = {}
    for backend in BACKENDS:
        why = backend.takes(move)
        if why is None:
            break
        whys[backend.device if backend.is_kernel else ""] = why
    if backend.is_kernel:
        return _shared(move, backend)
    if move.fused:
        device = move.ys[0].device
        nowhere = f"parameters must be on the CPU or a CUDA device, got {device}"
        raise _no_kernel(whys.get(device.type, nowhere))
    return [(backend, move)]


def _no_kernel(why: str) -> RuntimeError:
    return RuntimeError(f"fused must be None or False here, got True: {why}")


def _shared(move: Move, kernel: Backend) -> list[tuple[Backend, Move]]:
    """Returns the kernel's share of a move, one part a gradient dtype, and what is left of it.

    Gradients of other kinds than a kernel takes, which are rare, are copied.
    """
    tables, count = _tables(move), len(move.ys)
    if fit.all_fit(tables):
        return [(kernel, move)]
    grads = list(move.grads)
    taken: dict[torch.dtype, list[int]] = {}
    left: dict[int, str] = {}
    for i in range(count):
        row = {name: tensors[i] for name, tensors in tables.items()}
        if why := fit.why_left(row):
            left[i] = why
        else:
            grads[i] = fit.walkable(row["g"], row["y"], row["z"].dtype)
            taken.setdefault(grads[i].dtype, []).append(i)
    if left and move.fused:
        first, why = next(iter(left.items()))
        where = f"in {len(left)} of {count} parameters, the first of shape {tuple(move.ys[first].shape)}"
        raise _no_kernel(f"{why}, {where}")
    if not left and len(taken) == 1 and all(map(is_, grads, move.grads)):
        return [(kernel, move)]
    found = [(kernel, move._replace(grads=grads).rows(rows)) for rows in taken.values()]
    return [*found, (SINGLE, move.rows(list(left)))] if left else found


def _tables(move: Move) -> fit.Tables:
    tables = {"y": move.ys, "rest": move.rests, "z": move.zs, "g": move.grads, "x": move.xs}
    tables |= {"v": move.buffers.get("exp_avg_sq", []), "m": move.buffers.get("exp_avg", [])}
    return {name: tensors for name, tensors in tables.items() if tensors}


def _kernel(
    name: str,
    device: str,
    dtypes: Sequence[torch.dtype],
    find: Callable[[], object],
    run: Callable[[Move, Numbers], None],
) -> Backend:
    """Returns the kernel of a device as a backend; `find` returns it, or why there is none."""

    def takes(move: Move) -> str | None:
        if move.fused is False or (move.fused is None and (device != "cpu" or move.foreach is False)):
            return f"fused must be True, got {move.fused}"
        y = move.ys[0]
        if y.device.type != device:
            return f"parameters must be on a {device} device, got {y.device}"
        if move.keys is not None:
            return "precision must be 'exact', got 'lean': the kernel has no random rounding"
        if y.dtype not in dtypes:
            names = ", ".join(str(one).removeprefix("torch.") for one in dtypes)
            return f"parameters on {y.device} must be of one of {names}, got {y.dtype}"
        if not move.direction.kernel:
            return f"the direction must have a kernel, got {move.direction.single.__name__}, which has none"
        kernel = find()
        if isinstance(kernel, str) and move.fused is None:
            build.give_notice(kernel)
        return kernel if isinstance(kernel, str) else None

    return Backend(name, takes, run, device, is_kernel=True)


def _kind(move: Move) -> Kind:
    return Kind.ADAMW_MOMENTUM if "exp_avg" in move.buffers else Kind[move.direction.kernel]


def _types(move: Move) -> tuple[Element, Element]:
    """Returns the element types of y and of the gradients."""
    of_y, of_g = (fit.NARROW.get(ts[0].dtype, Element.AS_Z) for ts in (move.ys, move.grads))
    return Element.BFLOAT16_REST if move.rests else of_y, of_g


def _run_native(move: Move, numbers: Numbers) -> None:
    job, tables = move.kept.get("job"), {"g": move.grads}
    if job is None:
        job, tables = call.Job(_kind(move), *_types(move)), _tables(move)
        move.kept["job"] = job
    elif move.xs:
        tables["x"] = move.xs
    job.run(tables, (-1.0 if move.maximize else 1.0, *numbers))
    # As an operation of torch does, so that autograd notices a graph that needs the old values.
    torch.autograd.graph.increment_version(move.ys)


def _run_triton(move: Move, numbers: Numbers) -> None:
    signed = (-1.0 if move.maximize else 1.0, *numbers)
    launch.run(_kind(move), _tables(move), signed, *_types(move))
    torch.autograd.graph.increment_version(move.ys)


def _takes_lean(move: Move) -> str | None:
    return "precision must be 'lean', got 'exact'" if move.keys is None else None


def _takes_foreach(move: Move) -> str | None:
    if not move.foreach:
        return f"foreach must be True, got {move.foreach}"
    dtypes = {tensor.dtype for tensor in (*move.ys, *move.zs, *move.grads)}
    # With rests, y and the gradients are made as wide as z.
    return None if move.rests or len(dtypes) == 1 else f"dtypes must be the same, got {len(dtypes)} of them"


def _run_foreach(move: Move, numbers: Numbers) -> None:
    wide = _joined(move) if move.rests else move
    grads = list(torch._foreach_neg(wide.grads)) if wide.maximize else wide.grads
    directions = wide.direction.foreach(grads, wide.buffers, *numbers[5:])
    if wide.xs:
        iterates.average_foreach_(wide.ys, wide.xs, wide.zs, directions, numbers[:5])
    else:
        iterates.advance_foreach_(wide.ys, wide.zs, directions, numbers[:5])
    if move.rests:
        _put_back(move, wide.ys)


def _run_single(move: Move, numbers: Numbers) -> None:
    wide = _joined(move) if move.rests else move
    for i, (y, z, grad) in enumerate(zip(wide.ys, wide.zs, wide.grads, strict=True)):
        buffers = {name: tensors[i] for name, tensors in wide.buffers.items()}
        grad = grad.to(z.dtype)
        direction = wide.direction.single(-grad if wide.maximize else grad, buffers, *numbers[5:])
        if wide.xs:
            iterates.average_single_(y, wide.xs[i], z, direction, numbers[:5])
        else:
            iterates.advance_single_(y, z, direction, numbers[:5])
    if move.rests:
        _put_back(move, wide.ys)


def _joined(move: Move) -> Move:
    """Returns a batch of 16-bit parameters with y, x and gradients in float32."""
    ys = [forms.join(y, rest) for y, rest in zip(move.ys, move.rests, strict=True)]
    xs, grads = ([tensor.to(torch.float32) for tensor in tensors] for tensors in (move.xs, move.grads))
    return move._replace(ys=ys, rests=[], xs=xs, grads=grads)


def _put_back(move: Move, values: list[Tensor]) -> None:
    """Puts what became of joined parameters into both of their halves."""
    for y, rest, value in zip(move.ys, move.rests, values, strict=True):
        forms.put_halves_(y, rest, value)


# Complex tensors come as their reals, and are told of.
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.complex64)
_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
NATIVE = _kernel("native", "cpu", _CPU_DTYPES, lambda: build.find(), _run_native)
TRITON = _kernel("triton", "cuda", _CUDA_DTYPES, lambda: launch.find(), _run_triton)
LEAN = Backend("lean", _takes_lean, lean.run)
FOREACH = Backend("foreach", _takes_foreach, _run_foreach)
SINGLE = Backend("single", lambda move: None, _run_single)
BACKENDS = [NATIVE, TRITON, LEAN, FOREACH, SINGLE]
