"""What nnx and linen share: a checkpoint with all that they keep beside parameters and optimizer state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import checks
from sfjax.checkpoint import Checkpoints, Restored
from sfjax.state.find import _require

CHECKPOINTS = checks.kind_of("sfjax.checkpoint.Checkpoints", Checkpoints, "make them of the run's folder")


def save(
    checkpoints: Checkpoints, params: Any, opt_state: Any, beside: Any, extra_state: Any, **options: Any
) -> Path:
    """Saves a run with what lies `beside` its parameters; `extra_state` is the user's own."""
    # Flax's own counters count micro-batches where gradients are accumulated; these count updates.
    step = max(int(np.max(state.step)) for state in _require(opt_state))
    together = _together(beside, extra_state)
    return checkpoints.save(step, params, opt_state, extra_state=together, **options)


def restore(
    checkpoints: Checkpoints, params: Any, opt_state: Any, beside: Any, extra_state: Any, **options: Any
) -> tuple[Restored | None, Any]:
    """Returns what was restored, with the user's own extra_state, and what lies beside the parameters.

    The latter is None where there is none: in an empty folder, and after a start from weights alone.
    """
    together = _together(beside, extra_state)
    restored = checkpoints.restore(params, opt_state, extra_state=together, **options)
    if restored is None or restored.extra_state is None:
        return restored, None
    found = restored.extra_state
    return replace(restored, extra_state=found.get("extra")), found["flax"]


def _together(beside: Any, extra_state: Any) -> dict[str, Any]:
    return {"flax": beside} if extra_state is None else {"flax": beside, "extra": extra_state}
