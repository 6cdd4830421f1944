"""Optimizers whose parameters hold y while training and x in eval mode: the step and the two modes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sftorch import _checks, _iterates
from sftorch._core import Batch, ScheduleFreeOptimizer, as_real


class TrainEvalOptimizer(ScheduleFreeOptimizer):
    """Abstract: `step`, `train`, `eval`, and x without touching the weights.

    In eval mode a parameter's y lies in `state[p]["y"]`, so that `train()` puts back the same bits.
    """

    @abstractmethod
    def _step_groups(self) -> None:
        """Moves every parameter that has a gradient by one step; everything has been checked."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step; `p.grad` is read and never written.

        Args:
            closure: optional; reevaluates the model at y and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: in eval mode, and for gradients that are not dense; nothing has moved then.
        """
        self._require_train_mode()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._group_lr(group)
            _checks.check_gradients(group["params"])
        for group in self.param_groups:
            self._settle_beta(group)
        self._step_groups()
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        """Puts x into the parameters: for evaluating, saving and shipping the model. Idempotent."""
        for group in self.param_groups:
            if self.books(group)["train_mode"]:
                for p in self._started(group):
                    x = self._x(p, group)
                    self.state[p]["y"] = p.detach().clone(memory_format=torch.preserve_format)
                    p.copy_(x)
                self.books(group)["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Puts y back into the parameters, bit for bit as it was before `eval()`. Idempotent.

        Raises:
            RuntimeError: if the weights were written to in eval mode; nothing has changed then.
        """
        resting = [group for group in self.param_groups if not self.books(group)["train_mode"]]
        self._require_untouched(resting)
        for group in resting:
            for p in self._started(group):
                y = self.state[p].pop("y", None)
                if y is None:  # an eval-mode checkpoint of another program, which keeps no y
                    y = _iterates.interpolate(p, self.state[p]["z"], self._y_beta(group))
                p.copy_(y)
            self.books(group)["train_mode"] = True

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
        training = any(self.books(group)["train_mode"] for group in self.param_groups)
        self.eval()
        try:
            yield
        finally:
            if training:
                self.train()

    @torch.no_grad()
    def eval_params(self) -> dict[Tensor, Tensor]:
        """Returns parameter -> x, as new tensors of the parameter's shape, dtype and device."""
        found = {}
        for group in self.param_groups:
            holds_y = self.books(group)["train_mode"]
            for p in group["params"]:
                x = self._x(p, group) if holds_y and "z" in self.state.get(p, {}) else p.detach()
                found[p] = x.to(p.dtype, copy=True)
        return found

    def eval_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Returns `model.state_dict()` with x in place of y: a copy, buffers included, to save or load.

        Args:
            model: the module whose parameters this optimizer holds; others are copied as they are.
        """
        x = self.eval_params()
        return {
            name: (x[value] if isinstance(value, Tensor) and value in x else _copied(value))
            for name, value in model.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def rebase(self) -> None:
        """Takes the weights as they are now for x, y and z; clocks and second moments stay.

        For weights that someone else wrote (a merge, an EMA copy, load_state_dict) and that are to
        be trained on. Works in both modes and does not change the mode.
        """
        for group in self.param_groups:
            for p in self._started(group):
                state = self.state[p]
                state["z"].copy_(p)
                if "x" in state:
                    state["x"].copy_(p)
                if "y" in state:
                    state["y"].copy_(p)

    def _started(self, group: dict[str, Any]) -> list[Tensor]:
        return [p for p in group["params"] if "z" in self.state.get(p, {})]

    def _require_train_mode(self) -> None:
        if not all(self.books(group)["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                "the optimizer must be in train mode for step(), got eval mode: "
                "call optimizer.train() before training and optimizer.eval() before evaluating or saving"
            )

    def _require_untouched(self, groups: list[dict[str, Any]]) -> None:
        changed = [
            (index, p)
            for group in groups
            for index, p in enumerate(group["params"])
            if "y" in self.state.get(p, {}) and not self._holds_x(p, group)
        ]
        if changed:
            index, p = changed[0]
            raise RuntimeError(
                f"weights must stay x while in eval mode, got other values in {len(changed)} parameter(s), "
                f"the first at index {index} of its group with shape {tuple(p.shape)}: something "
                "(load_state_dict, an EMA copy, a merge) wrote to them. Call optimizer.rebase() to go on "
                "from the new weights as x and z, or put the old ones back, and then optimizer.train()"
            )

    def _holds_x(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Tells whether a parameter still holds x; a state moved to another device may round differently."""
        state = self.state[p]
        y, z = state["y"].to(state["z"].dtype), state["z"]
        x = state["x"] if "x" in state else _iterates.recover_x(y, z, self._y_beta(group))
        x = x.to(p.dtype)
        if torch.equal(p, x):
            return True
        slack = 8 * torch.finfo(p.dtype).eps * (y.abs() + (y - z).abs() / (self._y_beta(group) or 1.0))
        return bool((((p - x).abs() <= slack) | (p.isnan() & x.isnan())).all())

    def _settle_beta(self, group: dict[str, Any]) -> None:
        """Moves y to the configured beta if another one built it, so that x stays."""
        beta = self._beta(group)
        if self._y_beta(group) != beta:
            for p in self._started(group):
                state, x = self.state[p], self._x(p, group)
                p.copy_(_iterates.interpolate(x, state["z"], beta) if beta else state["z"])
                state.pop("x", None)
                if beta == 0:
                    state["x"] = x
        self.books(group)["y_beta"] = beta

    def _finish_batch(self, batch: Batch) -> None:
        """Stores the batch's clock, and S8 for the parameters that keep x (beta = 0)."""
        for p in batch.params:
            state = self.state[p]
            self._set_clock(p, batch.clock)
            if "x" in state:
                state["x"].add_(batch.c * (state["z"] - state["x"]))  # S8


