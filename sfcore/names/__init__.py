"""Names and layouts of parameters in JAX and in torch: derived, or from a user's own map; exact both ways.

JAX names are key paths of the parameter tree joined by "/", torch names those of `named_parameters()`
and `named_buffers()`. What is known of itself: the modules of Flax (nnx and linen) against torch's of the
same name or the same shape; Linear, Conv, Embed, the norms, BatchNorm's statistics, and attention with
an axis for its heads, also against torch's stacked `in_proj_weight`. Transposed convolutions and
recurrent cells need a map.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from sfcore import checks
from sfcore.checks import nearest
from sfcore.names import _flax, _map
from sfcore.names._flax import Pair, Shape
from sfcore.names._map import NamesError, Rule

__all__ = ["NameMap", "NamesError", "Pair", "between", "to_jax", "to_torch"]

Shapes = Mapping[str, Shape]
UserMap = Path | str | Mapping[str, Any] | None
USER_MAP = checks.optional(
    checks.kind_of("a JSON file or its content", (str, Path, Mapping), 'such as {"Dense_0": "fc1"}')
)
_PAIRS = checks.Rule(
    "a list of sfcore.names.Pair",
    lambda v: isinstance(v, Collection) and all(isinstance(one, Pair) for one in v),
    "sfcore.names.between makes them",
)
_SHAPES = checks.Rule(
    "name -> shape",
    lambda v: isinstance(v, Mapping) and all(map(_is_shape, v.values())),
    "such as {name: array.shape}",
)
_WHOLE = (0, 1)


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
        shapes = {pair.jax: pair.jax_shape for pair in self.pairs}
        problems = _unlike("jax", arrays, shapes)
        wanted = dict.fromkeys(self._by_jax[name].torch for name in arrays if name in self._by_jax)
        for name in wanted:
            parts = [pair.jax for pair in self._by_torch[name]]
            missing = [part for part in parts if part not in arrays]
            dtypes = {str(np.asarray(arrays[part]).dtype) for part in parts if part in arrays}
            if missing:
                problems.append(f"torch leaf {name!r} needs {', '.join(parts)}, got no {', '.join(missing)}")
            if len(dtypes) > 1:
                problems.append(f"the parts of torch leaf {name!r} must have one dtype, got {sorted(dtypes)}")
        if problems:
            raise NamesError(problems)
        found = {}
        for name in wanted:
            moved = [pair.to_torch(arrays[pair.jax]) for pair in self._by_torch[name]]
            found[name] = moved[0] if len(moved) == 1 else np.concatenate(moved)
        return found

    def to_jax(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns JAX name -> array for torch name -> array; `num_batches_tracked` is left out.

        Raises:
            NamesError: with every name that the map lacks, and every other shape.
        """
        checks.require(TypeError, arrays=(checks.MAPPING, arrays))
        arrays = {name: array for name, array in arrays.items() if not _flax.torch_only(name)}
        shapes = {}
        for name, parts in self._by_torch.items():
            shape = parts[0].torch_shape
            shapes[name] = shape if len(parts) == 1 else (shape[0] * len(parts), *shape[1:])
        if problems := _unlike("torch", arrays, shapes):
            raise NamesError(problems)
        found = {}
        for name, array in arrays.items():
            for pair in self._by_torch[name]:
                k, n = pair.part
                rows = len(array) // n if n > 1 else 0
                found[pair.jax] = pair.to_jax(array[k * rows : (k + 1) * rows] if n > 1 else array)
        return found

    def to_json(self) -> str:
        """Returns the map as JSON that `between`, `to_torch` and `to_jax` read back, layouts spelt out."""
        entries: dict[str, dict[str, Any]] = {}
        for pair in self.pairs:
            entry = entries[pair.jax] = {"torch": pair.torch}
            for key in ("axes", "split", "jax_shape", "torch_shape", "part"):
                if key != "part" or pair.part != _WHOLE:
                    entry[key] = list(getattr(pair, key))
        return json.dumps(entries, indent=1)


