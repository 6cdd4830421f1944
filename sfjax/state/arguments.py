"""The arguments of the public functions: their types, how they are read, and what a run will do with them.

Trees and optax's own are Any to a type checker: optax ships no types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfcore import checks, matrices, plan
from sfcore.checks import Rule
from sfcore.hyperparameters import ScheduleFree
from sfcore.laws import JAX_NAMES, Law
from sfjax.law.scalars import as_scalar, full_lr

Tree = TypeVar("Tree")
Scalar: TypeAlias = float | np.floating[Any] | np.integer[Any] | np.ndarray | jax.Array
Whole: TypeAlias = int | np.integer[Any] | np.ndarray | jax.Array
Schedule: TypeAlias = Callable[[Any], Any]
ScalarOrSchedule: TypeAlias = Scalar | Schedule
Configuration: TypeAlias = ScheduleFree | Mapping[str, Any]
Configurations: TypeAlias = Configuration | Sequence[Configuration]
MicroBatches: TypeAlias = int | Sequence[int]
_TRANSFORMATION = Rule(
    "an optax transformation",
    lambda v: callable(getattr(v, "init", None)) and callable(getattr(v, "update", None)),
    "pass one like optax.sgd(learning_rate)",
)
_FACTORY = Rule(
    "a factory of sfjax",
    lambda v: callable(v) and "learning_rate" in inspect.signature(v).parameters,
    "such as sfjax.schedule_free_adamw, without calling it",
)
# What a plan does not speak of.
_OTHER = ("base_optimizer", "state_dtype", "mask", "muon_mask", "precision", "seed", "axis_name")


def read(kind: type[ScheduleFree], **values: Any) -> dict[str, Any]:
    """Returns clean values of the options of `kind`.

    Args:
        kind: a dataclass of `sfcore.hyperparameters`.
        values: its fields. A number may be Python's, NumPy's, or an array of one element of any dtype;
            `lr` may also be a schedule.

    Returns:
        Each value as a Python number, as a scalar tracer (of inject_hyperparams, jit, vmap, grad), or the
        schedule itself.

    Raises:
        HyperparameterError: with every value that is out of range. A tracer has no value to judge.
    """
    clean = {name: _plain(value) for name, value in values.items()}
    known = {name: value for name, value in clean.items() if not isinstance(value, jax.core.Tracer)}
    if callable(known.get("lr")):
        del known["lr"]
    checks.check(kind, known, JAX_NAMES)
    return clean


def _plain(value: Any) -> Any:
    if isinstance(value, jax.core.Tracer):
        return as_scalar(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic) and value.size == 1:
        number = value.item()
        # inject_hyperparams makes complex numbers of all hyperparameters where all parameters are complex.
        return number.real if isinstance(number, complex) and number.imag == 0 else number
    return value


def read_dtype(state_dtype: Any) -> Any:
    """Returns state_dtype as a dtype, or None; raises TypeError unless it is real floating point."""
    if state_dtype is None:
        return None
    if not _is_dtype(state_dtype, jnp.floating):
        raise TypeError(
            f"state_dtype must be a real floating-point dtype or None, got {state_dtype!r}: "
            "None keeps z in the parameters' dtype, at least float32"
        )
    return jnp.dtype(state_dtype)


def _is_dtype(value: Any, kind: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(value), kind))
    except TypeError:
        return False


def check_dtype(dtype: Any) -> None:
    """Raises TypeError unless this is a dtype of floating-point or complex numbers, or None."""
    if dtype is not None and not _is_dtype(dtype, jnp.inexact):
        raise TypeError(
            f"dtype must be a floating-point or complex dtype or None, got {dtype!r}: None is the parameters'"
        )


def as_transformation(name: str, given: Any) -> Any:
    """Returns an Optax transformation whose update takes further arguments; raises TypeError for others."""
    checks.require(TypeError, **{name: (_TRANSFORMATION, given)})
    return optax.with_extra_args_support(given)


def read_precision(given: Mapping[str, Any], beta: Any, law: Law) -> str:
    """Returns the precision; raises HyperparameterError with all that does not go with it."""
    precision, seed, state_dtype = (given[name] for name in ("precision", "seed", "state_dtype"))
    found = []
    if precision not in ("exact", "lean", "8bit"):
        found.append(f"precision must be 'exact', 'lean' or '8bit', got {precision!r}: 'exact' is usual")
    number = _plain(seed)
    is_whole = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**32
    if not (is_whole or isinstance(number, jax.core.Tracer)):
        found.append(f"seed must be a whole number >= 0 and < 2^32, got {seed!r}: 0 is usual")
    without = {
        "lean": [one.jax for one in law.buffers if not one.lean],
        "8bit": [one.jax for one in law.buffers if not one.code],
    }
    if precision in ("lean", "8bit"):
        got, kind = f"got {precision!r}", "lean" if precision == "lean" else "8-bit"
        if wide := without[precision]:
            found.append(
                f"precision must be 'exact' with {law.title}, {got}: {', '.join(wide)} has no {kind} form"
            )
        if is_zero(beta):
            found.append(f"precision must be 'exact' at b1 = 0, {got}: y is z there, and has no gap to it")
        if state_dtype is not None:
            found.append(
                f"state_dtype must be None with precision={precision!r}, got {state_dtype!r}: leave it out"
            )
    if found:
        raise checks.HyperparameterError(found)
    return str(precision)


def check_narrow(params: Any, precision: str) -> None:
    """Raises TypeError for a leaf that a precision has no form for."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype == np.float16 and precision == "8bit":
            raise TypeError(
                f"precision must be 'exact' or 'lean' for float16, got '8bit' and float16 at "
                f"params{jax.tree_util.keystr(path)}: cast it to bfloat16"
            )


