"""x, y and z of every parameter of a checkpoint, in NumPy, from whichever two of them it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sfcore import codes, hyperparameters, laws
from sfcore.exchange import of_role
from sfcore.meta import Meta


class Iterates(NamedTuple):
    """One parameter; an iterate that cannot be had is None.

    Attributes:
        name: the parameter.
        dtype: its own dtype, which z may exceed.
        x, y, z: in at least float32 (float64 for a float64 parameter).
    """

    name: str
    dtype: np.dtype[Any]
    x: np.ndarray | None
    y: np.ndarray | None
    z: np.ndarray | None


def says_beta(group: Mapping[str, Any]) -> bool:
    """Tells whether a group's record has the interpolation that built its y."""
    return bool(_betas(group))


def beta_of(group: Mapping[str, Any]) -> float:
    """Returns the interpolation that built a group's y, which a changed configuration does not change."""
    # The default is all that is left where nobody says it.
    return next(iter(_betas(group)), hyperparameters.ScheduleFree().beta)


def _betas(group: Mapping[str, Any]) -> list[float]:
    found = (
        group.get("torch", {}).get("books", {}).get("y_beta"),
        group.get("clock", {}).get("beta"),
        group["hyperparameters"].get("beta"),
    )
    return [float(value) for value in found if value is not None]


def iterates(meta: Meta, state: Mapping[str, np.ndarray]) -> Iterator[Iterates]:
    """Yields the iterates of every parameter that a group holds, one parameter at a time."""
    for group in meta.groups:
        beta = beta_of(group)
        for name in group["parameters"]:
            yield _of_parameter(name, beta, meta, state)


def _of_parameter(name: str, beta: float, meta: Meta, state: Mapping[str, np.ndarray]) -> Iterates:
    leaves = {role: state[f"{role}/{name}"] for role in ("y", "z", "x") if f"{role}/{name}" in state}
    dtype = _dtype(meta.parameters.get(name, {}), leaves)
    held, z, x = (_wide(leaves.get(role)) for role in ("y", "z", "x"))
    if z is None or meta.parameters.get(name, {}).get("clock") is None:
        return Iterates(name, dtype, held, held, held)  # before a first gradient the three are one
    if meta.weights_hold == "x":
        x = held if x is None else x
        return Iterates(name, dtype, x, None if x is None else beta * x + (1 - beta) * z, z)
    if beta == 0:
        return Iterates(name, dtype, x, z, z)
    return Iterates(name, dtype, None if held is None else (held - (1 - beta) * z) / beta, held, z)


def _dtype(about: Mapping[str, Any], leaves: Mapping[str, np.ndarray]) -> np.dtype[Any]:
    """Returns a parameter's own dtype, in which its y need not be stored."""
    if about.get("dtype") == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    stored = next((array.dtype for array in leaves.values()), np.dtype(np.float32))
    return np.dtype(about.get("dtype", stored))


def _wide(array: np.ndarray | None) -> np.ndarray | None:
    if array is None:
        return None
    return array.astype(np.float32 if array.dtype.itemsize < 4 else array.dtype)


def x_of(meta: Meta, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns name -> x in the parameter's dtype, of the parameters whose x is known."""
    return {one.name: one.x.astype(one.dtype) for one in iterates(meta, state) if one.x is not None}


def widened(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the leaves with z = y + gap in place of each gap, and that parameter's moments in float32.

    Codes of `sfcore.codes` are opened.

    Example:
        >>> import numpy as np
        >>> from sfcore.iterates import widened
        >>> found = widened({"y/w": np.float32([1.0]), "gap/w": np.float16([0.5])})
        >>> found["z/w"], "gap/w" in found
        (array([1.5], dtype=float32), False)
    """
    found = {leaf: array for leaf, array in state.items() if not leaf.startswith(("gap/", "scale/"))}
    scales = of_role(state, "scale")
    for name, gap in of_role(state, "gap").items():
        if name in scales:
            held = {
                role: state[f"{role}/{name}"] for role in ("gap", *laws.roles()) if f"{role}/{name}" in state
            }
            opened = codes.opened(held, scales[name])
            gap = opened.pop("gap")
            found |= {f"{role}/{name}": array for role, array in opened.items()}
        found[f"z/{name}"] = state[f"y/{name}"].astype(np.float32) + gap.astype(np.float32)
        for leaf in (f"{role}/{name}" for role in laws.roles()):
            if leaf in found:
                found[leaf] = found[leaf].astype(np.float32)
    return found
