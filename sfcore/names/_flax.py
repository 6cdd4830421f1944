"""What Flax and torch call the same thing, and what a name and a shape alone tell about a leaf."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One JAX leaf and the torch leaf, or part of one, that holds the same numbers.

    Attributes:
        jax, torch: their names.
        jax_shape: shape in JAX.
        torch_shape: shape in torch, of the part if it is one.
        axes: the JAX axes in torch's order.
        split: shape that the JAX array takes before its axes are permuted; its own by default.
        part: (k, n): the k-th of n equal parts along torch's first axis, from 0.
    """

    jax: str
    torch: str
    jax_shape: Shape
    torch_shape: Shape
    axes: tuple[int, ...]
    split: Shape
    part: tuple[int, int] = (0, 1)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns the torch array of a JAX array: the same numbers, bit for bit."""
        moved = array.reshape(self.split).transpose(self.axes).reshape(self.torch_shape)
        return np.ascontiguousarray(moved).reshape(self.torch_shape)

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """Returns the JAX array of a torch array: the same numbers, bit for bit."""
        moved = array.reshape([self.split[axis] for axis in self.axes]).transpose(np.argsort(self.axes))
        return np.ascontiguousarray(moved.reshape(self.jax_shape)).reshape(self.jax_shape)


def straight(ndim: int) -> tuple[int, ...]:
    """Returns the axes in their own order."""
    return tuple(range(ndim))


def of_kernel(ndim: int) -> tuple[int, ...]:
    """Returns torch's order of a Flax kernel's axes: (..., in, out) becomes (out, in, ...)."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def usual(leaf: str, ndim: int) -> tuple[int, ...]:
    """Returns the order of axes of a leaf of that name and number of axes where nothing else is said."""
    return of_kernel(ndim) if leaf == "kernel" and ndim > 1 else straight(ndim)


def fitting(leaf: str, jax_shape: Shape, torch_shape: Shape) -> tuple[int, ...] | None:
    """Returns the order of axes that makes a JAX leaf fit a torch shape, or None if none does.

    There is never a choice: two ways to merge a kernel's axes into the same two sizes differ by axes of
    one element.

    Args:
        leaf: the last part of the JAX name; only a "kernel" is ever transposed.
        jax_shape, torch_shape: the shapes; torch's may have axes of the kernel merged, as a Linear
            beside an attention projection (features, heads, size of a head) has.
    """
    ndim = len(jax_shape)
    if leaf != "kernel":
        merged = leaf == "bias" and torch_shape == (math.prod(jax_shape),)
        return straight(ndim) if merged or jax_shape == torch_shape else None
    if ndim == len(torch_shape) and 2 <= ndim <= 5:
        axes = of_kernel(ndim)
        return axes if tuple(jax_shape[a] for a in axes) == torch_shape else None
    for ins in range(1, ndim):
        if torch_shape == (math.prod(jax_shape[ins:]), math.prod(jax_shape[:ins])):
            return (*range(ins, ndim), *range(ins))
    return None


Path = tuple[str, ...]

_COLLECTIONS = ("params", "batch_stats")
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
_STACKED = {"query": 0, "key": 1, "value": 2}
# Parts of a torch class's name -> what Flax calls its weight; None where that is transposed in another way
# than a convolution's, or not a kernel at all.
_WEIGHT_OF: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("ConvTranspose", "LSTM", "GRU", "RNN", "PReLU", "Bilinear"), None),
    (("Embedding",), "embedding"),
    (("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm"), "scale"),
    (("Linear", "Conv"), "kernel"),
)


def jax_paths(name: str) -> tuple[Path, ...]:
    """Returns a JAX name's path without its collection and without the "value" of an nnx variable.

    A second one keeps the "value", which may be a leaf's own name.
    """
    path = tuple(name.split("/"))
    if len(path) > 1 and path[0] in _COLLECTIONS:
        path = path[1:]
    if len(path) > 1 and path[-1] in ("value", "raw_value"):
        return path[:-1], path
    return (path,)


def torch_only(name: str) -> bool:
    """Tells whether a torch leaf has no counterpart by nature: torch counts batches and Flax does not."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def torch_leaf(leaf: str) -> str:
    """Returns torch's word for the last part of a Flax name: kernel, scale, embedding -> weight, ..."""
    return _LEAVES.get(leaf, leaf)


def torch_paths(path: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Yields (torch path, part) of everything that a Flax path may be called in torch, likeliest first."""
    module, leaf = path[:-1], torch_leaf(path[-1])
    yield (*module, leaf), (0, 1)
    if module and module[-1] in _ATTENTION:
        yield (*module[:-1], _ATTENTION[module[-1]], leaf), (0, 1)
    if module and module[-1] in _STACKED:
        yield (*module[:-1], f"in_proj_{leaf}"), (_STACKED[module[-1]], 3)
    if path[-1] != "kernel":  # whose axes another module than Flax's need not have in that order
        yield path, (0, 1)


def flax_leaf(leaf: str, shape: Shape, siblings: frozenset[str], kind: str | None) -> tuple[str | None, str]:
    """Returns (Flax's word for the last part of a torch name, "") or (None, why it cannot be told).

    Args:
        leaf: the last part of the torch name.
        shape: its shape.
        siblings: last parts of all leaves of its module, itself included.
        kind: class of its module, such as "Linear", where it is known.
    """
    if leaf.startswith("in_proj_"):
        return None, "holds query, key and value in one: map it to the three leaves, with parts"
    if leaf != "weight":
        return {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf), ""
    if kind is not None:
        for words, flax in _WEIGHT_OF:
            if any(word in kind for word in words):
                return (
                    flax,
                    "" if flax else f"belongs to a {kind}, whose layout Flax does not share: map its leaves",
                )
        return None, f"belongs to a {kind}, of which no layout is known: map its leaves"
    if "running_mean" in siblings or (len(shape) == 1 and shape != (1,)):
        return "scale", ""
    if 3 <= len(shape) <= 5 or (len(shape) == 2 and "bias" in siblings):
        return "kernel", ""
    if len(shape) == 2:
        return None, "may be a Linear's without bias or an Embedding's"
    return None, "is of no layer that is known by its shape"


def in_attention(path: Path, modules: set[str]) -> bool:
    """Tells whether a leaf is a projection of a Flax attention, which has axes for its heads."""
    if len(path) < 2 or path[-1] not in ("kernel", "bias") or path[-2] not in _ATTENTION:
        return False
    above = path[:-2]
    return all("/".join((*above, name)) in modules for name in _ATTENTION)
