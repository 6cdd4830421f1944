"""The state: its fields, where it lies, and what a parameter and it hold together, however it is stored.

optax.apply_updates adds an update of the parameter's dtype, so a parameter of 16 bits cannot follow y in
small steps. The rest, in float32, keeps what it misses: y = parameter + rest, exact to a bit or so of
float32. The lean form keeps the gap z - y in bfloat16 in place of z, and the rest in int16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sfjax.law.iterates import as_held, wide_dtype
from sfjax.state import eight

NARROW, REST = jnp.bfloat16, jnp.int16  # of the lean form
EXACT, LEAN, EIGHT = "exact", "lean", "8bit"
_BELONG = "pass the params that tx.init got, their gradients and their state"


class ScheduleFreeState(NamedTuple):
    """State of every Schedule-Free transformation.

    Attributes:
        b1: the interpolation beta that built y, which decodes it; shape ().
        step: finished updates; int32, shape ().
        lr: lr_t of the last update; shape ().
        lr_max: largest lr_t so far; shape ().
        c: averaging weight of the last update; shape ().
        weight_sum: sum of the averaging weights so far; shape ().
        weight_sum_low: what rounding has cut off weight_sum in float32; 0 in float64; shape ().
        base_optimizer_state: the base's state, or the direction's buffers.
        z: tree of the parameters, at least float32 unless state_dtype says otherwise. At b1 = 0 the
            parameters themselves are z and this holds x. With precision="lean", z - y in bfloat16 for
            parameters of 16 bits; with "8bit", its codes.
        y_rest: tree of the parameters in float32, lean: int16 units: what y is more than a parameter of 16
            bits holds. None at wider leaves, and None as a whole where all are wider.
        scale: with precision="8bit" the exponents of the codes that z and the moments then are, int8 of shape
            (rows, 1 + moments) for every leaf that lies in codes, None for others and without any.

    Example:
        >>> import jax.numpy as jnp, sfjax
        >>> state = sfjax.schedule_free_sgd(0.1, b1=0.5).init(jnp.ones(3, jnp.bfloat16))
        >>> isinstance(state, sfjax.ScheduleFreeState), float(state.b1), state.z.dtype.name
        (True, 0.5, 'float32')
    """

    b1: jax.Array
    step: jax.Array
    lr: jax.Array
    lr_max: jax.Array
    c: jax.Array
    weight_sum: jax.Array
    weight_sum_low: jax.Array
    base_optimizer_state: Any
    z: Any
    y_rest: Any = None
    scale: Any = None


def zeros_alike(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Returns zeros of leaf's shape, laid out over devices as leaf is, also inside jit."""
    zeros = jnp.zeros_like(leaf, dtype=dtype)
    if not isinstance(leaf, jax.core.Tracer):
        return zeros
    # A choice between both, so that one layout has to serve both. The compiler may see which it is only
    # after it has laid them out, and then drops the choice.
    true = jax.lax.optimization_barrier(jnp.asarray(True))
    return jax.lax.select(true, zeros, leaf.astype(dtype))


def on_every_device(tree: Any, params: Any) -> Any:
    """Returns a tree of scalars on the mesh of params, if these are concrete and have one.

    Scalars on one device would move to the mesh in the first jitted update, and compile it twice.
    """
    sharding = _everywhere(params)
    concrete = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((tree, params)))
    return jax.device_put(tree, sharding) if sharding and concrete else tree


def abstract_init(init: Callable[[Any], Any], params: Any) -> Any:
    """Returns init(params) for params of `jax.ShapeDtypeStruct`, with their shardings."""
    everywhere = _everywhere(params)

    def scalar(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    def buffer(leaf: Any, p: Any) -> jax.ShapeDtypeStruct | None:
        if leaf is None:  # a buffer that this parameter has not
            return None
        sharding = getattr(p, "sharding", None)
        if len(leaf.shape) != len(p.shape):
            return scalar(leaf)
        if leaf.shape != p.shape and isinstance(sharding, NamedSharding):  # one number a row
            axes = zip(sharding.spec, leaf.shape, p.shape, strict=False)
            kept = [axis if size == whole else None for axis, size, whole in axes]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*kept))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(init, params)
    return optax.tree.map_params(
        init, buffer, state, params, transform_non_params=scalar, is_leaf=lambda leaf: leaf is None
    )


