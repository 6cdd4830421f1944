"""What a configuration comes to: steps, warm-up, and lr and c at every step (S2 to S5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sfcore import averaging
from sfcore.hyperparameters import ScheduleFree, weighed
from sfcore.plan import _datasets, _sd_scripts
from sfcore.plan._config import Config, steps_of_state, trained_steps
from sfcore.plan._sd_scripts import SCRIPTS, Built, Script, built
from sfcore.plan._tables import SCHEDULERS, OptimizerKind, SchedulerKind, is_set, optimizer_kind, whole

_UNKNOWN_LENGTH = 1000
_LONGEST = 10**7
_BLOCK = 2**15  # steps computed together: what they need in between stays in the cache


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
        if is_set(self.config.get("scheduler_class")):
            return None
        name = self.config.get("scheduler")
        if not is_set(name) or name == "none":
            return None
        if self.config.source.dummy_scheduler:  # sd-scripts takes it as it is
            return "adafactor" if str(name).startswith("adafactor") else str(name)
        return str(name).split(":")[0].lower()

    @cached_property
    def scheduler(self) -> SchedulerKind | None:
        """The scheduler, where it is known by name."""
        return SCHEDULERS.get(self.scheduler_name or "")

    @cached_property
    def has_schedule(self) -> bool:
        """Whether there is any scheduler, known or not."""
        return self.scheduler_name is not None or is_set(self.config.get("scheduler_class"))

    @cached_property
    def ignored(self) -> bool:
        """Whether the trainer ignores the scheduler, because the optimizer's name ends in ScheduleFree."""
        return self.config.source.dummy_scheduler and self.optimizer.lower().endswith("schedulefree")

    @cached_property
    def accumulation(self) -> int:
        return whole(self.config.get("accumulation")) or 1

    @cached_property
    def devices(self) -> int:
        return whole(self.config.get("devices")) or 1

    @property
    def scheduler_devices(self) -> int:
        """How many steps the scheduler counts in one step of the optimizer."""
        return self.devices if self.config.source.steps_per_process else 1

    @cached_property
    def micro_steps_per_epoch(self) -> int | None:
        """Micro-batches of one epoch on each device: as said, or of sd-scripts' data, if it is here."""
        samples, batch = (whole(self.config.get(name)) for name in ("samples", "batch_size"))
        if samples is not None:
            return math.ceil(samples / ((batch or 1) * self.devices))
        found = _datasets.batches(self.config.raw) if self.config.source.dummy_scheduler else None
        return None if found is None else math.ceil(found / self.devices)

    @cached_property
    def total_steps(self) -> int | None:
        """Optimizer steps: as given, or epochs of the data after accumulation; sd-scripts' epochs win."""
        given = whole(self.config.values.get("total_steps"))
        epochs = self.config.get("epochs")
        wins = self.config.source.dummy_scheduler and epochs is not None
        if given and not wins:
            return given
        if isinstance(epochs, int | float) and 0 < epochs < math.inf:
            if self.micro_steps_per_epoch is None:
                return None
            steps = epochs * math.ceil(self.micro_steps_per_epoch / self.accumulation)
            return math.ceil(steps) if steps < math.inf else None
        return given or whole(self.config.get("total_steps"))

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
            return float(steps) / self.scheduler_devices
        fraction = fraction or (get("scheduler_warmup_percent") or 0) / 100
        if not fraction:
            return 0.0
        if self.total_steps is None:
            return math.nan
        if self.config.source.dummy_scheduler:  # int(), of the scheduler's own steps
            steps = fraction * self.total_steps * self.scheduler_devices
            return math.trunc(steps) / self.scheduler_devices if math.isfinite(steps) else steps
        return float(math.ceil(fraction * self.total_steps))

    @cached_property
    def script(self) -> Script | None:
        """The training script, where it is one of sd-scripts or musubi-tuner."""
        return SCRIPTS.get(str(self.config.get("script", ""))) if self.config.source.dummy_scheduler else None

    @cached_property
    def built(self) -> Built:
        """What sd-scripts makes of the optimizer's name."""
        return built(self.optimizer, self.script is not None and self.script.musubi)

    @cached_property
    def steps_done(self) -> int | None:
        """Optimizer steps that a state of sd-scripts has done, where it is known."""
        get, per_epoch = self.config.get, self.micro_steps_per_epoch
        if get("initial_step") is not None:
            return whole(get("initial_step"))
        if get("initial_epoch") is not None and per_epoch:
            return (int(get("initial_epoch")) - 1) * math.ceil(per_epoch / self.accumulation)
        return steps_of_state(str(get("resume"))) if get("resume") else None

    @cached_property
    def trained_steps(self) -> int | None:
        """Optimizer steps that the weights were trained for, if they are said, or in the file of a LoRA."""
        said = self.config.get("trained_steps")
        return whole(said) if said is not None else trained_steps(str(self.config.get("weights", "")))

    @property
    def is_resumed(self) -> bool:
        """Whether sd-scripts goes on from a state."""
        return self.config.source.dummy_scheduler and bool(self.config.get("resume"))

    @property
    def resumes_exactly(self) -> bool:
        """Whether it is run by the launcher of sd-scripts, which goes on where the state stands."""
        return bool(self.config.get("launched"))

    @cached_property
    def resumed(self) -> tuple[int, int] | None:
        """Micro-batches that a resumed run of sd-scripts trains on, and those that are left of the run."""
        batches, total, done = self.micro_steps_per_epoch, self.total_steps, self.steps_done
        if not (self.is_resumed and batches and total and done and done < total <= _LONGEST):
            return None
        an_epoch = math.ceil(batches / self.accumulation)

        def trained(updates: int) -> int:
            return updates // an_epoch * batches + updates % an_epoch * self.accumulation

        left = trained(total) - trained(done)
        if self.script is not None and not self.script.resumes:
            return trained(total), left  # it begins anew
        if self.resumes_exactly:
            return left, left
        skip = bool(self.config.get("skip_done"))
        return _sd_scripts.resumed(batches, self.accumulation, done, total, skip), left

    @cached_property
    def scheduler_acts(self) -> bool:
        """Whether the scheduler ramps the lr."""
        uses = self.scheduler is None or "warmup" in self.scheduler.uses
        return self.scheduler_warmup != 0 and not self.ignored and self.has_schedule and uses

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
        """Optimizer steps until the full lr; NaN for a part of an unknown run."""
        return float(np.maximum(self.own_warmup, self.scheduler_warmup if self.scheduler_acts else 0.0))

    @cached_property
    def lr(self) -> float:
        """The full step size."""
        return float(self.config.get("lr", getattr(self.kind.rules, "lr", 1e-3)))

    @cached_property
    def lr_t(self) -> np.ndarray:
        """The step size at every step (S2), float64 of shape (steps,)."""
        acts = self.has_schedule and not self.ignored
        known = not acts or self.scheduler_name in COURSES
        needs_total = acts and (
            self.scheduler is None
            or "total_steps" in self.scheduler.needs
            or math.isnan(self.scheduler_warmup)
        )
        if not known or (self.total_steps is None and needs_total) or not math.isfinite(self.lr):
            return np.empty(0)
        found = np.full(min(self.total_steps or _UNKNOWN_LENGTH, _LONGEST), self.lr)
        law = self.kind.law
        options = law.defaults | self.config.values | {"warmup_steps": self.own_warmup} if law else {}
        for start in range(0, len(found), _BLOCK):
            lr = found[start : start + _BLOCK]
            step = np.arange(start, start + len(lr), dtype=np.float64)
            with np.errstate(over="ignore"):  # a warm-up of 5e-324 steps
                if acts:
                    lr *= self._factors(step, len(found))
                if law:
                    lr *= averaging.STEP_SIZES[law.step_size].factor(step + 1, options, np)  # S2
        return found

    def _factors(self, step: np.ndarray, steps: int) -> np.ndarray:
        """Returns what the scheduler multiplies the lr by at every step of `step`, in a run of `steps`."""
        times = self.scheduler_devices
        warmup = self.scheduler_warmup * times if self.scheduler_acts else 0.0
        time = _Time(step * times, warmup, float(self.total_steps or steps) * times)
        ramp = _ramp_of_min_lr if self.scheduler_name == "cosine_warmup_with_min_lr" else _ramp
        return np.where(time.step < warmup, ramp(self, time), COURSES[self.scheduler_name or ""](self, time))

    @cached_property
    def c(self) -> np.ndarray:
        """The averaging weight at every step (S3 to S5), float64 of shape (steps,)."""
        if not self.kind.schedule_free:
            return np.empty(0)
        given = self.config.values
        # What no optimizer takes is told by a rule, and has no curve.
        rules: dict[str, Any] = {
            one.name: given[one.name] if one.metadata["rule"].holds(given.get(one.name)) else one.default
            for one in fields(ScheduleFree)
        }
        names = {name: name for name in rules}
        if ScheduleFree.joint_problems(rules, names):
            rules["beta_rule"] = "constant"
        options = weighed(self.config.values)
        r, exponent, prior = options["r"], options["weight_lr_power"], whole(options["prior_steps"]) or 0
        steps, lr_max = len(self.lr_t), 0.0
        # c is a ratio of weights: in units of the last age and of the largest lr, none is too large.
        age, lr = max(steps + prior, 1), max(self.lr_t.max(initial=0.0), self.lr) or 1.0
        earlier = averaging.power(np.arange(1.0, min(prior, _LONGEST) + 1) / age, r, np).sum() if r else prior
        weight_sum = averaging.prior_weight(earlier, np.float64(self.lr / lr), exponent, np)
        found = np.empty(steps)
        for start in range(0, steps, _BLOCK):
            block = self.lr_t[start : start + _BLOCK]
            t = np.arange(start + 1, start + len(block) + 1, dtype=np.float64)  # S1
            largest = np.maximum(np.maximum.accumulate(block), lr_max)  # S3
            of_lr = (block if rules["weight_lr"] == "current" else largest) / lr  # F3
            weight = averaging.step_weight((t + prior) / age, of_lr, r, exponent, 0, np)  # S4
            weight = np.where(t <= rules["c_warmup"], 0.0, weight)  # F5
            sums = np.cumsum(weight) + weight_sum
            of_step = {**rules, "q": averaging.BETAS[rules["beta_rule"]](t, rules, np).q}  # F9
            found[start : start + _BLOCK] = averaging.averaging_weight(weight, sums, np, t, of_step)  # S5
            lr_max, weight_sum = largest[-1], sums[-1]
        return found


