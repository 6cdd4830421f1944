"""A move, one batch of parameters and where it is to go, and who runs it: the first of a list that takes it.

Each backend says why it does not take a move, and so why fused=True cannot be had. On a CUDA device the
kernel needs fused=True, or SFTORCH_TRITON=1: its bits are right in Triton's interpreter, but no GPU has run
it yet, and None must be safe. Even then it is used only where `check` has found it right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfcore import laws
from sfcore.native import build
from sftorch.kernels import call, drawn
from sftorch.kernels.call import Element, Kind
from sftorch.law import iterates, lists
from sftorch.law.parts import Place, indices, is_fake
from sftorch.state import eight, forms
from sftorch.step import check

Numbers = Sequence[Any]  # of `Move`: Python floats, or 0-d tensors under torch.compile
Key = tuple[int, int] | tuple[Tensor, Tensor]


class Direction(NamedTuple):
    """S6 without lr and decay, twice; neither writes to a gradient, both update the buffers.

    Attributes:
        single: (gradient, buffers by name, *numbers) -> direction. The numbers may be 0-d tensors.
        foreach: the same for lists, with plain numbers.
        kernel: what the kernels know it as, the name of a `kernels.call.Kind`; "" where they do not.
        gathers: whether it looks beyond the part of a DTensor that lies here; it is then called with `of`,
            the parameters, and makes of all their parts what belongs to this one.
    """

    single: Callable[..., Tensor]
    foreach: Callable[..., list[Tensor]]
    kernel: str = ""
    gathers: bool = False


class Move(NamedTuple):
    """What S6-S9 need to know of one batch; lists have one entry a parameter, complex ones as reals.

    A backend's numbers are lr_t, wd_y, wd_z, k1, k2 and then the direction's own:

        delta = -lr_t (direction + wd_y y + wd_z z)     z' = z + delta     y' = y + k1 (z - y) + k2 delta

    With xs, y ends as x' = x + k1 (z' - x), and k1 is c. In the lean form k2 is beta: w = gap + k2 delta,
    y' = y + k1 w + (1 - k2) delta, gap' = (1 - k1) w. The 8-bit form has the codes of it.

    Attributes:
        direction: how gradients become directions.
        ys: the parameters.
        rests: what 16-bit parameters cannot hold, as in `forms`; empty where they hold all.
        xs: the averages if ys are to end as x (they are used up), else empty.
        zs: base iterates, at least float32; in the lean and the 8-bit form the gaps z - y.
        grads: gradients, in any dtype; new ones in every step.
        buffers: the direction's, by name.
        foreach, fused, maximize: the group's options.
        keys: in these forms the random words of `keys`, else None; new ones in every step.
        kept: for a backend to keep what it makes of tensors that stay from step to step.
        places: in the lean form where each tensor lies in a larger one, None for one that is whole; empty if
            all are.
        of: the parameters as DTensors, for a direction that gathers; else empty.
        scales: in the 8-bit form the exponents of gaps and buffers, else empty.
        columns: of these, by name of the buffer; the first is that of the gap.
        over: in the 8-bit form the process groups that have the other parts of each parameter's rows; empty
            if all rows are whole.
    """

    direction: Direction
    ys: list[Tensor]
    rests: list[Tensor]
    xs: list[Tensor]
    zs: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    foreach: bool | None
    fused: bool | None
    maximize: bool
    keys: Tensor | None
    kept: dict[str, Any]
    places: Sequence[Place | None] = ()
    of: Sequence[Tensor] = ()
    scales: Sequence[Tensor] = ()
    columns: Sequence[tuple[str, int]] = ()
    over: Sequence[Sequence[Any]] = ()

    def whole(self, index: int | None = None) -> dict[str, Any]:
        """Returns what a direction that gathers is called with beside its numbers: all of a move, or one."""
        return {"of": self.of if index is None else self.of[index : index + 1]} if self.of else {}

    def rows(self, chosen: list[int]) -> Move:
        """Returns the part of a move that concerns some of its parameters."""

        def some(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in chosen] if tensors else []

        lists: dict[str, Any] = {
            name: some(getattr(self, name)) for name in ("ys", "rests", "xs", "zs", "grads", "scales")
        }
        buffers = {name: some(tensors) for name, tensors in self.buffers.items()}
        keys = None if self.keys is None else self.keys[chosen]
        places = [self.places[i] for i in chosen] if self.places else ()
        of = [self.of[i] for i in chosen] if self.of else ()
        over = [self.over[i] for i in chosen] if self.over else ()
        return self._replace(**lists, buffers=buffers, keys=keys, kept={}, places=places, of=of, over=over)


class Backend(NamedTuple):
    """One way to run a move.

    Attributes:
        name: as messages have it.
        takes: move -> None, or why not; it looks at options, devices and dtypes.
        run: (move, numbers) -> None; runs S6 to S9* of it, in place.
        device: of the parameters that a kernel runs on, which is what fused=True asks for; "" for the others.
    """

    name: str
    takes: Callable[[Move], str | None]
    run: Callable[[Move, Numbers], None]
    device: str = ""


def run_compiled(move: Move, scalars: Tensor) -> None:
    """Runs S6-S9 of a move under torch.compile: one tensor at a time, with the numbers as tensors."""
    (_run_single if move.keys is None else _run_lean)(move, list(scalars.unbind()))


def assign(move: Move) -> list[tuple[Backend, Move]]:
    """Returns who runs which part of a move; nothing has changed then.

    A kernel that takes a move leaves parameters whose tensors it cannot walk to `SINGLE`.

    Raises:
        RuntimeError: if the group has fused=True and no kernel runs, or it leaves some; for state of other
            sizes than its parameters.
    """
    whys = {}
    for backend in BACKENDS:
        why = backend.takes(move)
        if why is None:
            break
        whys[backend.device] = why
    if move.fused and not backend.device:
        device = move.ys[0].device
        nowhere = f"parameters must be on the CPU or a CUDA device, got {device}"
        raise _no_kernel(whys.get(device.type, nowhere))
    found = _shared(move, backend) if backend.device else [(backend, move)]
    for one, share in found:
        if not one.device:
            _check_sizes(share)
    return found


def _check_sizes(move: Move) -> None:
    """Raises if state is not of its parameter's size, before a list operation is half through."""
    sizes = [y.shape for y in move.ys]
    for name, tensors in (("z", move.zs), ("y_rest", move.rests), ("x", move.xs)):
        for found, size in zip([t.shape for t in tensors], sizes, strict=False):
            if found != size:
                raise RuntimeError(
                    f"{name} must have the size of its parameter, {tuple(size)}, got {tuple(found)}: load "
                    "the state that was saved with these weights"
                )


