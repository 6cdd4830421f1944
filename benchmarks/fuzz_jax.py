"""The JAX half of fuzz.py: folders of Orbax, and checkpoints that are restored.

tensorstore does not run in a fork of a process that has used it, so only forks use it, once each has begun.
"""

from __future__ import annotations

import copy
import logging
import random
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import sfjax
from benchmarks import fuzz
from benchmarks.fuzz import Case, Reading
from sfcore import inspection, sources
from sfcore.exchange import CheckpointError, fingerprint
from sfjax.checkpoint import Checkpoints

MAKERS = {
    "sgd": lambda: sfjax.schedule_free_sgd(0.1),
    "adamw": lambda: sfjax.schedule_free_adamw(0.1),
    "radam": lambda: sfjax.schedule_free_radam(0.1),
    "lean": lambda: sfjax.schedule_free_adamw(0.1, precision="lean"),
    "accumulated": lambda: optax.MultiSteps(sfjax.schedule_free_adamw(0.1), 2),
}
STEPS = 3  # of the run whose checkpoints are restored


def trained(name: str, seed: int, steps: int = 0) -> tuple[Any, Any, Any]:
    """Returns parameters, state and what a program keeps beside them, after some updates."""
    dtype = jnp.bfloat16 if name == "lean" else jnp.float32
    params = {"w": jnp.full((3, 2), 0.5 + seed, dtype), "b": jnp.arange(2, dtype=dtype)}
    tx = MAKERS[name]()
    state = tx.init(params)
    extra: dict[str, Any] = {"key": jax.random.key(seed), "numpy": np.random.default_rng(seed), "epoch": seed}
    for _ in range(steps):
        grads = jax.tree.map(lambda leaf: leaf * extra["numpy"].random(), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, extra


def digest(run: Any) -> str:
    """Returns a SHA-256 of everything that the next update depends on."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(run):
        if isinstance(leaf, np.random.Generator):
            leaf = np.frombuffer(str(leaf.bit_generator.state).encode(), np.uint8)
        elif isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return fingerprint(found)


def make(folder: Path) -> None:
    """Writes a run of checkpoints of every optimizer, and a state of optax's own."""
    for name in MAKERS:
        with Checkpoints(folder / f"run {name}", keep_newest=STEPS, background=False) as checkpoints:
            for done in range(1, STEPS + 1):
                params, state, extra = trained(name, 0, done)
                checkpoints.save(done, params, state, extra_state=extra)
    params, _, _ = trained("sgd", 0)
    state = optax.contrib.schedule_free_sgd(0.1).init(params)
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "optax", {"params": params, "opt_state": state})


_made: list[Path] = []


def warm(folder: Path) -> None:
    """Notes where `make` has written, and does what a first restore does once."""
    warnings.simplefilter("ignore")
    logging.disable()
    _made[:] = [folder]
    for name in MAKERS:
        expected(name)
        inside(f"run {name}/{STEPS}")
    inside("optax")


@cache
def expected(name: str) -> dict[int | str, set[str]]:
    """Returns step, "weights" or "a file" -> digests after an undisturbed restore.

    A file of weights that is read alone may become, whole, that of another step: then it is what it says.
    """
    run, steps = _made[0] / f"run {name}", range(1, STEPS + 1)
    found: dict[int | str, set[str]] = {step: {_restored(name, run, step)[1]} for step in steps}
    found["weights"] = {_restored(name, run, f"weights:{run}")[1]}
    found["a file"] = {_restored(name, run, f"weights:{weights_file(run, step)}")[1] for step in steps}
    return found


def weights_file(run: Path, step: int) -> Path:
    """Returns the path of a step's weights for inference."""
    return run / str(step) / "inference" / "inference.safetensors"


def _restored(name: str, run: Path, resume: Any, extra: Any = None) -> tuple[int | str | None, str]:
    """Returns what was restored, and a digest of it."""
    params, state, own = trained(name, 1)
    own = extra or own
    found = Checkpoints(run).restore(
        params, state, extra_state=own, hyperparameters={"lr": 0.1}, resume=resume
    )
    if found is None:
        return None, ""
    if str(resume).startswith("weights:"):
        return "weights", digest((found.params, found.opt_state))
    return found.meta.step, digest((found.params, found.opt_state, found.extra_state))


@cache
def inside(place: str) -> sources.Source:
    """Returns what an undamaged folder holds."""
    return sources.load(_made[0] / place)


def a_folder(draw: random.Random, folder: Path) -> Reading:
    """Inspects an Orbax folder with damage in it: one of ours, or one that says nothing of its numbers."""
    place = draw.choice([f"run {name}/{STEPS}" for name in MAKERS] + ["optax"])
    path = folder / "1"
    shutil.copytree(_made[0] / place, path)
    fuzz.rummage(draw, path)

    def read() -> bool | None:
        inspection.inspect(path)
        if place == "optax":
            return None
        found, whole = sources.load(path), inside(place)
        return found.meta == whole.meta and all(
            fuzz.same(getattr(found, of) or {}, getattr(whole, of) or {}) for of in ("state", "inference")
        )

    return read


def a_restore(draw: random.Random, folder: Path) -> Reading:
    """Restores from a folder of checkpoints with damage in it."""
    name, run = draw.choice(tuple(MAKERS)), folder / "run"
    shutil.copytree(_made[0] / f"run {name}", run)
    alone = f"weights:{weights_file(run, STEPS)}"
    resume = draw.choice(["auto", "auto", "latest-good", 1, run / str(STEPS), f"weights:{run}", alone])
    fuzz.rummage(draw, run)
    extra = trained(name, 1)[2]
    before = digest(copy.deepcopy(extra["numpy"]))

    def read() -> bool:
        try:
            step, found = _restored(name, run, resume, extra)
        except CheckpointError:
            if digest(extra["numpy"]) != before:
                return False
            raise
        return step is None or found in expected(name)["a file" if resume == alone else step]

    return read


CASES: dict[str, Case] = {"orbax": a_folder, "restore jax": a_restore}