def is_zero(value: Any) -> bool:
    """Tells whether a value is the Python number 0, so that work can be left out for good."""
    return isinstance(value, int | float) and value == 0


def check_params(params: Any) -> None:
    """Raises TypeError unless every leaf is an array of floating-point or complex numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None:
            raise TypeError(
                f"params must be arrays, got {type(leaf).__name__} at params{jax.tree_util.keystr(path)}: "
                "convert them with jax.tree.map(jnp.asarray, params)"
            )
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"params must be floating point or complex, got {dtype} at "
                f"params{jax.tree_util.keystr(path)}: leave such leaves out, with a filter of your framework "
                "or with optax.partition and optax.set_to_zero"
            )


def check_mask(mask: Any, name: str = "mask", means: str = "True decays") -> None:
    """Raises TypeError unless this is None, a function, or has nothing but bools in it."""
    if callable(mask):
        return
    for leaf in jax.tree.leaves(mask):
        if getattr(leaf, "dtype", type(leaf)) not in (bool, np.bool_):
            raise TypeError(
                f"{name} must be a tree of bools, a function of params or None, got {leaf!r} in it: {means}"
            )


def kinds_of_leaves(params: Any, mask: Any, output_axis: str) -> list[str]:
    """Returns "matrices" or "others" for each leaf: what Muon takes, and what AdamW.

    Args:
        params: any tree, also of shapes; one without leaves has no kinds.
        mask: as `schedule_free_muon` has it.
        output_axis: "first" or "last".

    Raises:
        HyperparameterError: with every leaf that is called a matrix and can be none, or if there are none.
    """
    placed = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in placed]
    if mask is None:
        chosen = [
            not jnp.issubdtype(leaf.dtype, jnp.complexfloating) and matrices.is_matrix(leaf.shape, name)
            for name, (_, leaf) in zip(names, placed, strict=True)
        ]
    else:
        chosen = jax.tree.leaves(decay_mask(mask, params, "muon_mask"))
    found = []
    for name, (_, leaf), is_chosen in zip(names, placed, chosen, strict=True):
        where = f"params[{name!r}] of Muon"
        if not is_chosen:
            continue
        wrong = matrices.wrong_matrix(where, leaf.shape, jnp.issubdtype(leaf.dtype, jnp.complexfloating))
        if wrong:
            found.append(f"{wrong}, False in muon_mask")
        elif len(leaf.shape) > 2 and output_axis == "first" and "kernel" in name.split("/")[-2:]:
            found.append(
                f"output_axis must be 'last' for a convolution of Flax, got 'first' for params[{name!r}] of "
                f"shape {tuple(leaf.shape)}: its outputs are the last axis"
            )
    if placed and not any(chosen):
        found.append(matrices.no_matrix(len(placed), "say which are with muon_mask"))
    if found:
        raise checks.HyperparameterError(found)
    return [matrices.MATRICES if one else matrices.OTHERS for one in chosen]


def decay_mask(mask: Any, params: Any, name: str = "mask") -> Any:
    """Returns a tree of bools of params' tree, from a tree or prefix of it, or a function of params."""
    mask = mask(params) if callable(mask) else mask
    try:
        return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: bool(flag), below), mask, params)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a tree of bools like params or a prefix of it, got {jax.tree.structure(mask)} "
            f"for {jax.tree.structure(params)}: pass a function of params to follow whatever tree there is"
        ) from error


def describe(optimizer: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Returns what a run with an optimizer will do, and what is wrong with it, as a table to print.

    Args:
        optimizer: a factory of sfjax, such as `schedule_free_adamw`.
        args, kwargs: its arguments, numbers or a schedule for the learning rate; and any field that
            `sfcore.plan.check` knows beside them, such as `total_steps=10_000`.

    Returns:
        Lines of text: optimizer, steps, warm-up, lr and c at some steps, then every problem.

    Raises:
        TypeError: for an argument that neither the optimizer nor a plan has.

    Example:
        >>> import sfjax
        >>> told = sfjax.describe(sfjax.schedule_free_adamw, 0.01, warmup_steps=50, total_steps=1000)
        >>> told.splitlines()[3]
        'warm-up       50 optimizer steps, by optimizer'
    """
    checks.require(TypeError, optimizer=(_FACTORY, optimizer))
    signature = inspect.signature(optimizer)
    own = {name: value for name, value in kwargs.items() if name in signature.parameters}
    bound = signature.bind(*args, **own)
    bound.apply_defaults()
    values = {name: value for name, value in bound.arguments.items() if name not in _OTHER}
    if "mu_x" in values:  # GPA, in the words of the others
        window = {"window": 1.0 / (1.0 - values.pop("mu_x")), "window_rule": "constant"}
        values |= {"b1": values.pop("mu_y"), "decay_at": "z"} | window
    note = ""
    ignore: tuple[str, ...] = ()
    if callable(values["learning_rate"]):
        values["learning_rate"] = float(full_lr(values["learning_rate"]))
        values["scheduler_class"] = "learning_rate"
        note, ignore = "\nlr            a schedule; its largest value is checked, not its course", ("SF207",)
    numbers = {
        name: value.item() if isinstance(value, jnp.ndarray) else value for name, value in values.items()
    }
    facts = {name: value for name, value in kwargs.items() if name not in own}
    told = plan.check(
        {"optimizer": f"sfjax.{optimizer.__name__}"} | numbers | facts, source="own", ignore=ignore
    )
    unknown = [problem.field for problem in told.problems if problem.code == "SF001"]
    if unknown:
        raise TypeError(
            f"{optimizer.__name__} and a plan have no {', '.join(unknown)}: look at docs/rules.md"
        )
    return plan.text(told) + note