def _no_kernel(why: str) -> RuntimeError:
    return RuntimeError(f"fused must be None or False here, got True: {why}")


def _shared(move: Move, kernel: Backend) -> list[tuple[Backend, Move]]:
    """Returns the kernel's share of a move, one part a gradient dtype, and what is left of it.

    Gradients of other kinds than a kernel takes, which are rare, are copied.
    """
    tables, count = _tables(move), len(move.ys)
    if call.all_fit(tables) if move.keys is None else drawn.all_fit(tables, move.places):
        return [(kernel, move)]
    grads = list(move.grads)
    taken: dict[torch.dtype, list[int]] = {}
    left: dict[int, str] = {}
    for i in range(count):
        row = {name: tensors[i] for name, tensors in tables.items()}
        if move.keys is None:
            why, wide = call.why_left(row), row["z"].dtype
        elif move.over and move.over[i]:
            why, wide = "a DTensor must be cut in its first dimension alone with '8bit'", torch.float32
        else:
            why, wide = drawn.why_left(row, move.places[i] if move.places else None), torch.float32
        if why:
            left[i] = why
        else:
            grads[i] = call.walkable(row["g"], row["y"], wide)
            taken.setdefault(grads[i].dtype, []).append(i)
    if left and move.fused:
        first, why = next(iter(left.items()))
        where = f"in {len(left)} of {count} parameters, the first of shape {tuple(move.ys[first].shape)}"
        raise _no_kernel(f"{why}, {where}")
    if not left and len(taken) == 1 and all(map(is_, grads, move.grads)):
        return [(kernel, move)]
    found = [(kernel, move._replace(grads=grads).rows(rows)) for rows in taken.values()]
    other = SINGLE if move.keys is None else LEAN
    return [*found, (other, move.rows(list(left)))] if left else found


