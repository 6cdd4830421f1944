"""The 8-bit form: z - y and the moments in the codes of `sfcore.codes`, row by row, rounded at random.

The equations are those of `lean`, and the random bits come from the same hash. What a leaf holds is told by
its dtypes, see `sfjax.state.eight`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sfcore.codes import GAP_BITS
from sfjax.law.scalars import Next
from sfjax.state import eight
from sfjax.step.lean import GAP, Draw, drawn, moved


def is_compiled(tree: Any) -> bool:
    """Tells whether arrays are those of a program that is being traced, and not computed one by one."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def again(inputs: Any) -> Any:
    """Returns what a step is made of, to be computed with once more when the exponents of all rows are known.

    That takes two passes over memory. On a GPU XLA would keep the direction between them, in 8 bytes a
    parameter of traffic: there it computes everything again, from codes. Elsewhere the compiler sees that
    both are the same, and computes it once.
    """
    # Array by array, as inside of shard_map they may vary over different axes.
    barriers = functools.partial(jax.tree.map, jax.lax.optimization_barrier)
    return jax.lax.platform_dependent(inputs, cuda=barriers, default=lambda same: same)


def scale_after(leaves: list[tuple[Any, ...]], base: Any, tree: Any, k: Next, beta: jax.Array) -> list[Any]:
    """Returns the exponents of each leaf after a step, int8 of shape (rows, 1 + moments); None without codes.

    Args:
        leaves: of each the parameter, y, what is stored beside it, delta, rest and exponents, or None.
        base: as the direction left it.
        tree: of the parameters.
        k: of the step.
        beta: that built y.
    """
    moments = [tree.flatten_up_to(getattr(base, name)) for name in eight.in_order(base)]
    found: list[Any] = []
    for (_, y, stored, delta, rest, scale), *of_leaf in zip(leaves, *moments, strict=True):
        if scale is None:
            found.append(None)
            continue
        _, gap = moved(y, eight.gap_of(stored, rest, scale), delta, k, beta)
        wide = (value.astype(jnp.float32) for value in (gap, *of_leaf))
        found.append(jnp.stack([eight.exponents(value) for value in wide], axis=-1))
    return found


def advance(
    p: jax.Array,
    y: jax.Array,
    gap: jax.Array,
    delta: jax.Array,
    k: Next,
    beta: jax.Array,
    draw: Draw,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Takes one step; returns what `lean.advance` does, in codes of the exponents given."""
    y, gap = moved(y, gap, delta, k, beta)  # S7 S9*
    exponent, of_gap = scale[:, 0], drawn(p.shape, draw, GAP)
    if p.dtype == jnp.float32:
        return y - p, eight.linear(gap, exponent, 16, of_gap).astype(jnp.int16), None
    update, rest = eight.split(y, p, drawn(p.shape, draw, GAP + 1) & 0x3FF)  # what counts least for v
    return update, *eight.packed(rest, eight.linear(gap, exponent, GAP_BITS, of_gap))


def open_(base: Any, scales: list[Any], tree: Any) -> Any:
    """Returns the state of a direction with every moment that lies in codes in float32.

    Args:
        base: a NamedTuple of trees, or of None.
        scales: the exponents of each leaf, None where it is not in codes.
        tree: of the parameters.
    """

    def one(name: str, column: Any) -> Any:
        found = [
            eight.decoded(leaf, scale[:, eight.column(name, base)]) if scale is not None else leaf
            for leaf, scale in zip(tree.flatten_up_to(column), scales, strict=True)
        ]
        return tree.unflatten(found)

    return _each(base, one)


def close(base: Any, was: Any, scales: list[Any], tree: Any, seed: Any, step: jax.Array) -> Any:
    """Returns the state with its moments in codes again.

    Args:
        base: as the direction left it.
        was: as it was before, in codes.
        scales: what `scale_after` returns.
        tree, seed, step: as for `open_` and `Draw`.
    """

    def one(name: str, column: Any) -> Any:
        leaves, number = tree.flatten_up_to(column), eight.column(name, base)
        for i, (old, scale) in enumerate(zip(tree.flatten_up_to(getattr(was, name)), scales, strict=True)):
            if scale is not None:
                value = leaves[i].astype(jnp.float32)
                of_value = drawn(value.shape, Draw(seed, i, step), number)
                leaves[i] = eight.encoded(old.dtype, value, scale[:, number], of_value)
        return tree.unflatten(leaves)

    return _each(base, one)


def _each(base: Any, change: Any) -> Any:
    """Returns a state with its trees changed, in the order of the columns of a scale."""
    order = eight.in_order(base)
    return base._replace(**{name: change(name, getattr(base, name)) for name in order})
