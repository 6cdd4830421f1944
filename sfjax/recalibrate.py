"""Running statistics at the weights that are evaluated: BatchNorm keeps those of y."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import core, linen, nnx
except ImportError as error:
    raise ImportError(f"sfjax.recalibrate needs flax, got {error}: pip install flax") from error

from sfcore import checks
from sfcore.checks import Rule

__all__ = ["recalibrate", "recalibrate_linen"]

_MODULE = checks.kind_of("an nnx module", nnx.Module, "pass the model itself")
_APPLY = Rule("a function", callable, "such as model.apply")


def recalibrate(
    model: nnx.Module, batches: Iterable[Any], call: Callable[[nnx.Module, Any], Any] | None = None
) -> int:
    """Averages running mean and variance of an nnx model over batches, at the weights it holds, in place.

    Call it on the copy that holds x, before every evaluation and before it is shipped. Every batch counts the
    same. Only `nnx.BatchNorm` works as in training; dropout and the rest are as in `model.eval()`.

    Args:
        model: an nnx module; all its `nnx.BatchNorm` are averaged anew.
        batches: some tens of batches of the training size; of a tuple or a list the first is the input.
        call: how to run a batch; default None: `model(input)`. It must not say use_running_average itself.

    Returns:
        The number of batches used; 0 where there is nothing to do, and then none is drawn.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if there are no batches. After this or any other error, statistics are what they were.
            Flags, momentum and random states are always put back.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sfjax.recalibrate import recalibrate
        >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        >>> recalibrate(model, [jnp.ones((4, 3)), 3 * jnp.ones((4, 3))])
        2
        >>> model.mean[...].tolist()
        [2.0, 2.0, 2.0]
    """
    checks.require(
        TypeError,
        model=(_MODULE, model),
        batches=(checks.BATCHES, batches),
        call=(checks.optional(checks.CALL), call),
    )
    layers = [module for module in _modules(model) if isinstance(module, nnx.BatchNorm)]
    if not layers:
        return 0
    before = _statistics(layers)
    zeros = jax.tree.map(jnp.zeros_like, before)
    # A state shares its variables with the model; a mapped one has its own.
    streams = jax.tree.map(lambda leaf: leaf, nnx.state(model, nnx.RngState))

    def of(batch: Any) -> Any:
        _set(layers, zeros)
        model(_input(batch)) if call is None else call(model, batch)
        return _statistics(layers)

    found = before
    try:
        with _as_in_evaluation(model, layers):
            used, found = _average(map(of, batches))
    finally:
        _set(layers, found)
        nnx.update(model, streams)
    return used


def _average(statistics: Iterable[Any]) -> tuple[int, Any]:
    """Returns how many trees there are, and their plain average; raises ValueError for none."""
    used, found = 0, None
    for used, new in enumerate(statistics, 1):
        old = jax.tree.map(jnp.zeros_like, new) if found is None else found
        found = jax.tree.map(lambda mean, value, n=used: mean + (value - mean) / n, old, new)
    if not used:
        raise ValueError("batches must hold at least one batch, got none: pass some training batches")
    return used, found


def _modules(model: nnx.Module) -> list[nnx.Module]:
    nodes = getattr(nnx, "iter_modules", None) or nnx.iter_graph  # the former since flax 0.12.1
    return [node for _, node in nodes(model) if isinstance(node, nnx.Module)]


def _statistics(layers: list[nnx.BatchNorm]) -> list[tuple[jax.Array, jax.Array]]:
    return [(layer.mean[...], layer.var[...]) for layer in layers]


def _set(layers: list[nnx.BatchNorm], statistics: Iterable[tuple[jax.Array, jax.Array]]) -> None:
    for layer, (mean, var) in zip(layers, statistics, strict=True):
        layer.mean[...], layer.var[...] = mean, var


@contextmanager
def _as_in_evaluation(model: nnx.Module, layers: list[nnx.BatchNorm]) -> Iterator[None]:
    """Holds all but BatchNorm in eval mode, with momentum 0, so that it stores a batch's own statistics."""
    names = ("deterministic", "use_running_average")
    flags = [(m, name, getattr(m, name)) for m in _modules(model) for name in names if hasattr(m, name)]
    momenta = [layer.momentum for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.use_running_average, layer.momentum = False, 0.0
        yield
    finally:
        for module, name, value in flags:
            setattr(module, name, value)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _input(batch: Any) -> Any:
    return batch[0] if isinstance(batch, list | tuple) else batch


def recalibrate_linen(
    apply: Callable[..., tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    collection: str = "batch_stats",
) -> dict[str, Any]:
    """Returns variables whose running mean and variance are averages over batches, at the given params.

    Put x into `variables["params"]` first. Every batch counts the same. Nothing that is passed is changed.

    Args:
        apply: `(variables, input, mutable=[collection]) -> (output, updates)`, such as
            `functools.partial(model.apply, train=True)`, with BatchNorm as in training; leave dropout out.
            Not a function that jax.jit compiles for training too: it keeps the momentum it first met.
        variables: "params" and the collection of statistics.
        batches: some tens of batches of the training size; of a tuple or a list the first is the input.
        collection: name of the statistics; default "batch_stats".

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if there are no batches, or if apply runs no `linen.BatchNorm` that can be averaged.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen
        >>> from sfjax.recalibrate import recalibrate_linen
        >>> model = linen.BatchNorm(use_running_average=False)
        >>> variables = model.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> new = recalibrate_linen(model.apply, variables, [jnp.ones((4, 3)), 3 * jnp.ones((4, 3))])
        >>> new["batch_stats"]["mean"].tolist()
        [2.0, 2.0, 2.0]
    """
    checks.require(
        TypeError,
        variables=(checks.MAPPING, variables),
        batches=(checks.BATCHES, batches),
        collection=(checks.TEXT, collection),
    )
    if not jax.tree.leaves(variables.get(collection, {})):
        return dict(variables)
    checks.require(TypeError, apply=(_APPLY, apply))
    before = variables[collection]
    # apply returns plain dicts for a FrozenDict.
    zeros = jax.tree.map(jnp.zeros_like, core.unfreeze(before))
    layers: list[Any] = []

    def of(batch: Any) -> Any:
        _, updates = apply({**variables, collection: zeros}, _input(batch), mutable=[collection])
        if not layers:
            raise ValueError(
                "apply must run linen.BatchNorm anew, got no such layer: pass model.apply itself, not a "
                "function that jax.jit has compiled before; layers of your own are for you to average"
            )
        return core.unfreeze(updates[collection])

    with linen.intercept_methods(partial(_without_momentum, layers)):
        _, found = _average(map(of, batches))
    return {**variables, collection: core.freeze(found) if isinstance(before, core.FrozenDict) else found}


def _without_momentum(
    layers: list[Any], method: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext
) -> Any:
    """Runs BatchNorm with momentum 0, so that it stores a batch's own statistics, and notes it in layers."""
    module = context.module
    if not isinstance(module, linen.BatchNorm) or context.method_name != "__call__":
        return method(*args, **kwargs)
    layers.append(module.path)
    momentum = module.momentum
    # A module is frozen for its users; this one lives for the call, and gets its value back.
    object.__setattr__(module, "momentum", 0.0)
    try:
        return method(*args, **kwargs)
    finally:
        object.__setattr__(module, "momentum", momentum)
