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

    That takes two passes over memory. Between them XLA would keep the direction on a GPU, 8 bytes a parameter
    to write and to read: there it computes everything again, from codes. Elsewhere the compiler sees that
    both passes are the same, and takes one.
    """
    # Array by array, as inside of shard_map they may vary over different axes.
    barriers = functools.partial(jax.tree.map, jax.lax.optimization_barrier)
    return jax.lax.platform_dependent(inputs, cuda=barriers, default=lambda same: same)


def advance(
    p: jax.Array,
    y: jax.Array,
    gap: jax.Array,
    delta: jax.Array,
    k: Next,
    beta: jax.Array,
    draw: Draw,
    known: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], jax.Array]:
    """Takes one step; returns what `lean.advance` does, in codes, and the exponents of the gap.

    Args:
        p, y, gap, delta, k, beta, draw: as for `lean.advance`.
        known: the exponents of all that is in codes; None if they are still to be found.
    """
    y, gap = moved(y, gap, delta, k, beta)  # S7 S9*
    exponent = eight.exponents(gap) if known is None else known[:, 0]
    of_gap = drawn(p.shape, draw, GAP)
    if p.dtype == jnp.float32:
        return (y - p, eight.linear(gap, exponent, 16, of_gap).astype(jnp.int16), None), exponent
    update, rest = eight.split(y, p, drawn(p.shape, draw, GAP + 1) & 0x3FF)  # what counts least for v
    code = eight.linear(gap, exponent, GAP_BITS, of_gap)
    return (update, *eight.packed(rest, code)), exponent


def open_(base: Any, scales: list[Any], tree: Any) -> Any:
    """Returns the state of a direction with every moment that lies in codes in float32.

    Args:
        base: a NamedTuple of trees, or of None.
        scales: the exponents of each leaf, None where it is not in codes.
        tree: of the parameters.
    """

    if all(scale is None for scale in scales):
        return base

    def one(name: str, column: Any) -> Any:
        found = [
            eight.decoded(leaf, scale[:, eight.column(name, base)]) if scale is not None else leaf
            for leaf, scale in zip(tree.flatten_up_to(column), scales, strict=True)
        ]
        return tree.unflatten(found)

    return _each(base, one)


def close(
    base: Any, was: Any, exponents: list[Any], tree: Any, seed: Any, step: jax.Array, known: list[Any]
) -> tuple[Any, list[Any]]:
    """Returns the state with its moments in codes again, and the exponents of each leaf, with theirs.

    Args:
        base: as the direction left it.
        was: as it was before, in codes.
        exponents: of the gap of each leaf, None where it is not in codes.
        tree, seed, step: as for `open_` and `Draw`.
        known: for each leaf as for `advance`.
    """
    if all(one is None for one in exponents):
        return base, exponents
    scales = [None if one is None else [one] for one in exponents]

    def one(name: str, column: Any) -> Any:
        leaves = tree.flatten_up_to(column)
        for i, (old, scale) in enumerate(zip(tree.flatten_up_to(getattr(was, name)), scales, strict=True)):
            if scale is None:
                continue
            value, column_of = leaves[i].astype(jnp.float32), eight.column(name, base)
            scale.append(eight.exponents(value) if known[i] is None else known[i][:, column_of])
            of_value = drawn(value.shape, Draw(seed, i, step), column_of)
            leaves[i] = eight.encoded(old.dtype, value, scale[-1], of_value)
        return tree.unflatten(leaves)

    closed = _each(base, one)
    return closed, [None if one is None else jnp.stack(one, axis=-1) for one in scales]


def _each(base: Any, change: Any) -> Any:
    """Returns a state with its trees changed, in the order of the columns of a scale."""
    order = eight.in_order(base)
    return base._replace(**{name: change(name, getattr(base, name)) for name in order})