def _everywhere(params: Any) -> NamedSharding | None:
    """Returns the sharding of a scalar that every device of params' mesh has, or None without a mesh."""
    for leaf in jax.tree.leaves(params):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def is_low(p: Any) -> bool:
    """Tells whether a parameter leaf is too narrow for y, and so has a rest."""
    return jnp.issubdtype(p.dtype, jnp.floating) and np.dtype(p.dtype).itemsize < 4


def is_lean(rest: Any) -> bool:
    """Tells whether a leaf is kept in the lean form; an exact rest is float32."""
    return rest is not None and rest.dtype == REST


def form_of(precision: str, p: Any) -> str:
    """Returns which form a precision gives a parameter leaf: "exact", "lean" or "8bit"."""
    if precision == EIGHT and eight.has_codes(p):
        return EIGHT
    return LEAN if precision != EXACT and is_low(p) else EXACT


def first_buffer(p: jax.Array, precision: str, dtype: Any) -> jax.Array:
    """Returns what a state keeps beside a parameter at first: z, or a gap of 0.

    Args:
        p: the parameter.
        precision: as in the factories.
        dtype: of z; None is p's own, at least float32.
    """
    form = form_of(precision, p)
    if form != EXACT:
        narrow = NARROW if form == LEAN else jnp.int8 if is_low(p) else jnp.int16
        return zeros_alike(p, narrow)
    wide = wide_dtype(p) if dtype is None else dtype
    if dtype is not None and jnp.iscomplexobj(p):
        wide = np.promote_types(dtype, np.complex64)
    return jnp.array(p, wide, copy=True)  # a copy, so that params and state can be donated


def new_rests(params: Any, precision: str) -> Any:
    """Returns rests of zero: None for wide leaves, and None as a whole where no leaf is low."""
    if not any(map(is_low, jax.tree.leaves(params))):
        return None

    def zeros(p: Any) -> Any:
        dtype = {EXACT: jnp.float32, LEAN: REST, EIGHT: eight.REST}[form_of(precision, p)]
        if isinstance(p, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding)
        return zeros_alike(p, dtype)

    return jax.tree.map(lambda p: zeros(p) if is_low(p) else None, params)


def new_scales(params: Any, precision: str, moments: int) -> Any:
    """Returns exponents: None for leaves that lie in no codes, and None as a whole where none does."""
    if not any(form_of(precision, p) == EIGHT for p in jax.tree.leaves(params)):
        return None

    def zeros(p: Any) -> Any:
        if form_of(precision, p) != EIGHT:
            return None
        shape = (p.shape[0], 1 + moments)
        if isinstance(p, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, jnp.int8, sharding=_everywhere(params))
        return on_every_device(jnp.zeros(shape, jnp.int8), params)

    return jax.tree.map(zeros, params)