_COLUMN = {"exp_avg_sq": "v", "exp_avg": "m"}


def _tables(move: Move) -> dict[str, list[Tensor]]:
    tables: dict[str, Any] = {"y": move.ys, "rest": move.rests, "z": move.zs, "g": move.grads, "x": move.xs}
    tables |= {column: move.buffers.get(name, []) for name, column in _COLUMN.items()}
    tables["scale"] = move.scales
    return {name: tensors for name, tensors in tables.items() if tensors}


def _kernel(
    name: str,
    device: str,
    dtypes: Sequence[torch.dtype],
    find: Callable[[Move], object],
    run: Callable[[Move, Numbers], None],
    why_not: Callable[[Move], str] | None = None,
) -> Backend:
    """Returns the kernel of a device as a backend.

    Args:
        name, device, run: as a `Backend` has them.
        dtypes: that parameters may have.
        find: move -> its kernel, or why there is none.
        why_not: move -> what is wrong with the kernel here, "" if it is right; None for a kernel that is the
            default.
    """

    def takes(move: Move) -> str | None:
        wish = check.wish() if why_not else True
        if move.fused is False or (move.fused is None and (not wish or move.foreach is False)):
            return f"fused must be True, got {move.fused}"
        y = move.ys[0]
        if y.device.type != device:
            return f"parameters must be on a {device} device, got {y.device}"
        if y.dtype not in dtypes:
            names = ", ".join(str(one).removeprefix("torch.") for one in dtypes)
            return f"parameters on {y.device} must be of one of {names}, got {y.dtype}"
        if not move.direction.kernel:
            return f"the direction must have a kernel, got {move.direction.single.__name__}, which has none"
        if wish is False:
            return f"{check.VARIABLE} must not be 0"
        kernel = find(move)
        if why_not:
            return kernel if isinstance(kernel, str) else why_not(move) or None
        if isinstance(kernel, str) and move.fused is None:
            call.give_notice(kernel)
        return kernel if isinstance(kernel, str) else None

    return Backend(name, takes, run, device)


def _described(move: Move) -> tuple[Kind, Element, Element]:
    """Returns what a kernel is to do, and the element types of y and of the gradients."""
    kind = Kind.ADAMW_MOMENTUM if "exp_avg" in move.buffers else Kind[move.direction.kernel]
    of_y, of_g = (call.NARROW.get(ts[0].dtype, Element.AS_Z) for ts in (move.ys, move.grads))
    return kind, Element.BFLOAT16_REST if move.rests else of_y, of_g


def _find_native(move: Move) -> object:
    return build.find(build.STEP if move.keys is None else build.DRAWN)


def _run_native(move: Move, numbers: Numbers) -> None:
    job, tables = move.kept.get("job"), {"g": move.grads}
    if job is None:
        tables = _tables(move)
        if move.keys is None:
            job = call.Job(*_described(move))
        else:
            job = drawn.job_of(_described(move)[0], tables, move.places)
        move.kept["job"] = job
    elif move.xs:
        tables["x"] = move.xs
    if move.keys is not None:
        drawn.give_words(job, move.keys)
    job.run(tables, (-1.0 if move.maximize else 1.0, *numbers))
    # As an operation of torch does, so that autograd notices a graph that needs the old values.
    torch.autograd.graph.increment_version(move.ys)