class _Time(NamedTuple):
    """The scheduler's own time, at every step.

    Attributes:
        step: its steps from 0; accelerate's counts one for every process.
        warmup, total: steps of the warm-up and of the run, counted the same way.
    """

    step: np.ndarray
    warmup: float
    total: float

    def progress(self, ahead: float = 0.0) -> np.ndarray:
        """Returns the share of what follows the warm-up, from 0 to 1."""
        after = self.step - self.warmup + ahead
        return np.clip(after / max(1.0, self.total - self.warmup), 0.0, 1.0)


def _ramp(run: Run, time: _Time) -> np.ndarray:
    """Returns the linear warm-up, which has no meaning beyond itself."""
    return time.step / max(1.0, time.warmup)


def _ramp_of_min_lr(run: Run, time: _Time) -> np.ndarray:
    """Returns a warm-up that starts at 1 / steps, or at the lr that is said for its first step."""
    first = run.config.values.get("scheduler_warmup_lr_ratio")
    if first is None:
        return (time.step + 1.0) / max(1.0, time.warmup)
    return float(first) + (1.0 - float(first)) * time.step / max(1.0, time.warmup - 1.0)


def _cosine(run: Run, progress: np.ndarray) -> np.ndarray:
    """Returns cosine waves above the least lr: half of one unless it is said; sd-scripts counts halves."""
    floor = float(run.config.get("scheduler_min_lr_ratio", 0.0))
    cycles = float(run.config.values.get("scheduler_cycles") or 0.0)
    cycles = (cycles / 2 if run.config.source.dummy_scheduler else cycles) or 0.5
    wave = 0.5 * (1.0 + np.cos(math.pi * cycles * 2.0 * progress))
    return np.maximum(0.0, wave * (1.0 - floor) + floor)


