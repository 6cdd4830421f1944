"""From the framework-free store: a run goes on in JAX that came from the torch twin, or from JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfcore import laws, store
from sfcore import names as _names
from sfcore.changes import LEFT_BEHIND, at_last_update
from sfcore.exchange import CheckpointError, of_role
from sfcore.iterates import beta_of, widened
from sfcore.meta import Meta
from sfcore.names import NameMap
from sfcore.names.translate import renamed
from sfjax.checkpoint._leaves import parameters
from sfjax.checkpoint._place import place
from sfjax.checkpoint._read import Saved
from sfjax.checkpoint._restore import Restored, restore_into
from sfjax.checkpoint._storable import is_weak, stored_form
from sfjax.state.arguments import Configurations, MicroBatches


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
    folder = Path(path).absolute()
    folder = folder if (folder / store.META).exists() else store.newest(folder)
    meta, stored = store.read(folder)
    arrays = widened(stored)
    jax_shapes = {name: tuple(leaf.shape) for name, leaf in parameters(params).items()}
    jax_shapes |= {name: tuple(leaf.shape) for name, leaf in parameters(buffers or {}).items()}
    if meta.framework == "torch":
        found = names if isinstance(names, NameMap) else _names.between(jax_shapes, _shapes(arrays), names)
        arrays = renamed(arrays, found.to_jax)
        meta = _jax_names(meta, found)
    meta, differences = _one_clock(meta)
    meta, left = at_last_update(meta, LEFT_BEHIND)
    arrays = _as_training(meta, arrays, set(parameters(params)))
    arrays |= _halves(meta, arrays, parameters(params))
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
        differences=differences + left,
    )
    if buffers is None:
        return restored
    return replace(restored, extra_state=_buffers(folder, arrays, buffers))


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for role in ("buffer", "y") for name, array in of_role(arrays, role).items()}


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


def _halves(
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
