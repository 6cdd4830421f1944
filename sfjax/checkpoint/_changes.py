"""What differs between a checkpoint and the configuration that resumes it: a table, and what is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sfjax.checkpoint._record import Configured

_NEXT = "the configured value holds from the next step"
EFFECTS = {
    "lr": f"{_NEXT}; a larger lr also weighs its steps more in the average",
    "weight_decay": _NEXT,
    "beta": "y moves in the next step so that x stays",
    "b2": f"{_NEXT}; v keeps its value",
    "eps": _NEXT,
    "warmup_steps": "the ramp goes on at the step it had reached",
    "r": "later steps are weighed anew; the sum so far keeps its weights",
    "weight_lr_power": "later steps are weighed anew; the sum so far keeps its weights",
    "prior_steps": "the average so far is kept; with r > 0 later steps count as that much older",
    "inner_momentum": "the first moment starts from zero, or is dropped at 0",
    "silent_sgd_phase": "it matters in the first steps only",
}
_ADAM = ("adamw", "radam", "adamw or radam")


class Change(NamedTuple):
    """One row of the table; group is None where it concerns all of them.

    Example:
        >>> from sfjax.checkpoint import Change
        >>> print(Change("lr", None, 0.1, 0.2, "the configured value holds from the next step"))
        lr: saved 0.1, configured 0.2: the configured value holds from the next step
    """

    name: str
    group: int | None
    saved: Any
    configured: Any
    effect: str

    def __str__(self) -> str:
        where = "" if self.group is None else f" (group {self.group})"
        return f"{self.name}{where}: saved {self.saved!r}, configured {self.configured!r}: {self.effect}"


def compare(
    meta: Meta,
    groups: Sequence[tuple[Mapping[str, Any], Configured]],
    accumulation: Mapping[str, int] | None,
) -> list[Change]:
    """Returns the table.

    Args:
        meta: the checkpoint's record.
        groups: (saved group, configuration) a state of the target; hyperparameters that either leaves out
            are not compared.
        accumulation: the configured Meta.accumulation, or None if it is not known.
    """
    found = []
    for index, (group, configured) in enumerate(groups):
        number, saved = index if len(groups) > 1 else None, group["hyperparameters"]
        kind = kind_of(meta, group)
        if not same(kind, configured.optimizer):
            found.append(_kind(number, kind, configured.optimizer))
        found += [
            Change(name, number, saved[name], value, EFFECTS.get(name, _NEXT))
            for name, value in configured.values.items()
            if name in saved and not _equal(saved[name], value)
        ]
    return found + _of_batches(meta.accumulation, accumulation or {})


def _of_batches(saved: Mapping[str, int], configured: Mapping[str, int]) -> list[Change]:
    found = []
    before, now = saved["steps"], configured.get("steps", 0)
    if before and now and before != now:
        effect = f"an update now takes {now} micro-batches; steps still count updates"
        found.append(Change("accumulation", None, before, now, effect))
    before, now = saved.get("batch_size", 0), configured.get("batch_size", 0)
    if before and now and before != now:
        effect = "position counts micro-batches of the saved size; an epoch has another number of steps now"
        found.append(Change("batch_size", None, before, now, effect))
    return found


def _equal(saved: Any, configured: Any) -> bool:
    if isinstance(saved, float) and isinstance(configured, float):
        # beta may have been read off a float32 state.
        return abs(saved - configured) <= 1e-7 * abs(configured)
    return bool(saved == configured)


def kind_of(meta: Meta, group: Mapping[str, Any]) -> str:
    """Returns the name of a saved group's optimizer."""
    return str(group.get("optimizer", meta.optimizer))


def _kind(group: int | None, saved: str, configured: str) -> Change:
    kept, anew = "x, y, z and the average", []
    if configured in _ADAM and saved in _ADAM:
        kept += " and the second moment v"
    elif configured in _ADAM:
        anew.append("the second moment v and its bias correction")
    elif configured == "wrapper":
        anew.append("the base's state")
    effect = f"{kept} are carried over" + (f"; {anew[0]} start anew" if anew else "")
    if not comparable(saved, configured):
        effect += "; the sum of weights is put in units of the configured lr, so that the average goes on"
    return Change("optimizer", group, saved, configured, effect)


def same(saved: str, configured: str) -> bool:
    """Tells whether two names may mean one optimizer."""
    return saved == configured or (
        saved in _ADAM and configured in _ADAM and _ADAM[-1] in (saved, configured)
    )


def comparable(saved: str, configured: str) -> bool:
    """Tells whether the two optimizers' learning rates mean the same."""
    return saved == configured or (saved in _ADAM and configured in _ADAM)


def in_units_of(clock: dict[str, Any], configured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the clock in units of another optimizer's lr.

    The weights in the sum are lr^weight_lr_power, so an average of small AdamW steps would be lost to one
    SGD step.

    Raises:
        CheckpointError: if the configured lr is not known.
    """
    lr = configured.get("lr")
    if not isinstance(lr, int | float) or lr <= 0:
        raise CheckpointError(
            f"hyperparameters must give lr > 0 when another kind of optimizer resumes, got {lr!r}: "
            "pass hyperparameters=sfcore.hyperparameters.SGD(lr=...), or AdamW or RAdam; "
            "of a schedule, its largest value"
        )
    if clock["lr_max"] <= 0:
        return clock
    factor = (lr / clock["lr_max"]) ** configured.get("weight_lr_power", 2.0)
    return clock | {"lr_max": float(lr), "weight_sum": clock["weight_sum"] * factor}


def refuse(path: object, differences: Sequence[str]) -> None:
    """Raises with every difference, for strict=True."""
    if differences:
        raise CheckpointError(
            f"{path} must agree with the configuration when strict=True, got {len(differences)} "
            "difference(s):\n  " + "\n  ".join(differences)
        )
