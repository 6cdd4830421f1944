"""Runs that are cut and resumed in fresh processes end bit for bit like the uninterrupted one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import hashlib, sys
import jax, jax.numpy as jnp, numpy as np, optax
from sfjax.checkpoint import Checkpoints
from sfjax.tests.checkpoint_runs import transformation

folder, optimizer, dtype, accumulate, stop = *sys.argv[1:4], *map(int, sys.argv[4:])
rng = np.random.default_rng(0)
images = jnp.asarray(rng.standard_normal((64, 5)), dtype)
labels = jnp.asarray(rng.standard_normal((64, 2)), dtype)
params = {"w": jnp.asarray(rng.standard_normal((5, 2)), dtype), "b": jnp.zeros(2, dtype)}
tx = transformation(optimizer, accumulate)
opt_state = tx.init(params)
extra = {"order": np.random.default_rng(1), "key": jax.random.key(2)}

def loss(params, rows, key):
    noise = jax.random.normal(key, (len(rows), 5), images.dtype)
    return jnp.mean(((images[rows] + noise) @ params["w"] + params["b"] - labels[rows]) ** 2)

@jax.jit
def step(params, opt_state, rows, key):
    updates, opt_state = tx.update(jax.grad(loss)(params, rows, key), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

with Checkpoints(folder) as checkpoints:
    restored = checkpoints.restore(params, jax.eval_shape(tx.init, params), extra_state=extra)
    first = 0
    if restored is not None:
        params, opt_state, extra = restored.params, restored.opt_state, restored.extra_state
        first = restored.meta.position
    for number in range(first, stop):
        extra["key"], key = jax.random.split(extra["key"])
        params, opt_state = step(params, opt_state, extra["order"].integers(0, 64, 8), key)
    checkpoints.save(stop // accumulate, params, opt_state, extra_state=extra, position=stop)
digest = hashlib.sha256()
for leaf in jax.tree.leaves((params, opt_state, jax.random.key_data(extra["key"]))):
    digest.update(np.asarray(leaf).tobytes())
print(digest.hexdigest(), first)
"""

START = """
import multiprocessing, sys, threading, warnings
import jax.numpy as jnp, sfjax
from sfjax.checkpoint import Checkpoints, _orbax

tx, params = sfjax.schedule_free_sgd(0.1), {"w": jnp.ones(3)}
going_on, write = threading.Event(), _orbax.write
def slow(*arguments):
    going_on.wait(2)
    return write(*arguments)
_orbax.write = slow
"""
LEAVES_IT = """
def main():
    Checkpoints(sys.argv[1]).save(0, params, tx.init(params))
main()
"""
FORKS = """
warnings.simplefilter("ignore")  # JAX advises against forks
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(0, params, tx.init(params))
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    going_on.set()
    child.join(20)
    child.kill()
    assert child.exitcode == 0, child.exitcode
"""


def _run(folder: Path, stop: int, *arguments: object) -> tuple[str, int]:
    command = [sys.executable, "-c", PROGRAM, folder, *arguments, stop]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    digest, first = done.stdout.split()
    return digest, int(first)


def _check(folder: Path, optimizer: str, dtype: str, accumulate: int) -> None:
    cut = 14 if accumulate == 4 else 10
    whole, _ = _run(folder / "whole", 25, optimizer, dtype, accumulate)
    half, first = _run(folder / "cut", cut, optimizer, dtype, accumulate)
    rest, resumed = _run(folder / "cut", 25, optimizer, dtype, accumulate)
    assert (first, resumed) == (0, cut)
    assert rest == whole != half


def test_a_run_resumes_exactly_in_a_fresh_process(tmp_path: Path) -> None:
    _check(tmp_path, "adamw", "bfloat16", 4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "radam"])
def test_every_run_resumes_exactly_in_a_fresh_process(
    optimizer: str, dtype: str, accumulate: int, tmp_path: Path
) -> None:
    _check(tmp_path, optimizer, dtype, accumulate)


@pytest.mark.parametrize("program", [LEAVES_IT, FORKS], ids=["nobody holds it", "a process is forked"])
def test_a_program_ends_with_its_last_save_on_disk(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", START + program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["0"], done.stderr