def _unlike(side: str, arrays: Mapping[str, np.ndarray], shapes: Shapes) -> list[str]:
    """Returns a sentence for every array that is not in the map, or of another shape."""
    problems = []
    for name, array in arrays.items():
        if name not in shapes:
            problems.append(f"{side} leaf {name!r} must be in the map, got none of that name")
        elif np.shape(array) != shapes[name]:
            got = np.shape(array)
            problems.append(f"{side} leaf {name!r} must have the shape {shapes[name]}, got {got}")
    return problems


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
    rules = _map.read(user)
    unnamed: dict[str, Shape] = {}
    taken = set()

    def by_name(name: str, shape: Shape) -> Iterator[Pair]:
        found = _target(name, torch, rules)
        if found is None:
            unnamed[name] = shape
            return
        target, layout = found
        taken.add(target)
        yield _laid_out(name, shape, target, torch[target], layout)

    problems = _unused(rules, jax)
    pairs = _collected(by_name, jax, problems)
    left = {name: shape for name, shape in torch.items() if name not in taken and not _flax.torch_only(name)}
    pairs += _by_module(unnamed, left, problems)
    return _settled(pairs, problems)


def to_torch(jax: Shapes, user: UserMap = None) -> NameMap:
    """Returns the map from a JAX model alone: torch names are the JAX paths with torch's words.

    Args:
        jax: name -> shape, of parameters and buffers together.
        user: as for `between`; a layout that shape and name do not tell needs "torch_shape" as well.

    Raises:
        NamesError: with every leaf whose layout in torch cannot be told.
    """
    checks.require(TypeError, jax=(_SHAPES, jax), user=(USER_MAP, user))
    rules = _map.read(user)
    modules = {"/".join(_flax.jax_paths(name)[0][:-1]) for name in jax}

    def pair(name: str, shape: Shape) -> Iterator[Pair]:
        path, rule, exact = _renamed(name, rules)
        layout = dict(rule.layout) if rule and exact else {}
        target = path if exact else (*path[:-1], _flax.torch_leaf(path[-1]))
        theirs = layout.pop("torch_shape", None) or _torch_shape(name, shape, layout, modules)
        whole = theirs if "part" not in layout else (theirs[0] * layout["part"][1], *theirs[1:])
        yield _laid_out(name, shape, ".".join(target), whole, layout)

    problems = _unused(rules, jax)
    return _settled(_collected(pair, jax, problems), problems)


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
    rules, kinds = _map.read(user), kinds or {}
    siblings: dict[str, set[str]] = defaultdict(set)
    for name in torch:
        siblings[name.rpartition(".")[0]].add(name.rpartition(".")[2])

    def pairs(name: str, shape: Shape) -> Iterator[Pair]:
        path = tuple(name.split("."))
        exact = [rule for rule in rules if len(rule.torch) == len(path) and rule.backward(path)]
        if exact:
            yield from (_by_rule(name, shape, rule) for rule in exact)
            return
        modules = (found for rule in rules if (found := rule.backward(path)) is not None)
        beside = frozenset(siblings[name.rpartition(".")[0]])
        leaf, why = _flax.flax_leaf(path[-1], shape, beside, kinds.get(name))
        if leaf is None:
            raise NamesError([f"{name} {shape} {why}"])
        axes = _flax.usual(leaf, len(shape))
        ours = _unmoved(shape, axes)
        yield Pair("/".join((*next(modules, path)[:-1], leaf)), name, ours, shape, axes, ours)

    shared = {name: shape for name, shape in torch.items() if not _flax.torch_only(name)}
    paths = [tuple(name.split(".")) for name in torch]
    problems = [
        f"map entry {'/'.join(rule.written)!r} must name a torch leaf or module, got none of that name"
        for rule in rules
        if not any(map(rule.backward, paths))
    ]
    return _settled(_collected(pairs, shared, problems), problems)


def _collected(
    make: Callable[[str, Shape], Iterable[Pair]], shapes: Shapes, problems: list[str]
) -> list[Pair]:
    """Returns the pairs of all leaves; what stands in the way of one is added to the problems."""
    pairs: list[Pair] = []
    for name, shape in shapes.items():
        try:
            pairs += make(name, shape)
        except NamesError as error:
            problems += error.problems
    return pairs


def _settled(pairs: list[Pair], problems: list[str]) -> NameMap:
    problems += _clashes(pairs)
    if problems:
        raise NamesError(problems)
    return NameMap(pairs)


