"""From one precision of 16-bit parameters to the other, before a checkpoint is matched with its target."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from sfcore import laws
from sfcore.changes import effect_of
from sfjax.checkpoint._leaves import Named
from sfjax.checkpoint._read import Saved
from sfjax.state import forms as _halves
from sfjax.state import forms as _lean


def in_form_of(saved: Saved, target: Named, roles: Mapping[str, str]) -> tuple[Saved, list[str]]:
    """Returns a checkpoint in the precision of its target, and a sentence if that is another.

    Args:
        saved: the checkpoint.
        target, roles: what it is restored into, and its `_leaves.roles`.
    """
    narrow, buffers = np.dtype(_lean.NARROW), laws.roles()
    arrays, found = dict(saved.arrays), dict(saved.roles)
    by_role = {role: name for name, role in saved.roles.items()}
    changed = False
    for leaf_name, leaf in zip(target.names, target.leaves, strict=True):
        kind, _, parameter = roles.get(leaf_name, "").partition("/")
        source = by_role.get(f"{kind}/{parameter}")
        if kind in buffers and source and {arrays[source].dtype, leaf.dtype} == {narrow, np.dtype("f4")}:
            arrays[source], changed = arrays[source].astype(leaf.dtype), True
        elif kind == "rest" and source and arrays[source].dtype != leaf.dtype:
            p, rest = saved.arrays[by_role[f"y/{parameter}"]], saved.arrays[source]
            convert = _halves.packed if leaf.dtype == _lean.REST else _halves.unpacked
            arrays[source] = np.asarray(convert(jnp.asarray(p), jnp.asarray(rest)))
        other = {"gap": "z", "stored": "gap"}.get(kind)
        if other is None or source or f"{other}/{parameter}" not in by_role:
            continue
        name = by_role[f"{other}/{parameter}"]
        y = in_full(saved, by_role, parameter)
        buffer = saved.arrays[name].astype(np.float32)
        arrays[name] = (buffer - y if kind == "gap" else y + buffer).astype(leaf.dtype)
        found[name] = f"{'gap' if kind == 'gap' else 'z'}/{parameter}"
        changed = True
    notices = [f"precision: {effect_of('precision')}"] if changed else []
    return saved._replace(arrays=arrays, roles=found), notices


def in_full(saved: Saved, by_role: Mapping[str, str], parameter: str) -> np.ndarray:
    """Returns y of a parameter in float32, with its rest if it has one."""
    rest = by_role.get(f"rest/{parameter}")
    p = saved.arrays[by_role[f"y/{parameter}"]]
    return np.asarray(_halves.whole(p, None if rest is None else saved.arrays[rest]), np.float32)