def _find_triton(move: Move) -> object:
    if move.scales and any(math.prod(y.shape[1:]) >= 1 << 31 for y in move.ys):
        return "rows must have less than 2^31 elements with precision='8bit'"
    return call.find_triton()


def _run_triton(move: Move, numbers: Numbers) -> None:
    places = drawn.places_of(move.ys, move.places) if any(move.places) else None
    numbers = (-1.0 if move.maximize else 1.0, *numbers)
    call.launch(*_described(move), _tables(move), numbers, move.keys, places)
    torch.autograd.graph.increment_version(move.ys)


def why_not_triton(move: Move) -> str:
    """Returns what is wrong with the Triton kernel for moves like this on its device, "" if it is right."""
    if is_fake(move.ys[0]):
        return "parameters must hold numbers, got fake tensors"
    dtypes = [(name, tensors[0].dtype) for name, tensors in _tables(move).items()]
    form = forms.EXACT if move.keys is None else forms.EIGHT if move.scales else forms.LEAN
    return _tried(move.direction, form, tuple(dtypes), move.ys[0].device)


@functools.cache
def _tried(
    direction: Direction, form: str, dtypes: tuple[tuple[str, torch.dtype], ...], device: torch.device
) -> str:
    """Tries the kernel once; each of two steps at either decay, and one of them with maximize."""
    names = [name for name, column in _COLUMN.items() if column in dict(dtypes)]

    def step(backend: Backend, tables: Mapping[str, Sequence[Tensor]], number: int) -> None:
        move = Move(
            direction=direction,
            ys=list(tables["y"]),
            rests=list(tables.get("rest", ())),
            xs=list(tables.get("x", ())),
            zs=list(tables["z"]),
            grads=list(tables["g"]),
            buffers={name: list(tables[_COLUMN[name]]) for name in names},
            foreach=False,
            fused=True,
            maximize=number % 2 == 1,
            keys=None if form == forms.EXACT else keys(0, range(len(tables["y"])), number + 1, len(names)),
            kept={},
            places={forms.LEAN: check.PLACES, forms.EIGHT: check.ROW_PLACES}.get(form, ()),
            scales=list(tables.get(eight.SCALE, ())),
            columns=tuple((name, at) for at, name in enumerate(names, start=1)),
        )
        for decays in ((0.1, 0.0), (0.0, 0.1)):
            backend.run(move, check.numbers_of(direction.kernel, number + 1, *decays))

    runs = [functools.partial(step, one) for one in (TRITON, SINGLE if form == forms.EXACT else LEAN)]
    why = check.why_wrong(dict(dtypes), device, *runs)
    if why:
        check.give_notice(form, device, why)
    return why


# The random bits of a rounding are a function of where and when, without a generator: of a seed, of the
# parameter's ordinal, its step, the buffer and the element's index in logical order. So they are the same on
# every device, in any number of threads, in any layout over processes, and after a resume.


