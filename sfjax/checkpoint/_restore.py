"""From a verified checkpoint to trees on devices, with a word about everything that is not as it was.

Every leaf of the target gets what the checkpoint holds for it: by role, else by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfcore import changes, laws
from sfcore.changes import DROPPED, Change, at_last_update, check_laws, effect_of, refuse
from sfcore.exchange import CheckpointError
from sfcore.iterates import beta_of
from sfcore.meta import Meta, of_rank
from sfcore.ranks import Ranks
from sfcore.store import Skipped
from sfjax.checkpoint import _changes, _orbax, _record
from sfjax.checkpoint._arrays import (
    OBJECTS,
    array_like,
    hidden,
    is_object,
    is_weak,
    place,
    set_objects,
    stored_form,
    with_own,
)
from sfjax.checkpoint._codes import in_codes_of
from sfjax.checkpoint._leaves import (
    CLOCK,
    ONE_VECTOR,
    Group,
    Named,
    groups,
    in_full,
    injected,
    named,
    roles,
    whole,
)
from sfjax.checkpoint._orbax import Saved
from sfjax.checkpoint._record import Configured, clock_from
from sfjax.state import forms
from sfjax.state.arguments import Configurations, MicroBatches

_log = logging.getLogger("sfjax.checkpoint")
_ACCUMULATION = ("grad", "accumulation")
_INTS = {"int64", "uint64"}
_SHARED = ("step", "lr_max", "weight_sum")


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
    saved: Saved | Callable[[], Saved],
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
    ranks: Ranks | None = None,
) -> Restored:
    """Returns a checkpoint in the shape of a target.

    Args:
        saved: the checkpoint, verified; or what reads it.
        params, opt_state, extra_state, hyperparameters, accumulation, batch_size, strict: as for
            `Checkpoints.restore`.
        skipped: what was passed over to get here.
        differences: sentences of the caller's, about what was changed before.
        quiet: leave the notices to the caller.
        ranks: that restore it together; default this process alone.

    Raises:
        CheckpointError: with everything that does not fit, or with every difference if strict.
    """
    given, ranks = saved, ranks or Ranks()

    def read() -> Saved:
        found = given() if callable(given) else given
        check_laws(found.path, found.meta)
        meta = of_rank(found.meta, ranks.rank)
        return found._replace(meta=meta, arrays=with_own(found.arrays, meta))

    def built() -> tuple[Saved, list[Change], list[str], Fit, list[Any]]:
        saved = read()
        batches = _record.accumulated((), accumulation or 0, batch_size)
        saved, dropped = _without_partial_update(saved, batches["steps"])
        result = fit(saved, target, roles(params, opt_state), own, configured)
        if result.problems:
            problems = "\n  ".join(result.problems)
            raise CheckpointError(f"{saved.path} does not fit the program:\n  {problems}")
        before = [saved.meta.groups[_saved_group(saved.meta, own, i) or 0] for i in range(len(own))]
        pairs = list(zip(before, configured, strict=True))
        table = _changes.compare(saved.meta, pairs, batches, injected(opt_state))
        found = [*differences, *map(str, table), *_changes.doubts(pairs), *dropped, *result.differences]
        if strict:
            refuse(saved.path, found)
        return saved, table, found, result, _placed(target, result)

    target = named(whole(params, opt_state, extra_state))
    own = groups(params, opt_state)
    configured = [
        one._replace(values=concrete_beta(group.state) | one.values)
        for group, one in zip(own, _record.configured(hyperparameters, own), strict=True)
    ]
    (saved, table, found, result, leaves), _ = ranks.agree("restore", built)
    notices = [f"resuming at step {saved.meta.step} from {saved.path}"]
    notices += [f"skipped {one.path}: {one.why}" for one in skipped] + found
    if extra_state is None and any(name.startswith("extra_state") for name in saved.arrays):
        notices.append("the checkpoint has an extra_state that was not asked for")
    before = len(saved.meta.ranks) or 1
    if before != ranks.count:
        notices.append(
            f"the checkpoint is of {before} process(es), this run has {ranks.count}: what each had of its "
            f"own (place in the data, iterators, extra) goes on on {min(before, ranks.count)} of them"
            + "; the others take that of rank 0"
            * (before < ranks.count)
        )
    if not quiet:
        tell(notices)
    state = _assemble(target, result, leaves)
    meta = replace(saved.meta, extra=hidden(saved.meta.extra))
    return Restored(
        state["params"],
        state["opt_state"],
        state.get("extra_state"),
        meta,
        saved.path,
        notices,
        table,
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


def _placed(target: Any, result: Fit) -> list[Any]:
    """Returns the target's leaves with new arrays; objects are still those of the target."""
    leaves = list(target.leaves)
    arrays = [i for i, leaf in enumerate(leaves) if not is_object(leaf)]
    placed = place(*([values[i] for i in arrays] for values in (leaves, result.values, result.weak)))
    for i, leaf in zip(arrays, placed, strict=True):
        leaves[i] = leaf
    return leaves


