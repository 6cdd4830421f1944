"""From a verified checkpoint to trees on devices, with a word about everything that is not as it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfcore.changes import DROPPED, Change, at_last_update, check_laws, refuse
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sfcore.store import Skipped
from sfjax.checkpoint import _changes, _record
from sfjax.checkpoint._leaves import groups, injected, named, roles, whole
from sfjax.checkpoint._place import place
from sfjax.checkpoint._read import Saved
from sfjax.checkpoint._reconcile import Fit, fit, saved_group
from sfjax.checkpoint._storable import OBJECTS, is_object, set_objects
from sfjax.state.arguments import Configurations, MicroBatches

_log = logging.getLogger("sfjax.checkpoint")


@dataclass(frozen=True)
class Restored:
    """What a run goes on with.

    Attributes:
        params, opt_state, extra_state: of the target's tree, shapes, dtypes and shardings.
        meta: the record: step, epoch, position, accumulation, metrics, extra and more.
        path: where it came from.
        notices: sentences for the user: where the run resumes, and what is not as it was saved.
        changes: the table of hyperparameters that the configuration changed.
        skipped: newer checkpoints that do not verify, with the reason.
        fresh: state that starts anew although the run had steps: "v", "m".

    Example:
        >>> import tempfile, jax.numpy as jnp, sfjax
        >>> from sfjax.checkpoint import Checkpoints
        >>> tx, params = sfjax.schedule_free_sgd(0.1), {"w": jnp.ones(3)}
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     path = checkpoints.save(5, params, tx.init(params), position=20)
        ...     restored = checkpoints.restore(params, tx.init(params))
        >>> restored.meta.step, restored.meta.position, len(restored.notices)
        (5, 20, 1)
    """

    params: Any
    opt_state: Any
    extra_state: Any
    meta: Meta
    path: Path
    notices: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    fresh: frozenset[str] = frozenset()


def restore_into(
    saved: Saved,
    params: Any,
    opt_state: Any,
    extra_state: Any = None,
    hyperparameters: Configurations | None = None,
    accumulation: MicroBatches | None = None,
    batch_size: int | None = None,
    *,
    strict: bool = False,
    skipped: Sequence[Skipped] = (),
    differences: Sequence[str] = (),
    quiet: bool = False,
) -> Restored:
    """Returns a checkpoint in the shape of a target.

    Args:
        saved: the checkpoint, verified.
        params, opt_state, extra_state, hyperparameters, accumulation, batch_size, strict: as for
            `Checkpoints.restore`.
        skipped: what was passed over to get here.
        differences: sentences of the caller's, about what was changed before.
        quiet: leave the notices to the caller.

    Raises:
        CheckpointError: with everything that does not fit, or with every difference if strict.
    """
    check_laws(saved.path, saved.meta)
    target = named(whole(params, opt_state, extra_state))
    own = groups(params, opt_state)
    configured = [
        one._replace(values=concrete_beta(group.state) | one.values)
        for group, one in zip(own, _record.configured(hyperparameters, own), strict=True)
    ]
    batches = _record.accumulated((), accumulation or 0, batch_size)
    saved, dropped = _without_partial_update(saved, batches["steps"])
    result = fit(saved, target, roles(params, opt_state), own, configured)
    if result.problems:
        raise CheckpointError(f"{saved.path} does not fit the program:\n  " + "\n  ".join(result.problems))
    before = [saved.meta.groups[saved_group(saved.meta, own, i) or 0] for i in range(len(own))]
    pairs = list(zip(before, configured, strict=True))
    changes = _changes.compare(saved.meta, pairs, batches, injected(opt_state))
    differences = [*differences, *map(str, changes), *dropped, *result.differences]
    if strict:
        refuse(saved.path, differences)
    notices = [f"resuming at step {saved.meta.step} from {saved.path}"]
    notices += [f"skipped {one.path}: {one.why}" for one in skipped] + differences
    if extra_state is None and any(name.startswith("extra_state") for name in saved.arrays):
        notices.append("the checkpoint has an extra_state that was not asked for")
    if not quiet:
        tell(notices)
    state = _assemble(target, result)
    meta = replace(saved.meta, extra={k: v for k, v in saved.meta.extra.items() if k != OBJECTS})
    return Restored(
        state["params"],
        state["opt_state"],
        state.get("extra_state"),
        meta,
        saved.path,
        notices,
        changes,
        list(skipped),
        frozenset(result.fresh),
    )


def tell(notices: Sequence[str]) -> None:
    """Logs where a run starts, and warns of what is not as it was."""
    for number, notice in enumerate(notices):
        _log.log(logging.WARNING if number else logging.INFO, "%s", notice)


def _without_partial_update(saved: Saved, steps: int) -> tuple[Saved, list[str]]:
    """Forgets the gradients of an unfinished update whose length has changed: their mean would be wrong."""
    before = saved.meta.accumulation
    # Where nobody said how long it was, the mean of those taken goes on if they are fewer than needed.
    if not steps or steps == before["steps"] or (not before["steps"] and before["position"] < steps):
        return saved, []
    meta, dropped = at_last_update(saved.meta, DROPPED)
    if not dropped:
        return saved, []
    gradients = {name for name, role in saved.roles.items() if role.startswith("grad/")}
    # There may be a counter in every part of an optax.partition; only the first has a role.
    counters = {
        name for name in saved.arrays if name.startswith("opt_state/") and name.endswith("/mini_step")
    }
    other = {name for name, role in saved.roles.items() if role != "accumulation/mini_step"}
    zeroed = {name: np.zeros_like(saved.arrays[name]) for name in gradients | (counters - other)}
    return saved._replace(meta=meta, arrays=saved.arrays | zeroed), dropped


def concrete_beta(state: Any) -> dict[str, Any]:
    """Returns the beta that a live target was configured with, the only hyperparameter that it tells."""
    if isinstance(state.b1, jax.ShapeDtypeStruct) or (
        isinstance(state.b1, jax.Array) and state.b1.is_deleted()
    ):
        return {}
    return {"beta": float(np.asarray(state.b1))}


def _assemble(target: Any, result: Fit) -> Any:
    """Returns the target's tree with its new leaves; objects are moved last, when nothing else can fail."""
    arrays = [i for i, leaf in enumerate(target.leaves) if not is_object(leaf)]
    placed = place(
        [target.leaves[i] for i in arrays],
        [result.values[i] for i in arrays],
        [result.weak[i] for i in arrays],
    )
    leaves = list(target.leaves)
    for i, leaf in zip(arrays, placed, strict=True):
        leaves[i] = leaf
    objects = [i for i, leaf in enumerate(target.leaves) if is_object(leaf)]
    moved = set_objects(
        [target.names[i] for i in objects],
        [target.leaves[i] for i in objects],
        [result.values[i] for i in objects],
    )
    for i, leaf in zip(objects, moved, strict=True):
        leaves[i] = leaf
    return target.tree.unflatten(leaves)