def key_of(*words: int) -> tuple[int, int]:
    """Returns two well-mixed signed 32-bit numbers of some integers, in which order counts.

    Example:
        >>> from sftorch.step.backends import key_of
        >>> key_of(0, 1, 2) == key_of(0, 2, 1)
        False
    """
    state = 0
    for word in words:  # splitmix64, a word at a time
        state = (state + word + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
        state ^= state >> 31
    return _signed(state >> 32), _signed(state & 0xFFFFFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _fold(bits: Tensor, shift: int) -> Tensor:
    """Returns bits ^ (bits >> shift), as for unsigned numbers."""
    return bits ^ (torch.bitwise_right_shift(bits, shift) & ((1 << (32 - shift)) - 1))


def noise(shape: torch.Size, key: Key, device: torch.device, at: Place | None = None) -> Tensor:
    """Returns int32 numbers, one for each element of a shape, as if drawn evenly from all that there are.

    Args:
        shape: of the tensor.
        key: two 32-bit numbers, or int64 tensors of them.
        device: where.
        at: where the tensor lies in a larger one, whose numbers these are; default None: it is whole.
    """
    # An integer hash of two multiplications (Wellons' lowbias32), with the second word halfway.
    size = shape.numel() if at is None else math.prod(at.shape)
    count = torch.int32 if size < 1 << 31 else torch.int64
    if at is None:
        place = torch.arange(size, dtype=count, device=device).to(torch.int32).view(shape)
    else:
        place = indices(at, device, count).to(torch.int32).reshape(shape)
    bits = _fold(place * -0x61C88647 + key[0], 16) * 0x7FEB352D
    bits = _fold(bits ^ key[1], 15) * -0x7B935975
    return _fold(bits, 16)


def draws(
    shape: torch.Size, of_p: Sequence[Key], device: torch.device, at: Place | None = None
) -> list[Tensor]:
    """Returns what the gap and then each buffer is rounded by: int32 numbers in [0, 65536).

    Two share a hash, which takes longer than the rounding itself. Each is even, and so right on average.

    Args:
        shape, device, at: as for `noise`.
        of_p: the parameter's words of `keys`.
    """
    found = [noise(shape, key, device, at) for key in of_p]
    return [half & 0xFFFF for bits in found for half in (torch.bitwise_right_shift(bits, 16), bits)]


def rounded(value: Tensor, draw: Tensor) -> Tensor:
    """Returns bfloat16 numbers that are a float32 value on average: up as often as it lies above.

    Example:
        >>> import torch
        >>> from sftorch.step.backends import draws, key_of, rounded
        >>> third = torch.full((30_000,), 1 / 3)
        >>> draw, _ = draws(third.shape, [key_of(0)], third.device)
        >>> rounded(third, draw).unique().tolist()  # its two neighbours
        [0.33203125, 0.333984375]
    """
    bits = torch.where(value.isnan(), float("nan"), value).view(torch.int32)
    return torch.bitwise_right_shift(bits + draw, 16).to(torch.int16).view(torch.bfloat16)


def keys(seed: int, ordinals: Iterable[int], step: int, buffers: int) -> Tensor:
    """Returns the random words of a batch's next step: int64 of shape (parameters, 1 + buffers // 2, 2).

    A tensor, because torch.compile would compile numbers into its program, new ones in every step.
    """
    places = np.array([[n] for n in ordinals], dtype=np.uint64).reshape(-1, 1)
    hashes = np.arange(1 + buffers // 2, dtype=np.uint64)  # of two draws each
    state = np.zeros((len(places), len(hashes)), dtype=np.uint64)
    first, time = (np.full((1, 1), word % (1 << 64), dtype=np.uint64) for word in (seed, step))
    for word in (first, places, time, hashes):
        state = state + word + np.uint64(0x9E3779B97F4A7C15)  # `key_of`, of all at once
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    halves = np.stack([state >> np.uint64(32), state], axis=-1)
    return torch.from_numpy(halves.astype(np.uint32).view(np.int32).astype(np.int64))


# The lean form. With w = gap + beta delta, the new gap is (1 - k1) w and y moves by k1 w + (1 - beta) delta
# (S7 and S9* in other letters). The gap survives bfloat16, which z does not: it is small where z is large.
def _run_lean(move: Move, numbers: Numbers) -> None:
    assert move.keys is not None
    if move.scales:
        _run_eight(move, numbers)
        return
    lr_t, wd_y, wd_z, k1, beta, *own = numbers
    rests: Sequence[Tensor | None] = move.rests or [None] * len(move.ys)
    compiling = torch.compiler.is_compiling()
    places: Sequence[Place | None] = move.places or [None] * len(move.ys)
    of_rows = {one.torch for one in laws.roles().values() if one.of_rows}  # whole beside a parameter in parts
    columns = (move.ys, rests, move.zs, move.grads, move.keys.unbind(), places)
    for i, (p, rest, gap, grad, words, at) in enumerate(zip(*columns, strict=True)):
        of_p: list[Any] = [word.unbind() for word in words.unbind()] if compiling else words.tolist()
        y, wide_gap, grad = forms.join(p, rest), gap.to(torch.float32), grad.to(torch.float32)
        wide = {name: tensors[i].to(torch.float32) for name, tensors in move.buffers.items()}
        direction = move.direction.single(-grad if move.maximize else grad, wide, *own, **move.whole(i))
        z = y + wide_gap if iterates.counts(wd_z) else y
        delta = iterates.delta_single(y, z, direction, lr_t, wd_y, wd_z)
        w = wide_gap + beta * delta
        forms.put_halves_(p, rest, y + (k1 * w + (1.0 - beta) * delta))  # S9*
        drawn = draws(p.shape, of_p, p.device, at)
        gap.copy_(rounded((1.0 - k1) * w, drawn[0]))  # S7
        for n, (name, value) in enumerate(wide.items(), start=1):
            draw = draws(value.shape, of_p, p.device)[n] if name in of_rows else drawn[n]
            move.buffers[name][i].copy_(rounded(value, draw))


# The same in codes: row by row new exponents, then the nearest codes below or above at random.
def _run_eight(move: Move, numbers: Numbers) -> None:
    assert move.keys is not None
    lr_t, wd_y, wd_z, k1, beta, *own = numbers
    compiling = torch.compiler.is_compiling()
    places: Sequence[Place | None] = move.places or [None] * len(move.ys)
    columns = (move.ys, move.zs, move.scales, move.grads, move.keys.unbind(), places)
    for i, (p, gap, scale, grad, words, place) in enumerate(zip(*columns, strict=True)):
        of_p: list[Any] = [word.unbind() for word in words.unbind()] if compiling else words.tolist()
        drawn = draws(p.shape, of_p, p.device, place)
        rest = move.rests[i] if move.rests else None
        state = {"gap": gap} if rest is None else {"gap": gap, forms.Y_REST: rest}
        wide = {name: eight.decoded(move.buffers[name][i], scale[:, at]) for name, at in move.columns}
        y, wide_gap = forms.join(p, rest), eight.decoded(eight.gap_code(state), scale[:, 0])
        grad = grad.to(torch.float32)
        direction = move.direction.single(-grad if move.maximize else grad, wide, *own)
        z = y + wide_gap if iterates.counts(wd_z) else y
        delta = iterates.delta_single(y, z, direction, lr_t, wd_y, wd_z)
        w = wide_gap + beta * delta
        y, wide_gap = y + (k1 * w + (1.0 - beta) * delta), (1.0 - k1) * w  # S9* S7
        y, lower = (y, None) if rest is None else forms.split(eight.rounded_y(y, drawn[1]), p.dtype)
        p.copy_(y)
        scale.copy_(eight.scale_of([wide_gap, *wide.values()], move.over[i] if move.over else ()))
        eight.put_(state, lower, eight.linear(wide_gap, scale[:, 0], eight.gap_bits(state), drawn[0]))
        for name, at in move.columns:
            code = move.buffers[name][i]
            code.copy_(eight.encode(code.dtype, wide[name], scale[:, at], drawn[at]))


def _takes_foreach(move: Move) -> str | None:
    if not move.foreach:
        return f"foreach must be True, got {move.foreach}"
    dtypes = {tensor.dtype for tensor in (*move.ys, *move.zs, *move.grads)}
    # With rests, y and the gradients are made as wide as z.
    return None if move.rests or len(dtypes) == 1 else f"dtypes must be the same, got {len(dtypes)} of them"


class _Group(NamedTuple):
    """A part of a move of bounded size, so that what is made for a moment is bounded too.

    Attributes:
        cuts: which pieces of the lists it has; None for all, as they are.
        move: the part, whose gradients and averages are new in every step.
        moments: what the fused operation needs beside it; None where it does not take it.
    """

    cuts: list[lists.Cut] | None
    move: Move
    moments: list[Tensor] | None


def _groups_of(move: Move) -> tuple[list[_Group], Tensor | None]:
    """Returns the groups of a move, and the time that the fused operation is given if it takes some."""
    if move.direction.gathers:  # it looks beyond an element, which a piece has not
        return [_Group(None, move, None)], None
    found = lists.groups_of(list(_tables(move).values()))
    if len(found) == 1 and all(end is None for *_, end in found[0]):
        parts: list[tuple[list[lists.Cut] | None, Move]] = [(None, move)]
    else:
        parts = [(cuts, _part(move, cuts)) for cuts in found]
    is_adam = move.direction.kernel == Kind.ADAMW.name and move.buffers.keys() == {"exp_avg_sq"}
    if not is_adam or move.xs or move.rests:
        return [_Group(*part, None) for part in parts], None
    memory = lists.memory_for(part.zs for _, part in parts)
    groups = []
    for cuts, part in parts:
        grads = part.grads if cuts is None else lists.cut(move.grads, cuts)
        plain = lists.why_plain(part.ys, part.zs, part.buffers["exp_avg_sq"], grads)
        groups.append(_Group(cuts, part, None if plain else lists.moments_in(memory, part.zs)))
    return groups, memory.time


def _part(move: Move, group: Sequence[lists.Cut]) -> Move:
    """Returns a group of a move, still without gradients and averages."""
    ys, rests, zs = (lists.cut(tensors, group) for tensors in (move.ys, move.rests, move.zs))
    buffers = {name: lists.cut(tensors, group) for name, tensors in move.buffers.items()}
    return move._replace(ys=ys, rests=rests, xs=[], zs=zs, grads=[], buffers=buffers, kept={})


def _run_foreach(move: Move, numbers: Numbers) -> None:
    if "groups" not in move.kept:
        move.kept["groups"] = _groups_of(move)
    groups, time = move.kept["groups"]
    fused = None if time is None else lists.numbers_of(numbers, move.zs[0].dtype)
    for cuts, part, moments in groups:
        grads, xs = move.grads, move.xs
        if cuts is not None:
            grads, xs = lists.cut(grads, cuts), lists.cut(xs, cuts)
        if fused is not None and moments is not None:
            v = part.buffers["exp_avg_sq"]
            lists.step_(part.ys, part.zs, v, grads, fused, moments, time, move.maximize)
        else:
            _run_plainly(part._replace(grads=grads, xs=xs), numbers)


def _run_plainly(move: Move, numbers: Numbers) -> None:
    wide = _joined(move) if move.rests else move
    grads = list(torch._foreach_neg(wide.grads)) if wide.maximize else wide.grads
    directions = wide.direction.foreach(grads, wide.buffers, *numbers[5:], **wide.whole())
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
        grad = -grad if wide.maximize else grad
        direction = wide.direction.single(grad, buffers, *numbers[5:], **wide.whole(i))
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
NATIVE = _kernel("native", "cpu", _CPU_DTYPES, _find_native, _run_native)
TRITON = _kernel(
    "triton",
    "cuda",
    _CUDA_DTYPES,
    _find_triton,
    _run_triton,
    lambda move: why_not_triton(move),
)
LEAN = Backend(
    "lean",
    lambda move: "precision must be 'lean' or '8bit', got 'exact'" if move.keys is None else None,
    _run_lean,
)
FOREACH = Backend("foreach", _takes_foreach, _run_foreach)
SINGLE = Backend("single", lambda move: None, _run_single)
BACKENDS = [NATIVE, TRITON, LEAN, FOREACH, SINGLE]
