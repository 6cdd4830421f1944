"""From a direction of one's own (S6) to a step: gather, move, and write the books."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sftorch import _fused, _halves, _iterates, _lean, _parts
from sftorch._compiler import uncompiled, uncompiled_itself
from sftorch._core import Batch, ScheduleFreeOptimizer
from sftorch._iterates import as_real
from sftorch._modes import TrainEvalOptimizer
from sftorch._native.call import Kind

Precision = Literal["exact", "lean"]


class Direction(NamedTuple):
    """S6 without lr and decay, twice; neither writes to a gradient, both update the buffers.

    Attributes:
        single: (gradient, buffers by name, *numbers) -> direction. The numbers may be 0-d tensors.
        foreach: the same for lists, with plain numbers.
        kind: what the native kernel knows it as.
    """

    single: Callable[..., Tensor]
    foreach: Callable[..., list[Tensor]]
    kind: Kind


class Move(NamedTuple):
    """What S6-S9 need to know of one batch; lists have one entry a parameter, complex ones as reals.

    Attributes:
        direction: how gradients become directions.
        ys: the parameters.
        rests: what 16-bit parameters cannot hold, as in `_halves`; empty where they hold all.
        xs: the averages if ys are to end as x (they are used up), else empty.
        zs: base iterates, at least float32; in the lean form the gaps z - y.
        grads: gradients, in any dtype.
        buffers: the direction's, by name.
        scalars: lr_t, weight decay, c, beta and the direction's numbers; float64 of shape (n,), because
            torch.compile would compile Python numbers into its program, a new one in every step.
        foreach: whether to take a list at a time.
        maximize: whether to ascend.
        shares: which parameters a kernel takes, and which are left; None where there is none.
        keys: in the lean form the random words of `_lean.keys`, else None.
    """

    direction: Direction
    ys: list[Tensor]
    rests: list[Tensor]
    xs: list[Tensor]
    zs: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    scalars: Tensor
    foreach: bool
    maximize: bool
    shares: _fused.Shares | None = None
    keys: Tensor | None = None


def run(moves: Iterable[Move]) -> None:
    """Runs S6-S9 of every batch, in place. torch.compile compiles this, one tensor at a time."""
    for move in moves:
        compiling = torch.compiler.is_compiling()
        scalars: list[Any] = list(move.scalars.unbind()) if compiling else move.scalars.tolist()
        if move.keys is not None:
            _lean.run(move, scalars)
            continue
        if compiling:
            _run_wide(move._replace(foreach=False), scalars)
            continue
        if move.shares is not None:
            _fused.run(move, scalars)
            move = _rows(move, move.shares.left)._replace(foreach=False)
        if move.ys:
            _run_wide(move, scalars)


def _run_wide(move: Move, scalars: list[Any]) -> None:
    wide = _joined(move) if move.rests else move
    if move.foreach and _same_dtypes(wide):
        _run_foreach(wide, scalars)
    else:
        _run_single(wide, scalars)
    if move.rests:
        _split_(move, wide.ys)


def _joined(move: Move) -> Move:
    """Returns a batch of 16-bit parameters with y, x and gradients in float32; y must be split again."""
    ys = [_halves.join(y, rest) for y, rest in zip(move.ys, move.rests, strict=True)]
    xs, grads = ([tensor.to(torch.float32) for tensor in tensors] for tensors in (move.xs, move.grads))
    return move._replace(ys=ys, rests=[], xs=xs, grads=grads)


def _split_(move: Move, values: list[Tensor]) -> None:
    for y, rest, value in zip(move.ys, move.rests, values, strict=True):
        _halves.split_(y, rest, value)


def _same_dtypes(move: Move) -> bool:
    return len({tensor.dtype for tensor in (*move.ys, *move.zs, *move.grads)}) == 1


def _run_single(move: Move, scalars: list[Any]) -> None:
    lr_t, weight_decay, c, beta, *numbers = scalars
    for i, (y, z, grad) in enumerate(zip(move.ys, move.zs, move.grads, strict=True)):
        own = {name: tensors[i] for name, tensors in move.buffers.items()}
        grad = grad.to(z.dtype)
        direction = move.direction.single(-grad if move.maximize else grad, own, *numbers)
        if move.xs:
            _iterates.average_single_(y, move.xs[i], z, direction, lr_t, weight_decay, c)
        else:
            _iterates.advance_single_(y, z, direction, lr_t, weight_decay, c, beta)


def _rows(move: Move, indices: list[int]) -> Move:
    """Returns the part of a move that concerns some of its parameters."""

    def some(tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[i] for i in indices] if tensors else []

    buffers = {name: some(tensors) for name, tensors in move.buffers.items()}
    ys, rests, xs, zs, grads = map(some, (move.ys, move.rests, move.xs, move.zs, move.grads))
    return move._replace(ys=ys, rests=rests, xs=xs, zs=zs, grads=grads, buffers=buffers)


def _run_foreach(move: Move, scalars: list[float]) -> None:
    lr_t, weight_decay, c, beta, *numbers = scalars
    grads = list(torch._foreach_neg(move.grads)) if move.maximize else move.grads
    directions = move.direction.foreach(grads, move.buffers, *numbers)
    if move.xs:
        _iterates.average_foreach_(move.ys, move.xs, move.zs, directions, lr_t, weight_decay, c)
    else:
        _iterates.advance_foreach_(move.ys, move.zs, directions, lr_t, weight_decay, c, beta)


def _viewed(tensors: Iterable[Tensor], are_complex: bool) -> list[Tensor]:
    """Returns views that share memory: the parts of DTensors, complex tensors as pairs of reals, no 0-d ones.

    torch.compile (2.13) takes a 0-d float64 tensor for a Python number and loses what is written to it.
    """
    found = [tensor if tensor.ndim else tensor.view(1) for tensor in _parts.parts(tensors)]
    return [as_real(tensor) for tensor in found] if are_complex else found


class DirectedOptimizer(ScheduleFreeOptimizer):
    """Abstract: optimizers that have a direction of their own; their groups hold options and books."""

    @abstractmethod
    def _direction(self, group: dict[str, Any], t: int) -> tuple[Direction, tuple[float, ...]]:
        """Returns S6's direction at a parameter's time t, and the numbers to call it with."""

    def _is_lean(self, group: dict[str, Any]) -> bool:
        return group["precision"] == "lean"

    def _books(self, group: dict[str, Any]) -> dict[str, Any]:
        return group

    @uncompiled
    def _plan(self, x: dict[Tensor, Tensor] | None = None) -> tuple[list[float], list[Batch], list[Move]]:
        """Returns the groups' lr, their batches and what to do with them; x for parameters that end as x."""
        lrs, batches, moves = [], [], []
        for group in self.param_groups:
            lr = self._group_lr(group)
            lrs.append(lr)
            for batch in self._batches(group, lr):
                batches.append(batch)
                moves.append(self._move(group, batch, x))
        return lrs, batches, moves

    def _move(self, group: dict[str, Any], batch: Batch, x: dict[Tensor, Tensor] | None) -> Move:
        direction, numbers = self._direction(group, batch.clock.step)
        scalars = (batch.lr_t, group["weight_decay"], batch.c, self._beta(group), *numbers)
        params, states, pairs = batch.params, batch.states, batch.params[0].is_complex()
        names, lean = self._buffers(group), self._is_lean(group)
        move = Move(
            direction=direction,
            ys=_viewed(params, pairs),
            rests=_viewed((state[self._rest] for state in states if self._rest in state), False),
            xs=_viewed((x[p] for p in params), pairs) if x is not None else [],
            zs=_viewed((state["gap" if lean else "z"] for state in states), pairs),
            grads=_viewed(_parts.gradients(params), pairs),
            buffers={name: _viewed((state[name] for state in states), pairs) for name in names},
            scalars=torch.tensor(scalars, dtype=torch.float64, device="cpu"),
            foreach=bool(group["foreach"]),
            maximize=group["maximize"],
            keys=self._keys(group, batch) if lean else None,
        )
        return _fused.shared(move, group["fused"] is True) if _fused.chosen(group, params) else move

    def _keys(self, group: dict[str, Any], batch: Batch) -> Tensor:
        places = {p: place for place, p in enumerate(self._params())}
        ordinals = [places[p] for p in batch.params]
        return _lean.keys(group["seed"], ordinals, batch.clock.step, len(self._buffers(group)))


class YAtRest(TrainEvalOptimizer, DirectedOptimizer):
    """Abstract: the usual form, parameters hold y between steps."""

    _may_be_lean = True

    @uncompiled_itself
    def _step_groups(self) -> None:
        lrs, batches, moves = self._plan()
        run(moves)
        self._close_step(lrs, batches)

    @uncompiled
    def _close_step(self, lrs: list[float], batches: list[Batch]) -> None:
        for batch in batches:
            self._finish_batch(batch)
        for group, lr in zip(self.param_groups, lrs, strict=True):
            self._finish(group, lr)
