"""A start from weights alone: they are taken for x, y and z, and count as an average of earlier steps.

A plain start gives the first step the whole average (c = 1), so x jumps from the loaded weights to the
first z. `prior_steps` counts the weights as that many earlier steps. It can be given to the transformation
when it is built; or `start_from_weights` puts it into the state of one that is there already.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfcore import averaging, checks, restart, store
from sfcore import hyperparameters as kinds
from sfcore.checks import HyperparameterError
from sfcore.exchange import CheckpointError
from sfcore.hyperparameters import weighed
from sfcore.laws import LAWS
from sfcore.meta import Meta
from sfjax.checkpoint import _orbax, _record
from sfjax.checkpoint._leaves import check_arrays, check_trees, groups, host_arrays, parameters
from sfjax.checkpoint._orbax import Saved
from sfjax.checkpoint._record import Configured
from sfjax.checkpoint._restore import Restored, concrete_beta, restore_into, tell
from sfjax.state import eight, forms
from sfjax.state.arguments import Configurations, MicroBatches

NO_STATE = "no optimizer state: starting from x"


def start_from_weights(
    weights: Any,
    params: Any,
    opt_state: Any,
    *,
    hyperparameters: Configurations | None = None,
    accumulation: MicroBatches | None = None,
    trained_steps: int | None = None,
) -> Restored:
    """Returns the start of a run whose weights are the average of an earlier one, and nothing else is known.

    The state is that of `tx.init`, with z = y = x = the weights and with the `prior_steps` of
    `sfcore.restart.WEIGHTS_ONLY` in its sum of weights. Values of your own win: build the transformation
    with `prior_steps=K`, or pass {"lr": ..., "prior_steps": K} here; 0 is a plain start.

    Args:
        weights: tree like params; or the path of a safetensors file, of a checkpoint, or of a folder of them.
        params: target: shapes, dtypes and shardings, concrete or `jax.ShapeDtypeStruct`.
        opt_state: what `tx.init(params)` returned, any wrapping; the values of params in it do not matter.
        hyperparameters: a dataclass of `sfcore.hyperparameters` or a dict of its fields. `lr`, the full one,
            is needed unless the transformation was built with `prior_steps`.
        accumulation: as for `Checkpoints.restore`.
        trained_steps: optimizer steps that the weights were trained for, if you know; a checkpoint says it
            itself. The weights then count as that many.

    Returns:
        Trees like params and opt_state; `notices` says what was assumed.

    Raises:
        CheckpointError: if weights that are trained are missing, or any has another shape, lr is missing,
            or r > 0 in a transformation built without `prior_steps`.
        HyperparameterError: for prior_steps or trained_steps out of range (a ValueError).

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> from sfjax.checkpoint import start_from_weights
        >>> tx = sfjax.schedule_free_adamw(0.01)
        >>> params = {"w": jnp.zeros(3)}
        >>> weights = {"w": jnp.ones(3)}
        >>> start = start_from_weights(weights, params, tx.init(params), hyperparameters={"lr": 0.01})
        >>> start.params["w"].tolist(), bool(sfjax.find_state(start.opt_state).weight_sum > 0)
        ([1.0, 1.0, 1.0], True)
    """
    check_trees(params, opt_state)
    _record.check_configured(hyperparameters, accumulation)
    checks.require(HyperparameterError, trained_steps=(checks.optional(checks.STEPS), trained_steps))
    if isinstance(weights, str | Path):
        path = Path(weights).absolute()
        found, known, said = read(path)
    else:
        check_arrays("weights", weights, "pass a tree like params, or a path", or_none=False)
        path, found, known, said = Path("weights"), host_arrays(weights), None, []
    trained_steps = known if trained_steps is None else trained_steps
    notices = [f"{path}: {NO_STATE}", *said]
    targets = parameters(params)
    own = groups(params, opt_state)
    found, notices_of_rest = with_frozen(found, targets, {name for group in own for name in group.parameters})
    x, more = fitted(path, found, targets)
    notices += notices_of_rest + more
    given = _record.configured(hyperparameters, own)
    arrays = {f"y/{name}": leaf for name, leaf in x.items()}
    recorded = []
    for group, one in zip(own, given, strict=True):
        buffers, rests = parameters(group.state.z), parameters(group.state.y_rest)
        for name in group.parameters:  # a gap's dtype is not enough for z itself
            is_gap = forms.is_lean(rests.get(name)) or eight.is_code(buffers[name])
            wide = np.float32 if is_gap else buffers[name].dtype
            arrays[f"z/{name}"] = x[name].astype(wide)
        clock, sentence = opening(group.state, one, trained_steps)
        notices.append(sentence)
        about = {"optimizer": one.optimizer, "hyperparameters": one.values, "clock": clock}
        recorded.append(about | {"parameters": group.parameters})
    meta = Meta(framework="jax", optimizer="+".join(one.optimizer for one in given), step=0, groups=recorded)
    saved = Saved(path, meta, arrays, {name: name for name in arrays})
    started = restore_into(
        saved, params, opt_state, hyperparameters=hyperparameters, accumulation=accumulation, quiet=True
    )
    tell(notices)
    return Restored(started.params, started.opt_state, None, meta, path, notices)


def read(path: Path) -> tuple[dict[str, np.ndarray], int | None, list[str]]:
    """Returns what `sfcore.store.weights` does, also of an Orbax checkpoint or a folder of them."""
    one = store.one_of(path, _orbax.LAYOUT) if path.is_dir() else path
    if not _orbax.is_ours(one):
        return store.weights(path)
    meta = _orbax.read_meta(one)
    return _orbax.read_inference(one, meta), meta.step, []


def with_frozen(
    found: Mapping[str, np.ndarray], targets: Mapping[str, Any], held: Set[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the weights and, as they are in the target, the parameters beside them without such a state.

    Args:
        found: the weights.
        targets: name -> live or abstract leaf.
        held: names of what Schedule-Free states move, which the weights must have.
    """
    left = {
        name: np.asarray(target)
        for name, target in targets.items()
        if name not in found and name not in held and not isinstance(target, jax.ShapeDtypeStruct)
    }
    if not left:
        return dict(found), []
    notice = (
        f"{len(left)} weights without Schedule-Free state are missing: they stay, the first {min(left)!r}"
    )
    return {**found, **left}, [notice]


