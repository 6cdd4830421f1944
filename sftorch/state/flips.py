"""Goes between y and x in one pass over memory, and where it must not, leaves everything as it was."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfcore.native import build
from sfcore.native.kinds import MARKED
from sftorch.kernels import call
from sftorch.kernels.call import Kind
from sftorch.law import iterates, lists
from sftorch.law.parts import PLAIN, parts
from sftorch.state import forms

Columns = tuple[list[Tensor], list[Tensor], list[Tensor]]  # in rows of one parameter each


class Row(NamedTuple):
    """A parameter, its state, its z, and where its y lies aside, or is to lie, or its x."""

    p: Tensor
    state: dict[str, Any]
    z: Tensor
    third: Tensor


@dataclasses.dataclass
class Walk:
    """All rows of a group as the kernel walks them; the next flip need not look at every tensor again.

    It also has what tells `train()`, without reading z, that a parameter still is the x of `eval()`: marks of
    its bits (step.c). They are not asked with another beta, or where z or y was written to since, as far as
    torch saw it; who writes to z past torch and leaves the weights alone gets the y back that was there.
    """

    rows: list[Row]  # which keep their memory, and their ids, from becoming another's
    columns: Columns
    job: call.Job = dataclasses.field(default_factory=lambda: call.Job(Kind.PUT_ASIDE))
    marked: tuple[float, list[int]] | None = None  # the share and versions of the marks; None: none, or asked

    def __post_init__(self) -> None:
        ps, states, zs, thirds = map(list, zip(*self.rows, strict=True))
        self._ids, self._places = _ids_of(ps, states, zs, thirds), _places_of(*self.columns)
        self._watched = zs + thirds
        blocks = sum(p.numel() for p in self.columns[0]) // MARKED + 1
        marks = self.job.arrays["marks"] = np.empty(blocks, dtype=np.uint64)
        self._marks_at = marks.ctypes.data

    def is_of(self, ps: list[Tensor], states: list[Any], zs: list[Any], thirds: list[Any]) -> bool:
        """Tells whether these are the rows, and lie where they lay."""
        if self._ids != _ids_of(ps, states, zs, thirds):
            return False
        return self._places == _places_of(parts(ps), parts(zs), parts(thirds))

    def run(self, kind: Kind, share: float) -> bool:
        """Does a job, and leaves marks or asks them."""
        job, marks = self.job, None
        tables = {} if job.columns else dict(zip("yzx", self.columns, strict=True))
        if kind in (Kind.PUT_ASIDE, Kind.PUT_BACK):
            now = (share, self._versions())
            if now[1] and (kind is Kind.PUT_ASIDE or self.marked == now):
                marks = self._marks_at
            self.marked = None
        job.kind, job.marks = kind, marks
        differs = job.run(tables, _numbers(share))
        if kind is Kind.PUT_ASIDE and marks:
            self.marked = now
        return differs

    def _versions(self) -> list[int]:
        """Returns how often torch saw somebody write to z and y; nothing where it does not count."""
        try:
            return [tensor._version for tensor in self._watched]
        except RuntimeError:  # inference tensors
            return []


def _ids_of(*columns: list[Any]) -> array[int]:
    return array("Q", [id(one) for column in columns for one in column])


def _places_of(ps: list[Tensor], *others: list[Tensor]) -> array[int]:
    """Returns where tensors lie, and how those of the first list do: as numbers, which take little memory."""
    every = [tensor for column in (ps, *others) for tensor in column]
    found = [tensor.data_ptr() for tensor in every] + [tensor.nbytes for tensor in every]
    return array("Q", found + [p.is_contiguous() for p in ps] + [id(p.dtype) for p in ps])


def _numbers(share: float) -> tuple[float, ...]:
    """Returns a job's: the same doubles as in iterates.recover_x, rounded to the tensors' dtype by both."""
    return (*call.ZEROS[: call.NUMBERS.index("k1")], share)


class Flip:
    """Goes between y and x in one pass over memory, by the native kernel or else by lists, where it can.

    That is a group's parameters that have the dtype of z. Lists go in groups of bounded size, and so does
    what is looked at before it is written to: from the cache, writing costs less.
    """

    def __init__(
        self, group: Mapping[str, Any], state: Mapping[Tensor, Any], beta: float, walk: Walk | None = None
    ):
        """Begins with a group's parameters.

        Args:
            group: of an optimizer.
            state: of the optimizer.
            beta: the one that y was built with.
            walk: what the group's last flip walked.
        """
        found = [(p, state.get(p)) for p in group["params"]]
        self._started = [(p, of_p) for p, of_p in found if of_p and forms.has_started(of_p)]
        self.back: list[Row] = []  # of parameters that hold y again
        self._written: list[Columns] = []
        self._native = group.get("fused") is not False and not isinstance(build.find(), str)
        self.walk = walk if self._native else None
        self._share = 1.0 / beta - 1.0 if beta else None
        if group.get("foreach") is False:
            self._share = None

    def left(self, rows: list[Row]) -> list[Tensor]:
        """Returns the parameters with a state that are not among those of some rows."""
        if len(rows) == len(self._started):
            return []
        done = {id(row.p) for row in rows}
        return [p for p, _ in self._started if id(p) not in done]

    def to_new(self, kind: Kind, kept: Mapping[int, Tensor]) -> list[Row]:
        """Returns rows with new tensors: x by RECOVER; by PUT_ASIDE y, and the parameter becomes x.

        Args:
            kind: one of these two.
            kept: id of a parameter -> a tensor that may be taken for its new one.
        """
        ready, columns = self._columns(kept, lasts=kind is Kind.PUT_ASIDE)
        try:
            for some in columns:
                self._run(kind, some)
        except BaseException:
            if kind is Kind.PUT_ASIDE:
                self._take_back(columns)
            raise
        return ready

    def _take_back(self, columns: list[Columns]) -> None:
        """Gives the parameters y again that an interrupted PUT_ASIDE has, or has not, made x of."""
        for some in columns:
            if self._native:
                self._run(Kind.PUT_BACK, some)  # which changes nothing where y was not put aside
        for ys, _, thirds in self._written:
            torch._foreach_copy_(ys, thirds)

    def held(self) -> list[Row]:
        """Returns the rows with y put aside if all of them hold x bit for bit, else none."""
        ready, columns = self._columns()
        return [] if any(self._run(Kind.HOLDS, some) for some in columns) else ready

    def put_back(self) -> None:
        """Puts back y where all parameters hold x bit for bit; else nothing has changed."""
        ready, columns = self._columns(lasts=True)
        # A look waits for the device: there, once before all.
        at_once = self._native or not any(row.p.is_cuda for row in ready)
        if not at_once and any(self._run(Kind.HOLDS, some) for some in columns):
            return
        for some in columns:
            if not self._put_back(some, look=at_once):
                self.undo()
                return
        self.back = ready

    def _put_back(self, columns: Columns, look: bool) -> bool:
        """Puts back y where all of a list holds x, and tells whether it does; else nothing has changed."""
        if self._native:
            self._written.append(columns)
            if self._run(Kind.PUT_BACK, columns):
                self._written.pop()
                return False
        else:
            if look and self._run(Kind.HOLDS, columns):
                return False
            self._written.append(columns)
            torch._foreach_copy_(columns[0], columns[2])
        return True

    def undo(self) -> None:
        """Makes x of what was put back, in the bits that it had."""
        for ps, zs, ys in self._written:
            # The kernel puts back a whole list or nothing, and who interrupts it does not learn which.
            if not self._native or _same_bits(ps, ys):
                self._run(Kind.RECOVER, (ys, zs, ps))
        self.back, self._written = [], []

    def _columns(
        self, kept: Mapping[int, Tensor] | None = None, lasts: bool = False
    ) -> tuple[list[Row], list[Columns]]:
        """Returns the rows that can be walked, and the same as lists, of one dtype and device each.

        Args:
            kept: id of a parameter -> what may be its third tensor, which is a new one else; None takes the
                y that lies aside.
            lasts: whether the next flip may find the same rows.
        """
        if self._share is None:
            return [], []
        ps, states = [p for p, _ in self._started], [state for _, state in self._started]
        zs = [state.get("z") for state in states]
        thirds = [state.get("y") for state in states] if kept is None else [kept.get(id(p)) for p in ps]
        if self.walk is not None and self.walk.is_of(ps, states, zs, thirds):
            return self.walk.rows, [self.walk.columns]
        rows = [
            Row(p, state, z, _empty_like(p) if third is None else third)
            for p, state, z, third in zip(ps, states, zs, thirds, strict=True)
            if z is not None and z.dtype == p.dtype and (third is not None or kept is not None)
        ]
        ready, columns = self._fitting(rows, kept is not None)
        self.walk = None
        if lasts and self._native and len(columns) == 1 and len(ready) == len(self._started):
            self.walk = Walk(ready, columns[0])
        return ready, columns

    def _fitting(self, rows: list[Row], is_free: bool) -> tuple[list[Row], list[Columns]]:
        """Returns the rows that can be walked, and the same as lists.

        Args:
            rows: of parameters with the dtype of z.
            is_free: whether the third tensors may be replaced.
        """
        columns = _columns_of(rows)
        if call.all_alike(columns):
            return rows, self._grouped(columns)
        columns = _reals_of(rows)
        fits = call.alike if self._native else _may_be_listed
        kinds: dict[Any, list[Row]] = {}
        for row, (y, z, third) in zip(rows, zip(*columns, strict=True), strict=True):
            if is_free and not fits(y, third):  # it was kept of another parameter
                row = row._replace(third=_empty_like(row.p))
                third = _reals([row.third])[0]
            if fits(y, z, third):
                kinds.setdefault((y.dtype, y.device), []).append(row)
        ready = [row for same in kinds.values() for row in same]
        return ready, [some for same in kinds.values() for some in self._grouped(_reals_of(same))]

    def _grouped(self, columns: Columns) -> list[Columns]:
        """Returns columns of one dtype and device in lists that one call takes."""
        if self._native:
            return [columns]
        ys, zs, thirds = columns
        return [
            (lists.cut(ys, cuts), lists.cut(zs, cuts), lists.cut(thirds, cuts))
            for cuts in lists.groups_of(columns)
        ]

    def _run(self, kind: Kind, columns: Columns) -> bool:
        """Does RECOVER, PUT_ASIDE, HOLDS or PUT_BACK; returns whether one of the last two found a difference.

        RECOVER and PUT_ASIDE take y, z and what is to become x or the y put aside; the others x, z and y.
        """
        assert self._share is not None
        ys, zs, thirds = columns
        if self.walk is not None and columns is self.walk.columns:
            return self.walk.run(kind, self._share)
        if self._native:
            return call.Job(kind).run({"y": ys, "z": zs, "x": thirds}, _numbers(self._share))
        if kind is Kind.HOLDS:
            new = list(torch._foreach_sub(thirds, zs))
            torch._foreach_mul_(new, self._share)
            torch._foreach_add_(new, thirds)
            return not _all_equal(ys, new)
        torch._foreach_copy_(thirds, ys)
        x, y = thirds, ys
        if kind is Kind.PUT_ASIDE:
            self._written.append(columns)
            x, y = ys, thirds
        torch._foreach_sub_(x, zs)
        torch._foreach_mul_(x, self._share)
        torch._foreach_add_(x, y)
        return False


def _may_be_listed(first: Tensor, *others: Tensor) -> bool:
    """Tells whether plain tensors have one wide dtype, device and shape, and their own signs."""
    return (
        first.dtype in (torch.float32, torch.float64)
        and first.device.type in lists.GROUP
        and PLAIN.issuperset(map(type, (first, *others)))
        and all((t.dtype, t.device, t.shape) == (first.dtype, first.device, first.shape) for t in others)
        and not any(t.is_neg() for t in (first, *others))
    )


def _all_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tells whether plain tensors are equal; NaN is not."""
    if first and first[0].is_cpu:  # torch.equal takes five times as long
        return all(np.array_equal(a.detach(), b) for a, b in zip(first, second, strict=True))
    return all(_equal(first, second)) if first else True