def _with_restarts(run: Run, time: _Time) -> np.ndarray:
    progress = time.progress()
    phase = (float(run.config.get("scheduler_cycles", 1)) * progress) % 1.0
    return np.where(progress < 1.0, 0.5 * (1.0 + np.cos(math.pi * phase)), 0.0)


def _inverse_sqrt(run: Run, time: _Time) -> np.ndarray:
    scale = float(run.config.get("scheduler_timescale") or time.warmup or 10_000)
    return 1.0 / np.sqrt((np.maximum(time.step, time.warmup) + scale - time.warmup) / scale)


def _warmup_stable_decay(run: Run, time: _Time) -> np.ndarray:
    decay = float(run.config.get("scheduler_decay_steps", 0))
    decay = decay * time.total if decay < 1 else decay
    return _cosine(run, 1.0 - np.clip((time.total - time.step) / max(1.0, decay), 0.0, 1.0))


# What every scheduler multiplies the lr by after its warm-up, as transformers 5.23 and diffusers compute it;
# of those that are missing nothing is drawn.
COURSES: Mapping[str, Callable[[Run, _Time], np.ndarray]] = {
    "constant": lambda run, time: np.ones_like(time.step),
    "constant_with_warmup": lambda run, time: np.ones_like(time.step),
    "linear": lambda run, time: 1.0 - time.progress(),
    "cosine": lambda run, time: 0.5 * (1.0 + np.cos(math.pi * time.progress())),
    "cosine_with_restarts": _with_restarts,
    "polynomial": lambda run, time: (1.0 - time.progress()) ** float(run.config.get("scheduler_power", 1.0)),
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": lambda run, time: _cosine(run, time.progress()),
    "cosine_warmup_with_min_lr": lambda run, time: _cosine(run, time.progress(1.0)),
    "warmup_stable_decay": _warmup_stable_decay,
}