def fitted(
    path: Path, found: Mapping[str, np.ndarray], targets: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the weights in the targets' dtypes, and notices of what was converted or left out.

    Raises:
        CheckpointError: with every weight that is missing or has another shape.
    """
    problems = [f"{name} must be in it, got none of that name" for name in targets if name not in found]
    problems += [
        f"{name} must have the shape {tuple(target.shape)} of the program, got {found[name].shape}"
        for name, target in targets.items()
        if name in found and found[name].shape != tuple(target.shape)
    ]
    if problems:
        advice = "build the same model; sfcore.names.between turns weights of torch into JAX's"
        raise CheckpointError(f"{path} does not fit the program ({advice}):\n  " + "\n  ".join(problems))
    notices = []
    unused = [name for name in found if name not in targets]
    if unused:
        notices.append(f"{len(unused)} leaves are not parameters and were left out, the first {unused[0]!r}")
    cast = [name for name, target in targets.items() if found[name].dtype != np.dtype(target.dtype)]
    if cast:
        notices.append(
            f"{len(cast)} weights are converted to the program's dtype, the first {cast[0]!r}: "
            f"{found[cast[0]].dtype} to {np.dtype(targets[cast[0]].dtype)}"
        )
    return {name: found[name].astype(target.dtype) for name, target in targets.items()}, notices


def opening(state: Any, configured: Configured, trained_steps: int | None) -> tuple[dict[str, Any], str]:
    """Returns the clock to begin with, and the sentence about it.

    Args:
        state: the target's, of `tx.init`.
        configured: what is known of its configuration.
        trained_steps: of the weights, if it is known.

    Raises:
        CheckpointError: if the policy needs a number that is not known.
        HyperparameterError: for prior_steps out of range.
    """
    values = configured.values
    live = concrete_beta(state)  # {} of an abstract state, and of one that was donated to a step
    if not live and "beta" not in values:
        raise CheckpointError(
            "opt_state must be tx.init(params) itself to start from weights, got abstract or donated leaves"
        )
    clock = {"step": 0, "lr_max": 0.0, "weight_sum": 0.0, "beta": live.get("beta", values.get("beta"))}
    # The sum of a state that has run is that of its steps, not of the prior_steps that it was built with.
    built = float(np.asarray(state.weight_sum)) if live and int(np.asarray(state.step)) == 0 else 0.0
    if built > 0:
        words = "the weights count as the prior_steps that the transformation was built with"
        return clock | {"weight_sum": built}, words
    kind = LAWS[configured.optimizer].options if configured.optimizer in LAWS else kinds.ScheduleFree
    policy = restart.weights_only_policy(configured.chosen, kind, trained_steps=trained_steps)
    checks.check(kind, {"prior_steps": policy["prior_steps"]})
    count = int(policy["prior_steps"])
    if count == 0:
        return clock, "prior_steps is 0: the first step takes the whole average"
    lr, r = values.get("lr"), values.get("r", 0.0)
    if not isinstance(lr, int | float) or lr <= 0 or r:
        raise CheckpointError(
            f"hyperparameters must give {'r = 0' if r else 'lr > 0, the full one'}, to start from weights, "
            f"got lr = {lr!r}, r = {r!r}: or build the transformation with prior_steps={count}"
        )
    words = f"the weights count as the average of {count} earlier steps (prior_steps)"
    if policy.get("warmup_steps") and "warmup_steps" not in configured.chosen:
        words += f"; build the transformation with warmup_steps={policy['warmup_steps']} as well"
    power = weighed(values)["weight_lr_power"]
    return clock | {"weight_sum": averaging.prior_weight(count, float(lr), power)}, words
