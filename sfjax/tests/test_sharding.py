"""On a mesh, with Auto and Explicit axes: the state lies like the parameters and a run compiles once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sfjax

LIKE_PARAMS = {"w": ["d", "m"], "b": ["m"], "everywhere": [None]}
TREES = {"adamw": {"z", "nu", "mu"}, "radam": {"z", "nu"}, "chain": {"z"}}
TRAINED = [*(("jit", name) for name in TREES), ("eager", "adamw")]
# A sum for each way that leaves are cut, for clip_by_global_norm.
CLIPS = {"chain": 2}
AXES = pytest.mark.parametrize("axes", ["Auto", "Explicit"])


@pytest.fixture(scope="module")
def found():
    """Facts from a process with eight devices; here there may be one, and other tests may count on it."""
    path = os.pathsep.join([str(Path(sfjax.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "sfjax.tests.sharding_program"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_laid_out(facts, name):
    assert facts["trees"].keys() == TREES[name]
    for tree in facts["trees"].values():
        assert tree == LIKE_PARAMS
    assert set(map(tuple, facts["scalars"].values())) == {()}


@AXES
@pytest.mark.parametrize(("how", "name"), [*TRAINED, *(("described", name) for name in TREES)])
def test_init_lays_the_state_out_like_the_parameters(found, axes, how, name):
    assert_laid_out(found[f"{axes}-{how}-{name}"]["before"], name)


@AXES
@pytest.mark.parametrize(("how", "name"), TRAINED)
def test_updates_keep_the_layout_compile_once_and_take_the_same_steps(found, axes, how, name):
    facts = found[f"{axes}-{how}-{name}"]
    assert_laid_out(facts["after"], name)
    assert facts["params"] == LIKE_PARAMS
    assert facts["compilations"] == 1
    # Against one device; measured: at most 2e-7, from the order of sums in the global norm.
    assert facts["error"] <= 1e-6


@AXES
@pytest.mark.parametrize("name", TREES)
def test_an_update_exchanges_nothing_but_a_global_norm(found, axes, name):
    assert found[f"{axes}-exchanged-{name}"] == CLIPS.get(name, 0)
    assert found[f"{axes}-exchanged-rows-{name}"] == CLIPS.get(name, 0) / 2


NATIVE = [f"{axes}-native{how}" for axes in ("Auto", "Explicit") for how in ("", ", set_mesh")]


@pytest.mark.parametrize("run", [*NATIVE, "shard_map-True", "shard_map-False"])
def test_the_native_step_runs_where_the_leaves_are(found, run):
    facts = found[run]
    # A check that the kernel has no say in, so there it is the plain program.
    if found["kernel"] is None:
        assert facts["calls"] == (0 if run == "shard_map-True" else 1)
    assert facts["collectives"] == 0
    assert facts["compilations"] == 1
    assert facts["params"] == LIKE_PARAMS
    assert_laid_out(facts["after"], "adamw")
    assert facts["error"] <= 1e-6


@AXES
@pytest.mark.parametrize("how", ["step", "update"])
@pytest.mark.parametrize("name", TREES)
def test_accumulated_updates_are_laid_out_like_the_parameters_and_compile_once(found, axes, how, name):
    facts, alone = found[f"{axes}-{how}-{name}"], found[f"alone-{name}"]
    assert facts["compilations"] == 1
    assert facts["before"] == facts["means"] == facts["params"] == LIKE_PARAMS
    assert facts["collectives"] == CLIPS.get(name, 0)
    if found["kernel"] is None:  # a call for the means, and one for a step that is not in optax.chain
        assert facts["calls"] == (how == "step") * (1 if name == "chain" else 2)
    for key, values in alone["y"].items():
        np.testing.assert_allclose(facts["y"][key], values, rtol=0, atol=1e-6)


@AXES
@pytest.mark.parametrize("how", ["jit", "eager"])
def test_muon_gathers_what_a_polar_factor_needs_and_its_state_lies_like_the_parameters(found, axes, how):
    facts = found[f"{axes}-{how}-muon"]
    trees = {"z": LIKE_PARAMS, "momentum": {"w": ["d", "m"]}, "row_nu": {"w": ["d", None]}}
    trees["nu"] = {name: LIKE_PARAMS[name] for name in ("b", "everywhere")}
    for when in ("before", "after"):
        assert facts[when]["trees"] == trees
    assert facts["params"] == LIKE_PARAMS
    assert facts["compilations"] == 1
    assert facts["error"] <= 1e-5  # against one device; measured: 2.4e-7
    assert found[f"{axes}-described-muon"]["before"]["trees"] == trees


@pytest.mark.parametrize("how", ["step", "update"])
def test_accumulated_updates_over_a_divided_batch_are_those_of_one_device(found, how):
    facts, alone = found[f"batch-{how}"], found["batch-alone"]
    assert facts["compilations"] == 1
    for key, values in alone["y"].items():
        np.testing.assert_allclose(facts["y"][key], values, rtol=0, atol=1e-6)
        assert np.abs(np.subtract(values, 1.0)).max() > 0.01  # from where it began
