"""precision="8bit": the codes in which z - y and the moments lie, which both twins write; read here in NumPy.

A row is all that lies behind one index of the first axis. It has an exponent E for each tensor, so that every
magnitude in it is below 2^E:

    LINEAR   a 16-bit number in two's complement: value = code 2^(E - 15). Of z - y beside a bfloat16
             parameter the upper 10 bits are kept, of a first moment the upper 8.
    LOG      8 bits: 0 is 0, and code k is 2^E times the float32 whose upper 13 bits are k + 1776: 16 values
             an octave, over 16 octaves. What lies below them is the least of them, and not 0: a second
             moment that is too large makes a short step, one of 0 a very long one.

So nothing depends on how an array is divided along its first axis, and a row that is rare, of an embedding,
has the precision of any other. Vectors, and arrays with short rows, are little memory: they stay in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sfcore import laws

LINEAR, LOG = "linear", "log"
GAP_BITS = 10  # of z - y beside a bfloat16 parameter; the 6 bits left of 16 are y's
SHORTEST = 16  # elements of a row
FIRST, SHIFT = 1776, 19  # LOG's code 0, and where its bits lie in a float32
LEAST, BROKEN = -120, 127  # the least exponent, and that of a row with a number that is not finite


def has_rows(shape: Sequence[int]) -> bool:
    """Tells whether an array of a shape is kept in 8 bits.

    Example:
        >>> from sfcore.codes import has_rows
        >>> has_rows((4, 16)), has_rows((64,)), has_rows((64, 3, 3))
        (True, False, False)
    """
    return len(shape) > 1 and int(np.prod(shape[1:])) >= SHORTEST and shape[0] > 0


def columns(names: Sequence[str], of: str) -> dict[str, int]:
    """Returns name -> column of "scale", of the buffers among some names; column 0 is that of z - y.

    Args:
        names: of a state.
        of: whose names these are, "torch", "jax" or "role".
    """
    kept = [name for one in laws.roles().values() if (name := getattr(one, of)) in names]
    return {name: column for column, name in enumerate(kept, start=1)}


def decoded(code: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Returns the float32 numbers of codes.

    Args:
        code: of shape (rows, ...): uint8 is LOG, int16 LINEAR, int8 the upper half of LINEAR.
        exponents: int8 of shape (rows,).

    Example:
        >>> import numpy as np
        >>> from sfcore.codes import decoded
        >>> one = np.int8([1])
        >>> decoded(np.int16([[16384, -1]]), one).tolist(), decoded(np.uint8([[255, 0]]), one).tolist()
        ([[1.0, -6.103515625e-05]], [[1.9375, 0.0]])
    """
    scale = np.where(exponents == BROKEN, np.nan, np.ldexp(np.float32(1.0), exponents.astype(np.int32)))
    scale = scale.astype(np.float32).reshape(-1, *[1] * (code.ndim - 1))
    if code.dtype == np.uint8:
        bits = (code.astype(np.uint32) + np.uint32(FIRST)) << np.uint32(SHIFT)
        return np.where(code == 0, np.float32(0), bits.view(np.float32)) * scale
    bits_of = 8 * code.dtype.itemsize - 1
    return code.astype(np.float32) * np.float32(2.0**-bits_of) * scale


def opened(leaves: Mapping[str, np.ndarray], scale: np.ndarray) -> dict[str, np.ndarray]:
    """Returns role -> float32 array of the leaves of one parameter that lie in codes, the gap among them.

    Args:
        leaves: role -> array.
        scale: int8 of shape (rows, 1 + buffers).
    """
    found = {role: decoded(leaves[role], scale[:, at]) for role, at in columns(tuple(leaves), "role").items()}
    return found | {"gap": decoded(leaves["gap"], scale[:, 0])}
