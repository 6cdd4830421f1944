"""Reads the factories' arguments: numbers become Python's, traced values scalars, and rules are kept."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sfcore import checks, hyperparameters
from sfcore.laws import JAX_NAMES, Law
from sfjax import _scalars

Kind = TypeVar("Kind", bound=hyperparameters.ScheduleFree)


def read(kind: type[Kind], **values: Any) -> Kind:
    """Returns `kind` filled with clean values.

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
    return kind(**clean)


def _plain(value: Any) -> Any:
    if isinstance(value, jax.core.Tracer):
        return _scalars.as_scalar(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic) and value.size == 1:
        number = value.item()
        # inject_hyperparams makes complex numbers of all hyperparameters where all parameters are complex.
        return number.real if isinstance(number, complex) and number.imag == 0 else number
    return value


def read_dtype(state_dtype: Any) -> Any:
    """Returns state_dtype as a dtype, or None; raises TypeError unless it is real floating point."""
    if state_dtype is None:
        return None
    if not jnp.issubdtype(state_dtype, jnp.floating):
        raise TypeError(
            f"state_dtype must be a real floating-point dtype or None, got {state_dtype!r}: "
            "None keeps z in the parameters' dtype, at least float32"
        )
    return jnp.dtype(state_dtype)


def read_precision(precision: Any, seed: Any, beta: Any, state_dtype: Any, law: Law) -> bool:
    """Tells whether precision is "lean"; raises HyperparameterError with all that does not go with it."""
    found = []
    if precision not in ("exact", "lean"):
        found.append(f"precision must be 'exact' or 'lean', got {precision!r}: 'exact' is usual")
    number = _plain(seed)
    is_whole = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**32
    if not (is_whole or isinstance(number, jax.core.Tracer)):
        found.append(f"seed must be a whole number >= 0 and < 2^32, got {seed!r}: 0 is usual")
    wide = [one.jax for one in law.buffers if not one.lean]
    if precision == "lean" and wide:
        found.append(
            f"precision must be 'exact' with {law.title}, got 'lean': {', '.join(wide)} has no lean form"
        )
    if precision == "lean" and is_zero(beta):
        found.append("precision must be 'exact' at b1 = 0, got 'lean': y is z there, and has no gap to it")
    if precision == "lean" and state_dtype is not None:
        found.append(f"state_dtype must be None with precision='lean', got {state_dtype!r}: leave it out")
    if found:
        raise checks.HyperparameterError(found)
    return bool(precision == "lean")


def is_zero(value: Any) -> bool:
    """Tells whether a value is the Python number 0, so that work can be left out for good."""
    return isinstance(value, int | float) and value == 0