class DirectedOptimizer(ScheduleFreeOptimizer):
    """Abstract: optimizers that have a direction of their own (S6), one tensor or a list at a time."""

    @abstractmethod
    def _direction_single(
        self, grad: Tensor, buffers: dict[str, Tensor], group: dict[str, Any], t: int
    ) -> Tensor:
        """Returns S6's direction of one gradient, which it does not write to; updates the buffers."""

    @abstractmethod
    def _direction_foreach(
        self, grads: list[Tensor], buffers: dict[str, list[Tensor]], group: dict[str, Any], t: int
    ) -> list[Tensor]:
        """The same for a list."""

    def _gathered(self, group: dict[str, Any], batch: Batch) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]:
        """Returns real views of a batch's gradients (ascent already negated), z and buffers."""
        zs = [as_real(self.state[p]["z"]) for p in batch.params]
        grads = [as_real(p.grad).to(z.dtype) for p, z in zip(batch.params, zs, strict=True) if p.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        buffers = {name: [as_real(self.state[p][name]) for p in batch.params] for name in self._buffers(group)}
        return grads, zs, buffers


class YAtRest(TrainEvalOptimizer, DirectedOptimizer):
    """Abstract: the usual form, parameters hold y between steps."""

    def _step_groups(self) -> None:
        for group in self.param_groups:
            lr = self._group_lr(group)
            for batch in self._batches(group, lr):
                self._advance(group, batch)
                self._finish_batch(batch)
            self._finish(group, lr)

    def _advance(self, group: dict[str, Any], batch: Batch) -> None:
        grads, zs, buffers = self._gathered(group, batch)
        ys = [as_real(p) for p in batch.params]
        lr_t, decay, c, beta = batch.lr_t, group["weight_decay"], batch.c, self._beta(group)
        if group["foreach"] and all(y.dtype == z.dtype for y, z in zip(ys, zs, strict=True)):
            directions = self._direction_foreach(grads, buffers, group, batch.clock.step)
            _iterates.advance_foreach_(ys, zs, directions, lr_t, decay, c, beta)
            return
        for i, (y, z, grad) in enumerate(zip(ys, zs, grads, strict=True)):
            own = {name: tensors[i] for name, tensors in buffers.items()}
            direction = self._direction_single(grad, own, group, batch.clock.step)
            _iterates.advance_single_(y, z, direction, lr_t, decay, c, beta)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
