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
from typing import Any

import numpy as np

from sfcore import laws

LINEAR, LOG = "linear", "log"
GAP_BITS = 10  # of z - y beside a bfloat16 parameter; the 6 bits left of 16 are y's
SHORTEST = 16  # elements of a row
FIRST, SHIFT = 1776, 19  # LOG's code 0, and where its bits lie in a float32
LEAST, BROKEN = -120, 127  # the least exponent, and that of a row with a number that is not finite
# In a file, y and z - y beside a bfloat16 parameter: 22 bits of a float32, and below them 10 of a gap.
TOGETHER = "y+gap"
_GAP = np.uint32((1 << GAP_BITS) - 1)


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


def put_together(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns "ROLE/PARAMETER" -> array as they lie in a file: y and gap in one, where that keeps every bit.

    Example:
        >>> import numpy as np
        >>> from sfcore.codes import put_together, taken_apart
        >>> leaves = {"y/w": np.float32([[1.5]]), "gap/w": np.int16([[-64]]), "scale/w": np.int8([[0]])}
        >>> found = put_together(leaves)
        >>> [(leaf, array.dtype.name) for leaf, array in found.items()]
        [('y+gap/w', 'uint32'), ('scale/w', 'int8')]
        >>> taken_apart("y/w", found["y+gap/w"]).tolist(), taken_apart("gap/w", found["y+gap/w"]).tolist()
        ([[1.5]], [[-64]])
    """
    both = {
        leaf.removeprefix("scale/"): _together(leaves, leaf) for leaf in leaves if leaf.startswith("scale/")
    }
    found: dict[str, Any] = {}
    for leaf, array in leaves.items():
        role, _, name = leaf.partition("/")
        joined = both.get(name) if role in ("y", "gap") else None
        if joined is None:
            found[leaf] = array
        elif role == "y":
            found[f"{TOGETHER}/{name}"] = joined
    return found


def _together(leaves: Mapping[str, Any], scale: str) -> np.ndarray | None:
    """Returns y and gap of a parameter in one, None where bits of either would be lost."""
    held = [leaves.get(f"{role}/{scale.removeprefix('scale/')}") for role in ("y", "gap")]
    y, gap = (None if one is None else np.ascontiguousarray(one) for one in held)
    if y is None or gap is None or (y.dtype.name, gap.dtype.name, y.shape) != ("float32", "int16", gap.shape):
        return None
    bits, code, below = y.view(np.uint32), gap.view(np.uint16), np.uint16(16 - GAP_BITS)
    if np.any(bits & _GAP) or np.any(code & np.uint16((1 << (16 - GAP_BITS)) - 1)):
        return None
    return bits | (code >> below)


def names_of(leaf: str) -> list[str]:
    """Returns the leaves that lie in one of a file.

    Example:
        >>> from sfcore.codes import names_of
        >>> names_of("y+gap/w"), names_of("v/w")
        (['y/w', 'gap/w'], ['v/w'])
    """
    role, _, name = leaf.partition("/")
    return [f"y/{name}", f"gap/{name}"] if role == TOGETHER else [leaf]


def taken_apart(leaf: str, together: np.ndarray) -> np.ndarray:
    """Returns y or the gap, by the leaf's name, of the two together.

    Raises:
        ValueError: if these are not the two.
    """
    if together.dtype != np.uint32:
        raise ValueError(f"{leaf!r} must lie in a leaf of uint32, got {together.dtype}")
    if leaf.startswith("y/"):
        return (together & ~_GAP).view(np.float32)
    return ((together & _GAP).astype(np.uint16) << np.uint16(16 - GAP_BITS)).view(np.int16)