def _clashes(pairs: Sequence[Pair]) -> Iterator[str]:
    """Yields a sentence for every leaf that two pairs claim, and every torch leaf that lacks a part."""
    by_torch: dict[str, list[Pair]] = defaultdict(list)
    by_jax: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_torch[pair.torch].append(pair)
        by_jax[pair.jax].append(pair)
    for name, claims in by_jax.items():
        if len(claims) > 1:
            who = " and ".join(pair.torch for pair in claims)
            yield f"JAX leaf {name!r} must be filled once, got {who}: map one elsewhere"
    for name, claims in by_torch.items():
        parts = sorted(pair.part for pair in claims)
        if parts != [(k, parts[0][1]) for k in range(parts[0][1])]:
            who = " and ".join(pair.jax for pair in claims)
            yield f"torch leaf {name!r} must be filled once, got parts {parts} from {who}: map the others"


def _unused(rules: Sequence[Rule], jax: Shapes) -> list[str]:
    """Returns a sentence for every entry of the map that no JAX leaf answers to."""
    paths = [path for name in jax for path in _flax.jax_paths(name)]
    idle = ["/".join(rule.jax) for rule in rules if not any(rule.forward(path) for path in paths)]
    return [f"map entry {name!r} must name a JAX leaf or module, got none of that name" for name in idle]


def _renamed(name: str, rules: Sequence[Rule]) -> tuple[_flax.Path, Rule | None, bool]:
    """Returns (a JAX leaf's path in torch's modules, the rule that led there, whether it names the leaf)."""
    for rule in rules:
        for path in _flax.jax_paths(name):
            found = rule.forward(path)
            if found is not None:
                return found, rule, len(path) == len(rule.jax)
    return _flax.jax_paths(name)[0], None, False


def _target(name: str, torch: Shapes, rules: Sequence[Rule]) -> tuple[str, Mapping[str, Any]] | None:
    """Returns the torch name of a JAX leaf and what is known of its layout, or None if no name fits.

    Raises:
        NamesError: if the map sends it where torch has nothing.
    """
    path, rule, exact = _renamed(name, rules)
    if rule is not None and exact:
        if ".".join(path) in torch:
            return ".".join(path), rule.layout
        raise _absent(name, ".".join(path), torch)
    if rule is not None and rule.layout:
        raise NamesError(
            [f"the map's entry for {'/'.join(rule.jax)!r} gives a layout to a module: give it to leaves"]
        )
    for start in [path] if rule else _flax.jax_paths(name):
        for candidate, part in _flax.torch_paths(start):
            if ".".join(candidate) in torch:
                return ".".join(candidate), {"part": part}
    if rule is not None:
        raise _absent(name, ".".join((*path[:-1], _flax.torch_leaf(path[-1]))), torch)
    return None


def _absent(name: str, target: str, torch: Shapes) -> NamesError:
    near = nearest(target, torch)
    hint = f"; the nearest is {near!r}" if near else ""
    return NamesError([f"the map sends {name!r} to {target!r}, of which torch has none{hint}"])


def _laid_out(name: str, shape: Shape, target: str, whole: Shape, layout: Mapping[str, Any]) -> Pair:
    """Returns the pair of two leaves that belong together, in the given layout or the only one that fits.

    Raises:
        NamesError: if none fits.
    """
    what, part = f"{name} {shape} and {target} {whole}", layout.get("part", _WHOLE)
    theirs = _part(whole, part)
    if theirs is None:
        raise NamesError([f"{what} must fit, but torch's first axis has no {part[1]} equal parts"])
    split = layout.get("split", shape)
    if "axes" in layout or "split" in layout:
        axes = layout.get("axes", _flax.straight(len(split)))
        sizes = {math.prod(shape), math.prod(theirs), math.prod(split)}
        if len(sizes) > 1 or len(axes) != len(split):
            raise NamesError(
                [f"{what} must fit by the map's axes {axes} of {split}: count the elements and the axes"]
            )
        return Pair(name, target, shape, theirs, axes, split, part)
    fitting = _flax.fitting(_flax.jax_paths(name)[0][-1], shape, theirs)
    if fitting is None:
        raise NamesError([f"{what} must have fitting shapes: it is another layer, or give the map its axes"])
    return Pair(name, target, shape, theirs, fitting, shape, part)


