"""What every leaf of parameters and optimizer state is: its name in a checkpoint, and its role.

A name is the leaf's path in {"params", "opt_state", "extra_state"}, such as "opt_state/1/z/Dense_0/kernel".
A role says what the leaf means wherever it sits, such as "z/Dense_0/kernel":

    y/NAME, stored/NAME, grad/NAME                   of the parameter NAME; `stored` is z, or x at b1 = 0
    v/NAME, m/NAME and others                        a buffer of its law, see `sfcore.laws`
    rest/NAME                                        what y is more than a parameter of 16 bits holds
    gap/NAME, scale/NAME                             z - y, in the lean or the 8-bit form; exponents of codes
    clock/GROUP/FIELD                                a scalar of the GROUP-th Schedule-Free state
    base/GROUP/PATH                                  state of a base that `sfjax.schedule_free` wraps
    accumulation/FIELD                               counters of optax.MultiSteps
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Number
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from sfcore import laws
from sfcore.exchange import CheckpointError
from sfcore.matrices import row_shape
from sfjax.plus import ScheduleFreePlusState
from sfjax.schedule_free import ScheduleFreeState
from sfjax.state import eight, forms
from sfjax.state.find import _pure, _require
from sfjax.step.plan import STATES

CLOCK = ("b1", "step", "lr", "lr_max", "c", "weight_sum", "weight_sum_low")
BARE = "value"  # the name of parameters that are one array, not a tree
ONE_VECTOR = "the one vector of optax.flatten: build the transformation without it"


class Named(NamedTuple):
    """A flattened tree: unique names, leaves, its structure, and that without flax.nnx variables."""

    names: list[str]
    leaves: list[Any]
    tree: Any
    pure: Any


class Group(NamedTuple):
    """One Schedule-Free state: its name in the checkpoint, itself, and the parameters it moves."""

    name: str
    state: ScheduleFreeState
    parameters: list[str]


def named(tree: Any) -> Named:
    """Returns the leaves of a tree with their names; flax.nnx variables count as their arrays.

    Raises:
        ValueError: if two leaves would have one name, as in {"a": {"b": 1}, "a/b": 2}; or one in Orbax,
            which joins keys by dots, as in {"a": {"b": 1}, "a.b": 2}.
    """
    pure = _pure(tree)
    paths = jax.tree_util.tree_leaves_with_path(pure)
    names = [_name(path) for path, _ in paths]
    dotted = [name.replace("/", ".") for name in names]
    if len(set(dotted)) < len(dotted):
        twice = min(name for name, dots in zip(names, dotted, strict=True) if dotted.count(dots) > 1)
        raise ValueError(f"leaves must have different names, got two called {twice!r}: rename a key")
    return Named(names, [leaf for _, leaf in paths], jax.tree.structure(tree), jax.tree.structure(pure))


def parameters(tree: Any) -> dict[str, Any]:
    """Returns name -> leaf of a tree of parameters; a bare array is called "value"."""
    found = named(tree)
    return {name or BARE: leaf for name, leaf in zip(found.names, found.leaves, strict=True)}


def host_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Returns name -> host array of a tree of parameters."""
    return {name: np.asarray(leaf) for name, leaf in parameters(tree).items()}


def beside(buffers: Any, params: Any) -> dict[str, Any]:
    """Returns name -> leaf of buffers, which lie beside the parameters in the inference weights.

    Raises:
        CheckpointError: if a parameter has the name of one, which would be shipped in its place.
    """
    check_arrays("buffers", buffers, "other things go into extra", or_numbers=True)
    found = parameters({} if buffers is None else buffers)
    both = sorted(found.keys() & parameters(params).keys())
    if both:
        raise CheckpointError(
            f"buffers must have other names than params, got {both[0]!r} in both: "
            'put them under a key of their own, such as {"batch_stats": buffers}'
        )
    return found


def check_trees(params: Any, opt_state: Any) -> None:
    """Raises unless params are arrays, or say what arrays will be, beside the Schedule-Free states of any."""
    moved = jax.tree.leaves([state.z for state in _require(opt_state)])
    check_arrays("params", params, "pass the tree that tx.init got", or_none=not moved)


def check_arrays(name: str, tree: Any, fix: str, or_none: bool = True, or_numbers: bool = False) -> None:
    """Raises TypeError unless a tree has arrays of numbers alone, or says what arrays will be.

    Args:
        name: the argument's.
        tree: it.
        fix: what to do.
        or_none: whether it may be empty.
        or_numbers: whether a leaf may be a number.
    """

    def is_right(leaf: Any) -> bool:
        is_array = hasattr(leaf, "shape") and getattr(getattr(leaf, "dtype", None), "kind", "V") not in "OSU"
        return (is_array and hasattr(leaf, "dtype")) or (or_numbers and isinstance(leaf, Number))

    leaves = jax.tree_util.tree_leaves_with_path(_pure(tree))
    wrong = [(path, leaf) for path, leaf in leaves if not is_right(leaf)]
    for path, leaf in wrong if leaves or or_none else [((), tree)]:
        where = f" at {name}{jax.tree_util.keystr(path)}" if path else ""
        raise TypeError(f"{name} must be arrays, got {leaf!r}{where}: {fix}")


def whole(params: Any, opt_state: Any, extra_state: Any = None) -> dict[str, Any]:
    """Returns the tree that a checkpoint holds."""
    tree = {"params": params, "opt_state": opt_state}
    return tree if extra_state is None else tree | {"extra_state": extra_state}


