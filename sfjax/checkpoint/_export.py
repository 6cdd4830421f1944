"""To the framework-free store, from which a run goes on in the torch twin.

The store holds y, z, v, m of every parameter by role and name, and x where beta is 0. y is in full: float32
where a parameter has 16 bits. Gradients of an unfinished accumulation stay behind, because the frameworks
scale them differently: the position in the data goes back to the last update.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import laws, store
from sfcore.changes import LEFT_BEHIND, at_last_update
from sfcore.exchange import CheckpointError, fingerprint, of_role
from sfcore.meta import Meta, as_metrics, as_step
from sfcore.names import NameMap
from sfcore.names.translate import translate
from sfjax.checkpoint import _read, _record
from sfjax.checkpoint._leaves import ONE_VECTOR, beside, named, parameters, whole
from sfjax.checkpoint._save import evaluated, recorded_roles
from sfjax.checkpoint._storable import array_like
from sfjax.state import forms as _halves
from sfjax.state.arguments import Configurations, MicroBatches
from sfjax.state.find import _pure


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
    flat = named(whole(_pure(params), _pure(opt_state)))
    arrays = [np.asarray(array_like(*one)) for one in zip(flat.names, flat.leaves, strict=True)]
    tree = flat.pure.unflatten(arrays)
    values = {
        "step": as_step(step),
        "epoch": epoch,
        "position": position,
        "metrics": as_metrics(metrics or {}),
        "extra": dict(extra or {}),
    }
    batches = _record.accumulated(tree["opt_state"], accumulation)
    meta, _ = at_last_update(_record.make(tree, hyperparameters, batches, **values), LEFT_BEHIND)
    if meta.parameters and not any(group["parameters"] for group in meta.groups):
        raise CheckpointError(f"opt_state must hold z as a tree like params, got {ONE_VECTOR}")
    state = content(tree["params"], tree["opt_state"])
    state |= {f"buffer/{name}": np.asarray(leaf) for name, leaf in beside(buffers, params).items()}
    x = evaluated(_pure(opt_state), _pure(params))
    inference = {name: np.asarray(leaf) for name, leaf in parameters(x).items()}
    meta.fingerprints = {"x": fingerprint(inference), "y": fingerprint(of_role(state, "y"))}
    inference |= of_role(state, "buffer")
    if names is not None:
        meta, state, inference, _ = translate(meta, state, inference, "torch", names)
    return store.write(Path(folder), meta, state, inference)


def content(params: Any, opt_state: Any) -> dict[str, np.ndarray]:
    """Returns ROLE/NAME -> host array of everything another optimizer could go on with."""
    flat = named(whole(params, opt_state))
    about = recorded_roles(params, opt_state)
    leaves = dict(zip(flat.names, flat.leaves, strict=True))
    return _portable({one["role"]: leaves[name] for name, one in about.items()})


def _portable(by_role: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the leaves as any optimizer has them: y in full, z for every parameter, no lean form."""
    y = in_full(by_role)
    found, buffers = {}, laws.roles()
    for role, array in by_role.items():
        kind, _, parameter = role.partition("/")
        if kind == "y":
            found[role] = y[parameter]
        elif kind == "gap":
            found[f"z/{parameter}"] = y[parameter] + array.astype(np.float32)
        elif kind in buffers and f"gap/{parameter}" in by_role:
            found[role] = array.astype(np.float32)
        elif kind in ("x", "z", "base") or kind in buffers:
            found[role] = array
        if kind == "x":  # the parameters are z; the twin keeps z in a buffer of its own
            found[f"z/{parameter}"] = y[parameter].astype(array.dtype)
    return found


def in_full(by_role: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns NAME -> y, with the rest of parameters of 16 bits, from ROLE/NAME -> array."""
    rests = of_role(by_role, "rest")
    return {
        name: np.asarray(_halves.whole(y, rests[name])) if name in rests else y
        for name, y in of_role(by_role, "y").items()
    }


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
    saved = _read.read(Path(path).absolute())
    state = _portable({role: saved.arrays[name] for name, role in saved.roles.items()})
    return saved.meta, state, _read.read_inference(saved.path, saved.meta)