def packed(p: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns a float32 rest in int16, in units of 2^-16 of p's last place: y to float32's last bit or so.

    What is more than half a place of p, after a stride over many binades, is cut.
    """
    unit = _unit(p)
    units = jnp.round(rest / jnp.where(unit > 0, unit, 1.0))
    return jnp.where(unit > 0, jnp.clip(units, -32767, 32767), 0.0).astype(REST)


def unpacked(p: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns the float32 rest that `packed` was given."""
    return rest.astype(jnp.float32) * _unit(p)


def _unit(p: jax.Array) -> jax.Array:
    """Returns 2^-16 of p's last place in float32; 0 where p is 0 or next to it."""
    bits = jax.lax.bitcast_convert_type(p.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return power * 2.0 ** -(jnp.finfo(p.dtype).nmant + 16)


def whole(p: Any, rest: Any) -> Any:
    """Returns y: p itself if it has no rest, else their sum in at least float32."""
    if rest is None:
        return p
    wide = np.promote_types(p.dtype, np.float32)
    p = jnp.asarray(p)
    if is_lean(rest):
        rest = unpacked(p, rest)
    elif rest.dtype == eight.REST:
        rest = eight.rest_of(p, rest)
    return p.astype(wide) + rest.astype(wide)


def opened(p: jax.Array, stored: jax.Array, rest: Any, scale: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns y, and the buffer beside it: as it is, or in the other forms the z that its gap tells."""
    y = whole(p, rest)
    if eight.is_code(stored):
        return y, y.astype(jnp.float32) + eight.gap_of(stored, rest, scale)
    return y, y.astype(jnp.float32) + stored.astype(jnp.float32) if is_lean(rest) else stored


def split(y: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the update in p's dtype that takes p next to y, and the rest that will then be missing."""
    old = p.astype(y.dtype)
    # To the nearest that p can hold, not as near to y: so p + update is exact but for large strides, and
    # the same whether or not XLA keeps more bits of it than p has.
    update = as_held(as_held(y, p.dtype) - old, p.dtype)
    rest = y - as_held(old + update, p.dtype)
    return update.astype(p.dtype), rest.astype(jnp.float32)


def leaves_of(
    updates: Any, state: Any, params: Any, precision: str
) -> tuple[list[Any], list[Any], list[Any], Any]:
    """Returns the leaves of params, the rest and the exponents of each or None, and their tree.

    Raises:
        ValueError, TypeError: unless update() got gradients, state and parameters that belong together, and
            a state of its precision.
    """
    if params is None:
        raise ValueError("params must be passed to update(), got None: call tx.update(grads, state, params)")
    if not isinstance(state, ScheduleFreeState):
        raise TypeError(
            f"state must be a ScheduleFreeState of sfjax, got {type(state).__name__}: pass what tx.init "
            "returned; restore a checkpoint with jax.eval_shape(tx.init, params) as its target"
        )
    placed, tree = jax.tree_util.tree_flatten_with_path(params)
    for name, given in (("updates", updates), ("state.z", state.z)):
        leaves, structure = jax.tree.flatten(given)
        if structure != tree:
            raise ValueError(f"{name} must have the tree of params, got {structure} for {tree}: {_BELONG}")
        for (path, p), leaf in zip(placed, leaves, strict=True):
            if jnp.shape(leaf) != jnp.shape(p):
                raise ValueError(
                    f"{name} must have the shapes of params, got {jnp.shape(leaf)} for {jnp.shape(p)} at "
                    f"params{jax.tree_util.keystr(path)}: {_BELONG}"
                )
    held = [p for _, p in placed]
    rests = [None] * len(held) if state.y_rest is None else tree.flatten_up_to(state.y_rest)
    scales = [None] * len(held) if state.scale is None else tree.flatten_up_to(state.scale)
    for p, rest, stored, scale in zip(held, rests, jax.tree.leaves(state.z), scales, strict=True):
        if is_low(p) != (rest is not None):
            raise ValueError(
                "state.y_rest must have a leaf for every parameter of 16 bits and no other, got "
                f"{'none' if rest is None else 'one'} for one of {p.dtype}: keep tx.init's dtypes; "
                "a state of an earlier version needs state._replace(y_rest=tx.init(params).y_rest)"
            )
        found = EXACT
        if scale is not None and eight.is_code(stored):
            found = EIGHT
        elif rest is not None and is_lean(rest):
            found = LEAN
        if found != form_of(precision, p):
            raise ValueError(
                f"state must be of precision={precision!r}, got another: restore it with sfjax.checkpoint, "
                "which converts"
            )
    return held, rests, scales, tree
