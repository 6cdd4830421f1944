"""Optimizers whose parameters hold y while training and x in eval mode: the two modes, and x on demand."""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sftorch.kernels.call import Kind
from sftorch.law import iterates
from sftorch.law.parts import PLAIN, is_fake, like, note_written, part, parts, parts_of
from sftorch.state import arguments, forms, unshipped
from sftorch.state.compiler import uncompiled, uncompiled_itself
from sftorch.state.flips import Flip, Walk
from sftorch.state.meshes import gather_anew, together
from sftorch.state.state_dict import ScheduleFreeOptimizer, before_step, settle

# Parameter -> the optimizer that knows its x, and the index of its group there, while `ship_x` is on.
SHIPPED: WeakIdKeyDictionary = WeakIdKeyDictionary()
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
    _walks: dict[int, Walk | None] | None = None  # id of a group -> what the last flip walked

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
                flip = self._flip(group)
                rows = flip.to_new(Kind.PUT_ASIDE, kept)
                torch.autograd.graph.increment_version([row.p for row in rows])
                for row in rows:
                    row.state["y"] = row.third
                self._walks = (self._walks or {}) | {id(group): flip.walk}
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

        What tells that nobody wrote to the weights is x, made of y and z once more; or, with the native
        kernel, 64 bits of each 512 elements, which `eval()` left in memory and in no state dict.

        Raises:
            RuntimeError: if the weights were written to in eval mode, or weights and state were loaded
                that do not belong together; nothing has changed then.
        """
        settle(self, train_mode=True)
        resting = [group for group in self.param_groups if not self._books(group)["train_mode"]]
        if not resting:
            return
        flips: list[Flip] = []
        try:
            for group in resting:
                flips.append(self._flip(group))
                flips[-1].put_back()
            with together(self._params()):
                if any(flip.left(flip.back) for flip in flips):
                    self._require_untouched(resting, {id(row.p) for flip in flips for row in flip.back})
        except BaseException:
            for flip in flips:
                flip.undo()
            raise
        kept: dict[int, Tensor] = {}
        self._walks = {}
        for group, flip in zip(resting, flips, strict=True):
            self._walks[id(group)] = flip.walk
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
                flip = self._flip(group)
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
        self._walks = None  # with the old state, which may go
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

    def _flip(self, group: dict[str, Any]) -> Flip:
        return Flip(group, self.state, self._y_beta(group), (self._walks or {}).get(id(group)))

    def _require_untouched(self, groups: list[dict[str, Any]], known: Collection[int] = ()) -> None:
        changed = []
        for group in groups:
            untouched = known or {id(row.p) for row in self._flip(group).held()}
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
