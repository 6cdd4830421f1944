"""What every scheduler multiplies the lr by, as transformers 5.23 and diffusers compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from sfcore.plan._run import Run


class Time(NamedTuple):
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

    def ramp(self, ahead: float = 0.0) -> np.ndarray:
        """Returns the linear warm-up, which has no meaning beyond itself."""
        return (self.step + ahead) / max(1.0, self.warmup)


def factors(run: Run, step: np.ndarray) -> np.ndarray:
    """Returns the multiple of the lr at every step, of the shape of `step`."""
    times = run.devices if run.config.source.steps_per_process else 1
    warmup = run.scheduler_warmup * times if run.scheduler_acts else 0.0
    time = Time(step * times, warmup, float((run.total_steps or len(step)) * times))
    course = COURSES[run.scheduler_name or ""](run, time)
    ramp = _ramp_of_min_lr(run, time) if run.scheduler_name == "cosine_warmup_with_min_lr" else time.ramp()
    return np.where(time.step < warmup, ramp, course)


def _cosine(run: Run, progress: np.ndarray) -> np.ndarray:
    """Returns cosine waves above the least lr: half of one unless it is said; sd-scripts counts halves."""
    floor = float(run.config.get("scheduler_min_lr_ratio", 0.0))
    cycles = float(run.config.values.get("scheduler_cycles") or 0.0)
    cycles = (cycles / 2 if run.config.source.dummy_scheduler else cycles) or 0.5
    wave = 0.5 * (1.0 + np.cos(math.pi * cycles * 2.0 * progress))
    return np.maximum(0.0, wave * (1.0 - floor) + floor)


def _with_restarts(run: Run, time: Time) -> np.ndarray:
    progress = time.progress()
    phase = (float(run.config.get("scheduler_cycles", 1)) * progress) % 1.0
    return np.where(progress < 1.0, 0.5 * (1.0 + np.cos(math.pi * phase)), 0.0)


def _inverse_sqrt(run: Run, time: Time) -> np.ndarray:
    scale = float(run.config.get("scheduler_timescale") or time.warmup or 10_000)
    return 1.0 / np.sqrt((np.maximum(time.step, time.warmup) + scale - time.warmup) / scale)


def _warmup_stable_decay(run: Run, time: Time) -> np.ndarray:
    decay = float(run.config.get("scheduler_decay_steps", 0))
    decay = decay * time.total if decay < 1 else decay
    return _cosine(run, 1.0 - np.clip((time.total - time.step) / max(1.0, decay), 0.0, 1.0))


def _ramp_of_min_lr(run: Run, time: Time) -> np.ndarray:
    """Returns a warm-up that starts at 1 / steps, or at the lr that is said for its first step."""
    first = run.config.values.get("scheduler_warmup_lr_ratio")
    if first is None:
        return time.ramp(1.0)
    return float(first) + (1.0 - float(first)) * time.step / max(1.0, time.warmup - 1.0)


# Those whose course is known; of the others nothing is drawn.
COURSES: Mapping[str, Callable[[Run, Time], np.ndarray]] = {
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
