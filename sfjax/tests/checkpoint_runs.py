"""What the tests of checkpoints share: runs that can be cut anywhere, and a look at what they leave."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sfjax
from sfcore.hyperparameters import SGD, AdamW, Muon, RAdam
from sfjax.checkpoint import Checkpoints
from sfjax.tests.runs import FACTORIES, gradients, start, typed

KINDS = {"sgd": SGD, "adamw": AdamW, "radam": RAdam, "muon": Muon}
MAKE = FACTORIES | {"muon": functools.partial(sfjax.schedule_free_muon, normalize="rows")}
LR = 0.05


@cache  # the same object again, so that its step compiles once for all tests
def transformation(optimizer: str, accumulate: int = 1, **options: Any) -> Any:
    """Returns clip, then Schedule-Free, then accumulation, as a user has it."""
    options = {"radam": {"b2": 0.9}}.get(optimizer, {"warmup_steps": 3}) | options
    options = {"learning_rate": LR} | options
    tx: Any = optax.chain(optax.clip_by_global_norm(10.0), MAKE[optimizer](**options))
    return optax.MultiSteps(tx, accumulate).gradient_transformation() if accumulate > 1 else tx


def begin(dtype: Any = jnp.float32) -> Any:
    """Returns the parameters that every run starts from."""
    return typed(start(), dtype)


@cache
def _step(tx: Any) -> Any:
    def step(params: Any, opt_state: Any, g: Any) -> tuple[Any, Any]:
        g = jax.tree.map(lambda leaf, p: leaf.astype(p.dtype), g, params)
        updates, opt_state = tx.update(g, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step)


def go(tx: Any, params: Any, opt_state: Any, first: int, last: int) -> tuple[Any, Any]:
    """Returns (params, opt_state) after the micro-batches first..last-1 of recorded gradients."""
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps cannot do without
        for g in gradients(last)[first:]:
            params, opt_state = _step(tx)(params, opt_state, g)
    return params, opt_state


@contextmanager
def saved(
    folder: Path, tx: Any = None, steps: int = 3, **arguments: Any
) -> Iterator[tuple[Checkpoints, Any, Any]]:
    """Yields (checkpoints, params, opt_state) of a short AdamW run that is saved as step 3."""
    tx = tx or transformation("adamw")
    params = begin()
    params, opt_state = go(tx, params, tx.init(params), 0, steps)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(steps, params, opt_state, **arguments)
        checkpoints.wait()
        yield checkpoints, params, opt_state


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Changes one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(bytes(content))


def data_files(step: Path) -> list[Path]:
    """Returns the files that hold the arrays of a checkpoint, the largest first."""
    found = [path for path in (step / "state").rglob("d/*") if path.is_file()]
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def snapshot(*trees: Any) -> list[bytes]:
    """Returns the bytes of every leaf, to tell later that nothing was touched."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]
