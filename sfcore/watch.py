"""The first steps after a restart: do they go on as the last steps before it did? Numbers only, no framework.

A twin records its steps with `Recorder`, saves `Recorder.recent()` in `Meta.recent`, and feeds `Watch`
for `WATCHED_STEPS` optimizer steps after a restart. What counts as a jump was measured on uninterrupted
runs (SGD, AdamW and RAdam on handwritten digits, batches of 4 to 256, warm-up 0, 5 and 100, restarts
after 1 to 570 steps: 2,200 in all by whole norms, 756 by `sfcore.samples`), of which none reaches a limit;
the largest ratio seen is beside each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from sfcore import checks

_NUMBER = checks.optional(checks.NUMBER)
_RECENT = checks.optional(checks.MAPPING, "pass Meta.recent of the checkpoint")
_WEIGHTS = frozenset({"lr", "weight_lr_power", "r", "weight_lr", "refined_c", "window", "window_rule"})


def _explain(found: set[str], changed: frozenset[str], fresh: frozenset[str]) -> tuple[str, str]:
    """Returns (likeliest cause, fix).

    Args:
        found: what jumped, of "c", "update", "moved", "loss".
        changed: hyperparameters that the configuration changed.
        fresh: state that started anew.
    """
    if "c" in found and changed & _WEIGHTS:
        names = " and ".join(sorted(changed & _WEIGHTS))
        return (
            f"the average weighs the new steps far above the old ones, by the changed {names}",
            "go back to the saved value, or change it in smaller steps",
        )
    if "c" in found:
        return (
            "the averaging began anew and throws the loaded weights away",
            "load the optimizer state with the weights, or pass prior_steps (sfcore.restart has the default)",
        )
    if found & {"update", "moved"}:
        return _explain_update(changed, fresh)
    return (
        "the data or the model is not what it was: other normalisation, BatchNorm statistics, dropout",
        "evaluate the loaded weights once before training, and compare",
    )


def _explain_update(changed: frozenset[str], fresh: frozenset[str]) -> tuple[str, str]:
    if changed & {"lr", "warmup_steps"}:
        return "the step size is not what it was", "go back to the saved lr, or ramp it with warmup_steps"
    if changed & {"accumulation", "batch_size"}:
        return (
            "the gradients are scaled by another number of micro-batches",
            "divide the loss by the number of micro-batches, and restore the saved accumulation if you can",
        )
    if fresh:
        return (
            f"{', '.join(sorted(fresh))} started anew, so the first steps are those of a new optimizer",
            "load the full state, or pass prior_steps and a few warmup_steps",
        )
    return (
        "the gradients are not what they were: other data, loss scaling or clipping",
        "compare the gradient norm with that of the run before",
    )


WATCHED_STEPS = 20
C_JUMP = 2.0  # seen: 1.00, because c falls
UPDATE_JUMP = 7.0  # seen: 5.04 times the largest of the 20 steps before (SGD, batches of 4); a sum of 8 is 8
MOVE_JUMP = 3.0  # seen: 1.27 times as far as the largest of the 20 steps before would go
LOSS_JUMP = 2.0  # seen: 1.23, mean of at least 5 losses over the largest of 20
ENOUGH = 5  # steps before, and losses after, below which updates and losses are not compared
# After a start from weights alone: the largest share of them that one step may replace.
C_ALONE = 0.05


class Recorder:
    """Remembers the last `WATCHED_STEPS` optimizer steps, for the record of a checkpoint.

    Example:
        >>> from sfcore.watch import Recorder
        >>> recorder = Recorder()
        >>> recorder.add(c=0.5, update_norm=0.1, x_step=0.05, loss=2.0)
        >>> recorder.add(c=0.25, update_norm=0.2, x_step=0.05, loss=1.0)
        >>> recorder.recent()
        {'steps': 2, 'c': 0.25, 'lr': None, 'update_norm': 0.2, 'x_step': 0.05, 'loss': 2.0}
    """

    def __init__(self) -> None:
        self._steps: deque[dict[str, float | None]] = deque(maxlen=WATCHED_STEPS)

    def add(
        self,
        *,
        c: float,
        lr: float | None = None,
        update_norm: float | None = None,
        x_step: float | None = None,
        loss: float | None = None,
    ) -> None:
        """Notes one optimizer step, however many micro-batches it had.

        Args:
            c: its averaging weight.
            lr: its step size, warm-up included, so that a ramp is not taken for a jump.
            update_norm: norm of the change of z, all parameters together.
            x_step: norm of the change of x; `step_of_x` gives it without a copy of x.
            loss: the training loss of the step, if the caller has it.
        """
        _require_numbers(c, lr=lr, update_norm=update_norm, x_step=x_step, loss=loss)
        self._steps.append({"c": c, "lr": lr, "update_norm": update_norm, "x_step": x_step, "loss": loss})

    def recent(self) -> dict[str, Any]:
        """Returns JSON for `Meta.recent`: the last c and lr, the largest of the others, None if unknown."""
        if not self._steps:
            return {}
        last = {name: self._steps[-1][name] for name in ("c", "lr")}
        largest = {
            name: _largest([step[name] for step in self._steps]) for name in ("update_norm", "x_step", "loss")
        }
        known = {name: value if _finite(value) else None for name, value in (last | largest).items()}
        return {"steps": len(self._steps), **known}


def step_of_x(c: float, gap: float) -> float:
    """Returns how far the last step moved x: S8 says x' - x = c / (1 - c) (z' - x').

    Args:
        c: averaging weight of the step.
        gap: norm of z - x after it.

    Returns:
        NaN for c = 1, where x is z and its way is not in the state.
    """
    checks.require(TypeError, c=(checks.NUMBER, c), gap=(checks.NUMBER, gap))
    return c / (1 - c) * gap if c < 1 else math.nan


def _require_numbers(c: Any, **others: Any) -> None:
    """Raises TypeError unless c is a number, NaN included, and each of the others one or None."""
    known = {name: (_NUMBER, value) for name, value in others.items()}
    checks.require(TypeError, c=(checks.NUMBER, c), **known)


@dataclass(frozen=True)
class Report:
    """What was seen after a restart, once.

    Attributes:
        step: optimizer steps after the restart.
        findings: a sentence for each number that jumped.
        cause: the likeliest.
        fix: what to do about it.
    """

    step: int
    findings: tuple[str, ...]
    cause: str
    fix: str

    def __str__(self) -> str:
        found = "; ".join(self.findings)
        return f"{self.step} step(s) after the restart {found}. Likely {self.cause}: {self.fix}"


class Watch:
    """Compares the first steps after a restart with those before; pure numbers, one report at most.

    Args:
        recent: `Meta.recent` of the checkpoint; None for a start from weights alone.
        changed: names of hyperparameters that the configuration changed, as "lr" or "accumulation".
        fresh_state: state that was not in the checkpoint and starts anew, as "v" or "clock"; all of it for a
            start from weights alone.

    Example:
        >>> from sfcore.watch import Watch
        >>> watch = Watch(None)
        >>> print(watch.observe(c=1.0).cause)
        the averaging began anew and throws the loaded weights away
    """

    def __init__(
        self,
        recent: Mapping[str, Any] | None,
        *,
        changed: Collection[str] = (),
        fresh_state: Collection[str] = (),
    ):
        checks.require(
            TypeError,
            recent=(_RECENT, recent),
            changed=(checks.NAMES, changed),
            fresh_state=(checks.NAMES, fresh_state),
        )
        self._alone, self._recent = recent is None, dict(recent or {})
        self._changed, self._fresh = frozenset(changed), frozenset(fresh_state)
        self._losses: list[float] = []
        self._moved = 0.0
        self.step = 0
        self.report: Report | None = None

    @property
    def done(self) -> bool:
        """True when nothing more is to be observed: after the report, or after `WATCHED_STEPS`."""
        return self.report is not None or self.step >= WATCHED_STEPS

    def observe(
        self,
        *,
        c: float,
        lr: float | None = None,
        moved: float | None = None,
        update_norm: float | None = None,
        loss: float | None = None,
    ) -> Report | None:
        """Takes one optimizer step, however many micro-batches it had; returns the report when it is made.

        Args:
            c: averaging weight of the step.
            lr: its step size, warm-up included.
            moved: norm of x minus the loaded x, all parameters together.
            update_norm: norm of the change of z.
            loss: the training loss of the step.
        """
        _require_numbers(c, lr=lr, moved=moved, update_norm=update_norm, loss=loss)
        if self.done:
            return None
        self.step += 1
        self._moved = moved if moved is not None else self._moved
        if loss is not None:
            self._losses.append(loss)
        ramp = self._ramp(lr)
        jumped = {
            "c": self._c(c),
            "update": _jump("the update", update_norm, self._of("update_norm", ENOUGH), UPDATE_JUMP * ramp),
            "moved": _jump("x's way from the loaded weights", moved, self._way(), MOVE_JUMP * ramp),
            "loss": self._loss(),
        }
        found = {name: text for name, text in jumped.items() if text}
        if found:
            self.report = Report(
                self.step, tuple(found.values()), *_explain(set(found), self._changed, self._fresh)
            )
        return self.report

    def metrics(self) -> dict[str, float]:
        """Returns what to log: steps watched, how far x moved, and whether anything jumped (0 or 1)."""
        return {
            "restart_steps": float(self.step),
            "restart_moved": self._moved,
            "restart_jump": float(self.report is not None),
        }

    def _of(self, name: str, enough: int = 0) -> float | None:
        """Returns a number of the steps before, if there were so many of them."""
        value = self._recent.get(name)
        return value if _finite(value) and self._recent.get("steps", 0) >= enough else None

    def _ramp(self, lr: float | None) -> float:
        """Returns the growth of the step size since the steps before, unless the configuration changed it."""
        before = self._of("lr")
        if lr is None or not before or self._changed & {"lr", "warmup_steps"}:
            return 1.0
        return max(1.0, lr / before)

    def _way(self) -> float | None:
        step = self._of("x_step")
        return None if step is None else step * self.step

    def _c(self, c: float) -> str | None:
        if self._alone and c > C_ALONE:
            return f"the averaging weight c is {c:.3g}, the share of x that one step replaces"
        return _jump("the averaging weight c", c, self._of("c"), C_JUMP)

    def _loss(self) -> str | None:
        if len(self._losses) < ENOUGH:
            return None
        return _jump(
            "the mean loss", math.fsum(self._losses) / len(self._losses), self._of("loss"), LOSS_JUMP
        )


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if _finite(value)), default=None)


def _jump(what: str, now: float | None, before: float | None, limit: float) -> str | None:
    """Returns a sentence if `now` is no number, or more than `limit` times what it was."""
    if now is not None and not math.isfinite(now):
        return f"{what} is {now}"
    # Nothing moves in RAdam's first steps and at lr = 0; whatever comes after is no multiple of it. Nor is
    # a loss one of a negative loss.
    if now is None or before is None or before <= 0 or now <= limit * before:
        return None
    return f"{what} is {now:.3g}, {now / before:.3g} times the {before:.3g} before"
