"""Names and layouts of parameters in JAX and in torch: derived, or from a user's own map; exact both ways.

JAX names are key paths of the parameter tree joined by "/", torch names those of `named_parameters()`
and `named_buffers()`. What is known of itself: the modules of Flax (nnx and linen) against torch's of the
same name or the same shape; Linear, Conv, Embed, the norms, BatchNorm's statistics, and attention with
an axis for its heads, also against torch's stacked `in_proj_weight`. Transposed convolutions and
recurrent cells need a map.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import checks
from sfcore.checks import Rule
from sfcore.names import _derive, _flax, _guess, _map
from sfcore.names._flax import Pair, Shape
from sfcore.names._map import NamesError

__all__ = ["NameMap", "NamesError", "Pair", "between", "to_jax", "to_torch"]

Shapes = Mapping[str, Shape]
UserMap = Path | str | Mapping[str, Any] | None
USER_MAP = checks.optional(
    checks.kind_of("a JSON file or its content", (str, Path, Mapping), 'such as {"Dense_0": "fc1"}')
)
_PAIRS = Rule(
    "a list of sfcore.names.Pair",
    lambda v: isinstance(v, Collection) and all(isinstance(one, Pair) for one in v),
    "sfcore.names.between makes them",
)
_SHAPES = Rule(
    "name -> shape",
    lambda v: isinstance(v, Mapping) and all(map(_is_shape, v.values())),
    "such as {name: array.shape}",
)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, Integral) for size in value)


class NameMap:
    """Pairs of JAX and torch leaves; turns arrays of one framework into the other's, bit for bit.

    What comes out may share memory with what went in, where nothing had to move.

    Attributes:
        pairs: the pairs; a torch leaf that stacks several JAX leaves has one for each.

    Example:
        >>> import numpy as np
        >>> from sfcore import names
        >>> found = names.to_torch({"fc/kernel": (2, 3), "fc/bias": (3,)})
        >>> found.torch_name("fc/kernel")
        'fc.weight'
        >>> found.to_torch({"fc/kernel": np.zeros((2, 3))})["fc.weight"].shape
        (3, 2)
    """

    def __init__(self, pairs: Sequence[Pair]):
        checks.require(TypeError, pairs=(_PAIRS, pairs))
        self.pairs = tuple(pairs)
        self._by_jax = {pair.jax: pair for pair in pairs}
        self._by_torch: dict[str, list[Pair]] = {}
        for pair in sorted(pairs, key=lambda pair: pair.part):
            self._by_torch.setdefault(pair.torch, []).append(pair)

    def torch_name(self, jax: str) -> str:
        """Returns the torch name of a JAX name; KeyError if it is not in the map."""
        return self._by_jax[jax].torch

    def jax_names(self, torch: str) -> list[str]:
        """Returns the JAX names that a torch name holds, usually one; KeyError if it is not in the map."""
        return [pair.jax for pair in self._by_torch[torch]]

    def to_torch(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns torch name -> array for JAX name -> array.

        Args:
            arrays: some or all of the map's leaves, of any dtype; all parts of a stacked leaf or none.

        Raises:
            NamesError: with every name that the map lacks, every other shape, every missing part.
        """
        checks.require(TypeError, arrays=(checks.MAPPING, arrays))
        problems = [_problem("jax", n, self._jax_shape(n), np.shape(array)) for n, array in arrays.items()]
        wanted = dict.fromkeys(self._by_jax[name].torch for name in arrays if name in self._by_jax)
        for name in wanted:
            parts = [pair.jax for pair in self._by_torch[name]]
            missing = [part for part in parts if part not in arrays]
            dtypes = {str(np.asarray(arrays[part]).dtype) for part in parts if part in arrays}
            if missing:
                problems.append(f"torch leaf {name!r} needs {', '.join(parts)}, got no {', '.join(missing)}")
            if len(dtypes) > 1:
                problems.append(f"the parts of torch leaf {name!r} must have one dtype, got {sorted(dtypes)}")
        _refuse(problems)
        return {name: self._stack(name, arrays) for name in wanted}

    def to_jax(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns JAX name -> array for torch name -> array; `num_batches_tracked` is left out.

        Raises:
            NamesError: with every name that the map lacks, and every other shape.
        """
        checks.require(TypeError, arrays=(checks.MAPPING, arrays))
        arrays = {name: array for name, array in arrays.items() if not _flax.torch_only(name)}
        _refuse([_problem("torch", n, self._torch_shape(n), np.shape(array)) for n, array in arrays.items()])
        found = {}
        for name, array in arrays.items():
            for pair in self._by_torch[name]:
                k, n = pair.part
                rows = len(array) // n if n > 1 else 0
                found[pair.jax] = pair.to_jax(array[k * rows : (k + 1) * rows] if n > 1 else array)
        return found

    def to_json(self) -> str:
        """Returns the map as JSON that `between`, `to_torch` and `to_jax` read back, layouts spelt out."""
        entries = {pair.jax: _entry(pair) for pair in self.pairs}
        return json.dumps(entries, indent=1)

    def _stack(self, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        pairs = self._by_torch[name]
        moved = [pair.to_torch(arrays[pair.jax]) for pair in pairs]
        return moved[0] if len(moved) == 1 else np.concatenate(moved)

    def _jax_shape(self, name: str) -> Shape | None:
        return self._by_jax[name].jax_shape if name in self._by_jax else None

    def _torch_shape(self, name: str) -> Shape | None:
        if name not in self._by_torch:
            return None
        parts = self._by_torch[name]
        shape = parts[0].torch_shape
        return shape if len(parts) == 1 else (shape[0] * len(parts), *shape[1:])


def _problem(side: str, name: str, expected: Shape | None, shape: Shape) -> str | None:
    if expected is None:
        return f"{side} leaf {name!r} must be in the map, got none of that name"
    if shape != expected:
        return f"{side} leaf {name!r} must have the shape {expected}, got {shape}"
    return None


def _refuse(problems: Sequence[str | None]) -> None:
    found = [problem for problem in problems if problem]
    if found:
        raise NamesError(found)


def _entry(pair: Pair) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "torch": pair.torch,
        "axes": list(pair.axes),
        "split": list(pair.split),
        "jax_shape": list(pair.jax_shape),
        "torch_shape": list(pair.torch_shape),
    }
    return entry if pair.part == (0, 1) else entry | {"part": list(pair.part)}


def between(jax: Shapes, torch: Shapes, user: UserMap = None) -> NameMap:
    """Returns the map between two models whose names and shapes are both known.

    A leaf is matched by the user's map, by its name (Flax's kernel, scale, embedding, mean, var are torch's
    weight, weight, weight, running_mean, running_var), or because its module is the only one of its shape
    on both sides.

    Args:
        jax, torch: name -> shape, of parameters and buffers together.
        user: a JSON file or its content: "JAX/path" -> "torch.path" for modules or leaves, "*" for any one
            part of a path; or for a leaf -> {"torch": ..., "axes": ..., "split": ..., "part": ...}.

    Raises:
        NamesError: with every leaf that is missing, has several counterparts or one of another shape.

    Example:
        >>> from sfcore import names
        >>> jax = {"Dense_0/kernel": (4, 8), "Dense_1/kernel": (8, 2)}
        >>> names.between(jax, {"0.weight": (8, 4), "2.weight": (2, 8)}).torch_name("Dense_1/kernel")
        '2.weight'
    """
    checks.require(TypeError, jax=(_SHAPES, jax), torch=(_SHAPES, torch), user=(USER_MAP, user))
    return NameMap(_derive.between(jax, torch, _map.read(user)))


def to_torch(jax: Shapes, user: UserMap = None) -> NameMap:
    """Returns the map from a JAX model alone: torch names are the JAX paths with torch's words.

    Args:
        jax: name -> shape, of parameters and buffers together.
        user: as for `between`; a layout that shape and name do not tell needs "torch_shape" as well.

    Raises:
        NamesError: with every leaf whose layout in torch cannot be told.
    """
    checks.require(TypeError, jax=(_SHAPES, jax), user=(USER_MAP, user))
    return NameMap(_guess.to_torch(jax, _map.read(user)))


def to_jax(torch: Shapes, user: UserMap = None, kinds: Mapping[str, str] | None = None) -> NameMap:
    """Returns the map from a torch model alone: JAX names are the torch paths with Flax's words.

    Args:
        torch: name -> shape, of parameters and buffers together.
        user: as for `between`; a layout that shape and name do not tell needs "jax_shape" as well.
        kinds: torch leaf -> class of its module, such as {"emb.weight": "Embedding"}; without it a weight of
            two axes and no bias, which may be a Linear's or an Embedding's, is refused.

    Raises:
        NamesError: with every leaf whose layout in Flax cannot be told.

    Example:
        >>> from sfcore import names
        >>> names.to_jax({"fc.weight": (3, 2), "fc.bias": (3,)}).jax_names("fc.weight")
        ['fc/kernel']
    """
    checks.require(
        TypeError,
        torch=(_SHAPES, torch),
        user=(USER_MAP, user),
        kinds=(checks.optional(checks.MAPPING), kinds),
    )
    return NameMap(_guess.to_jax(torch, _map.read(user), kinds or {}))