def _assemble(target: Any, result: Fit, leaves: list[Any]) -> Any:
    """Returns the target's tree with its new leaves; objects are moved last, when nothing else can fail."""
    objects = [i for i, leaf in enumerate(leaves) if is_object(leaf)]
    moved = set_objects(*([values[i] for i in objects] for values in (target.names, leaves, result.values)))
    for i, leaf in zip(objects, moved, strict=True):
        leaves[i] = leaf
    return target.tree.unflatten(leaves)


@dataclass
class Fit:
    """What becomes of each target leaf.

    Attributes:
        values: a leaf each: a host array, or the JSON of an object.
        weak: for each leaf whether it has a weak type, as a Python number has.
        differences: sentences about what is not as it was saved.
        problems: sentences about what makes a resume impossible.
        fresh: buffers that start anew, by role: "v", "m".
    """

    values: list[Any] = field(default_factory=list)
    weak: list[bool] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)

    def differs(self, sentence: str | None) -> None:
        if sentence and sentence not in self.differences:
            self.differences.append(sentence)


def fit(
    saved: Saved,
    target: Named,
    roles: Mapping[str, str],
    own: Sequence[Group],
    configured: Sequence[Configured],
) -> Fit:
    """Matches a checkpoint with the target that it is restored into.

    Args:
        saved: the checkpoint, verified.
        target: what is restored into, concrete or abstract.
        roles, own: `_leaves.roles` and `_leaves.groups` of the target.
        configured: one for each of `own`.
    """
    saved, differences = _in_form_of(saved, target, roles)
    result = Fit(differences=differences)
    by_role = saved.names | _stored(saved)
    clocks = _clocks(saved, own, by_role, roles, configured, result)
    used: set[str] = set()
    recorded = saved.meta.tensors.get(_orbax.STATE, {})
    vectors = {f"{group.name}/z" for group in own if not group.parameters}
    for name, leaf in zip(target.names, target.leaves, strict=True):
        role = roles.get(name)
        if role in clocks:
            result.values.append(clocks[role])
            result.weak.append(False)
            continue
        source = by_role.get(_source_role(role, saved, own))
        if source is None and name in saved.arrays and (role is None or name not in saved.roles):
            source = name
        if source is not None:
            used.add(source)
        elif name in vectors:  # not to be begun anew: it belongs to parameters that come from elsewhere
            result.problems.append(f"{name} must be a tree like params, got {ONE_VECTOR}")
        result.values.append(_value(name, leaf, role, source, saved, result))
        # As it was saved: a parameter loses its weak type in its first update, and rounds less from then on.
        result.weak.append(recorded.get(source, {}).get("weak", False) if source else is_weak(leaf))
    _leftovers(saved, used, result)
    return result


def _stored(saved: Saved) -> dict[str, str]:
    """Returns "stored/NAME" -> the leaf that a state keeps as its buffer: x where beta is 0, else z."""
    found = {}
    for group in saved.meta.groups:
        first, second = ("x", "z") if beta_of(group) == 0 else ("z", "x")
        mine = set(group["parameters"])
        for name, role in saved.roles.items():
            kind, _, parameter = role.partition("/")
            if parameter in mine and (
                kind == first or (kind == second and f"stored/{parameter}" not in found)
            ):
                found[f"stored/{parameter}"] = name
    return found


def _source_role(role: str | None, saved: Saved, own: Sequence[Group]) -> str:
    """Returns a role under the number that its group has in the checkpoint."""
    kind, _, rest = (role or "").partition("/")
    if kind != "base":
        return role or ""
    index, _, path = rest.partition("/")
    return f"base/{_saved_group(saved.meta, own, int(index))}/{path}"


