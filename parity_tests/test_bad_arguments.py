"""Bad arguments of every public function are refused by name, by our own code, before anything changes."""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from parity_tests import bad_arguments
from parity_tests.bad_arguments import TABLE, WITHOUT_ROWS, Refused
from parity_tests.good_arguments import World

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def before(world: World) -> str:
    return print_of(world)


def print_of(world: World) -> str:
    """Returns a hash of all that a refused call must leave as it was."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().numpy()
        if isinstance(value, np.ndarray | jax.Array):
            value = np.asarray(value)
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, dict):
            for key, below in value.items():
                digest.update(str(key).encode())
                add(below)
        elif isinstance(value, list | tuple):
            for below in value:
                add(below)
        else:
            digest.update(repr(value).encode())

    for folder, _, files in os.walk(world.folder):
        # Who writes a file or a name leaves a new time.
        paths = [folder, *(os.path.join(folder, file) for file in files)]
        add(repr([(path, (about := os.stat(path)).st_mtime_ns, about.st_size) for path in paths]))
    add(world.module.state_dict())
    for one in (world.optimizer, world.at_rest, world.wrapper, world.wrapper.base):
        add([one.param_groups, *one.state.values()])
    add([layer.training for layer in world.module.modules()])
    add([jax.tree.leaves(tree) for tree in (world.params, world.state, world.adam, world.variables)])
    add(jax.tree.leaves(world.of_flax))
    add([world.recorder.recent(), world.watch.step, world.watch.metrics(), world.preemption.requested])
    add([world.of_jax.metrics(), world.optimizer.metrics(), torch.get_rng_state()])
    return digest.hexdigest()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_it_is_refused_by_name_and_nothing_has_changed(world: World, before: str, row: Refused):
    with pytest.raises(row.error) as caught:
        world.call(row.function, **{row.argument: row.value})
    raised = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert raised.is_relative_to(ROOT)
    assert raised.relative_to(ROOT).parts[0] in bad_arguments.PACKAGES
    # Of a hyperparameter in a dict its own name says more than the dict's.
    named = [row.argument, *(row.value if isinstance(row.value, dict) else ())]
    lines = [
        line
        for line in str(caught.value).splitlines()
        if any(n in line.partition(" must ")[0] for n in named)
    ]
    assert lines, f"{row.argument} is not named: {caught.value}"
    _, _, told = lines[0].partition(", got ")
    assert any(form in told for form in bad_arguments.shown(row.value)), lines[0]
    # A rule that lists the names says what to do.
    assert ": " in told or "must be named" in lines[0], f"nothing says what to do: {lines[0]}"
    assert print_of(world) == before


def test_the_good_arguments_are_good(tmp_path: Path):
    # Or a row would be refused for something else.
    world = World(tmp_path)
    changing = ("add_param_group", "step_in_backward", "ship_x")
    for name in sorted({row.function for row in TABLE}, key=lambda name: name.endswith(changing)):
        world.call(name)


CHANGES: dict[str, Callable[[World], object]] = {
    "a file": lambda world: (world.folder / "new").write_text(""),
    "a weight": lambda world: world.module[0].bias.data.add_(1.0),
    "a flag": lambda world: world.module.eval(),
    "a gradient's step": lambda world: world.at_rest.step(lambda: 0.0),
    "a mode": lambda world: world.optimizer.eval(),
    "an option": lambda world: world.wrapper.param_groups[0].update(lr=0.2),
    "statistics of nnx": lambda world: world.model.train() or world.model(np.ones((4, 3), np.float32)),
    "a recorded step": lambda world: world.recorder.add(c=0.1),
    "a watched step": lambda world: world.watch.observe(c=0.1),
    "a random number": lambda world: torch.rand(1),
}


def test_a_change_would_be_seen(tmp_path: Path):
    world = World(tmp_path)
    world.at_rest.param_groups[0]["params"][0].grad = torch.ones(2)
    for what, change in CHANGES.items():
        before = print_of(world)
        change(world)
        assert print_of(world) != before, what


def reason(name: str) -> str | None:
    """Returns why a function, or an argument of it, has no rows."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts), 1, -1)]
    return next((WITHOUT_ROWS[one] for one in above if one in WITHOUT_ROWS), None)


def test_every_argument_of_every_public_function_has_rows_or_a_reason():
    rows = {(row.function, row.argument) for row in TABLE}
    lost = [
        f"{name}({argument})"
        for name, function in bad_arguments.public().items()
        for argument in bad_arguments.arguments(function)
        if (name, argument) not in rows
        and argument not in bad_arguments.hyperparameters(name)
        and not reason(f"{name}.{argument}")
    ]
    assert lost == []


def test_every_row_and_every_reason_is_of_something_public():
    public = bad_arguments.public()
    assert {row.function for row in TABLE} <= set(public)
    for row in TABLE:
        assert row.argument in bad_arguments.arguments(public[row.function])
    everything = [*public, *(f"{n}.{a}" for n, f in public.items() for a in bad_arguments.arguments(f))]
    assert [
        name for name in WITHOUT_ROWS if not any(f"{one}.".startswith(f"{name}.") for one in everything)
    ] == []
    assert len({row.id for row in TABLE}) == len(TABLE) > 300
