"""From and to the framework-free store, where a run of JAX and one of the torch twin take each other over.

The store holds y, z, v, m of every parameter by role and name, and x where beta is 0. y is in full: float32
where a parameter has 16 bits. Gradients of an unfinished accumulation stay behind, because the frameworks
scale them differently: the position in the data goes back to the last update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfcore import checks, laws, store
from sfcore import names as _names
from sfcore.changes import LEFT_BEHIND, at_last_update
from sfcore.checks import Rule
from sfcore.exchange import CheckpointError, of_role
from sfcore.iterates import beta_of, widened
from sfcore.meta import Meta, as_place, of_rank
from sfcore.names import NameMap
from sfcore.names.translate import renamed, translate
from sfjax.checkpoint import _orbax, _record
from sfjax.checkpoint._arrays import array_like, is_weak, place, stored_form
from sfjax.checkpoint._codes import gap_code
from sfjax.checkpoint._leaves import (
    ONE_VECTOR,
    beside,
    check_arrays,
    check_trees,
    host_arrays,
    in_full,
    named,
    parameters,
    whole,
)
from sfjax.checkpoint._orbax import Saved
from sfjax.checkpoint._restore import Restored, restore_into
from sfjax.checkpoint._save import evaluated, recorded_roles
from sfjax.state.arguments import Configurations, MicroBatches
from sfjax.state.find import _pure

_NAME_MAP = checks.optional(
    checks.kind_of("a NameMap", NameMap, "sfcore.names.to_torch and between make one")
)
_NAMES = Rule(
    "None, a NameMap, or a JSON file or its content",
    lambda v: isinstance(v, NameMap) or _names.USER_MAP.holds(v),
    "sfcore.names.between makes a NameMap",
)


def export_exchange(
    folder: str | Path,
    params: Any,
    opt_state: Any,
    *,
    step: int,
    hyperparameters: Configurations | None = None,
    names: NameMap | None = None,
    buffers: Any = None,
    epoch: int = 0,
    position: int = 0,
    accumulation: MicroBatches | None = None,
    metrics: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one checkpoint of the framework-free store; returns its path, FOLDER/step_....

    Args:
        folder: where it goes, beside others or not.
        params, opt_state, step, hyperparameters, epoch, position, accumulation, metrics, extra: as for
            `Checkpoints.save`. The torch twin needs hyperparameters.
        names: from `sfcore.names`, to write torch's names and layouts; JAX's own by default, which the twin
            can turn into its own as well.
        buffers: model state without gradient, such as batch statistics.

    Raises:
        CheckpointError: if it cannot be written, or a buffer has the name of a parameter; nothing of the
            attempt stays.
        NamesError: if `names` does not fit (a CheckpointError).

    Example:
        >>> import tempfile, jax.numpy as jnp, sfjax
        >>> from sfjax.checkpoint import export_exchange, import_exchange
        >>> tx = sfjax.schedule_free_sgd(0.1)
        >>> params = {"w": jnp.ones(3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_exchange(folder, params, tx.init(params), step=0)
        ...     back = import_exchange(path, params, tx.init(params))
        >>> back.params["w"].tolist()
        [1.0, 1.0, 1.0]
    """
    values = as_place(step, epoch, position, metrics, extra)
    checks.require(TypeError, folder=(checks.PATH, folder), names=(_NAME_MAP, names))
    _record.check_configured(hyperparameters, accumulation)
    check_trees(params, opt_state)
    flat = named(whole(_pure(params), _pure(opt_state)))
    arrays = [np.asarray(array_like(*one)) for one in zip(flat.names, flat.leaves, strict=True)]
    tree = flat.pure.unflatten(arrays)
    batches = _record.accumulated(tree["opt_state"], accumulation)
    meta, _ = at_last_update(_record.make(tree, hyperparameters, batches, **values), LEFT_BEHIND)
    if meta.parameters and not any(group["parameters"] for group in meta.groups):
        raise CheckpointError(f"opt_state must hold z as a tree like params, got {ONE_VECTOR}")
    leaves = dict(zip(flat.names, arrays, strict=True))
    about = recorded_roles(tree["params"], tree["opt_state"])
    state = _portable({one["role"]: leaves[name] for name, one in about.items()})
    state |= {f"buffer/{name}": np.asarray(leaf) for name, leaf in beside(buffers, params).items()}
    inference = host_arrays(evaluated(_pure(opt_state), _pure(params)))
    inference |= of_role(state, "buffer")
    if names is not None:
        meta, state, inference, _ = translate(meta, state, inference, "torch", names)
    return store.write(Path(folder), meta, state, inference)