def _saved_group(meta: Meta, own: Sequence[Group], index: int) -> int | None:
    """Returns the number of the saved group of own[index]'s parameters, None if they had several clocks."""
    mine = set(own[index].parameters)
    owners = [i for i, one in enumerate(meta.groups) if set(one["parameters"]) & mine]
    if not owners and len(meta.groups) == 1:
        return 0
    if not mine:  # a label of optax.partition that no parameter has: a clock that moves nothing
        return index if index < len(meta.groups) and not meta.groups[index]["parameters"] else 0
    clocks = {(beta_of(meta.groups[i]), *(meta.groups[i]["clock"][key] for key in _SHARED)) for i in owners}
    return owners[0] if len(clocks) == 1 else None


def _clocks(
    saved: Saved,
    own: Sequence[Group],
    by_role: Mapping[str, str],
    roles: Mapping[str, str],
    configured: Sequence[Configured],
    result: Fit,
) -> dict[str, np.ndarray]:
    """Returns role -> scalar of every target clock, carried over to the configured optimizer."""
    found = {}
    wanted = set(roles.values())
    for index, (group, one) in enumerate(zip(own, configured, strict=True)):
        source = _saved_group(saved.meta, own, index)
        if source is None:
            result.problems.append(
                f"{group.name} must take its parameters from one Schedule-Free state of the checkpoint, "
                f"got several of its {len(saved.meta.groups)}: restore with the partition that was saved"
            )
            continue
        exact = {field: by_role.get(f"clock/{source}/{field}") for field in CLOCK}
        scalars = {field: saved.arrays[name] for field, name in exact.items() if name is not None}
        clock = dict(saved.meta.groups[source]["clock"])
        clock["beta"] = beta_of(saved.meta.groups[source])
        always = {b.role for law in laws.candidates(one.optimizer) for b in law.buffers if not b.when}
        anew = clock["step"] > 0 and any(
            f"{role}/{name}" in wanted and f"{role}/{name}" not in by_role
            for role in always
            for name in group.parameters
        )
        old = saved.meta.groups[source]
        same_units = changes.comparable(changes.kind_of(saved.meta, old), one.optimizer)
        try:
            carried = _changes.carry(clock, old["hyperparameters"], one.values, same_units)
        except CheckpointError as error:
            result.problems.append(str(error))
            carried = clock
        new_units, clock = carried != clock, carried
        if anew:  # their bias correction must start at t = 1
            clock["step"] = 0
        if new_units or anew or len(scalars) < len(CLOCK):
            scalars = clock_from(clock, group.state.weight_sum.dtype)
        for name, array in scalars.items():
            form = stored_form(getattr(group.state, name))
            if form != (array.dtype.name, array.shape):
                result.problems.append(_unlike(f"{group.name}/{name}", form, array))
            found[f"clock/{index}/{name}"] = array
        norm = f"clock/{index}/grad_l1_ema"
        if norm in wanted and norm not in by_role:
            found[norm] = np.asarray(clock.get("grad_l1_ema", 0.0), group.state.lr.dtype)
    return found


def _value(name: str, leaf: Any, role: str | None, source: str | None, saved: Saved, result: Fit) -> Any:
    objects = saved.meta.extra.get(OBJECTS, {})
    if is_object(leaf):
        if name not in objects:
            result.problems.append(f"{name} must be in the checkpoint, got none of that name: leave it out")
        return objects.get(name)
    buffer = laws.roles().get((role or "").partition("/")[0])
    if source is not None and buffer and buffer.of_rows and saved.arrays[source].shape != leaf.shape:
        source = None  # of rows along another axis
    if source is not None:
        array, form = saved.arrays[source], stored_form(leaf)
        # NumPy holds a Python int from 2^63 on, such as a seed, in uint64 and any other in int64.
        dtype = (
            form[0] if isinstance(leaf, int) and {form[0], array.dtype.name} <= _INTS else array.dtype.name
        )
        if form != (dtype, array.shape):
            result.problems.append(_unlike(name, form, array))
        return array
    kind = (role or "").partition("/")[0]
    if kind == "rest":  # earlier versions had none: y was what the parameters held
        return np.zeros(leaf.shape, leaf.dtype)
    if buffer or kind in _ACCUMULATION:
        if buffer:
            result.fresh.add(kind)
            result.differs(f"the {buffer.doc} {kind} starts anew")
        elif saved.meta.accumulation["position"]:
            result.differs("the accumulation starts anew")
        return np.zeros(leaf.shape, leaf.dtype)
    if (
        isinstance(leaf, jax.ShapeDtypeStruct)
        or kind in ("y", "stored", "gap")
        or name.startswith("extra_state")
    ):
        advice = "pass tx.init(params) itself" if name.startswith("opt_state") else "leave it out"
        result.problems.append(f"{name} must be in the checkpoint, got none of that name: {advice}")
        return None
    result.differs(f"{name} is not in the checkpoint and starts anew")
    return np.array(array_like(name, leaf))  # a copy: the target's own buffer is not ours to give away


