"""What differs between a checkpoint and the configuration that resumes it: a table, and what is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sfcore import averaging, checks, laws
from sfcore.checks import Rule
from sfcore.exchange import CheckpointError
from sfcore.hyperparameters import NEXT, weighed
from sfcore.laws import Buffer
from sfcore.meta import Meta

# Options that the equations do not know.
_EFFECTS = {
    "maximize": "the direction of every later step is turned around",
    "precision": "z and the moments are converted, for 'lean' and '8bit' to the nearest",
    "seed": "later steps are rounded with other random bits",
}
LEFT_BEHIND = "left behind, because the frameworks scale them differently"
DROPPED = "dropped, because accumulation changed"


_MICRO_BATCHES = Rule(
    "the number of micro-batches an update",
    checks.optional(checks.COUNT).holds,
    "pass that alone, how many are in the gradients is in the checkpoint",
)


class Change(NamedTuple):
    """One row of the table.

    Attributes:
        name: of the hyperparameter, or "optimizer", "accumulation", "batch_size".
        group: the number of the parameter group or state, None where it concerns all of them.
        saved, configured: the two values.
        effect: what becomes of it.

    Example:
        >>> from sfcore.changes import Change
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


def refuse(path: object, differences: Iterable[object]) -> None:
    """Raises with every difference, for strict=True."""
    rows = [str(one) for one in differences]
    if rows:
        raise CheckpointError(
            f"{path} must agree with the configuration when strict=True, got {len(rows)} difference(s):\n  "
            + "\n  ".join(rows)
        )


def effect_of(name: str) -> str:
    """Returns what becomes of a run that is resumed with another value of an option.

    Example:
        >>> from sfcore.changes import effect_of
        >>> effect_of("beta")
        'y moves in the next step so that x stays'
    """
    known = laws.options()
    return _EFFECTS.get(name) or (known[name].metadata["effect"] if name in known else NEXT)


def check_laws(path: object, meta: Meta) -> None:
    """Raises unless the rows know every law of a record: another's state would be taken for something else.

    Raises:
        CheckpointError: with the names that no row has.
    """
    names = {kind_of(meta, group) for group in meta.groups}
    strange = sorted(name for name in names if not laws.candidates(name))
    if strange:
        raise CheckpointError(
            f"{path} must be of a known law ({', '.join(laws.LAWS)}), got {', '.join(strange)}: register its "
            f"row with sfcore.laws.register, or start from its weights with resume='weights:{path}'"
        )


def kind_of(meta: Meta, group: Mapping[str, Any]) -> str:
    """Returns the name of a saved group's optimizer; in JAX each state may have its own."""
    return str(group.get("optimizer", meta.optimizer))


def of_optimizer(group: int | None, saved: str, configured: str) -> Change:
    """Returns the row for another optimizer than the one that saved."""
    kept, anew = ["x, y, z", "the average"], list[str]()
    had = _always_kept(saved)
    for role, buffer in _always_kept(configured).items():
        (kept if role in had else anew).append(f"the {buffer.doc} {role}")
    if configured == "wrapper":
        anew.append("the base's state")
    effect = f"carried over: {', '.join(kept)}"
    if anew:
        effect += f"; starts anew: {', '.join(anew)}"
    if not comparable(saved, configured):
        effect += "; the sum of weights is put in units of the configured lr, so that the average goes on"
    return Change("optimizer", group, saved, configured, effect)


def _always_kept(name: str) -> dict[str, Buffer]:
    """Returns role -> buffer that every law of a recorded name keeps whatever its options are."""
    each = [{one.role: one for one in law.buffers if not one.when} for law in laws.candidates(name)]
    return (
        {role: buffer for role, buffer in each[0].items() if all(role in one for one in each)} if each else {}
    )


def check_batches(accumulation: Any, batch_size: Any) -> None:
    """Raises `CheckpointError` unless what this run says of them is a whole number >= 0, or None."""
    checks.require(
        CheckpointError,
        accumulation=(_MICRO_BATCHES, accumulation),
        batch_size=(checks.optional(checks.COUNT), batch_size),
    )


