"""Pairs the leaves of a JAX model with those of a torch model, or says everything that is in the way."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sfcore.checks import nearest
from sfcore.names import _flax
from sfcore.names._flax import Pair, Path, Shape
from sfcore.names._map import NamesError, Rule

Shapes = Mapping[str, Shape]


def between(jax: Shapes, torch: Shapes, rules: Sequence[Rule]) -> list[Pair]:
    """Returns one pair for every JAX leaf, which together cover every torch leaf.

    First by name, with the rules' help; then modules of which there is one of their shape on each side.

    Raises:
        NamesError: with every leaf that has no counterpart, several, or one of another shape.
    """
    problems = unused(rules, jax)
    pairs: list[Pair] = []
    unnamed: dict[str, Shape] = {}
    taken = set()
    for name, shape in jax.items():
        try:
            found = _target(name, torch, rules)
            if found is None:
                unnamed[name] = shape
                continue
            target, layout = found
            taken.add(target)
            pairs.append(laid_out(name, shape, target, torch[target], layout))
        except NamesError as error:
            problems += error.problems
    left = {name: shape for name, shape in torch.items() if name not in taken and not _flax.torch_only(name)}
    pairs += _by_module(unnamed, left, problems)
    problems += list(clashes(pairs))
    if problems:
        raise NamesError(problems)
    return pairs


def renamed(name: str, rules: Sequence[Rule]) -> tuple[Path, Rule | None, bool]:
    """Returns (a JAX leaf's path in torch's modules, the rule that led there, whether it names the leaf)."""
    for rule in rules:
        for path in _flax.jax_paths(name):
            found = rule.forward(path)
            if found is not None:
                return found, rule, len(path) == len(rule.jax)
    return _flax.jax_paths(name)[0], None, False


def unused(rules: Sequence[Rule], jax: Shapes) -> list[str]:
    """Returns a sentence for every entry of the map that no JAX leaf answers to."""
    paths = [path for name in jax for path in _flax.jax_paths(name)]
    idle = ["/".join(rule.jax) for rule in rules if not any(rule.forward(path) for path in paths)]
    return [f"map entry {name!r} must name a JAX leaf or module, got none of that name" for name in idle]


def _target(name: str, torch: Shapes, rules: Sequence[Rule]) -> tuple[str, Mapping[str, Any]] | None:
    """Returns the torch name of a JAX leaf and what is known of its layout, or None if no name fits.

    Raises:
        NamesError: if the map sends it where torch has nothing.
    """
    path, rule, exact = renamed(name, rules)
    if exact and rule is not None:
        target = ".".join(path)
        if target not in torch:
            raise _absent(name, target, torch)
        return target, rule.layout
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


def laid_out(name: str, shape: Shape, target: str, whole: Shape, layout: Mapping[str, Any]) -> Pair:
    """Returns the pair of two leaves that belong together, in the given layout or the only one that fits.

    Raises:
        NamesError: if none fits.
    """
    what = f"{name} {shape} and {target} {whole}"
    part = layout.get("part", (0, 1))
    if part[1] > 1 and (not whole or whole[0] % part[1]):
        raise NamesError([f"{what} must fit, but torch's first axis has no {part[1]} equal parts"])
    theirs = whole if part[1] == 1 else (whole[0] // part[1], *whole[1:])
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


def _by_module(jax: Shapes, torch: Shapes, problems: list[str]) -> Iterator[Pair]:
    """Yields the pairs of modules that are the only ones of their shape; notes the others as problems."""
    ours, theirs = _modules_of_jax(jax), _modules_of_torch(torch)
    by_shape: dict[frozenset[tuple[str, Shape]], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for module, leaves in ours.items():
        by_shape[frozenset((leaf, shape) for leaf, (_, shape) in leaves.items())][0].append(module)
    for module, shapes in theirs.items():
        by_shape[frozenset(shapes.items())][1].append(module)
    for signature, (a, b) in by_shape.items():
        if len(a) == len(b) == 1:
            for leaf, (name, _) in ours[a[0]].items():
                target = f"{b[0]}.{leaf}" if b[0] else leaf
                yield laid_out(name, jax[name], target, torch[target], {})
            continue
        shown = ", ".join(f"{leaf} {shape}" for leaf, shape in sorted(signature))
        problems += [_lost("JAX", module, shown, b) for module in a]
        problems += [_lost("torch", module, shown, a) for module in b]


def _lost(side: str, module: str, shown: str, others: list[str]) -> str:
    if not others:
        return f"{side} module {module!r} (in torch's words {shown}) has no counterpart of that name or shape"
    entry = f'{{"{module}": "{others[0]}"}}' if side == "JAX" else f'{{"{others[0]}": "{module}"}}'
    return f"{side} module {module!r} ({shown}) may be {' or '.join(others)}: map it, such as {entry}"


def _modules_of_jax(jax: Shapes) -> dict[str, dict[str, tuple[str, Shape]]]:
    """Returns module -> torch's word for a leaf -> (JAX name, the shape that torch would give it)."""
    found: dict[str, dict[str, tuple[str, Shape]]] = defaultdict(dict)
    for name, shape in jax.items():
        path = _flax.jax_paths(name)[0]
        if path[-1] == "kernel" and 2 <= len(shape) <= 5:
            shape = tuple(shape[axis] for axis in _flax.of_kernel(len(shape)))
        found["/".join(path[:-1])][_flax.torch_leaf(path[-1])] = (name, shape)
    return found


def _modules_of_torch(torch: Shapes) -> dict[str, dict[str, Shape]]:
    found: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in torch.items():
        module, _, leaf = name.rpartition(".")
        found[module][leaf] = shape
    return found


def clashes(pairs: Sequence[Pair]) -> Iterator[str]:
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
        if parts == [(k, parts[0][1]) for k in range(parts[0][1])]:
            continue
        who = " and ".join(pair.jax for pair in claims)
        yield f"torch leaf {name!r} must be filled once, got parts {parts} from {who}: map the others"
