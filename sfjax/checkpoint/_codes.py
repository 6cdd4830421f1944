"""Between a checkpoint and a target one of which has a parameter in the codes of precision="8bit"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sfcore import laws
from sfcore.codes import GAP_BITS
from sfcore.exchange import of_role
from sfjax.checkpoint._leaves import Named, in_full
from sfjax.checkpoint._orbax import Saved
from sfjax.state import eight

_BUFFER = ("z", "x", "gap")


def gap_code(leaves: Mapping[str, Any], parameter: str) -> np.ndarray:
    """Returns the whole code of a gap, of 16 bits, from role -> array."""
    gap, rest = jnp.asarray(np.asarray(leaves[f"gap/{parameter}"])), leaves.get(f"rest/{parameter}")
    return np.asarray(eight.gap_code(gap, None if rest is None else jnp.asarray(np.asarray(rest))))


def in_codes_of(saved: Saved, target: Named, roles: Mapping[str, str]) -> tuple[Saved, bool]:
    """Returns a checkpoint with the codes that its target has, and whether it had others.

    What is in codes in one of them alone is opened, or rounded to the nearest.
    """
    by_role = {
        role: leaf
        for name, leaf in zip(target.names, target.leaves, strict=True)
        if (role := roles.get(name))
    }
    places = {role: name for name, role in roles.items()}
    wanted, held = of_role(by_role, "scale"), of_role(saved.leaves, "scale")
    differ = {
        name
        for name in wanted.keys() | held.keys()
        if name not in wanted or name not in held or wanted[name].shape != held[name].shape
    }
    differ = {name for name in differ if f"y/{name}" in saved.names}
    arrays, found = dict(saved.arrays), dict(saved.roles)
    for parameter in sorted(differ & held.keys()):
        _open(arrays, found, parameter)
    for parameter in sorted(differ & wanted.keys()):
        _close(arrays, found, parameter, by_role, places)
    return saved._replace(arrays=arrays, roles=found), bool(differ)


def _open(arrays: dict[str, Any], found: dict[str, str], parameter: str) -> None:
    """Puts z, a float32 rest and float32 moments in place of the codes of a parameter."""
    names = {role: name for name, role in found.items()}
    leaves = {
        role: np.asarray(arrays[name]) for role, name in names.items() if role.endswith(f"/{parameter}")
    }
    y = in_full(leaves, parameter)
    scale = jnp.asarray(leaves[f"scale/{parameter}"])
    gap = eight.decoded(jnp.asarray(gap_code(leaves, parameter)), scale[:, 0])
    name = names[f"gap/{parameter}"]
    arrays[name], found[name] = np.asarray(y.astype(np.float32) + gap), f"z/{parameter}"
    if f"rest/{parameter}" in names:
        arrays[names[f"rest/{parameter}"]] = y - leaves[f"y/{parameter}"].astype(np.float32)
    for column, role in enumerate(_moments(names, parameter), start=1):
        arrays[names[role]] = np.asarray(eight.decoded(jnp.asarray(leaves[role]), scale[:, column]))
    name = names[f"scale/{parameter}"]
    del arrays[name], found[name]


def _close(
    arrays: dict[str, Any],
    found: dict[str, str],
    parameter: str,
    target: Mapping[str, Any],
    places: Mapping[str, str],
) -> None:
    """Puts codes in place of what is exact or lean; `target` is role -> leaf, `places` role -> its name."""
    names = {role: name for name, role in found.items()}
    leaves = {
        role: np.asarray(arrays[name]) for role, name in names.items() if role.endswith(f"/{parameter}")
    }
    buffer = next((kind for kind in _BUFFER if f"{kind}/{parameter}" in names), None)
    if buffer is None:
        return
    y = jnp.asarray(in_full(leaves, parameter).astype(np.float32))
    z = jnp.asarray(leaves[f"{buffer}/{parameter}"].astype(np.float32))
    z = y + z if buffer == "gap" else z
    rest = None
    if f"rest/{parameter}" in target:
        p = jnp.asarray(leaves[f"y/{parameter}"])
        update, rest = eight.split(y, p)
        p = (p.astype(jnp.float32) + update.astype(jnp.float32)).astype(p.dtype)
        arrays[names[f"y/{parameter}"]] = np.asarray(p)  # the same but where y lies between two
        y = p.astype(jnp.float32) + rest.astype(jnp.float32) * eight.unit(p)
    exponents = [eight.exponents(z - y)]
    code = eight.linear(z - y, exponents[0], 16 if rest is None else GAP_BITS)
    gap, rest = (code.astype(jnp.int16), None) if rest is None else eight.packed(rest, code)
    new = {f"gap/{parameter}": gap} | ({} if rest is None else {f"rest/{parameter}": rest})
    for role in _moments(target, parameter):
        exponents.append(jnp.zeros_like(exponents[0]))
        if role in leaves:
            value = jnp.asarray(leaves[role].astype(np.float32))
            exponents[-1] = eight.exponents(value)
            new[role] = eight.encoded(target[role].dtype, value, exponents[-1])
    new[f"scale/{parameter}"] = jnp.stack(exponents, axis=-1)
    name = names[f"{buffer}/{parameter}"]
    del found[name], arrays[name]
    for role, array in new.items():
        name = names.get(role, places[role])
        arrays[name], found[name] = np.asarray(array), role


def _moments(names: Mapping[str, Any], parameter: str) -> list[str]:
    """Returns the roles of a parameter's moments, in the order of the columns of its scale."""
    return [f"{role}/{parameter}" for role in laws.roles() if f"{role}/{parameter}" in names]
