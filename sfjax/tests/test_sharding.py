"""On a mesh, with Auto and Explicit axes: the state lies like the parameters and a run compiles once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sfjax

LIKE_PARAMS = {"w": ["d", "m"], "b": ["m"], "everywhere": [None]}
TREES = {"adamw": {"z", "nu", "mu"}, "radam": {"z", "nu"}, "chain": {"z"}}
TRAINED = [*(("jit", name) for name in TREES), ("eager", "adamw")]
AXES = pytest.mark.parametrize("axes", ["Auto", "Explicit"])


@pytest.fixture(scope="module")
def found():
    """Facts from a process with four devices; here there may be one, and other tests may count on it."""
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
