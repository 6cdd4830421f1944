"""A step through the kernel of a CPU: S6 to S9* of a whole tree in one pass over memory, and a mean.

The kernel is what a CPU runs; another device, a derivative or vmap takes the plain program, that of `update`.
Both have the same equations in another order of operations, and differ in the last places. A mean has the
same operations, each rounded as it stands; XLA joins some, and multiplies by an inverse instead of dividing.
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
    if not _is_there():
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

    def natively(varying: Any, params: Any, state: Any, gradients: Any) -> Trees:
        return _moved(kernel, whole(varying), groups, decayed, params, state, gradients)

    varying = [leaf for leaf, one in zip(leaves, traced, strict=True) if one]
    new: Trees = _on_a_cpu(natively, by_xla)(varying, params, state, gradients)
    return new


def means(
    plain: Callable[[Any, jax.Array, jax.Array], jax.Array], taken: jax.Array, old: Any, gradients: Any
) -> Any:
    """Returns the means of gradients.

    Args:
        plain: (gradient, old mean, taken) -> mean, of one leaf; for those that are not for the kernel.
        taken: how many gradients there were, with the newest; an integer of at least 1.
        old, gradients: the means without the newest, and the newest, as trees of one structure.
    """
    newest, tree = jax.tree.flatten(gradients)
    leaves = tree.flatten_up_to(old)
    groups: dict[Any, list[int]] = {}
    if _is_there():
        for i, (one, g) in enumerate(zip(leaves, newest, strict=True)):
            if _is_read_as_it_is(one, g):
                groups.setdefault((one.dtype, g.dtype), []).append(i)
    found: dict[int, jax.Array] = {}
    for rows in groups.values():
        pair = [leaves[i] for i in rows], [newest[i] for i in rows]
        if call.why_not(pair) is None:
            found |= zip(rows, _on_a_cpu(_meant, _by_leaf(plain))(taken, *pair), strict=True)
    pairs = zip(newest, leaves, strict=True)
    return tree.unflatten(
        found[i] if i in found else plain(g, one, taken) for i, (g, one) in enumerate(pairs)
    )


def _is_there() -> bool:
    """Tells whether steps are taken on a CPU that has the kernel; gives notice if it could not be built."""
    if jax.default_backend() != "cpu":
        return False
    why = call.find()
    if why is not None:
        call.give_notice(why)
    return why is None


def _on_a_cpu(natively: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of trees: `natively` on a CPU, `plain` elsewhere and under transformations."""
    kernel = custom_vmap(natively)

    @kernel.def_vmap
    def _(size: int, batched: Any, *trees: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda flag: 0 if flag else None, tuple(batched))
        new = jax.vmap(plain, in_axes=axes, axis_size=size)(*trees)
        return new, jax.tree.map(lambda _: True, new)

    @jax.custom_jvp
    def somewhere(*trees: Any) -> Any:
        return jax.lax.platform_dependent(*trees, cpu=kernel, default=plain)

    somewhere.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return somewhere


def _is_read_as_it_is(mean: Any, gradient: Any) -> bool:
    """Tells whether the kernel reads a gradient without a cast, which would be a pass of its own."""
    shape, dtype = (getattr(gradient, name, None) for name in ("shape", "dtype"))
    return bool(shape == mean.shape and call.is_read(dtype, mean.dtype))


def _by_leaf(plain: Callable[..., jax.Array]) -> Callable[[Any, Any, Any], list[jax.Array]]:
    return lambda taken, old, gradients: [plain(g, one, taken) for g, one in zip(gradients, old, strict=True)]


def _meant(taken: jax.Array, old: list[jax.Array], gradients: list[jax.Array]) -> list[jax.Array]:
    """Returns the means as the kernel has them."""
    numbers = jnp.stack([as_scalar({"k1": taken, "usable": 1.0}.get(name, 0.0)) for name in call.NUMBERS])
    return call.step(Kind.MEAN, (old, gradients), numbers)[0]


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
