"""What every scheduler multiplies the lr by, as transformers 5.23 and diffusers compute it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sfcore.plan._run import Run


def factors(run: Run, step: np.ndarray) -> np.ndarray:
    """Returns the multiple of the lr at every step, of the shape of `step`.

    A scheduler of accelerate's counts one step for every process, of a run as many times longer.
    """
    times = run.devices if run.config.source.steps_per_process else 1
    s, total = step * times, float((run.total_steps or len(step)) * times)
    warmup = run.scheduler_warmup * times if run.scheduler_acts else 0.0
    name = run.scheduler_name or ""
    progress = np.clip((s - warmup) / max(1.0, total - warmup), 0.0, 1.0)
    after = _after(run, name, s, warmup, progress, total)
    return np.where(s < warmup, s / max(1.0, warmup), after)


def _after(
    run: Run, name: str, s: np.ndarray, warmup: float, progress: np.ndarray, total: float
) -> np.ndarray:
    get = run.config.get
    floor = float(get("scheduler_min_lr_ratio", 0.0))
    if name == "linear":
        return 1.0 - progress
    if name == "polynomial":
        return (1.0 - progress) ** float(get("scheduler_power", 1.0))
    if name in ("cosine", "cosine_with_min_lr"):
        return floor + (1.0 - floor) * 0.5 * (1.0 + np.cos(math.pi * progress))
    if name == "cosine_with_restarts":
        phase = (float(get("scheduler_cycles", 1)) * progress) % 1.0
        return np.where(progress < 1.0, 0.5 * (1.0 + np.cos(math.pi * phase)), 0.0)
    if name == "inverse_sqrt":
        scale = float(get("scheduler_timescale") or warmup or 10_000)
        return 1.0 / np.sqrt((np.maximum(s, warmup) + scale - warmup) / scale)
    if name == "warmup_stable_decay":
        decay = float(get("scheduler_decay_steps", 0))
        decay = decay * total if decay < 1 else decay
        left = np.clip((total - s) / max(1.0, decay), 0.0, 1.0)
        return floor + (1.0 - floor) * 0.5 * (1.0 - np.cos(math.pi * left))
    return np.ones_like(s)