def _part(whole: Shape, part: tuple[int, int]) -> Shape | None:
    """Returns the shape of one of n equal parts along the first axis, None if there are none."""
    n = part[1]
    if n > 1 and (not whole or whole[0] % n):
        return None
    return whole if n == 1 else (whole[0] // n, *whole[1:])


def _by_module(jax: Shapes, torch: Shapes, problems: list[str]) -> Iterator[Pair]:
    """Yields the pairs of modules that are the only ones of their shape; notes the others as problems."""
    # Module -> torch's word for a leaf -> (JAX name, the shape that torch would give it).
    ours: dict[str, dict[str, tuple[str, Shape]]] = defaultdict(dict)
    for name, shape in jax.items():
        path = _flax.jax_paths(name)[0]
        moved = path[-1] == "kernel" and 2 <= len(shape) <= 5
        theirs = tuple(shape[axis] for axis in _flax.of_kernel(len(shape))) if moved else shape
        ours["/".join(path[:-1])][_flax.torch_leaf(path[-1])] = (name, theirs)
    in_torch: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in torch.items():
        module, _, leaf = name.rpartition(".")
        in_torch[module][leaf] = shape
    by_shape: dict[frozenset[tuple[str, Shape]], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for module, leaves in ours.items():
        by_shape[frozenset((leaf, shape) for leaf, (_, shape) in leaves.items())][0].append(module)
    for module, shapes in in_torch.items():
        by_shape[frozenset(shapes.items())][1].append(module)
    for signature, (a, b) in by_shape.items():
        if len(a) == len(b) == 1:
            for leaf, (name, _) in ours[a[0]].items():
                target = f"{b[0]}.{leaf}" if b[0] else leaf
                yield _laid_out(name, jax[name], target, torch[target], {})
            continue
        shown = ", ".join(f"{leaf} {shape}" for leaf, shape in sorted(signature))
        problems += [_lost("JAX", module, shown, b) for module in a]
        problems += [_lost("torch", module, shown, a) for module in b]


def _lost(side: str, module: str, shown: str, others: list[str]) -> str:
    if not others:
        return f"{side} module {module!r} (in torch's words {shown}) has no counterpart of that name or shape"
    entry = f'{{"{module}": "{others[0]}"}}' if side == "JAX" else f'{{"{others[0]}": "{module}"}}'
    return f"{side} module {module!r} ({shown}) may be {' or '.join(others)}: map it, such as {entry}"


def _torch_shape(name: str, shape: Shape, layout: Mapping[str, tuple[int, ...]], modules: set[str]) -> Shape:
    if "axes" in layout or "split" in layout:
        split = layout.get("split", shape)
        axes = layout.get("axes", _flax.straight(len(split)))
        if len(axes) != len(split):
            raise NamesError([f"{name} {split} must have as many axes as the map's {axes}"])
        return tuple(split[axis] for axis in axes)
    path = _flax.jax_paths(name)[0]
    if any("ConvTranspose" in part for part in path):
        raise NamesError(
            [f"{name} {shape} is a transposed convolution's, which torch also mirrors: map its axes"]
        )
    if _flax.in_attention(path, modules):
        ins = len(shape) - 1 if path[-2] == "out" else 1
        bias = path[-1] == "bias"
        return (math.prod(shape),) if bias else (math.prod(shape[ins:]), math.prod(shape[:ins]))
    if path[-1] != "kernel":
        return shape
    if not 2 <= len(shape) <= 5:
        raise NamesError(
            [f"{name} {shape} must be a kernel of 2 to 5 axes: give its axes and torch_shape in a map"]
        )
    return tuple(shape[axis] for axis in _flax.of_kernel(len(shape)))


def _by_rule(name: str, shape: Shape, rule: Rule) -> Pair:
    """Returns the pair of a torch leaf and the JAX leaf that an entry of the map names."""
    jax, layout = "/".join(rule.backward(tuple(name.split("."))) or ()), dict(rule.layout)
    part = layout.get("part", _WHOLE)
    theirs = _part(shape, part)
    if theirs is None:
        raise NamesError([f"{name} {shape} must have {part[1]} equal parts along its first axis for the map"])
    axes = layout.get("axes", _flax.usual(_flax.jax_paths(jax)[0][-1], len(theirs)))
    split = layout.get("split") or layout.get("jax_shape")
    if split is None:
        if len(axes) != len(theirs):
            raise NamesError(
                [f"{name} {shape} must have as many axes as the map's {axes}: add its split or jax_shape"]
            )
        split = _unmoved(theirs, axes)
    layout |= {"axes": axes, "split": split}
    return _laid_out(jax, layout.get("jax_shape", split), name, shape, layout)


def _unmoved(shape: Shape, axes: tuple[int, ...]) -> Shape:
    """Returns the shape that becomes `shape` when its axes are put in the order `axes`."""
    return tuple(size for _, size in sorted(zip(axes, shape, strict=True)))
