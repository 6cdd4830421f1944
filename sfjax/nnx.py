"""For Flax NNX: a copy of the model that holds x, and checkpoints of model and optimizer in one call.

The learning rate, with its warm-up, is given to the Schedule-Free optimizer; `nnx.Optimizer` adds none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

try:
    from flax import __version__ as _flax_version
    from flax import nnx

    if tuple(map(int, _flax_version.split(".")[:2])) < (0, 11):  # its optimizer kept the model
        raise ImportError(f"flax {_flax_version}")
except ImportError as error:
    raise ImportError(
        f"sfjax.nnx needs flax >= 0.11 (Python 3.11), got {error}: pip install -U flax"
    ) from error

from sfcore import checks
from sfjax import _flax
from sfjax.checkpoint import Checkpoints, Restored
from sfjax.checkpoint._save import evaluated
from sfjax.state.find import _pure
from sfjax.step.transformation import stepped

__all__ = ["eval_model", "restore", "save", "step"]

_MODEL = checks.kind_of("an nnx module", nnx.Module, "pass the model itself")
_OPTIMIZER = checks.kind_of("an nnx.Optimizer", nnx.Optimizer, "nnx.Optimizer(model, tx, wrt=nnx.Param)")
Model = TypeVar("Model", bound=nnx.Module)


def eval_model(model: Model, optimizer: nnx.Optimizer[Any]) -> Model:
    """Returns a copy of a model, in eval mode, whose trained variables hold x: to evaluate and to ship.

    It exists because x must never get into the model that trains: the next update would take it for y, and
    nothing could notice. The copy shares nothing with the model: batch statistics, random states and
    variables that are not trained are copied. Statistics are those of y until
    `sfjax.recalibrate.recalibrate(copy, batches)`.

    Args:
        model: as the last update left it; not changed. Also in nnx.jit.
        optimizer: an nnx.Optimizer of it with a Schedule-Free transformation in any wrapping. The variables
            of its `wrt` hold x in the copy.

    Raises:
        ValueError: if there is no Schedule-Free state in it, or if it is that of another model.
        TypeError: for what is no model or no optimizer.

    Example:
        >>> import jax.numpy as jnp, sfjax.nnx
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, sfjax.schedule_free_sgd(0.1), wrt=nnx.Param)
        >>> for _ in range(2):
        ...     _ = optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 3))).sum())(model))
        >>> shipped = sfjax.nnx.eval_model(model, optimizer)
        >>> f"y: {model.bias[0]:.3f}, x: {shipped.bias[0]:.3f}"
        'y: -0.155, x: -0.150'
    """
    checks.require(TypeError, model=(_MODEL, model), optimizer=(_OPTIMIZER, optimizer))
    copy = nnx.clone(model)
    params, rest = nnx.state(copy, optimizer.wrt, ...)
    nnx.update(copy, evaluated(_pure(optimizer.opt_state), _pure(params)))
    # A train step to which the model is donated would delete arrays that the copy shares with it.
    nnx.update(copy, jax.tree.map(jnp.copy, rest))
    copy.eval()
    return copy


def step(model: nnx.Module, optimizer: nnx.Optimizer[Any], grads: Any, **extra_args: Any) -> None:
    """Takes one step of a model and its optimizer, in place, as `optimizer.update(model, grads)`.

    It exists because that one makes updates and adds them; this one goes by `step` of the transformation, if
    it is a `sfjax.Transformation`: on a CPU in one pass over memory, without temporaries.

    Args:
        model, optimizer: as for `eval_model`; donate both to nnx.jit, in this order.
        grads: of the variables of the optimizer's `wrt`, as nnx.grad returns them.
        extra_args: further arguments of the transformation.

    Raises:
        TypeError: for what is no model or no optimizer.

    Example:
        >>> import jax.numpy as jnp, sfjax.nnx
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, sfjax.schedule_free_sgd(0.1), wrt=nnx.Param)
        >>> sfjax.nnx.step(model, optimizer, nnx.grad(lambda m: m(jnp.ones((1, 3))).sum())(model))
        >>> model.bias[...].tolist(), int(optimizer.step[...])
        ([-0.10000000149011612, -0.10000000149011612], 1)
    """
    checks.require(TypeError, model=(_MODEL, model), optimizer=(_OPTIMIZER, optimizer))
    params, gradients = (_pure(nnx.state(one, optimizer.wrt)) for one in (model, grads))
    params, state = stepped(optimizer.tx, params, _pure(optimizer.opt_state), gradients, _pure(extra_args))
    nnx.update(model, params)
    nnx.update(optimizer.opt_state, nnx.state(state))
    optimizer.step[...] += 1


def save(
    checkpoints: Checkpoints,
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any],
    *,
    buffers: Any = None,
    extra_state: Any = None,
    **options: Any,
) -> Path:
    """Saves model and optimizer, all that a resume needs, and beside it x to ship; returns the path.

    It exists because an nnx model keeps more than its parameters: batch statistics, the random streams of
    Dropout, variables that are not trained. A run that resumes without them takes another path. The number
    of the checkpoint is that of the finished updates, also where gradients are accumulated.

    Args:
        checkpoints: of the run.
        model, optimizer: as for `eval_model`.
        buffers: what goes beside x into the inference weights; default the model's `nnx.BatchStat`, as they
            are. Better `nnx.state(copy, nnx.BatchStat)` of a copy that was recalibrated.
        extra_state: what else a resume needs, as for `Checkpoints.save`: a grain iterator,
            `nnx.state(rngs)` of random streams outside of the model.
        options: further arguments of `Checkpoints.save`: epoch, position, metrics, hyperparameters, extra.

    Raises:
        CheckpointError: as `Checkpoints.save`.
        TypeError: for checkpoints, a model or an optimizer of another kind.

    Example:
        >>> import tempfile, sfjax.nnx
        >>> from flax import nnx
        >>> from sfjax.checkpoint import Checkpoints
        >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, sfjax.schedule_free_sgd(0.1), wrt=nnx.Param)
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        ...     path = sfjax.nnx.save(checkpoints, model, optimizer)
        ...     restored = sfjax.nnx.restore(checkpoints, model, optimizer)
        >>> restored.meta.step
        0
    """
    _check(checkpoints, model, optimizer)
    params, rest = nnx.state(model, optimizer.wrt, ...)
    buffers = nnx.state(model, nnx.BatchStat) if buffers is None else buffers
    beside = {"model": rest, "step": optimizer.step}
    return _flax.save(
        checkpoints, params, optimizer.opt_state, beside, extra_state, buffers=buffers, **options
    )


def restore(
    checkpoints: Checkpoints,
    model: nnx.Module,
    optimizer: nnx.Optimizer[Any],
    *,
    extra_state: Any = None,
    **options: Any,
) -> Restored | None:
    """Puts a checkpoint of `save` into model and optimizer; an error leaves both as they were.

    After a start from weights alone (`resume="weights:PATH"`) only the variables of `wrt` are the loaded
    ones. A checkpoint of the torch twin is read by `sfjax.checkpoint.import_exchange`.

    Args:
        checkpoints: of the run.
        model, optimizer: built as those that were saved; changed in place.
        extra_state: target for that of `save`; iterators and generators in it are moved.
        options: further arguments of `Checkpoints.restore`: resume, strict, hyperparameters.

    Returns:
        What was restored, `extra_state` included, or None if there is nothing to resume from.

    Raises:
        CheckpointError: as `Checkpoints.restore`.
        TypeError: for checkpoints, a model or an optimizer of another kind.

    Example:
        >>> import sfjax.nnx
        >>> from flax import nnx
        >>> from sfjax.checkpoint import Checkpoints
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, sfjax.schedule_free_sgd(0.1), wrt=nnx.Param)
        >>> print(sfjax.nnx.restore(Checkpoints("empty"), model, optimizer))
        None
    """
    _check(checkpoints, model, optimizer)
    params, rest = nnx.state(model, optimizer.wrt, ...)
    beside = {"model": rest, "step": optimizer.step}
    restored, found = _flax.restore(checkpoints, params, optimizer.opt_state, beside, extra_state, **options)
    if restored is None:
        return None
    nnx.update(model, restored.params)
    nnx.update(optimizer.opt_state, nnx.state(restored.opt_state))
    if found is not None:
        nnx.update(model, found["model"])
        optimizer.step[...] = found["step"][...]
    return restored


def _check(checkpoints: Any, model: Any, optimizer: Any) -> None:
    checks.require(
        TypeError,
        checkpoints=(_flax.CHECKPOINTS, checkpoints),
        model=(_MODEL, model),
        optimizer=(_OPTIMIZER, optimizer),
    )
