"""The last steps of a run, and the first after a restart, as samples of x and z.

The mirror of `sftorch/checkpoint/_steps.py`; here they stay on the device, and nothing
waits until someone asks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sfcore import checks, samples
from sfcore.samples import Restart, Sample
from sfcore.watch import WATCHED_STEPS
from sfjax.checkpoint._arrays import is_spread
from sfjax.checkpoint._leaves import check_trees
from sfjax.law import iterates
from sfjax.state.find import _overlay, _pure, _require

_log = logging.getLogger("sfjax.checkpoint")
_ROWS = WATCHED_STEPS + 1


class Rows(NamedTuple):
    """What steps left, one a row and the newest last; `step` is -1 in rows that are not filled yet."""

    step: jax.Array
    c: jax.Array
    lr: jax.Array
    loss: jax.Array
    has_loss: jax.Array
    x: jax.Array
    z: jax.Array


class Steps:
    """Samples of the last steps of one run, and the watch over the first after a restart."""

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._factor = 1.0
        self._restart: Restart | None = None

    def add(self, params: Any, opt_state: Any, loss: Any = None) -> None:
        """Notes what an update left; a micro-batch that did not update changes the loss only."""
        params, opt_state = _pure(params), _pure(opt_state)
        try:
            look = _looking(_mesh_of(params))
            row = look(params, opt_state, jnp.nan if loss is None else loss, loss is not None)
        except (TypeError, ValueError):  # arguments are not looked at in every step
            check_trees(params, opt_state)
            checks.require(TypeError, loss=(checks.optional(checks.LOSS), loss))
            raise
        before = self._rows
        if before is None or before.x.shape[1] != row.x.shape[0] or before.x.devices() != row.x.devices():
            self._factor = samples.scale([leaf.size for leaf in jax.tree.leaves(params)])
            empty = Rows(*(jnp.broadcast_to(value, (_ROWS, *value.shape)) for value in row))
            self._rows = empty._replace(step=np.full(_ROWS, -1, np.int32))  # type: ignore[arg-type]
        self._rows = _push(self._rows, row)

    def read(self) -> list[Sample]:
        """Returns the samples, the oldest first; waits for the last update."""
        if self._rows is None:
            return []
        host = [np.asarray(column) for column in self._rows]
        return [
            Sample(int(step), float(c), float(lr), x, z, float(loss) if has_loss else None)
            for step, c, lr, loss, has_loss, x, z in zip(*host, strict=True)
            if step >= 0
        ]

    def watch(
        self,
        params: Any,
        opt_state: Any,
        recent: Mapping[str, Any] | None,
        changed: Collection[str],
        fresh: Collection[str],
    ) -> None:
        """Begins with what a restart left; `recent`, `changed` and `fresh` are `sfcore.watch.Watch`'s."""
        self._rows = None
        self.add(params, opt_state)
        self._restart = Restart(self.read()[-1], self._factor, recent, changed, fresh)

    def observe(self, params: Any, opt_state: Any, loss: Any = None) -> None:
        """Adds what an update left, and logs a jump after the restart, once."""
        self.add(params, opt_state, loss)
        if self._restart is None or self._restart.done:
            return
        now = self.read()[-1]
        if now.step > self._restart.last.step:
            report = self._restart.observe(now)
            if report is not None:
                _log.warning("%s", report)

    def metrics(self) -> dict[str, float]:
        """Returns restart_steps, restart_moved and restart_jump; {} before a restart."""
        return {} if self._restart is None else self._restart.metrics()

    def recent(self) -> dict[str, Any]:
        """Returns `Meta.recent`."""
        return samples.recent(self.read(), self._factor)


def _mesh_of(params: Any) -> Any:
    """Returns the mesh of arrays over several processes, each of which is to get every sample; else None."""
    over_several = (leaf.sharding for leaf in jax.tree.leaves(params) if is_spread(leaf))
    return next((one.mesh for one in over_several if isinstance(one, NamedSharding)), None)


@functools.lru_cache(maxsize=4)
def _looking(mesh: Any) -> Any:
    return jax.jit(_look, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _look(params: Any, opt_state: Any, loss: Any, has_loss: Any) -> Rows:
    states = _require(opt_state)
    recover = (iterates.recover_x, iterates.recover_z)
    x, z = (_entries(_overlay(states, params, one)) for one in recover)
    newest = [jnp.stack([getattr(state, name) for state in states]).max() for name in ("step", "c", "lr")]
    step, c, lr = newest
    return Rows(step, c, lr, jnp.asarray(loss, jnp.float32).reshape(()), jnp.asarray(has_loss), x, z)


def _entries(tree: Any) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    found = []
    for index, entries in samples.positions([leaf.size for leaf in leaves]):
        taken = _taken(leaves[index], entries)
        parts = (taken.real, taken.imag) if jnp.iscomplexobj(taken) else (taken,)
        found += [part.astype(jnp.float32) for part in parts]
    return jnp.concatenate(found) if found else jnp.zeros(0)


def _taken(leaf: jax.Array, entries: np.ndarray) -> jax.Array:
    """Returns some entries of a flattened leaf, on every device."""
    leaf = leaf.reshape(leaf.shape or (1,))
    where = np.unravel_index(entries, leaf.shape)
    mesh = jax.typeof(leaf).sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return leaf[where]
    # Where the axes of a mesh are explicit, the result's layout must be said.
    return leaf.at[where].get(out_sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


@jax.jit
def _push(rows: Rows, row: Rows) -> Rows:
    """Returns the rows with a new one, or with the newest replaced if there was no update since."""
    shift = row.step != rows.step[-1]
    return Rows(
        *(
            jnp.where(shift, jnp.roll(column, -1, axis=0), column).at[-1].set(value.astype(column.dtype))
            for column, value in zip(rows, row, strict=True)
        )
    )
