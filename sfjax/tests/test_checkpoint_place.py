"""Restored arrays lie where a step's own results lie: given away by a donating step, compiled for once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sfjax
from sfjax.checkpoint import CheckpointError, Checkpoints
from sfjax.checkpoint._arrays import place
from sfjax.tests.checkpoint_runs import begin, saved, transformation


def _donating(tx: Any) -> Any:
    def step(params: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step, donate_argnums=(0, 1))


@pytest.mark.parametrize("abstract", [True, False], ids=["into shapes", "into a live state"])
@pytest.mark.parametrize("inject", [False, True], ids=["plain", "inject_hyperparams"])
def test_a_restored_state_is_donated_and_compiles_nothing_anew(
    abstract: bool, inject: bool, tmp_path: Path
) -> None:
    tx = optax.inject_hyperparams(sfjax.schedule_free_adamw)(0.1) if inject else transformation("adamw")
    step, params = _donating(tx), begin()
    opt_state = jax.jit(tx.init)(params)
    for _ in range(3):
        before = (params, opt_state)
        params, opt_state = step(params, opt_state)
    given = _deleted(before)
    assert sum(given) >= 3 * len(
        jax.tree.leaves(params)
    )  # y, z and v; a step has no use for the last lr and c
    assert step._cache_size() == 1
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, params, opt_state)
        target = jax.eval_shape(lambda: (params, opt_state)) if abstract else (params, opt_state)
        restored = checkpoints.restore(*target)
    assert restored is not None
    state = (restored.params, restored.opt_state)
    for _ in range(2):
        before, state = state, step(*state)
        assert _deleted(before) == given
    assert step._cache_size() == 1


def _deleted(tree: Any) -> list[bool]:
    return [leaf.is_deleted() for leaf in jax.tree.leaves(tree)]


def test_a_committed_target_stays_committed_to_its_device(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        target = jax.device_put((params, opt_state), jax.devices()[0])
        restored = checkpoints.restore(*target)
        free = checkpoints.restore(*jax.eval_shape(lambda: (params, opt_state)))
    assert restored is not None
    assert free is not None
    assert all(leaf.committed for leaf in jax.tree.leaves(restored.params))
    assert not any(leaf.committed for leaf in jax.tree.leaves(free.params))


def test_host_arrays_are_copied() -> None:
    target, array = np.zeros(3), np.arange(3.0)
    (placed,) = place([target], [array], [False])
    array[:] = 9
    assert placed.tolist() == [0, 1, 2]


def test_a_device_array_does_not_follow_the_host_array_that_it_came_from() -> None:
    array = np.arange(1000, dtype=np.float32)
    (placed,) = place([jax.ShapeDtypeStruct((1000,), jnp.float32)], [array], [False])
    array[:] = 9
    np.testing.assert_array_equal(placed, np.arange(1000, dtype=np.float32))


@pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="jax < 0.7 cannot gather along explicit axes")
def test_an_abstract_state_with_explicit_axes_goes_to_the_devices_of_the_parameters(tmp_path: Path) -> None:
    explicit = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((1,), ("d",), axis_types=(explicit,), devices=jax.devices()[:1])
    params = jax.device_put({"w": jnp.arange(4.0)}, NamedSharding(mesh, PartitionSpec("d")))
    tx = sfjax.schedule_free_adamw(0.1)
    shapes, target = jax.eval_shape(lambda: params), jax.eval_shape(tx.init, params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, params, tx.init(params))
        restored = checkpoints.restore(params, target)
        with pytest.raises(CheckpointError, match="params must lie on devices, got AbstractMesh"):
            checkpoints.restore(shapes, target)
        with jax.set_mesh(mesh):
            within = checkpoints.restore(shapes, target)
    for one in (restored, within):
        assert one is not None
        assert one.params["w"].sharding == one.opt_state.z["w"].sharding == params["w"].sharding


def _devices(count: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


MOVED = """
import sys
import jax, jax.numpy as jnp, sfjax
from sfjax.checkpoint import Checkpoints

tx = sfjax.schedule_free_adamw(0.1)
with Checkpoints(sys.argv[1]) as checkpoints:
    for step, device in enumerate(jax.devices()):
        params = jax.device_put({"w": jnp.ones(8)}, device)
        checkpoints.save(step, params, tx.init(params))
"""


def test_a_run_may_move_to_other_devices_between_saves(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MOVED, str(tmp_path)], env=_devices(2), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
import sfjax
from sfjax.checkpoint import CheckpointError, Checkpoints

folder, devices, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
kind = jax.sharding.AxisType.Explicit if "explicit" in mode else jax.sharding.AxisType.Auto
mesh = jax.make_mesh((devices,), ("d",), axis_types=(kind,), devices=jax.devices()[:devices])
# The specs that a step's results have, on one device and with explicit axes, whatever its arguments had.
specs = {"w": P("d") if devices > 1 else P(), "b": P()}
if "explicit" in mode:
    specs = {"w": P("d", None), "b": P(None)}
shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
values = {"w": jnp.arange(64.0).reshape(16, 4), "b": jnp.arange(4.0)}
params = jax.tree.map(jax.device_put, values, shardings)
key = jax.device_put(jax.random.key(5), NamedSharding(mesh, P()))
tx = sfjax.schedule_free_adamw(0.1)

def step(params, opt_state):
    updates, opt_state = tx.update(params, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

step = jax.jit(step, donate_argnums=(0, 1))
if mode.startswith("save"):
    opt_state = tx.init(params)
    for _ in range(2):
        params, opt_state = step(params, opt_state)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(2, params, opt_state, extra_state={"key": key})
    params, opt_state = step(params, opt_state)
else:
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    target = (shapes, tx.init(shapes)) if "shapes" in mode else (params, tx.init(params))
    restored = Checkpoints(folder).restore(*target, extra_state={"key": key}, strict=True)
    for (path, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path((restored.params, restored.opt_state)), jax.tree.leaves(target)
    ):
        assert leaf.sharding == wanted.sharding, (path, leaf.sharding, wanted.sharding)
    assert jax.random.key_data(restored.extra_state["key"]).tolist() == jax.random.key_data(key).tolist()
    first = (restored.params, restored.opt_state)
    params, opt_state = step(*first)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first[0], first[1].z)))
np.save(folder + f"/{mode}-{devices}.npy", np.asarray(params["w"]))
step(params, opt_state)
assert step._cache_size() == 1, step._cache_size()
"""


def _run(folder: Path, devices: int, mode: str) -> np.ndarray:
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(folder), str(devices), mode],
        env=_devices(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: np.ndarray = np.load(folder / f"{mode}-{devices}.npy")
    return found


@pytest.mark.slow
def test_a_sharded_state_is_restored_onto_fewer_devices(tmp_path: Path) -> None:
    expected = _run(tmp_path, 8, "save")
    np.testing.assert_array_equal(_run(tmp_path, 2, "restore shapes"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["", " explicit"], ids=["auto", "explicit"])
def test_a_sharded_state_is_restored_onto_any_number_of_devices(axes: str, tmp_path: Path) -> None:
    expected = _run(tmp_path, 4, "save" + axes)
    for devices in (1, 2, 8):
        for mode in ("restore shapes", "restore live"):
            np.testing.assert_array_equal(_run(tmp_path, devices, mode + axes), expected)
