"""From a direction of our own (S6) to a transformation: its row says what lr, average and decay do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from sfcore import averaging, checks, laws
from sfcore.laws import JAX_NAMES, Law
from sfjax import _arguments, _layout, _scalars, _trees
from sfjax._arguments import is_zero
from sfjax._iterates import wide_dtype
from sfjax.schedule_free import Base, build

# Types of state that hold the buffers of a direction, by which a checkpoint knows one.
STATES: set[type] = {optax.EmptyState}
Factory = TypeVar("Factory", bound=Callable[..., Any])
_NONE_IS_0 = ("weight_decay", "warmup_steps")


class Direction(NamedTuple):
    """What an optimizer does with a gradient.

    Attributes:
        law: the name of its row in `sfcore.laws`.
        next: (gradients in wide dtype, buffers, t, options) -> (direction in the same dtype, buffers).
        state: the NamedTuple of its buffers, which has their names in JAX; optax.EmptyState without any.
    """

    law: str
    next: Callable[[Any, Any, jax.Array, Any], tuple[Any, Any]]
    state: type = optax.EmptyState


def known_options(law: str) -> Callable[[Factory], Factory]:
    """Makes the factory of a row name a misspelt keyword together with all else that is wrong."""

    def find(given: Mapping[str, Any]) -> list[str]:
        numbers = {
            name: value
            for name, value in given.items()
            if not isinstance(value, jax.core.Tracer) and not callable(value) and value is not None
        }
        return laws.law_of(law).problems("jax", numbers)

    return checks.with_known_options(find, lambda: laws.law_of(law).words("jax"))


def directed(direction: Direction, arguments: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """Returns the Schedule-Free transformation along a direction.

    Args:
        direction: its row must be in `sfcore.laws.LAWS`.
        arguments: of the factory, by name: the row's options by their names in JAX, and mask, state_dtype,
            precision and seed.

    Raises:
        HyperparameterError: with every value that is out of range.
    """
    STATES.add(direction.state)
    law = laws.law_of(direction.law)
    given = {name: arguments[JAX_NAMES.get(name, name)] for name in law.defaults}
    given |= {name: 0 for name in _NONE_IS_0 if name in given and given[name] is None}
    hp: Any = _arguments.read(law.options, **given)
    mask, state_dtype, precision, seed = (
        arguments[name] for name in ("mask", "state_dtype", "precision", "seed")
    )
    lean = _arguments.read_precision(precision, seed, hp.beta, state_dtype, law)
    lr, factor = _scalars.lr_schedule(hp.lr), _scalars.step_size(law, hp)
    wd_y, wd_z = averaging.DECAYS[law.decay_at](hp.weight_decay)
    buffers = _buffers(direction, law, given)

    def init(params: Any) -> Any:
        def zeros() -> Any:
            return jax.tree.map(lambda p: _layout.zeros_alike(p, wide_dtype(p)), params)

        return direction.state(*(zeros() if kept else None for kept in buffers))

    def delta(
        grads: Any, state: Any, ys: Any, zs: Callable[[], Any], lr_t: Any, t: Any, extra_args: Any
    ) -> tuple[Any, Any]:
        wide = jax.tree.map(lambda g, y: g.astype(wide_dtype(y)), grads, ys)
        directions, state = direction.next(wide, state, t, hp)
        decays = _trees.decay_mask(mask, ys)
        for decay, iterate in ((wd_y, lambda: ys), (wd_z, zs)):
            if not is_zero(decay):
                add = _decayed(decay)
                directions = jax.tree.map(add, directions, iterate(), decays)
        return jax.tree.map(lambda d: -as_like(lr_t, d) * d, directions), state  # S6

    return build(
        Base(init, delta), hp, lambda step: lr(step) * factor(step + 1), state_dtype, lean, seed, law
    )


def _buffers(direction: Direction, law: Law, given: Mapping[str, Any]) -> list[bool]:
    """Returns which buffers of a direction's state are kept."""
    # The raw argument: an injected 0 keeps a buffer, in tx.init and under jit alike.
    kept = {one.jax for one in law.buffers if not (one.when and is_zero(given[one.when]))}
    fields: tuple[str, ...] = direction.state._fields  # type: ignore[attr-defined]
    if not kept <= set(fields):
        raise TypeError(
            f"{direction.state.__name__} must have the buffers of the law {law.name!r}, got the fields "
            f"{fields}: name them {sorted(kept)}"
        )
    return [name in kept for name in fields]


def _decayed(decay: Any) -> Callable[[jax.Array, jax.Array, bool], jax.Array]:
    def add(d: jax.Array, iterate: jax.Array, decays: bool) -> jax.Array:
        return d + as_like(decay, d) * iterate.astype(d.dtype) if decays else d

    return add


def as_like(value: Any, leaf: jax.Array) -> jax.Array:
    """Returns a number or scalar in leaf's dtype."""
    return _scalars.as_scalar(value).astype(leaf.dtype)


def on_reals(function: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., tuple[jax.Array, ...]]:
    """Lets an elementwise function of real leaves take complex ones, as pairs of reals."""

    def wrapped(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        if not jnp.iscomplexobj(leaves[0]):
            return function(*leaves)
        real = function(*(leaf.real for leaf in leaves))
        imaginary = function(*(leaf.imag for leaf in leaves))
        return tuple(jax.lax.complex(a, b) for a, b in zip(real, imaginary, strict=True))

    return wrapped
