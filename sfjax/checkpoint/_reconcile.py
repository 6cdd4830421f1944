"""Finds for every leaf of the target what the checkpoint holds for it: by role, else by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from sfcore import changes, laws
from sfcore.exchange import CheckpointError
from sfcore.iterates import beta_of
from sfcore.meta import Meta
from sfjax.checkpoint import _changes, _folder, _precision
from sfjax.checkpoint._leaves import CLOCK, ONE_VECTOR, Group, Named
from sfjax.checkpoint._read import Saved
from sfjax.checkpoint._record import Configured, clock_from
from sfjax.checkpoint._storable import OBJECTS, array_like, is_object, is_weak, stored_form

_ACCUMULATION = ("grad", "accumulation")
_INTS = {"int64", "uint64"}
_SHARED = ("step", "lr_max", "weight_sum")


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
    saved, differences = _precision.in_form_of(saved, target, roles)
    result = Fit(differences=differences)
    by_role = {role: name for name, role in saved.roles.items()} | _stored(saved)
    clocks = _clocks(saved, own, by_role, roles, configured, result)
    used: set[str] = set()
    recorded = saved.meta.tensors.get(_folder.STATE, {})
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
    return f"base/{saved_group(saved.meta, own, int(index))}/{path}"


def saved_group(meta: Meta, own: Sequence[Group], index: int) -> int | None:
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
        source = saved_group(saved.meta, own, index)
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
        same_units = changes.comparable(_changes.kind_of(saved.meta, old), one.optimizer)
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
    return found


def _value(name: str, leaf: Any, role: str | None, source: str | None, saved: Saved, result: Fit) -> Any:
    objects = saved.meta.extra.get(OBJECTS, {})
    if is_object(leaf):
        if name not in objects:
            result.problems.append(f"{name} must be in the checkpoint, got none of that name: leave it out")
        return objects.get(name)
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
    buffer = laws.roles().get(kind)
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