def _portable(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns role -> array as any optimizer has them: y in full, z for every parameter, no lean form."""
    held = {"y", "gap", "scale", "x", "z", "base", *laws.roles()}
    found = {role: array for role, array in leaves.items() if role.partition("/")[0] in held}
    found |= {f"gap/{name}": gap_code(leaves, name) for name in of_role(leaves, "scale")}
    found = widened(found | {f"y/{name}": in_full(leaves, name) for name in of_role(leaves, "y")})
    # Where there is an x, the parameters are z; the twin keeps z in a buffer of its own.
    for name, x in of_role(leaves, "x").items():
        found[f"z/{name}"] = found[f"y/{name}"].astype(x.dtype)
    return found


def read(path: str | Path) -> tuple[Meta, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns (record, ROLE/NAME -> array, inference weights) of one Orbax checkpoint, verified, on the host.

    Args:
        path: FOLDER/STEP, as `Checkpoints.save` returned it.

    Raises:
        CheckpointError: naming file and leaf if it is damaged.

    Example:
        >>> import tempfile, jax.numpy as jnp, sfjax
        >>> from sfjax.checkpoint import Checkpoints, read
        >>> tx, params = sfjax.schedule_free_sgd(0.1), {"w": jnp.ones(3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpoints(folder) as checkpoints:
        ...         path = checkpoints.save(0, params, tx.init(params))
        ...     meta, state, inference = read(path)
        >>> sorted(state), sorted(inference)
        (['y/w', 'z/w'], ['w'])
    """
    checks.require(TypeError, path=(checks.PATH, path))
    saved = _orbax.read(Path(path).absolute())
    state = _portable({role: np.asarray(array) for role, array in saved.leaves.items()})
    return saved.meta, state, _orbax.read_inference(saved.path, saved.meta)


def import_exchange(
    path: str | Path,
    params: Any,
    opt_state: Any,
    *,
    names: NameMap | _names.UserMap = None,
    buffers: Any = None,
    hyperparameters: Configurations | None = None,
    accumulation: MicroBatches | None = None,
    batch_size: int | None = None,
    strict: bool = False,
) -> Restored:
    """Takes over a checkpoint of the framework-free store, of JAX or of the torch twin.

    Args:
        path: the checkpoint, or a folder of them: the newest.
        params, opt_state, hyperparameters, accumulation, batch_size, strict: as for `Checkpoints.restore`.
        names: for a checkpoint with torch's names, a `sfcore.names.NameMap`, or what `sfcore.names.between`
            takes as a user's map; by default it is derived from names and shapes.
        buffers: target for model state without gradient; it comes back as `Restored.extra_state`.

    Raises:
        CheckpointError: if it is damaged or does not fit; NamesError if the names do not.

    Example:
        >>> import tempfile, jax.numpy as jnp, sfjax
        >>> from sfjax.checkpoint import export_exchange, import_exchange
        >>> tx, params = sfjax.schedule_free_sgd(0.1), {"w": jnp.ones(3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_exchange(folder, params, tx.init(params), step=7)
        ...     import_exchange(path, params, tx.init(params)).meta.step
        7
    """
    checks.require(TypeError, path=(checks.PATH, path), names=(_NAMES, names), strict=(checks.FLAG, strict))
    check_trees(params, opt_state)
    check_arrays("buffers", buffers, "pass the tree that they shall be like", or_numbers=True)
    _record.check_configured(hyperparameters, accumulation, batch_size)
    folder = store.at(Path(path).absolute())
    meta, stored = store.read(folder)
    meta, places = _own_place(meta)
    arrays = widened(stored)
    if meta.framework == "torch":
        leaves = parameters(params) | parameters(buffers or {})
        ours = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        stored = of_role(arrays, "buffer") | of_role(arrays, "y")
        theirs = {name: array.shape for name, array in stored.items()}
        found = names if isinstance(names, NameMap) else _names.between(ours, theirs, names)
        arrays = renamed(arrays, found.to_jax)
        meta = _jax_names(meta, found)
    meta, differences = _one_clock(meta)
    meta, left = at_last_update(meta, LEFT_BEHIND)
    arrays = _as_training(meta, arrays, set(parameters(params)))
    arrays |= _in_halves(meta, arrays, parameters(params))
    held = {"y", "rest", "x", "z", *laws.roles(), "base"}
    state = {leaf: array for leaf, array in arrays.items() if leaf.partition("/")[0] in held}
    saved = Saved(folder, meta, state, {leaf: leaf for leaf in state})
    restored = restore_into(
        saved,
        params,
        opt_state,
        hyperparameters=hyperparameters,
        accumulation=accumulation,
        batch_size=batch_size,
        strict=strict,
        differences=places + differences + left,
    )
    if buffers is None:
        return restored
    return replace(restored, extra_state=_buffers(folder, arrays, buffers))


def _own_place(meta: Meta) -> tuple[Meta, list[str]]:
    """Returns the record as the rank of this number wrote it, and a word if there were not as many."""
    own, count = of_rank(meta, jax.process_index()), jax.process_count()
    differ = any({"epoch", "position"} & set(one) for one in meta.ranks)
    said = (
        f"the place in the data is that of one of the {len(meta.ranks)} processes that wrote the checkpoint, "
        f"which differ in it; this run has {count}"
    )
    return replace(own, ranks=[]), [said] if differ and len(meta.ranks) != count else []


def _jax_names(meta: Meta, names: NameMap) -> Meta:
    about = {jax: one for torch, one in meta.parameters.items() for jax in names.jax_names(torch)}
    moved = [
        group | {"parameters": [jax for torch in group["parameters"] for jax in names.jax_names(torch)]}
        for group in meta.groups
    ]
    return replace(meta, parameters=about, groups=moved)


def _one_clock(meta: Meta) -> tuple[Meta, list[str]]:
    """Returns the record with one clock a group, the furthest of its parameters', as JAX has it."""
    differences, moved = [], []
    for group in meta.groups:
        clocks = [meta.parameters[name]["clock"] for name in group["parameters"]]
        started = [clock for clock in clocks if clock]
        clock = group["clock"] | max(started, key=lambda one: one["step"], default={})
        late = [
            n
            for n, one in zip(group["parameters"], clocks, strict=True)
            if not one or one["step"] != clock["step"]
        ]
        if late:
            differences.append(
                f"{len(late)} parameters have a clock of their own, the first {late[0]!r}: JAX has one clock "
                f"for all, so they go on at step {clock['step']} too"
            )
        ramp, warmed = group["hyperparameters"].get("warmup_steps", 0), group["clock"]["step"]
        if warmed != clock["step"] and min(warmed, clock["step"]) < ramp:
            differences.append(
                f"the warm-up has come to step {warmed} of {ramp}, the parameters to step {clock['step']}: "
                "JAX has one clock for both, so the warm-up goes on at the latter"
            )
        moved.append(group | {"clock": clock})
    return replace(meta, groups=moved), differences


def _as_training(meta: Meta, arrays: dict[str, np.ndarray], wanted: set[str]) -> dict[str, np.ndarray]:
    """Returns the leaves as a JAX run holds them in training: y in the parameters, z for every parameter."""
    arrays = dict(arrays)
    for name in wanted:  # parameters that torch's optimizer did not hold are among its buffers
        if f"y/{name}" not in arrays and f"buffer/{name}" in arrays:
            arrays[f"y/{name}"] = arrays[f"buffer/{name}"]
    for group in meta.groups:
        beta = beta_of(group)
        for name in group["parameters"]:
            y = arrays[f"y/{name}"]
            z = arrays.setdefault(f"z/{name}", y.astype(np.promote_types(y.dtype, np.float32)))
            if meta.weights_hold == "x" and name in meta.parameters and meta.parameters[name]["clock"]:
                arrays.setdefault(f"x/{name}", y.astype(z.dtype))
                arrays[f"y/{name}"] = (beta * y.astype(z.dtype) + (1 - beta) * z).astype(y.dtype)
            if beta == 0:
                arrays.setdefault(f"x/{name}", z)
    return arrays


def _in_halves(
    meta: Meta, arrays: Mapping[str, np.ndarray], targets: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns y and its rest of every parameter of 16 bits whose y the store holds in float32."""
    found = {}
    for name, target in targets.items():
        y, dtype = arrays.get(f"y/{name}"), np.dtype(target.dtype)
        recorded = meta.parameters.get(name, {}).get("dtype")
        if y is not None and y.dtype == np.float32 and recorded == dtype.name and dtype.itemsize < 4:
            found[f"y/{name}"] = y.astype(dtype)
            found[f"rest/{name}"] = y - found[f"y/{name}"].astype(y.dtype)
    return found


def _buffers(path: Path, arrays: Mapping[str, np.ndarray], target: Any) -> Any:
    found, wanted = of_role(arrays, "buffer"), parameters(target)
    forms = {name: (array.dtype.name, array.shape) for name, array in found.items()}
    problems = [
        f"buffer {name!r} must be {stored_form(leaf)} in it, got {forms.get(name, 'none of that name')}"
        for name, leaf in wanted.items()
        if forms.get(name) != stored_form(leaf)
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the program:\n  " + "\n  ".join(problems))
    targets = list(wanted.values())
    leaves = place(targets, [found[name] for name in wanted], list(map(is_weak, targets)))
    return jax.tree.unflatten(jax.tree.structure(target), leaves)
