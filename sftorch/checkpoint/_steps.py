"""The last steps of an optimizer, and the first after a restart, as samples of x and z.

The mirror of `sfjax/checkpoint/_steps.py`; here a hook sees every step, and the optimizer is its owner.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sfcore import samples
from sfcore.samples import Restart, Sample
from sfcore.watch import WATCHED_STEPS
from sftorch.law import iterates
from sftorch.law.parts import part, parts_of
from sftorch.state import forms
from sftorch.state.modes import TrainEvalOptimizer
from sftorch.state.state_dict import ScheduleFreeOptimizer

_log = logging.getLogger("sftorch.checkpoint")
Row = tuple[int, float, float, Tensor, Tensor, float | None]


class Steps:
    """Samples of the last steps, taken by a hook that stays; a few thousand entries a step.

    Args:
        optimizer: to be looked at; becomes the owner.
    """

    def __init__(self, optimizer: ScheduleFreeOptimizer):
        params = optimizer._params()
        sizes = [part(p.detach()).numel() for p in params]
        self._entries = [
            (params[i], torch.from_numpy(entries).to(params[i].device))
            for i, entries in samples.positions(sizes)
        ]
        self._factor = samples.scale(sizes)
        self._rows: deque[Row] = deque([self._look(optimizer, None)], maxlen=WATCHED_STEPS + 1)
        self._losses: list[Tensor] = []
        self._restart: Restart | None = None
        self._hook = optimizer.register_step_post_hook(self._after_step)
        optimizer._watch = self

    def add_loss(self, loss: Any) -> None:
        """Notes the loss of a micro-batch of the coming step, or of the last one."""
        self._losses.append(torch.as_tensor(loss).detach().clone())  # the caller may write to it again

    def watch(
        self,
        optimizer: ScheduleFreeOptimizer,
        recent: Mapping[str, Any] | None,
        changed: Collection[str] = (),
        fresh: Collection[str] = (),
    ) -> None:
        """Begins with what a restart left; `recent`, `changed` and `fresh` are `sfcore.watch.Watch`'s."""
        self._losses.clear()
        self._rows.clear()
        self._rows.append(self._look(optimizer, None))
        self._restart = Restart(_sample(self._rows[-1]), self._factor, recent, changed, fresh)

    def metrics(self) -> dict[str, float]:
        """Returns restart_steps, restart_moved and restart_jump; {} before a restart."""
        return {} if self._restart is None else self._restart.metrics()

    def rows(self) -> list[Row]:
        """Returns the samples, to be passed to `recent` later, in another thread."""
        return list(self._rows)

    def recent(self, rows: list[Row]) -> dict[str, Any]:
        """Returns `Meta.recent`; waits for the last step."""
        return samples.recent([_sample(row) for row in rows], self._factor)

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        loss = None
        if self._losses:
            loss = sum(float(one) for one in self._losses) / len(self._losses)
            self._losses.clear()
        self._rows.append(self._look(optimizer, loss))
        if self._restart is not None and not self._restart.done:
            report = self._restart.observe(_sample(self._rows[-1]))
            if report is not None:
                _log.warning("%s", report)

    @torch.no_grad()
    def _look(self, optimizer: ScheduleFreeOptimizer, loss: float | None) -> Row:
        books = [optimizer._books(group) for group in optimizer.param_groups]
        owner = {p: group for group in optimizer.param_groups for p in group["params"]}
        pairs = [_iterates_at(optimizer, owner.get(p, {}), p, entries) for p, entries in self._entries]
        x, z = (torch.cat([one[i] for one in pairs]) if pairs else torch.zeros(0) for i in (0, 1))
        return (
            max(b["k"] for b in books),
            max(b["c"] for b in books),
            max(b["scheduled_lr"] for b in books),
            x,
            z,
            loss,
        )


def steps_of(optimizer: ScheduleFreeOptimizer) -> Steps:
    """Returns the steps of an optimizer, from now on if nobody has asked before."""
    if optimizer._watch is None:
        Steps(optimizer)
    watch: Steps = optimizer._watch
    return watch


def _sample(row: Row) -> Sample:
    step, c, lr, x, z, loss = row
    return Sample(step, c, lr, x.cpu().numpy(), z.cpu().numpy(), loss)


def _iterates_at(
    optimizer: ScheduleFreeOptimizer, group: dict[str, Any], p: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns some entries of x and z as flat real float32 or wider."""

    def taken(tensor: Tensor, rest: Tensor | None = None) -> Tensor:
        some = torch.take(part(tensor.detach()), entries)
        some = some if rest is None else forms.join(some, torch.take(part(rest), entries))
        some = some.to(torch.promote_types(some.dtype, torch.float32))
        return iterates.as_real(some).reshape(-1).cpu()

    state = optimizer.state.get(p, {})
    if not forms.has_started(state):
        held = taken(p)
        return held, held
    if not isinstance(optimizer, TrainEvalOptimizer):  # the closure forms hold x
        return taken(p, state.get(optimizer._rest)), taken(state["z"])
    y = taken(state.get("y", p), state.get(optimizer._rest))
    some = {name: taken(state[name]) for name in ("x", "z") if name in state}
    if "gap" in state:
        some["gap"] = taken(forms.gap_of(parts_of(state)))
    return forms.x_from_y(y, some, optimizer._y_beta(group)), forms.z_of(y, some)
