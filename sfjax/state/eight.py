"""The codes of `sfcore.codes` in JAX, and how a leaf of the parameters lies in them.

Beside a bfloat16 parameter 16 bits hold y and z - y: the upper 8 bits of the gap are its leaf of `state.z`,
and `state.y_rest` has in its upper 6 bits what y is more than the parameter, in 64ths of its last place, and
in its lower 2 the end of the gap. A float32 parameter is y, and its gap has 16 bits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfcore import codes, laws
from sfjax.law.iterates import as_held

NEAREST, NEAREST_REST = 1 << 15, 1 << 9  # in place of a random draw
REST = jnp.int8
_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(np.float32))


def has_codes(p: Any) -> bool:
    """Tells whether precision="8bit" keeps a parameter leaf in codes."""
    return np.dtype(p.dtype) in _DTYPES and codes.has_rows(p.shape)


def is_code(leaf: Any) -> bool:
    """Tells whether a leaf of `state.z` or a moment lies in codes."""
    return leaf is not None and np.dtype(leaf.dtype) in (np.int8, np.uint8, np.int16)


def dtype_of(buffer: laws.Buffer) -> Any:
    """Returns the dtype of a moment's codes."""
    return jnp.uint8 if buffer.code == codes.LOG else jnp.int8


def in_order(base: Any) -> list[str]:
    """Returns the fields of a direction's state that are kept, in the order of the columns of a scale."""
    kept = [name for name in getattr(base, "_fields", ()) if getattr(base, name) is not None]
    return list(codes.columns(kept, "jax"))


def column(name: str, base: Any) -> int:
    """Returns the column of a moment in a scale; that of the gap is 0."""
    return 1 + in_order(base).index(name)


def exponents(value: jax.Array) -> jax.Array:
    """Returns the exponents of a float32 array's rows, int8 of shape (rows,), with some room above."""
    most = jnp.max(jnp.abs(value), axis=tuple(range(1, value.ndim))) * 1.0625
    exponent = (jax.lax.bitcast_convert_type(most, jnp.int32) >> 23) - 126
    broken = (exponent >= codes.BROKEN) | jnp.isnan(most)
    return jnp.where(broken, codes.BROKEN, jnp.maximum(exponent, codes.LEAST)).astype(jnp.int8)


def _power(exponent: jax.Array, ndim: int, sign: int = 1) -> jax.Array:
    """Returns 2^E, or its inverse, to be multiplied with an array of some axes; NaN for a broken row."""
    whole = exponent.astype(jnp.int32)
    power = jax.lax.bitcast_convert_type((whole * sign + 127) << 23, jnp.float32)
    power = jnp.where(whole == codes.BROKEN, jnp.nan, power)
    return power.reshape(-1, *[1] * (ndim - 1))


def linear(value: jax.Array, exponent: jax.Array, bits: int, draw: Any = NEAREST) -> jax.Array:
    """Returns codes in the upper bits of int32 numbers of 16.

    Args:
        value: float32.
        exponent: of its rows.
        bits: that are kept.
        draw: how many of 65,536 parts of the way to the next code a number is put up; what is then not whole
            is cut off.
    """
    parts = jnp.round(value * _power(exponent, value.ndim, -1) * 2.0 ** (bits + 15))
    code = (jnp.nan_to_num(parts).astype(jnp.int32) + jnp.asarray(draw, jnp.int32)) >> 16
    return code << (16 - bits)


def log(value: jax.Array, exponent: jax.Array, draw: Any = NEAREST) -> jax.Array:
    """Returns the codes of numbers that are not negative; arguments as of `linear`."""
    bits = jax.lax.bitcast_convert_type(value * _power(exponent, value.ndim, -1), jnp.uint32)
    noisy = bits + jnp.asarray(draw, jnp.uint32) * 8
    code = (noisy >> codes.SHIFT).astype(jnp.int32) - codes.FIRST
    return jnp.where(value > 0, jnp.clip(code, 1, 255), 0).astype(jnp.uint8)


def encoded(dtype: Any, value: jax.Array, exponent: jax.Array, draw: Any = NEAREST) -> jax.Array:
    """Returns the codes of a moment, of a dtype: uint8 is LOG, int8 LINEAR."""
    if dtype == jnp.uint8:
        return log(value, exponent, draw)
    return (linear(value, exponent, 8, draw) >> 8).astype(jnp.int8)


def decoded(code: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns the float32 numbers of codes: int8 and integers of 16 bits are LINEAR, uint8 LOG."""
    power = _power(exponent, code.ndim)
    if code.dtype == jnp.uint8:
        bits = (code.astype(jnp.uint32) + codes.FIRST) << codes.SHIFT
        return jnp.where(code == 0, 0.0, jax.lax.bitcast_convert_type(bits, jnp.float32)) * power
    return code.astype(jnp.float32) * 2.0 ** -(7 if code.dtype == jnp.int8 else 15) * power


def gap_code(stored: jax.Array, rest: Any) -> jax.Array:
    """Returns the whole code of a gap, of 16 bits."""
    if stored.dtype == jnp.int16:
        return stored
    return stored.astype(jnp.int16) * 256 + (rest & 3).astype(jnp.int16) * 64


def gap_of(stored: jax.Array, rest: Any, scale: jax.Array) -> jax.Array:
    """Returns z - y in float32."""
    return decoded(gap_code(stored, rest), scale[:, 0])


def packed(rest: jax.Array, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the leaves of `state.z` and `state.y_rest`: of a rest in 64ths, and a code of a gap."""
    return (gap >> 8).astype(jnp.int8), (rest * 4 + ((gap >> 6) & 3)).astype(REST)


def split(y: jax.Array, p: jax.Array, draw: Any = NEAREST_REST) -> tuple[jax.Array, jax.Array]:
    """Returns the update that takes a bfloat16 p next to y, and what is left in 64ths of its last place.

    Args:
        y: float32.
        p: the parameter.
        draw: how many of 1,024 parts of such a 64th y is put up; what is then not whole is cut off.
    """
    near, share = as_held(y, p.dtype), jnp.asarray(draw).astype(jnp.float32) * 2.0**-10
    y = near + jnp.floor(_in_units(y, near) + share) * unit(near)
    old = p.astype(jnp.float32)
    # Up where y lies between two, for a rest goes from -32 to 31.
    update = as_held(as_held(y + 0.25 * unit(y), p.dtype) - old, p.dtype)
    held = as_held(old + update, p.dtype)
    rest = jnp.clip(jnp.round(_in_units(y, held)), -32, 31)
    return update.astype(p.dtype), jnp.nan_to_num(rest).astype(jnp.int32)


def _in_units(y: jax.Array, near: jax.Array) -> jax.Array:
    """Returns what y is more than a number next to it, in units of that."""
    return jnp.where(unit(near) > 0, (y - near) / jnp.where(unit(near) > 0, unit(near), 1.0), 0.0)


def unit(y: jax.Array) -> jax.Array:
    """Returns a 64th of the last place that a number has in bfloat16; 0 where it is 0 or next to it."""
    bits = jax.lax.bitcast_convert_type(y.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) * 2.0**-13


def rest_of(p: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns what y is more than a parameter, in float32."""
    return (rest >> 2).astype(jnp.float32) * unit(p)
