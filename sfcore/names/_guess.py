"""Names and layouts in one framework from those in the other, where name and shape leave no doubt."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sfcore.names import _flax
from sfcore.names._derive import Shapes, clashes, laid_out, renamed, unused
from sfcore.names._flax import Pair, Shape
from sfcore.names._map import NamesError, Rule


def to_torch(jax: Shapes, rules: Sequence[Rule]) -> list[Pair]:
    """Returns one pair for every JAX leaf, with the name and shape that a torch module would give it.

    Raises:
        NamesError: with every leaf of which that cannot be told.
    """
    problems = unused(rules, jax)
    modules = {"/".join(_flax.jax_paths(name)[0][:-1]) for name in jax}
    pairs: list[Pair] = []
    for name, shape in jax.items():
        path, rule, exact = renamed(name, rules)
        layout = dict(rule.layout) if rule and exact else {}
        target = path if exact else (*path[:-1], _flax.torch_leaf(path[-1]))
        try:
            theirs = layout.pop("torch_shape", None) or _torch_shape(name, shape, layout, modules)
            whole = theirs if "part" not in layout else (theirs[0] * layout["part"][1], *theirs[1:])
            pairs.append(laid_out(name, shape, ".".join(target), whole, layout))
        except NamesError as error:
            problems += error.problems
    problems += clashes(pairs)
    if problems:
        raise NamesError(problems)
    return pairs


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
        if path[-1] == "bias":
            return (math.prod(shape),)
        return (math.prod(shape[ins:]), math.prod(shape[:ins]))
    if path[-1] != "kernel":
        return shape
    if not 2 <= len(shape) <= 5:
        raise NamesError(
            [f"{name} {shape} must be a kernel of 2 to 5 axes: give its axes and torch_shape in a map"]
        )
    return tuple(shape[axis] for axis in _flax.of_kernel(len(shape)))


def to_jax(torch: Shapes, rules: Sequence[Rule], kinds: Mapping[str, str]) -> list[Pair]:
    """Returns the pairs of every torch leaf, with the names and shapes that a Flax module would give it.

    Args:
        torch: name -> shape, of parameters and buffers.
        rules: the user's map.
        kinds: torch leaf -> class of its module, as far as it is known.

    Raises:
        NamesError: with every leaf of which that cannot be told.
    """
    siblings: dict[str, set[str]] = defaultdict(set)
    for name in torch:
        siblings[name.rpartition(".")[0]].add(name.rpartition(".")[2])
    pairs: list[Pair] = []
    problems = [
        f"map entry {'/'.join(rule.written)!r} must name a torch leaf or module, got none of that name"
        for rule in rules
        if not any(rule.backward(tuple(name.split("."))) for name in torch)
    ]
    for name, shape in torch.items():
        if _flax.torch_only(name):
            continue
        beside = frozenset(siblings[name.rpartition(".")[0]])
        try:
            pairs += _pairs_of(name, shape, beside, rules, kinds.get(name))
        except NamesError as error:
            problems += error.problems
    problems += clashes(pairs)
    if problems:
        raise NamesError(problems)
    return pairs


def _pairs_of(
    name: str, shape: Shape, beside: frozenset[str], rules: Sequence[Rule], kind: str | None
) -> list[Pair]:
    path = tuple(name.split("."))
    exact = [rule for rule in rules if len(rule.torch) == len(path) and rule.backward(path)]
    if exact:
        return [_by_rule(name, shape, rule) for rule in exact]
    modules = [found for rule in rules if (found := rule.backward(path)) is not None]
    leaf, why = _flax.flax_leaf(path[-1], shape, beside, kind)
    if leaf is None:
        raise NamesError([f"{name} {shape} {why}"])
    target = (*(modules[0] if modules else path)[:-1], leaf)
    axes = _flax.of_kernel(len(shape)) if leaf == "kernel" else _flax.straight(len(shape))
    ours = _unmoved(shape, axes)
    return [Pair("/".join(target), name, ours, shape, axes, ours)]


def _by_rule(name: str, shape: Shape, rule: Rule) -> Pair:
    jax = "/".join(rule.backward(tuple(name.split("."))) or ())
    layout = dict(rule.layout)
    part = layout.get("part", (0, 1))
    if part[1] > 1 and (not shape or shape[0] % part[1]):
        raise NamesError([f"{name} {shape} must have {part[1]} equal parts along its first axis for the map"])
    theirs = shape if part[1] == 1 else (shape[0] // part[1], *shape[1:])
    leaf = _flax.jax_paths(jax)[0][-1]
    default = (
        _flax.of_kernel(len(theirs)) if leaf == "kernel" and len(theirs) > 1 else _flax.straight(len(theirs))
    )
    axes = layout.get("axes", default)
    split = layout.get("split") or layout.get("jax_shape")
    if split is None:
        if len(axes) != len(theirs):
            raise NamesError(
                [f"{name} {shape} must have as many axes as the map's {axes}: add its split or jax_shape"]
            )
        split = _unmoved(theirs, axes)
    layout |= {"axes": axes, "split": split}
    return laid_out(jax, layout.get("jax_shape", split), name, shape, layout)


def _unmoved(shape: Shape, axes: tuple[int, ...]) -> Shape:
    """Returns the shape that becomes `shape` when its axes are put in the order `axes`."""
    found = [0] * len(axes)
    for size, axis in zip(shape, axes, strict=True):
        found[axis] = size
    return tuple(found)
