"""For Flax linen: a TrainState that gives x, and checkpoints of a TrainState in one call.

The learning rate, with its warm-up, is given to the Schedule-Free optimizer; TrainState adds none.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

try:
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ImportError as error:
    raise ImportError(f"sfjax.linen needs flax, got {error}: pip install flax") from error

from sfcore import checks
from sfjax import _flax
from sfjax.checkpoint import Checkpoints, Restored
from sfjax.checkpoint._save import evaluated
from sfjax.step.transformation import Transformation

__all__ = ["TrainState", "restore", "save"]

_STATE = checks.kind_of(
    "a TrainState of Flax", train_state.TrainState, "sfjax.linen.TrainState.create makes one"
)
State = TypeVar("State", bound=train_state.TrainState)


class TrainState(train_state.TrainState, kw_only=True):
    """flax.training's TrainState, which holds y, with x to evaluate and to ship.

    It exists because the one of Flax has no word for x, and evaluation code takes `state.params`. Batch
    statistics go along as in Flax: `state.apply_gradients(grads=grads, batch_stats=new)`. A subclass may
    add fields (PRNG keys, metrics); `save` saves them.

    Attributes:
        batch_stats: running statistics, of y; None where the model has none.

    Example:
        >>> import jax, jax.numpy as jnp, sfjax.linen
        >>> from flax import linen
        >>> model = linen.Dense(2)
        >>> params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
        >>> tx = sfjax.schedule_free_sgd(0.1)
        >>> state = sfjax.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> state = state.apply_gradients(grads=grads).apply_gradients(grads=grads)
        >>> f"y: {state.params['bias'][0]:.3f}, x: {state.eval_params['bias'][0]:.3f}"
        'y: -0.155, x: -0.150'
    """

    batch_stats: Any = None

    def apply_gradients(self, *, grads: Any, **changes: Any) -> Any:
        """Returns the state after a step, as Flax's, by `step` of the transformation if it has one.

        Args:
            grads: tree like params.
            changes: fields to replace, such as batch_stats.
        """
        if OVERWRITE_WITH_GRADIENT in grads or not isinstance(self.tx, Transformation):
            return super().apply_gradients(grads=grads, **changes)
        params, opt_state = self.tx.step(self.params, self.opt_state, gradients=grads)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)

    @property
    def eval_params(self) -> Any:
        """x, a tree like params; also in jax.jit. Raises ValueError if tx is not Schedule-Free."""
        return evaluated(self.opt_state, self.params)

    @property
    def eval_variables(self) -> dict[str, Any]:
        """{"params": x}, and "batch_stats" if there are any, for apply_fn and `recalibrate_linen`."""
        if self.batch_stats is None:
            return {"params": self.eval_params}
        return {"params": self.eval_params, "batch_stats": self.batch_stats}


def save(
    checkpoints: Checkpoints,
    state: train_state.TrainState,
    *,
    buffers: Any = None,
    extra_state: Any = None,
    **options: Any,
) -> Path:
    """Saves a TrainState, and beside it x to ship; returns the path.

    It exists because a TrainState is more than params and opt_state: every field that is a pytree is saved,
    those of subclasses too. The number of the checkpoint is that of the finished updates; `state.step`
    counts micro-batches where gradients are accumulated.

    Args:
        checkpoints: of the run.
        state: ours, or any TrainState of Flax with a Schedule-Free transformation.
        buffers: what goes beside x into the inference weights; default `state.batch_stats`, as they are.
            Better those of `recalibrate_linen`.
        extra_state: what else a resume needs, as for `Checkpoints.save`, such as a grain iterator.
        options: further arguments of `Checkpoints.save`: epoch, position, metrics, hyperparameters, extra.

    Raises:
        CheckpointError: as `Checkpoints.save`.
        TypeError: for checkpoints or a state of another kind.

    Example:
        >>> import tempfile, jax.numpy as jnp, sfjax.linen
        >>> from sfjax.checkpoint import Checkpoints
        >>> tx = sfjax.schedule_free_sgd(0.1)
        >>> state = sfjax.linen.TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=tx)
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     path = sfjax.linen.save(checkpoints, state)
        ...     state, restored = sfjax.linen.restore(checkpoints, state)
        >>> restored.meta.step
        0
    """
    _check(checkpoints, state)
    buffers = getattr(state, "batch_stats", None) if buffers is None else buffers
    return _flax.save(
        checkpoints, state.params, state.opt_state, _beside(state), extra_state, buffers=buffers, **options
    )


def restore(
    checkpoints: Checkpoints, state: State, *, extra_state: Any = None, **options: Any
) -> tuple[State, Restored | None]:
    """Returns the TrainState to go on with, and what is known of it; `state` and None in an empty folder.

    After a start from weights alone (`resume="weights:PATH"`) all but params and opt_state is as in `state`.
    A checkpoint of the torch twin is read by `sfjax.checkpoint.import_exchange`.

    Args:
        checkpoints: of the run.
        state: target, built as the one that was saved; not changed. Concrete or from `jax.eval_shape`.
        extra_state: target for that of `save`; iterators and generators in it are moved.
        options: further arguments of `Checkpoints.restore`: resume, strict, hyperparameters.

    Raises:
        CheckpointError: as `Checkpoints.restore`.
        TypeError: for checkpoints or a state of another kind.

    Example:
        >>> import jax.numpy as jnp, sfjax.linen
        >>> from sfjax.checkpoint import Checkpoints
        >>> tx = sfjax.schedule_free_sgd(0.1)
        >>> state = sfjax.linen.TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=tx)
        >>> state, restored = sfjax.linen.restore(Checkpoints("empty"), state)
        >>> print(restored)
        None
    """
    _check(checkpoints, state)
    restored, found = _flax.restore(
        checkpoints, state.params, state.opt_state, _beside(state), extra_state, **options
    )
    if restored is None:
        return state, None
    new = {"params": restored.params, "opt_state": restored.opt_state, **(found or {})}
    if found is not None and isinstance(state.step, int):
        new["step"] = int(found["step"])  # a jitted step is then not compiled anew
    return state.replace(**new), restored


def _check(checkpoints: Any, state: Any) -> None:
    checks.require(TypeError, checkpoints=(_flax.CHECKPOINTS, checkpoints), state=(_STATE, state))


def _beside(state: train_state.TrainState) -> dict[str, Any]:
    """Returns the pytree fields beside params and opt_state."""
    fields = [field for field in dataclasses.fields(state) if field.metadata.get("pytree_node", True)]
    found = {one.name: getattr(state, one.name) for one in fields if one.name not in ("params", "opt_state")}
    # Flax begins with a Python 0, which the first jitted step makes an int32; a checkpoint has one form.
    return found | ({"step": jnp.int32(state.step)} if isinstance(state.step, int) else {})