def groups(params: Any, opt_state: Any) -> list[Group]:
    """Returns the Schedule-Free states of an optimizer state, concrete or abstract, in tree order."""
    shapes = {name: leaf.shape for name, leaf in parameters(params).items()}
    found = []
    for path, state in nodes(opt_state, ScheduleFreeState):
        below = parameters(state.z)
        own = [name for name, z in below.items() if shapes.get(name) == z.shape]
        found.append(Group(_name(path, "opt_state"), state, own))
    return found


def roles(params: Any, opt_state: Any) -> dict[str, str]:
    """Returns name -> role of every leaf that has one; each role is given once, to its first leaf."""
    shapes = {name: leaf.shape for name, leaf in parameters(params).items()}
    rows = {name: [row_shape(one, axis) for axis in ("first", "last") if one] for name, one in shapes.items()}
    found = [(place, f"y/{name}") for name, place, _ in _placed("params", params)]

    def per_parameter(prefix: str, tree: Any, role: str, gaps: Collection[str] = ()) -> None:
        for name, place, leaf in _placed(prefix, tree):
            if leaf.shape in (shapes.get(name), *rows.get(name, ())):
                found.append((place, f"{'gap' if name in gaps else role}/{name}"))

    for index, group in enumerate(groups(params, opt_state)):
        found += [(f"{group.name}/{field}", f"clock/{index}/{field}") for field in CLOCK]
        rests = parameters(group.state.y_rest)
        gaps = [name for name, rest in rests.items() if forms.is_lean(rest)]
        gaps += [name for name, leaf in parameters(group.state.z).items() if eight.is_code(leaf)]
        per_parameter(f"{group.name}/z", group.state.z, "stored", gaps)
        per_parameter(f"{group.name}/y_rest", group.state.y_rest, "rest")
        scales = _placed(f"{group.name}/scale", group.state.scale)
        found += [(place, f"scale/{name}") for name, place, _ in scales]
        base, prefix = group.state.base_optimizer_state, f"{group.name}/base_optimizer_state"
        if type(base) in STATES:
            for field, role in held(base).items():
                per_parameter(f"{prefix}/{field}", getattr(base, field), role)
        else:
            found += [(place, f"base/{index}/{name}") for name, place, _ in _placed(prefix, base)]
    for index, norm in norms(params, opt_state).items():
        found.append((norm, f"clock/{index}/grad_l1_ema"))
    for path, steps in nodes(opt_state, optax.MultiStepsState):
        prefix = _name(path, "opt_state")
        per_parameter(f"{prefix}/acc_grads", steps.acc_grads, "grad")
        found += [(f"{prefix}/{field}", f"accumulation/{field}") for field in ("mini_step", "gradient_step")]
    first: dict[str, str] = {}
    for name, role in found:
        first.setdefault(role, name)
    return {name: role for role, name in first.items()}


def norms(params: Any, opt_state: Any) -> dict[int, str]:
    """Returns number of a group -> name of its smoothed norm, of those that take Polyak steps."""
    found = {}
    for path, _ in nodes(opt_state, ScheduleFreePlusState):
        name = _name(path, "opt_state")
        for index, group in enumerate(groups(params, opt_state)):
            if group.name == f"{name}/inner":
                found[index] = f"{name}/grad_l1_ema"
    return found


def held(base: Any) -> dict[str, str]:
    """Returns field -> role of the buffers that the state of a direction of ours holds.

    Raises:
        CheckpointError: for one that no law names: it would be lost.
    """
    known = {one.jax: role for role, one in laws.roles().items()}
    fields = [field for field in base._fields if getattr(base, field) is not None]
    lost = [field for field in fields if field not in known]
    if lost:
        raise CheckpointError(
            f"state must hold the buffers of a law, got {', '.join(lost)} in {type(base).__name__}: register "
            "the law that keeps them"
        )
    return {field: known[field] for field in fields}


def in_full(leaves: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Returns y of a parameter from role -> array, with its rest if it has 16 bits and one."""
    return np.asarray(forms.whole(leaves[f"y/{name}"], leaves.get(f"rest/{name}")))


def injected(opt_state: Any) -> set[str]:
    """Returns the arguments that optax.inject_hyperparams holds in its state; those of schedules stay out."""
    found = [node for _, node in nodes(opt_state, optax.InjectStatefulHyperparamsState)]
    return {name for node in found for name in node.hyperparams if name not in node.hyperparams_states}


def nodes(tree: Any, kind: type) -> list[tuple[Any, Any]]:
    """Returns (path, node) of every outermost node of a kind."""

    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    leaves = jax.tree_util.tree_leaves_with_path(_pure(tree), is_leaf=is_kind)
    return [(path, node) for path, node in leaves if is_kind(node)]


def _name(path: Any, under: str = "") -> str:
    return _join(under, jax.tree_util.keystr(path, simple=True, separator="/"))


def _placed(prefix: str, tree: Any) -> list[tuple[str, str, Any]]:
    """Returns (name, name under prefix, leaf) of a tree of parameters; a bare array lies at prefix itself."""
    found = named(tree)
    bare = jax.tree_util.treedef_is_leaf(found.pure)
    return [
        (name or BARE, prefix if bare else f"{prefix}/{name}", leaf)
        for name, leaf in zip(found.names, found.leaves, strict=True)
    ]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