def _same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tells whether plain CPU tensors of wide dtypes are equal bit for bit."""
    words = {torch.float32: torch.int32, torch.float64: torch.int64}
    return all(
        torch.equal(*(t.detach().view(words[t.dtype]) for t in pair))
        for pair in zip(first, second, strict=True)
    )


def _equal(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    """Tells which tensors on a device are equal, with one wait; NaN is not."""
    differ: list[bool] = torch.stack([(a != b).any() for a, b in zip(first, second, strict=True)]).tolist()
    return [not one for one in differ]


def _empty_like(p: Tensor) -> Tensor:
    return torch.empty_like(p, requires_grad=False)


def _columns_of(rows: Sequence[Row]) -> Columns:
    """Returns the parts of the parameters of some rows, of their z, and of the third tensors."""
    thirds = parts([row.third for row in rows])
    return parts([row.p for row in rows]), parts([row.z for row in rows]), thirds


def _reals_of(rows: Sequence[Row]) -> Columns:
    """Returns the same, complex ones as pairs of reals."""
    ys, zs, thirds = map(_reals, _columns_of(rows))
    return ys, zs, thirds


def _reals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parts of tensors, complex ones as pairs of reals."""
    found = parts(tensors)
    return [iterates.as_real(t) for t in found] if any(t.is_complex() for t in found) else found
