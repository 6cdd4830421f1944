"""Optimizers whose parameters hold y while training and x in eval mode: the two modes, and x on demand."""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sfcore.native import build
from sftorch.kernels import call
from sftorch.kernels.call import Kind
from sftorch.law import iterates, lists
from sftorch.law.parts import PLAIN, is_fake, like, note_written, part, parts, parts_of
from sftorch.state import arguments, forms, unshipped
from sftorch.state.compiler import uncompiled, uncompiled_itself
from sftorch.state.meshes import gather_anew, together
from sftorch.state.state_dict import ScheduleFreeOptimizer, before_step, settle

# Parameter -> the optimizer that knows its x, and the index of its group there, while `ship_x` is on.
SHIPPED: WeakIdKeyDictionary = WeakIdKeyDictionary()
Columns = tuple[list[Tensor], list[Tensor], list[Tensor]]  # in rows of one parameter each
Loss = TypeVar("Loss")  # what a closure returns: a number, or a tensor of one


class TrainEvalOptimizer(ScheduleFreeOptimizer):
    """Abstract: `step`, `train`, `eval`, and x without touching the weights.

    In eval mode a parameter's y lies in `state[p]["y"]`, so that `train()` puts back the same bits; on a
    CPU, where fresh memory costs more than the copy, that tensor is kept for the next `eval()`.
    At beta = 0, where y is z, x cannot be had from y and lies in `state[p]["x"]`.
    """

    _ships_x = 0  # models: an optimizer may train several
    _moves_alone = False  # `_run` to `_close`, without anyone who might put back what was
    _kept: dict[int, Tensor] | None = None  # id of a parameter -> where its y lay in the last eval mode

    @abstractmethod
    def _prepare(self) -> Any:
        """Begins, and checks everything before anything changes; returns the plan of the coming step."""

    @abstractmethod
    def _run(self, plan: Any) -> None:
        """Moves y and z: all that torch.compile compiles."""

    @abstractmethod
    def _close(self, plan: Any) -> None:
        """Writes the books of the step."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one step; `p.grad` is read and never written.

        Under torch.compile the arithmetic is compiled, once; the bookkeeping runs as it is.

        Args:
            closure: optional; reevaluates the model at y and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: for a closure that is no function.
            RuntimeError: in eval mode, for gradients that are not dense, where fused=True cannot be had, and
                if an interrupt or an error ended the last step midway; nothing has moved then.
            HyperparameterError: if a scheduler has put nonsense into a group; nothing has moved then.
        """
        with torch.no_grad():
            return self._take_step(closure)

    # torch.compile passes over this function, and over whatever else is marked so. What is left for it
    # is the arithmetic on tensors: compiled with the numbers of a step, it would do for that step only.
    @uncompiled_itself
    def _take_step(self, closure: Callable[[], Loss] | None) -> Loss | None:
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"closure must be None or a function, got {closure!r}: pass one that clears the "
                    "gradients, calls backward and returns the loss"
                )
            self._begin()
            with torch.enable_grad():
                loss = closure()
        plan = self._prepare()
        self._is_half_stepped = self._moves_alone
        self._run(plan)
        self._close(plan)
        return loss

    @uncompiled
    def _begin(self) -> None:
        """Raises unless gradients are, or will be, taken at y."""
        with together(self._to_agree()):
            for group in self.param_groups:
                if not self._books(group)["train_mode"]:
                    raise RuntimeError(
                        "the optimizer must be in train mode for step(), got eval mode: call "
                        "optimizer.train() before training and optimizer.eval() before evaluating or saving"
                    )
        if self._loaded is not None:
            before_step(self)

    @torch.no_grad()
    def eval(self) -> None:
        """Puts x into the parameters: for evaluating, saving and shipping the model. Idempotent.

        Raises:
            RuntimeError: if weights and state were loaded that do not belong together.
        """
        settle(self, train_mode=False)
        kept, self._kept = self._kept or {}, None
        for group in self.param_groups:
            if self._books(group)["train_mode"]:
                flip = _Flip(self, group)
                rows = flip.to_new(Kind.PUT_ASIDE, kept)
                torch.autograd.graph.increment_version([row.p for row in rows])
                for row in rows:
                    row.state["y"] = row.third
                left = flip.left(rows)
                for p in left:
                    x = self._x_of_part(p, group)
                    self.state[p]["y"] = _copied(p, kept.get(id(p)))
                    part(p).copy_(x)
                note_written(left)
                gather_anew(self, group["params"])
                self._books(group)["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Puts y back into the parameters, bit for bit as it was before `eval()`. Idempotent.

        Raises:
            RuntimeError: if the weights were written to in eval mode, or weights and state were loaded
                that do not belong together; nothing has changed then.
        """
        settle(self, train_mode=True)
        resting = [group for group in self.param_groups if not self._books(group)["train_mode"]]
        if not resting:
            return
        flips: list[_Flip] = []
        try:
            for group in resting:
                flips.append(_Flip(self, group))
                flips[-1].put_back()
            with together(self._params()):
                self._require_untouched(resting, {id(row.p) for flip in flips for row in flip.back})
        except BaseException:
            for flip in flips:
                flip.undo()
            raise
        kept: dict[int, Tensor] = {}
        for group, flip in zip(resting, flips, strict=True):
            left = {}
            for p in flip.left(flip.back):
                y = self.state[p].pop("y", None)
                if y is None:  # an eval-mode checkpoint of schedulefree, which keeps no y
                    forms.put_(p, self.state[p], forms.y_from_x(p, self.state[p], self._y_beta(group)))
                else:
                    left[p] = y
            if left:
                torch._foreach_copy_(parts(left), parts(left.values()))
            aside = [(row.p, row.state.pop("y")) for row in flip.back] + list(left.items())
            kept |= {id(p): y for p, y in aside if y.is_cpu and type(y) in PLAIN}
            note_written(p for p, _ in aside)
            gather_anew(self, group["params"])
            self._books(group)["train_mode"] = True
        self._kept = kept

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Holds x in the parameters inside a `with` block, and what they held before it afterwards.

        Example:
            >>> import sftorch, torch
            >>> p = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = sftorch.SGDScheduleFree([p])
            >>> with optimizer.evaluation():
            ...     loss = (p**2).sum()
        """
        training = any(self._books(group)["train_mode"] for group in self.param_groups)
        self.eval()
        try:
            yield
        finally:
            if training:
                self.train()

    @torch.no_grad()
    def eval_params(self) -> dict[Tensor, Tensor]:
        """Returns parameter -> x, as new tensors of the parameter's shape, dtype and device.

        Example:
            >>> import sftorch, torch
            >>> p = torch.nn.Parameter(torch.ones(2))
            >>> sftorch.SGDScheduleFree([p]).eval_params()[p]
            tensor([1., 1.])
        """
        settle(self)
        found: dict[Tensor, Tensor | None] = dict.fromkeys(self._params())
        for group in self.param_groups:
            if self._books(group)["train_mode"]:
                flip = _Flip(self, group)
                rows = flip.to_new(Kind.RECOVER, {})
                found |= {row.p: row.third for row in rows}
                found |= {p: self._x(p, group).to(p.dtype, copy=True) for p in flip.left(rows)}
        return {p: p.detach().clone() if x is None else x for p, x in found.items()}

    def eval_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Returns `model.state_dict()` with x in place of y: a copy, buffers included, to save or load.

        Args:
            model: a module with parameters of this optimizer: all of them, or a part, such as one of two
                models or an adapter. What is frozen or another optimizer's is copied as it is.

        Raises:
            TypeError: for what is no model.
            ValueError: for a copy of the model, or another model, of which this optimizer does not know x.

        Example:
            >>> import sftorch, torch
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = sftorch.SGDScheduleFree(model.parameters())
            >>> sorted(optimizer.eval_state_dict(model))
            ['bias', 'weight']
        """
        arguments.check_module(model)
        found: dict[str, Any] = model.state_dict(keep_vars=True)
        arguments.check_entries(found, self._params())
        x = self.eval_params()
        for name, value in found.items():
            if not isinstance(value, Tensor):
                found[name] = copy.deepcopy(value)
            else:
                found[name] = x[value] if value in x else value.detach().clone()
        return found

    @torch.no_grad()
    def rebase(self) -> None:
        """Takes the weights as they are now for x, y and z; clocks and second moments stay.

        For weights that someone else wrote (a merge, an EMA copy, load_state_dict) and that are to
        be trained on. Works in both modes and does not change the mode.

        Example:
            >>> import sftorch, torch
            >>> p = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = sftorch.SGDScheduleFree([p])
            >>> optimizer.eval()
            >>> p.data.zero_()
            tensor([0., 0.])
            >>> optimizer.rebase()  # train() would raise without it, once there were steps
            >>> optimizer.train()
        """
        self._loaded = None
        for group in self.param_groups:
            for p in self._started(group):
                self._rebase(p, group)
        self._is_half_stepped = False

    def _rebase(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state.pop("y", None)
        if not self._books(group)["train_mode"]:
            state["y"] = p.detach().clone(memory_format=torch.preserve_format)
        for name in ("x", "z"):
            if name in state:
                state[name].copy_(p)
        for name in (forms.Y_REST, "gap"):
            if name in state:
                state[name].zero_()

    def state_dict(self) -> dict[str, Any]:
        """As any Schedule-Free optimizer's; while `ship_x` is on, that of eval mode: it goes with x."""
        if not self._ships_x:
            return super().state_dict()
        with self.evaluation():
            return super().state_dict()

    def _ship_x(self, more: int = 0) -> None:
        """Counts the models whose state dicts give x, and says who knows it as long as there is one."""
        self._ships_x += more
        for index, group in enumerate(self.param_groups if self._ships_x or more else ()):
            for p in group["params"]:
                if self._ships_x:
                    SHIPPED[p] = (weakref.ref(self), index)
                else:
                    SHIPPED.pop(p, None)

    def _trains_at_y(self) -> bool:
        """Tells whether parameters hold y, and not x."""
        books = [self._books(group) for group in self.param_groups]
        return any(of["train_mode"] and of["k"] for of in books)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self.param_groups:
            unshipped.watch(self)
        super().add_param_group(param_group)
        self._ship_x()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_ships_x": self._ships_x}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        unshipped.watch(self)
        self._ship_x()

    def _wanted(self, group: dict[str, Any]) -> str:
        return "y" if self._books(group)["train_mode"] else "x"

    def _settle_beta(
        self, group: dict[str, Any], beta: float | None = None, moved: Collection[Tensor] = ()
    ) -> None:
        """Moves y to a beta if another one built it, so that x stays; stores x at beta = 0."""
        beta = self._beta(group) if beta is None else beta
        changed = self._y_beta(group) != beta
        for p in self._started(group) if changed or beta == 0 else []:
            if p in moved or (self._ahead and p in self._ahead):
                continue
            state = self.state[p]
            x = self._x(p, group)
            if changed:
                forms.move_y_(p, state, x, beta)
                state.pop("x", None)
            if beta == 0 and "x" not in state:
                state["x"] = x.clone()
        self._books(group)["y_beta"] = beta

    def _x(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Returns the x that a parameter's y leads to, in z's dtype; in eval mode y lies aside."""
        return like(p, self._x_of_part(p, group))

    def _x_of_part(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Returns the same for the part of a DTensor."""
        state = parts_of(self.state[p])
        return forms.x_from_y(forms.y_of(part(p), state), state, self._y_beta(group))

    def _x_and_y(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self._wanted(group) == "y":
            return self._x(p, group).to(p.dtype), p
        if "y" not in self.state[p]:  # an eval-mode checkpoint of schedulefree
            return super()._x_and_y(p, group)
        return p if self._holds_x(p, group) else self._x(p, group).to(p.dtype), self.state[p]["y"]

    def _require_untouched(self, groups: list[dict[str, Any]], known: Collection[int] = ()) -> None:
        changed = []
        for group in groups:
            untouched = known or {id(row.p) for row in _Flip(self, group).held()}
            for index, p in enumerate(group["params"]):
                aside = id(p) not in untouched and "y" in self.state.get(p, {})
                if aside and not is_fake(p) and not self._holds_x(p, group):
                    changed.append((index, p))
        if changed:
            index, p = changed[0]
            raise RuntimeError(
                f"weights must stay x while in eval mode, got other values in {len(changed)} parameter(s), "
                f"the first at index {index} of its group with shape {tuple(p.shape)}: something "
                "(load_state_dict, an EMA copy, a merge) wrote to them. Call optimizer.rebase() to go on "
                "from the new weights as x and z, or put the old ones back, and then optimizer.train()"
            )

    def _holds_x(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Tells whether a parameter still holds x, to the rounding that another device may do differently."""
        x, state, p = self._x_of_part(p, group), parts_of(self.state[p]), part(p)
        y = forms.y_of(p, state)
        p, x, y, z = (iterates.as_real(tensor) for tensor in (p, x, y, forms.z_of(y, state)))
        reach = (y - z).abs() / (self._y_beta(group) or 1.0)
        slack = 8 * torch.finfo(z.dtype).eps * (y.abs() + reach)
        # A 16-bit parameter holds x rounded, so it may be off by an ulp, but only next to a tie.
        near = (p >= (x - slack).to(p.dtype)) & (p <= (x + slack).to(p.dtype))
        return bool((near | (p == x.to(p.dtype)) | (p.isnan() & x.isnan())).all())


class _Row(NamedTuple):
    """A parameter, its state, and where its y lies aside, or is to lie, or its x."""

    p: Tensor
    state: dict[str, Any]
    third: Tensor


class _Flip:
    """Goes between y and x in one pass over memory, by the native kernel or else by lists, where it can.

    That is a group's parameters that have the dtype of z. Lists go in groups of bounded size, and so does
    what is looked at before it is written to: from the cache, writing costs less.
    """

    def __init__(self, optimizer: TrainEvalOptimizer, group: dict[str, Any]):
        beta, state = optimizer._y_beta(group), optimizer.state
        found = [(p, state.get(p, {})) for p in group["params"]]
        self._started = [(p, of_p) for p, of_p in found if forms.has_started(of_p)]
        self.back: list[_Row] = []  # of parameters that hold y again
        self._written: list[Columns] = []
        self._native = group.get("fused") is not False and not isinstance(build.find(), str)
        self._share = 1.0 / beta - 1.0 if beta else None
        if group.get("foreach") is False:
            self._share = None

    def left(self, rows: list[_Row]) -> list[Tensor]:
        """Returns the parameters with a state that are not among those of some rows."""
        if len(rows) == len(self._started):
            return []
        done = {id(row.p) for row in rows}
        return [p for p, _ in self._started if id(p) not in done]

    def to_new(self, kind: Kind, kept: Mapping[int, Tensor]) -> list[_Row]:
        """Returns rows with new tensors: x by RECOVER; by PUT_ASIDE y, and the parameter becomes x.

        Args:
            kind: one of these two.
            kept: id of a parameter -> a tensor that may be taken for its new one.
        """
        ready, columns = self._columns(kept)
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

    def held(self) -> list[_Row]:
        """Returns the rows with y put aside if all of them hold x bit for bit, else none."""
        ready, columns = self._columns()
        return [] if any(self._run(Kind.HOLDS, some) for some in columns) else ready

    def put_back(self) -> None:
        """Puts back y where all parameters hold x bit for bit; else nothing has changed."""
        ready, columns = self._columns()
        at_once = not any(
            row.p.is_cuda for row in ready
        )  # a look waits for the device: there, once before all
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
            if not self._native or _all_equal(ps, ys):
                self._run(Kind.RECOVER, (ys, zs, ps))
        self.back, self._written = [], []

    def _columns(self, kept: Mapping[int, Tensor] | None = None) -> tuple[list[_Row], list[Columns]]:
        """Returns the rows that can be walked, and the same as lists, of one dtype and device each.

        Args:
            kept: id of a parameter -> what may be its third tensor, which is a new one else; None takes the
                y that lies aside.
        """
        rows = []
        for p, state in self._started if self._share is not None else ():
            z, third = state.get("z"), state.get("y") if kept is None else kept.get(id(p))
            if z is not None and z.dtype == p.dtype and (third is not None or kept is not None):
                rows.append(_Row(p, state, _empty_like(p) if third is None else third))
        columns = _columns_of(rows)
        if call.all_alike(columns):
            return rows, self._grouped(columns)
        columns = _reals_of(rows)
        fits = call.alike if self._native else _may_be_listed
        kinds: dict[Any, list[_Row]] = {}
        for row, (y, z, third) in zip(rows, zip(*columns, strict=True), strict=True):
            if kept is not None and not fits(y, third):  # it was kept of another parameter
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
        # The same doubles as in iterates.recover_x, rounded to the tensors' dtype by both.
        if self._native:
            numbers = (*call.ZEROS[: call.NUMBERS.index("k1")], self._share)
            return call.Job(kind).run({"y": ys, "z": zs, "x": thirds}, numbers)
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


def _equal(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    """Tells which tensors on a device are equal, with one wait; NaN is not."""
    differ: list[bool] = torch.stack([(a != b).any() for a, b in zip(first, second, strict=True)]).tolist()
    return [not one for one in differ]


def _empty_like(p: Tensor) -> Tensor:
    return torch.empty_like(p, requires_grad=False)


def _copied(p: Tensor, kept: Tensor | None) -> Tensor:
    """Returns a copy of a parameter, in what was kept if that is still like it."""
    if kept is not None and _kind_of(kept) == _kind_of(p.detach()):
        return kept.copy_(p)
    return p.detach().clone(memory_format=torch.preserve_format)


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride(),
        tensor.is_neg(),
        tensor.is_conj(),
    )


def _columns_of(rows: Sequence[_Row]) -> Columns:
    """Returns the parts of the parameters of some rows, of their z, and of the third tensors."""
    thirds = parts([row.third for row in rows])
    return parts([row.p for row in rows]), parts([row.state["z"] for row in rows]), thirds


def _reals_of(rows: Sequence[_Row]) -> Columns:
    """Returns the same, complex ones as pairs of reals."""
    ys, zs, thirds = map(_reals, _columns_of(rows))
    return ys, zs, thirds


def _reals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parts of tensors, complex ones as pairs of reals."""
    found = parts(tensors)
    return [iterates.as_real(t) for t in found] if any(t.is_complex() for t in found) else found
