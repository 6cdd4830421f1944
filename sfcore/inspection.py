"""What a file to resume from says, as data: what it is, where it stands, what a resume would do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import averaging, checks, laws, restart, sources
from sfcore.exchange import split
from sfcore.hyperparameters import weighed
from sfcore.iterates import beta_of, iterates
from sfcore.meta import Meta
from sfcore.sources import Source


def inspect(path: str | Path) -> dict[str, Any]:
    """Returns what is known about a checkpoint, an exchange folder, a torch or Orbax state, or weights.

    Args:
        path: a checkpoint or a folder of them (the newest), a safetensors file, a torch file.

    Returns:
        JSON-like: "path", "what", "verified", "notes", "resume" (sentences), and where known "framework",
        "optimizer", "step", "epoch", "position", "accumulation", "precision", "weights_hold", "metrics",
        "versions", "groups" (hyperparameters, clock, c of the last and of the next step), "norms" (x, y, z,
        z - x, v, m; Euclidean, over all parameters), "parameters", "elements", "leaves" (role -> count).

    Raises:
        CheckpointError: if there is nothing, it is damaged, or of no known kind.

    Example:
        >>> import tempfile, numpy as np
        >>> from sfcore import exchange, inspection
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = exchange.Path(folder) / "model.safetensors"
        ...     record = exchange.write_tensors(path, {"fc.weight": np.ones((2, 2))})
        ...     found = inspection.inspect(path)
        >>> found["what"], found["norms"]
        ('weights without optimizer state (safetensors)', {'weights': 2.0})
    """
    checks.require(TypeError, path=(checks.PATH, path))
    source = sources.load(Path(path))
    found: dict[str, Any] = {"path": str(source.path), "what": source.what, "verified": source.verified}
    if source.meta is None:
        weights = source.weights or {}
        found |= {"parameters": len(weights), "elements": sum(array.size for array in weights.values())}
        found["norms"] = {"weights": _norm(_squares(array) for array in weights.values())}
    else:
        found |= _of_meta(source.meta)
        found["weights_hold"] = source.holds or source.meta.weights_hold
        found["norms"] = norms(source.meta, source.state)
        found["leaves"] = dict(Counter(split(leaf)[0] for leaf in source.state))
    return found | {"notes": source.notes, "resume": _resume(source)}


def _of_meta(meta: Meta) -> dict[str, Any]:
    names = ("framework", "optimizer", "step", "epoch", "position", "accumulation", "precision")
    found = {name: getattr(meta, name) for name in (*names, "weights_hold", "metrics", "versions", "recent")}
    sizes = [math.prod(about["shape"]) for about in meta.parameters.values()]
    found |= {"parameters": len(sizes), "elements": sum(sizes)}
    found["groups"] = [_group(meta, group) for group in meta.groups]
    return found


def _group(meta: Meta, group: Mapping[str, Any]) -> dict[str, Any]:
    clocks = [meta.parameters.get(name, {}).get("clock") for name in group["parameters"]]
    steps = [clock["step"] for clock in clocks if clock]
    last, coming = averaging_weights(group)
    return {
        "hyperparameters": group["hyperparameters"],
        "clock": group["clock"],
        "beta_of_y": beta_of(group),
        "c": last,
        "next_c": coming,
        "parameters": len(clocks),
        "not_started": sum(clock is None for clock in clocks),
        "steps": [min(steps), max(steps)] if steps else [0, 0],
    }


def averaging_weights(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Returns c of the last step (None before one) and of the next, at the largest lr so far (S4, S5)."""
    clock, options = group["clock"], weighed(group["hyperparameters"])
    step, lr_max, total = clock["step"], clock["lr_max"], clock["weight_sum"]
    of_last, of_next = (averaging.step_weight(t, lr_max, **options) for t in (step, step + 1))
    last = clock.get("c")
    if last is None and step > 0:
        last = averaging.averaging_weight(of_last, total)
    coming = averaging.averaging_weight(of_next, total + of_next)
    return last, coming if total + of_next > 0 else None


def norms(meta: Meta, state: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Returns the norms of x, y, z, z - x and buffers over all parameters; None for what is not there."""
    sums: dict[str, list[float] | None] = {"x": [], "y": [], "z": [], "z - x": []}
    for one in iterates(meta, state):
        gap = None if one.x is None or one.z is None else one.z - one.x
        for name, array in (("x", one.x), ("y", one.y), ("z", one.z), ("z - x", gap)):
            known = sums[name]
            if array is None:
                sums[name] = None
            elif known is not None:
                known.append(_squares(array))
    found = {name: None if values is None else _norm(values) for name, values in sums.items()}
    for role in laws.roles():
        held = [array for leaf, array in state.items() if leaf.startswith(f"{role}/")]
        if held:
            found[role] = _norm(_squares(array) for array in held)
    return found


def _squares(array: np.ndarray) -> float:
    if not array.size:  # of whose axes one may be longer than memory
        return 0.0
    wide = array.astype(np.complex128 if np.iscomplexobj(array) else np.float64).reshape(-1)
    return float(np.vdot(wide, wide).real)


def _norm(squares: Any) -> float:
    return math.sqrt(math.fsum(squares))


def _resume(source: Source) -> list[str]:
    """Returns what a resume would do, in sentences."""
    policy = f"prior_steps={restart.WEIGHTS_ONLY['prior_steps']}"
    meta = source.meta
    if meta is None:
        held = "they are x" if source.inference is not None else "whether they are x or y is not recorded"
        return [
            f"no optimizer state: a resume starts from these weights, {policy} by default; {held}",
            f"resume='weights:{source.path}' in sftorch.checkpoint or sfjax.checkpoint",
        ]
    if meta.optimizer == "plain":
        return [
            "not Schedule-Free: load the weights, then sftorch.checkpoint.import_state_dict takes v over; "
            f"x = y = z = the weights, {policy} by default"
        ]
    found = [_how(source, meta)]
    if meta.accumulation["position"]:
        taken = meta.accumulation["position"]
        found.append(f"in the middle of an update: the gradients of {taken} micro-batches are saved")
    late = sum(about.get("clock") is None for about in meta.parameters.values())
    if late and meta.step:
        found.append(f"{late} parameter(s) have had no gradient yet and start their clock at their first one")
    return found


def _how(source: Source, meta: Meta) -> str:
    place = f"goes on after step {meta.step}"
    if not source.verified:
        if meta.framework == "jax":
            return f"{place}: sfjax.checkpoint.import_optax takes it over"
        return f"{place}: load the weights saved with it, then optimizer.load_state_dict or import_state_dict"
    path, place = str(source.path), f"{place}, epoch {meta.epoch}, micro-batch {meta.position}"
    if meta.framework == "torch":
        return f"{place}: sftorch.checkpoint.Checkpoints(...).restore(model, optimizer, resume={path!r})"
    if "Orbax" in source.what:
        return f"{place}: sfjax.checkpoint.Checkpoints(...).restore(params, opt_state, resume={path!r})"
    return f"{place}: sfjax.checkpoint.import_exchange({path!r}, params, opt_state)"