def _unlike(name: str, form: tuple[str, tuple[int, ...]], array: np.ndarray) -> str:
    dtype, shape = form
    if shape != array.shape:
        return f"{name} must have the shape {shape} of the program, got {array.shape}: build the same model"
    advice = "enable jax_enable_x64 as it was" if "64" in array.dtype.name else "restore as it was saved"
    return (
        f"{name} must have the dtype {dtype} of the program, got {array.dtype.name}: {advice}, convert after"
    )


def _leftovers(saved: Saved, used: set[str], result: Fit) -> None:
    """Says what of the checkpoint is not used; parameters without a place are a problem."""
    buffers = laws.roles()
    split = {name: saved.roles.get(name, "").partition("/")[::2] for name in saved.arrays}
    # Where beta is 0 there may be both z and x, and the parameters are z.
    placed = {parameter for name, (kind, parameter) in split.items() if kind in ("z", "x") and name in used}
    for name, (kind, parameter) in split.items():
        if name in used or kind == "clock" or (kind in ("z", "x") and parameter in placed):
            continue
        if kind in ("y", "z", "x", "gap"):
            result.problems.append(f"the checkpoint's {name} must have a place in the program, got none")
        elif kind in buffers:
            result.differs(f"the {buffers[kind].doc} {kind} is not used and is dropped")
        elif kind in _ACCUMULATION:
            if saved.meta.accumulation["position"]:
                result.differs("micro-batches that were accumulated are dropped")
        elif not name.startswith("extra_state"):
            result.differs(f"the checkpoint's {name} is not used")


def _in_form_of(saved: Saved, target: Named, roles: Mapping[str, str]) -> tuple[Saved, list[str]]:
    """Returns a checkpoint in the precision of its target, and a sentence if that is another."""
    narrow, buffers = np.dtype(forms.NARROW), laws.roles()
    saved, changed = in_codes_of(saved, target, roles)
    arrays, found = dict(saved.arrays), dict(saved.roles)
    by_role, leaves = saved.names, saved.leaves
    for leaf_name, leaf in zip(target.names, target.leaves, strict=True):
        kind, _, parameter = roles.get(leaf_name, "").partition("/")
        source = by_role.get(f"{kind}/{parameter}")
        if kind in buffers and source and {arrays[source].dtype, leaf.dtype} == {narrow, np.dtype("f4")}:
            arrays[source], changed = arrays[source].astype(leaf.dtype), True
        elif kind == "rest" and source and arrays[source].dtype != leaf.dtype:
            convert = forms.packed if leaf.dtype == forms.REST else forms.unpacked
            halves = (jnp.asarray(leaves[f"{half}/{parameter}"]) for half in ("y", "rest"))
            arrays[source] = np.asarray(convert(*halves))
        other = {"gap": "z", "stored": "gap"}.get(kind)
        if other is None or source or f"{other}/{parameter}" not in by_role:
            continue
        name = by_role[f"{other}/{parameter}"]
        y, buffer = in_full(leaves, parameter).astype(np.float32), saved.arrays[name].astype(np.float32)
        arrays[name] = (buffer - y if kind == "gap" else y + buffer).astype(leaf.dtype)
        found[name] = f"{'gap' if kind == 'gap' else 'z'}/{parameter}"
        changed = True
    notices = [f"precision: {effect_of('precision')}"] if changed else []
    return saved._replace(arrays=arrays, roles=found), notices
