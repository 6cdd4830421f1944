"""Where a run goes on and when it saves: what --save-every, --resume and --kill-at ask for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from _digits import Digits, Settings, batches
from sfcore.exchange import fingerprint
from sfcore.preemption import Preemption


class Plan:
    """What both backends are told about stopping and resuming.

    Args:
        folder: holds a folder of checkpoints for each framework.
        save_every: optimizer steps between saves; None does not save.
        resume: "none", "auto", "latest-good" or "weights:PATH", as `Checkpoints.restore` takes it.
        kill_at: the step after which the process kills itself, with a save in flight; None does not.

    Attributes:
        digests: framework -> {"x", "state"}: SHA-256 of the final weights and of all that a resume needs.
        resumed: framework -> the step that it went on from.
    """

    def __init__(self, folder: Path, save_every: int | None, resume: str, kill_at: int | None):
        self.folder, self.save_every, self.resume, self.kill_at = folder, save_every, resume, kill_at
        self.digests: dict[str, dict[str, str]] = {}
        self.resumed: dict[str, int] = {}

    def batches(self, framework: str, settings: Settings, digits: Digits, start: int) -> Iterator[Any]:
        """Yields (step, batch) from the step after `start`, under a progress bar."""
        self.resumed[framework] = start
        label = f"{framework} from step {start}" if start else framework
        left = islice(batches(settings, digits), start, None)
        bar = tqdm(left, desc=f"{label:>5}", initial=start, total=settings.steps, unit="step")
        return enumerate(bar, start=start + 1)

    def guard(self, save: Callable[[], Any]) -> AbstractContextManager[Any]:
        """Returns what saves at SIGTERM and Ctrl-C; without --save-every they end the run as ever."""
        return Preemption(save) if self.save_every else nullcontext(_Unguarded())

    def is_due(self, step: int) -> bool:
        """Tells whether to save after this step."""
        return bool(self.save_every) and step % (self.save_every or 1) == 0

    def kill(self, step: int) -> None:
        """Kills the process, as a power cut would, if this is the step to do so."""
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, framework: str, x: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
        """Notes what two runs must have in common to be the same run."""
        self.digests[framework] = {"x": fingerprint(x), "state": fingerprint(state)}


class _Unguarded:
    def updating(self) -> AbstractContextManager[None]:
        return nullcontext()
