"""The lean form of 16-bit parameters: the gap z - y and the moments in bfloat16, the rest of y in int16.

bfloat16 is rounded at random, so that steps below its resolution add up on average. With w = gap + beta delta
of the beta that built y, the new gap is (1 - k1) w, and y moves by k1 gap + k2 delta (S7 and S9*). The gap
survives bfloat16, which z does not: it is small where z is large.

The random bits are a hash of seed, leaf, step, buffer and element: nothing of them is in the state, a
resumed run draws the same ones, and so does any layout over devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sfjax.law.iterates import as_held
from sfjax.law.scalars import Next
from sfjax.state import forms

GAP = 0  # the number of z - y among what is rounded; the buffers have those of their columns in a scale


class Draw(NamedTuple):
    """Where the random bits of one leaf's step come from: seed, ordinal of the leaf, step; of shape ()."""

    seed: Any
    leaf: int
    step: jax.Array


def advance(
    p: jax.Array, y: jax.Array, gap: jax.Array, delta: jax.Array, k: Next, beta: jax.Array, draw: Draw
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes one step of a parameter whose y was built by beta; returns its update, the new gap and rest."""
    y, gap = moved(y, gap, delta, k, beta)
    update, rest = forms.split(y, p)
    # p + update is exact but for long strides, where XLA may keep more bits than p has.
    held = as_held(p.astype(jnp.float32) + update.astype(jnp.float32), p.dtype).astype(p.dtype)
    return update, rounded(gap, draw, GAP), forms.packed(held, rest)


def moved(
    y: jax.Array, gap: jax.Array, delta: jax.Array, k: Next, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the new y and the new gap, both in float32."""
    y, old, delta = (leaf.astype(jnp.float32) for leaf in (y, gap, delta))
    k1, k2, beta = (s.astype(jnp.float32) for s in (k.k1, k.k2, beta))
    w = old + beta * delta
    return y + (k1 * old + k2 * delta), (1.0 - k1) * w  # S7 S9*


def rounded(value: jax.Array, draw: Draw, number: int) -> jax.Array:
    """Returns a float32 array in bfloat16, up or down at random and right on average."""
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    noisy = (bits + drawn(value.shape, draw, number)) & jnp.uint32(0xFFFF0000)
    up_or_down = jax.lax.bitcast_convert_type(noisy, jnp.float32)
    return jnp.where(jnp.isfinite(value), up_or_down, value).astype(forms.NARROW)


def drawn(shape: tuple[int, ...], draw: Draw, number: int) -> jax.Array:
    """Returns 16 random bits an element, by the number of what is rounded; two of them share a hash."""
    bits = _noise(shape, draw, number // 2)
    return bits & 0xFFFF if number % 2 else bits >> 16


def _noise(shape: tuple[int, ...], draw: Draw, number: int) -> jax.Array:
    """Returns 32 random bits an element, a hash of where and when it is."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + along * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    key = _mix(jnp.asarray(draw.seed, jnp.uint32).reshape(()) ^ jnp.uint32(0x9E3779B9))
    for word in (jnp.uint32(draw.leaf), draw.step.astype(jnp.uint32), jnp.uint32(number)):
        key = _mix(key ^ word) + jnp.uint32(0x9E3779B9)
    return _mix(_mix(index ^ key) + key)


def _mix(word: jax.Array) -> jax.Array:
    """Returns a word whose every bit depends on every bit of the given one, one to one."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
