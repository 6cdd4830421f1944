"""Muon's matrices: which parameters are some, how they lie as rows and columns, and how long a step is.

A polar factor is taken of a parameter as [rows, rest]: one row an output, all other axes in a row of it.
Functions of names and shapes; the arrays are the twins'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

# Of the quintic that takes singular values near 1: Keller Jordan's, as in torch.optim and optax.contrib.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# What is added to the norm of a matrix before it is divided by it.
TINY = 1e-7
MATRICES, OTHERS = "matrices", "others"
# A part of a name that says: a table that is looked up, a head, or no weight.
_TABLE = re.compile(
    r"w[tp]e|(.*[_.])?(head|unembed|classifier|logits|bias|scale)|.*embed(ding)?s?(_.*)?|.*embedd.*|.*tokens?"
    r"|.*position.*"
)


def is_table(name: str) -> bool:
    """Tells by its name whether a parameter is an embedding, a head, a bias or a scale, which AdamW suits.

    Example:
        >>> from sfcore.matrices import is_table
        >>> [is_table(name) for name in ("wte.weight", "params/lm_head/kernel", "layers.0.mlp.up.weight")]
        [True, True, False]
    """
    return any(_TABLE.fullmatch(part) for part in re.split(r"[./]", name.lower()))


def is_matrix(shape: Sequence[int], name: str = "") -> bool:
    """Tells whether Muon takes a real parameter by default: two axes or more, some elements, and no table.

    Args:
        shape: of the parameter.
        name: dotted or with slashes; "" where it has none.

    Example:
        >>> from sfcore.matrices import is_matrix
        >>> is_matrix((4, 3), "h.0.attn.weight"), is_matrix((4, 3), "wte.weight"), is_matrix((4,))
        (True, False, False)
    """
    return len(shape) >= 2 and math.prod(shape) > 0 and not is_table(name)


def axis_of_rows(output_axis: str) -> int:
    """Returns the axis that rows are counted along."""
    return 0 if output_axis == "first" else -1


def row_shape(shape: Sequence[int], output_axis: str) -> tuple[int, ...]:
    """Returns the shape of one number a row beside a parameter, 1 in every other axis.

    Example:
        >>> from sfcore.matrices import row_shape
        >>> row_shape((8, 3, 5), "first"), row_shape((3, 5, 8), "last")
        ((8, 1, 1), (1, 1, 8))
    """
    axis = axis_of_rows(output_axis) % len(shape)
    return tuple(size if place == axis else 1 for place, size in enumerate(shape))


def length(rows: int, cols: int, adjust_lr: str) -> float:
    """Returns s, by which a polar factor is multiplied.

    Example:
        >>> from sfcore.matrices import length
        >>> length(100, 25, "match_rms_adamw"), length(100, 25, "original")
        (2.0, 2.0)
    """
    match = adjust_lr == "match_rms_adamw"
    return 0.2 * math.sqrt(max(rows, cols)) if match else math.sqrt(max(1.0, rows / cols))


def size(rows: int, cols: int, adjust_lr: str, factor: Any) -> Any:
    """Returns the Frobenius norm of a step whose rows are normalized.

    Args:
        rows, cols, adjust_lr: as for `length`.
        factor: the norm of the polar factor.
    """
    match = adjust_lr == "match_rms_adamw"
    return 0.2 * math.sqrt(rows * cols) if match else length(rows, cols, adjust_lr) * factor


def wrong_matrix(where: str, shape: Sequence[int], is_complex: bool) -> str | None:
    """Returns the sentence about a parameter that is called a matrix and can be none, or None.

    Args:
        where: the parameter, as its user knows it.
        shape, is_complex: of it.
    """
    if is_complex:
        return f"{where} must be real, got a complex one of shape {tuple(shape)}: leave it to AdamW"
    if len(shape) < 2 or not math.prod(shape):
        rule = "two axes or more and some elements"
        return f"{where} must have {rule}, got the shape {tuple(shape)}: leave it to AdamW"
    return None


def no_matrix(count: int, fix: str) -> str:
    """Returns the sentence about a run that has nothing for Muon."""
    return f"params must have a matrix for Muon, got none among {count}: use AdamW, or {fix}"