def of_batches(saved: Mapping[str, int], steps: int | None, batch_size: int | None) -> list[Change]:
    """Returns the rows for accumulation and batch size, where both sides say what they are.

    Args:
        saved: `Meta.accumulation`; `steps` is 0 where it is not known.
        steps: micro-batches an update in this run; None or 0 if not known.
        batch_size: of a micro-batch in this run, the same.
    """
    found = []
    if steps and saved["steps"] and steps != saved["steps"]:
        effect = f"an update now takes {steps} micro-batches; steps still count updates"
        found.append(Change("accumulation", None, saved["steps"], steps, effect))
    before = saved.get("batch_size")
    if batch_size and before and batch_size != before:
        effect = "position counts micro-batches of the saved size; an epoch has another number of steps now"
        found.append(Change("batch_size", None, before, batch_size, effect))
    return found


def at_last_update(meta: Meta, what: str) -> tuple[Meta, list[str]]:
    """Returns a record without the micro-batches of an unfinished update, and a sentence if there are any.

    Args:
        meta: of a checkpoint; not changed.
        what: `LEFT_BEHIND` or `DROPPED`, what becomes of their gradients.
    """
    taken = meta.accumulation["position"]
    if not taken:
        return meta, []
    position = max(meta.position - taken, 0)
    moved = replace(meta, position=position, accumulation=meta.accumulation | {"position": 0})
    sentence = f"the gradients of {taken} micro-batches of an unfinished update are {what}"
    if meta.position < taken:
        sentence += (
            f" (position {meta.position} was saved: the first are of the epoch before, if it was kept)"
        )
    return moved, [f"{sentence}: take them again from position {position}"]


def same(saved: str, configured: str) -> bool:
    """Tells whether two names may mean one optimizer.

    Example:
        >>> from sfcore.changes import same
        >>> same("adamw or radam", "radam"), same("adamw", "radam")
        (True, False)
    """
    return bool({*saved.split(laws.OR)} & {*configured.split(laws.OR)})


def comparable(saved: str, configured: str) -> bool:
    """Tells whether the two optimizers' learning rates mean the same: those of one direction do."""
    directions = {law.direction for name in (saved, configured) for law in laws.candidates(name)}
    known = laws.candidates(saved) and laws.candidates(configured)
    return same(saved, configured) or bool(known and len(directions) == 1)


def carried_sum(
    clock: Mapping[str, Any],
    saved: Mapping[str, Any],
    configured: Mapping[str, Any],
    new_lr: float | None = None,
) -> tuple[float, float]:
    """Returns (lr_max, weight_sum) in the units of the configured hyperparameters, so that c goes on.

    The sum is multiplied by what S4 gives the last step now over what it gave then. With a constant lr
    that is exact for another weight_lr_power; another r weighs only the steps to come.

    Args:
        clock: step, lr_max and weight_sum as saved.
        saved, configured: hyperparameters; r, weight_lr_power or prior_steps count as unchanged where one
            side lacks them.
        new_lr: the configured lr, where that of the saved optimizer means something else: an average of
            small AdamW steps would be lost to one SGD step.

    Example:
        >>> from sfcore.changes import carried_sum
        >>> clock = {"step": 10, "lr_max": 0.5, "weight_sum": 10.0}
        >>> carried_sum(clock, {"weight_lr_power": 0.0}, {"weight_lr_power": 2.0})
        (0.5, 2.5)
    """
    # Before the first step there is no lr_max, but prior steps have been weighed with the full lr.
    lr = clock["lr_max"] or _number(saved.get("lr"))
    lr_after = new_lr if new_lr and lr else lr
    then = weighed(saved, configured)
    now = weighed(configured, then)
    before, after = _weight(clock["step"], lr, then), _weight(clock["step"], lr_after, now)
    lr_max = lr_after if clock["lr_max"] else clock["lr_max"]
    if before == after or not before:
        return lr_max, clock["weight_sum"]
    return lr_max, clock["weight_sum"] * (after / before)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _weight(step: int, lr: float, options: Mapping[str, Any]) -> float:
    """Returns S4 for the last step, before the first for the last prior one."""
    return float(averaging.step_weight(max(step, 1 - options["prior_steps"]), lr, **options))
