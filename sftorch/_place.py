"""Where a run is in an update: how many of its micro-batches are in the gradients."""

from __future__ import annotations

from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sftorch._apply import Plan


def accumulation_of(accumulation: tuple[int, int], batch_size: int | None) -> dict[str, int]:
    """Returns the record of a place in an update."""
    steps, position = accumulation
    if not 0 <= position < steps:
        raise CheckpointError(
            f"accumulation must be (steps, position) with 0 <= position < steps, got {accumulation!r}: "
            "after the last micro-batch take the step, and position is 0"
        )
    found = {"steps": steps, "position": position}
    return found if batch_size is None else found | {"batch_size": batch_size}


def drop_partial_update(plan: Plan, meta: Meta, accumulation: int | None) -> list[str]:
    """Forgets the gradients of an unfinished update whose length has changed: their scale would be wrong."""
    taken = meta.accumulation["position"]
    if not taken or accumulation in (None, meta.accumulation["steps"]):
        return []
    plan.gradients = dict.fromkeys(plan.gradients)
    meta.accumulation["position"] = 0
    meta.position -= taken
    return [
        f"the gradients of {taken} micro-batches of an unfinished update are dropped, because accumulation "
        f"changed: take them again from position {meta.position}"
    ]
