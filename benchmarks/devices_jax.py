"""Updates on virtual CPU devices: `python -m benchmarks.devices_jax TREE DEVICES ROUNDS` writes JSON.

A CPU that plays eight devices runs their shares one after the other, or side by side if it has the cores: the
time says little, and the program says all. It is compared with the same update on one device that has the
whole tree, which is as much arithmetic.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import sfjax
from benchmarks._records import spread, versions
from benchmarks._trees import count
from benchmarks.devices import TREES

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
METHODS = {
    "sfjax.schedule_free_adamw": lambda: sfjax.schedule_free_adamw(1e-4),
    "sfjax.schedule_free_adamw, clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(1e-4)
    ),
    "optax.adamw": lambda: optax.adamw(1e-4),
    "optax.adamw, clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)),
}


def collectives(text: str) -> int:
    """Returns how many instructions of a compiled program exchange something between devices."""
    names = tuple(f" {one}{end}(" for one in COLLECTIVES for end in ("", "-start"))
    return sum(any(name in line for name in names) for line in text.splitlines())


def measure(tree: str, devices: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each method."""
    mesh = jax.make_mesh((devices,), ("d",))
    cut = NamedSharding(mesh, PartitionSpec("d"))
    rows = []
    for name, make in METHODS.items():
        taken: dict[str, list[float]] = {"divided": [], "alone": []}
        programs = {}
        for where in taken:
            # Rows are padded to a multiple of the devices, as NamedSharding asks for.
            shapes = [(-(-shape[0] // devices) * devices, *shape[1:]) for shape in TREES[tree]]
            params = {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}
            if where == "divided":
                params = jax.device_put(params, cut)
            tx = make()

            def step(params: Any, state: Any, gradients: Any, tx: Any = tx) -> Any:
                updates, state = tx.update(gradients, state, params)
                return optax.apply_updates(params, updates), state

            state = tx.init(params)
            gradients = jax.tree.map(lambda p: p * 1e-3, params)
            update = jax.jit(step, donate_argnums=(0, 1))
            text = update.lower(params, state, gradients).compile().as_text()
            programs[where] = [update, params, state, gradients, text]
        for number in range(-2, rounds):
            for where, program in programs.items():
                update, params, state, gradients, _ = program
                started = time.perf_counter()
                params, state = jax.block_until_ready(update(params, state, gradients))
                if number >= 0:
                    taken[where].append(time.perf_counter() - started)
                program[1:3] = params, state
        here, alone = (np.array(taken[where]) for where in ("divided", "alone"))
        rows.append(
            {
                "part": f"jax-{tree}-{devices}",
                "name": name,
                "what": "update",
                "tree": tree,
                "tensors": len(TREES[tree]),
                "parameters": count(TREES[tree]),
                "devices": devices,
                "n": rounds,
                "ms": spread(here * 1e3),
                "local_ms": spread(alone * 1e3),
                "over_local": spread(here / alone),
                "collectives": collectives(programs["divided"][4]),
                "compilations": programs["divided"][0]._cache_size(),
                "versions": versions(),
            }
        )
    return rows


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    json.dump(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), sys.stdout)
