"""A step through the kernel of a CPU: S6 to S9* of a whole tree in one pass over memory.

The kernel is what a CPU runs; another device, a derivative or vmap takes the plain program, that of `update`.
Both have the same equations in another order of operations, and differ in the last places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from sfcore import averaging
from sfcore.laws import Law
from sfcore.native.kinds import Kind
from sfjax.kernels import call
from sfjax.law.scalars import Next, as_scalar
from sfjax.state import arguments

# Options that reach the kernel, most as scalars of the step; with another one the program is the plain one.
KNOWN = {
    "lr", "warmup_steps", "silent_sgd_phase", "weight_decay", "decay_at", "decay_power", "b2", "eps",
    "inner_momentum", "beta", "beta_rule", "beta_max", "beta_anneal_steps", "beta_hold_steps", "rho",
    "r", "weight_lr_power", "weight_lr", "prior_steps", "c_warmup", "refined_c", "window", "window_rule",
}  # fmt: skip
Trees = tuple[Any, Any]  # params and state


class Scalars(NamedTuple):
    """What the arrays of a step need to know.

    Attributes:
        next: as every law has them.
        own: what a direction is called with.
        decays: the weight_decay by the point that decays, "y" or "z".
    """

    next: Next
    own: tuple[Any, ...]
    decays: Mapping[str, Any]


class Kernel(NamedTuple):
    """What the kernel needs to know of a transformation.

    Attributes:
        numbers: the kernel's names of the direction's own numbers.
        mask: as the factories have it.
        decay_power: the option.
    """

    numbers: tuple[str, ...]
    mask: Any
    decay_power: Any


def kernel_of(
    law: Law, numbers: tuple[str, ...] | None, values: Mapping[str, Any], mask: Any
) -> Kernel | None:
    """Returns the kernel of a transformation, None if it does not know the direction or an option."""
    strange = [name for name in values if name not in KNOWN and not _is(values[name], law.defaults[name])]
    if numbers is None or strange:
        return None
    return Kernel(numbers, mask, values.get("decay_power", 1))


def _is(value: Any, default: Any) -> bool:
    return isinstance(value, type(default)) and bool(value == default)


def step(
    kernel: Kernel,
    plain: Callable[[Scalars, Any, Any, Any], Trees],
    scalars: Scalars,
    params: Any,
    state: Any,
    gradients: Any,
) -> Trees | None:
    """Returns params and state after a step, or None if it is not for the kernel.

    Args:
        kernel: of the transformation.
        plain: (scalars, params, state, gradients) -> (params, state), of arrays alone.
        scalars: of the step.
        params, state, gradients: that belong together.
    """
    if jax.default_backend() != "cpu":
        return None
    why = call.find()
    if why is not None:
        call.give_notice(why)
        return None
    decayed = jax.tree.leaves(arguments.decay_mask(True if kernel.mask is None else kernel.mask, params))
    groups = [rows for one in (True, False) if (rows := [i for i, flag in enumerate(decayed) if flag == one])]
    columns = _columns(params, state, gradients)
    parts = [{name: [column[i] for i in rows] for name, column in columns.items()} for rows in groups]
    if not parts or any(call.why_not(list(part.values())) for part in parts):
        return None

    leaves, tree = jax.tree.flatten(scalars)
    traced = [isinstance(leaf, jax.Array) for leaf in leaves]

    def whole(varying: Sequence[jax.Array]) -> Scalars:
        found = iter(varying)  # the others are Python's, and decide what is computed
        return tree.unflatten(next(found) if one else leaf for leaf, one in zip(leaves, traced, strict=True))

    def by_xla(varying: Any, params: Any, state: Any, gradients: Any) -> Trees:
        return plain(whole(varying), params, state, gradients)

    @custom_vmap
    def natively(varying: Any, params: Any, state: Any, gradients: Any) -> Trees:
        return _moved(kernel, whole(varying), groups, decayed, params, state, gradients)

    @natively.def_vmap
    def _(size: int, batched: Any, *trees: Any) -> tuple[Trees, Any]:
        axes = jax.tree.map(lambda flag: 0 if flag else None, tuple(batched))
        new = jax.vmap(by_xla, in_axes=axes, axis_size=size)(*trees)
        return new, jax.tree.map(lambda _: True, new)

    @jax.custom_jvp
    def somewhere(*trees: Any) -> Trees:
        found: Trees = jax.lax.platform_dependent(*trees, cpu=natively, default=by_xla)
        return found

    somewhere.defjvp(lambda primals, tangents: jax.jvp(by_xla, primals, tangents))
    new: Trees = somewhere(
        [leaf for leaf, one in zip(leaves, traced, strict=True) if one], params, state, gradients
    )
    return new


def _columns(params: Any, state: Any, gradients: Any) -> dict[str, list[Any]]:
    """Returns the lists of leaves that the kernel walks, in its order."""
    moments = {name: getattr(state.base_optimizer_state, name, None) for name in ("nu", "mu")}
    trees = {"y": params, "z": state.z} | {name: tree for name, tree in moments.items() if tree is not None}
    return {name: jax.tree.leaves(one) for name, one in (trees | {"g": gradients}).items()}


def _moved(
    kernel: Kernel,
    scalars: Scalars,
    groups: Sequence[Sequence[int]],
    decayed: Sequence[bool],
    params: Any,
    state: Any,
    gradients: Any,
) -> Trees:
    """Returns params and state after a step of the kernel, a call for each group of leaves."""
    columns, tree = _columns(params, state, gradients), jax.tree.structure(params)
    kind = Kind.ADAMW_MOMENTUM if "mu" in columns else Kind.ADAMW if "nu" in columns else Kind.SGD
    after: dict[str, list[Any]] = {name: [None] * tree.num_leaves for name in columns if name != "g"}
    for rows in groups:
        numbers = _numbers(kernel, scalars if decayed[rows[0]] else scalars._replace(decays={}))
        given = [[column[i] for i in rows] for column in columns.values()]
        for name, leaves in zip(after, call.step(kind, given, numbers), strict=True):
            for i, leaf in zip(rows, leaves, strict=True):
                after[name][i] = leaf
    trees = {name: tree.unflatten(leaves) for name, leaves in after.items()}
    y, z, k = trees.pop("y"), trees.pop("z"), scalars.next
    base = state.base_optimizer_state._replace(**trees)
    new = state._replace(lr=k.lr_t, c=k.c, base_optimizer_state=base, z=z, **k.clock._asdict())
    return y, new


def _numbers(kernel: Kernel, scalars: Scalars) -> jax.Array:
    """Returns the numbers of `call.NUMBERS`.

    At beta = 0 the kernel takes a step of beta = 1, where y is x, with both columns exchanged.
    """
    k = scalars.next
    held_x, holds_x = k.stores_x, jnp.asarray(k.will_store_x)
    to_x = k.c - jnp.where(held_x, 0.0, k.per_gap) * (1.0 - k.c)
    scale = averaging.decay_scale(k.lr_t, k.clock.lr_max, kernel.decay_power, jnp)  # F6
    y, z = (as_scalar(scalars.decays.get(at, 0.0)) * scale for at in "yz")
    given = dict(zip(kernel.numbers, scalars.own, strict=True)) | {
        "lr_t": k.lr_t,
        "wd_y": jnp.where(held_x, 0.0, y),  # what was y is z there
        "wd_z": jnp.where(held_x, y + z, z),
        "k1": jnp.where(holds_x, to_x, jnp.where(held_x, 1.0 + k.k1, k.k1)),  # S9*
        "k2": jnp.where(holds_x, k.c, k.k2),
        "held_x": held_x,
        "holds_x": holds_x,
    }
    one = {"usable": 1.0, "correction1": 1.0, "correction2": 1.0}
    return jnp.stack([as_scalar(given.get(name, one.get(name, 0.0))) for name in call.NUMBERS])
