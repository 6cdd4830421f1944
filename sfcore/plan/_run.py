"""What a configuration comes to: steps, warm-up, and lr and c at every step (S2 to S5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sfcore import averaging
from sfcore.hyperparameters import weighed
from sfcore.plan import _fields, _schedules
from sfcore.plan._config import Config
from sfcore.plan._tables import SCHEDULERS, OptimizerKind, SchedulerKind, optimizer_kind

_UNKNOWN_LENGTH = 1000
_LONGEST = 10**7


@dataclass(frozen=True)
class Run:
    """A configuration with everything that follows from it, for the rules to ask."""

    config: Config

    @cached_property
    def optimizer(self) -> str:
        """The optimizer's name as given."""
        return str(self.config.get("optimizer"))

    @cached_property
    def kind(self) -> OptimizerKind:
        """The optimizer's family."""
        return optimizer_kind(self.optimizer)

    @cached_property
    def scheduler_name(self) -> str | None:
        """The scheduler's name as given, without what follows a colon; None without one or for a class."""
        if _fields.is_set(self.config.get("scheduler_class")):
            return None
        name = self.config.get("scheduler")
        return str(name).split(":")[0].lower() if _fields.is_set(name) and name != "none" else None

    @cached_property
    def scheduler(self) -> SchedulerKind | None:
        """The scheduler, where it is known by name."""
        return SCHEDULERS.get(self.scheduler_name or "")

    @cached_property
    def ignored(self) -> bool:
        """Whether the trainer ignores the scheduler, because the optimizer's name ends in ScheduleFree."""
        return self.config.source.dummy_scheduler and self.optimizer.lower().endswith("schedulefree")

    @cached_property
    def accumulation(self) -> int:
        return _fields.whole(self.config.get("accumulation")) or 1

    @cached_property
    def devices(self) -> int:
        return _fields.whole(self.config.get("devices")) or 1

    @cached_property
    def micro_steps_per_epoch(self) -> int | None:
        """Micro-batches of one epoch on each device."""
        samples, batch = (_fields.whole(self.config.get(name)) for name in ("samples", "batch_size"))
        return None if samples is None else math.ceil(samples / ((batch or 1) * self.devices))

    @cached_property
    def total_steps(self) -> int | None:
        """Optimizer steps: as given, or epochs of the data after accumulation; sd-scripts' epochs win."""
        given = _fields.whole(self.config.values.get("total_steps"))
        epochs = self.config.get("epochs")
        wins = self.config.source.dummy_scheduler and epochs is not None
        if given and not wins:
            return given
        if isinstance(epochs, int | float) and 0 < epochs < math.inf:
            if self.micro_steps_per_epoch is None:
                return None
            steps = epochs * math.ceil(self.micro_steps_per_epoch / self.accumulation)
            return math.ceil(steps) if steps < math.inf else None
        return given or _fields.whole(self.config.get("total_steps"))

    @cached_property
    def epochs(self) -> float | None:
        """Passes through the data: from the steps where the data is known, else as given."""
        if self.micro_steps_per_epoch and self.total_steps:
            return self.total_steps * self.accumulation / self.micro_steps_per_epoch
        given = None if self.total_steps else self.config.get("epochs")
        return float(given) if isinstance(given, int | float) else None

    @cached_property
    def scheduler_warmup(self) -> float:
        """The warm-up given to the scheduler, in optimizer steps; NaN for a part of an unknown run."""
        get = self.config.values.get
        steps, fraction = get("scheduler_warmup_steps"), get("scheduler_warmup_fraction")
        if steps:
            return float(steps) / (self.devices if self.config.source.steps_per_process else 1)
        fraction = fraction or (get("scheduler_warmup_percent") or 0) / 100
        if not fraction:
            return 0.0
        return math.nan if self.total_steps is None else float(math.ceil(fraction * self.total_steps))

    @cached_property
    def scheduler_acts(self) -> bool:
        """Whether the scheduler ramps the lr."""
        uses = self.scheduler is None or "warmup" in self.scheduler.uses
        return self.scheduler_warmup != 0 and not self.ignored and self.has_schedule and uses

    @cached_property
    def has_schedule(self) -> bool:
        """Whether there is any scheduler, known or not."""
        return self.scheduler_name is not None or _fields.is_set(self.config.get("scheduler_class"))

    @cached_property
    def own_warmup(self) -> float:
        """The warm-up that the optimizer itself is given, as it is given; 0 for those without one."""
        value = self.config.values.get("warmup_steps", 0)
        return float(value) if "warmup_steps" in self.kind.uses and value > 0 else 0.0

    @property
    def owner(self) -> str:
        """Who ramps the lr: "optimizer", "scheduler", "both" or "nobody"."""
        if self.own_warmup and self.scheduler_acts:
            return "both"
        return "optimizer" if self.own_warmup else "scheduler" if self.scheduler_acts else "nobody"

    @cached_property
    def warmup(self) -> float:
        """Optimizer steps until the full lr."""
        return max(self.own_warmup, self.scheduler_warmup if self.scheduler_acts else 0.0)

    @cached_property
    def lr(self) -> float:
        """The full step size."""
        default = getattr(self.kind.rules, "lr", 1e-3)
        return float(self.config.get("lr", default))

    @cached_property
    def lr_t(self) -> np.ndarray:
        """The step size at every step (S2), float64 of shape (steps,)."""
        acts = self.has_schedule and not self.ignored
        known = not acts or self.scheduler_name in _schedules.COURSES
        needs_total = acts and (
            self.scheduler is None
            or "total_steps" in self.scheduler.needs
            or math.isnan(self.scheduler_warmup)
        )
        if not known or (self.total_steps is None and needs_total) or not math.isfinite(self.lr):
            return np.empty(0)
        steps = min(self.total_steps or _UNKNOWN_LENGTH, _LONGEST)
        step = np.arange(steps, dtype=np.float64)
        lr = np.full(steps, self.lr)
        if acts:
            lr *= _schedules.factors(self, step)
        if self.kind.law is None:
            return lr
        options = self.kind.law.defaults | self.config.values | {"warmup_steps": self.own_warmup}
        return lr * averaging.STEP_SIZES[self.kind.law.step_size].factor(step + 1, options, np)  # S2

    @cached_property
    def c(self) -> np.ndarray:
        """The averaging weight at every step (S3 to S5), float64 of shape (steps,)."""
        if not self.kind.schedule_free:
            return np.empty(0)
        options = weighed(self.config.values)
        r, power, prior = options["r"], options["weight_lr_power"], _fields.whole(options["prior_steps"]) or 0
        t = np.arange(1, len(self.lr_t) + 1, dtype=np.float64)  # S1
        lr_max = np.maximum.accumulate(self.lr_t)  # S3
        # c is a ratio of weights: in units of the last age and of the largest lr, none is too large.
        age, lr = max(len(t) + prior, 1), max(lr_max.max(initial=0.0), self.lr) or 1.0
        earlier = averaging.power(np.arange(1.0, min(prior, _LONGEST) + 1) / age, r, np).sum() if r else prior
        before = averaging.prior_weight(earlier, np.float64(self.lr / lr), power, np)
        weight = averaging.step_weight((t + prior) / age, lr_max / lr, r, power, 0, np) + np.zeros_like(t)
        return averaging.averaging_weight(weight, np.cumsum(weight) + before, np)  # S4, S5
