"""The JAX rows of a benchmark of steps: processor time of a jitted step with donation, everyone in turn.

Processor time of all threads, because a machine that others use as well stretches any other.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sfjax
from benchmarks.hlo import step_of, updating

DECAY = 0.1


class Row(NamedTuple):
    """Seconds of each timed step of one program; one entry a round, in which everybody has a turn."""

    name: str
    seconds: list[float]


METHODS: dict[str, Callable[[], Any]] = {
    "sfjax.schedule_free_adamw": lambda: sfjax.schedule_free_adamw(1e-3, weight_decay=DECAY),
    "sfjax.schedule_free_adamw, update": lambda: updating(
        sfjax.schedule_free_adamw(1e-3, weight_decay=DECAY)
    ),
    "optax.contrib.schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(1e-3, weight_decay=DECAY),
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=DECAY),
    "sfjax.schedule_free_sgd": lambda: sfjax.schedule_free_sgd(1.0, weight_decay=DECAY),
    "sfjax.accumulate, micro-step": lambda: sfjax.accumulate(
        sfjax.schedule_free_adamw(1e-3, weight_decay=DECAY), 1_000_000
    ),
    "sfjax.schedule_free_radam": lambda: sfjax.schedule_free_radam(1e-3, weight_decay=DECAY),
    "jax.jit alone, of a micro-step": lambda: passing(
        sfjax.accumulate(sfjax.schedule_free_adamw(1e-3), 1_000_000)
    ),
}


# Ours, and what each is to be held against.
PEERED = ("sfjax.schedule_free_adamw", "optax.contrib.schedule_free_adamw", "optax.adamw")
COMPILED = ("sfjax.schedule_free_adamw", "sfjax.schedule_free_sgd", "optax.adamw")


def passing(tx: Any) -> sfjax.Transformation:
    """Returns a transformation whose step hands on what it is given: what a call costs beside the step."""
    found = sfjax.Transformation(*tx)
    found.step = lambda params, state, *, gradients, **more: (params, state)
    return found


def gpt2_like(width: int = 432) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of GPT-2's 148 tensors at another width: 49M parameters at 432, 124M at 768."""
    block = {
        "ln1/scale": (width,),
        "ln1/bias": (width,),
        "qkv/kernel": (width, 3 * width),
        "qkv/bias": (3 * width,),
        "out/kernel": (width, width),
        "out/bias": (width,),
        "ln2/scale": (width,),
        "ln2/bias": (width,),
        "up/kernel": (width, 4 * width),
        "up/bias": (4 * width,),
        "down/kernel": (4 * width, width),
        "down/bias": (width,),
    }
    ends = {"wte": (50257, width), "wpe": (1024, width), "ln/scale": (width,), "ln/bias": (width,)}
    return ends | {f"h{i}/{name}": shape for i in range(12) for name, shape in block.items()}


def rows(
    shapes: Mapping[str, tuple[int, ...]],
    rounds: int = 9,
    dtype: Any = jnp.float32,
    names: Any = PEERED,
    others: Mapping[str, Callable[[], Any]] | None = None,
) -> list[Row]:
    """Times steps of several programs, in an order drawn anew each round; the first of each is not timed.

    Args:
        shapes: of the tree of parameters.
        rounds: timed steps of each.
        dtype: of parameters and gradients.
        names: which of METHODS.
        others: name -> what is timed in the same turns, such as a floor.
    """
    draw, generator = random.Random(0), np.random.default_rng(0)
    start = {
        name: jnp.asarray(generator.standard_normal(shape) * 0.02, dtype) for name, shape in shapes.items()
    }
    grads = jax.tree.map(lambda leaf: leaf * 0.1, start)
    with jax.numpy_dtype_promotion("standard"):  # optax's own programs mix dtypes
        turns = {name: _turns(METHODS[name](), start, grads) for name in names} | dict(others or {})
    found = {name: Row(name, []) for name in turns}
    for _ in range(rounds):
        for name in draw.sample(list(turns), len(turns)):
            begin = time.process_time()
            made = turns[name]()
            found[name].seconds.append(time.process_time() - begin)
            jax.block_until_ready(made)  # nothing of it is left for the next turn
    return list(found.values())


def seconds_to_compile(name: str, leaves: int) -> tuple[float, float]:
    """Returns what tracing and compiling a step of a tree of 16 by 16 leaves take of the processors."""
    params = {str(i): jax.ShapeDtypeStruct((16, 16), jnp.float32) for i in range(leaves)}
    with jax.numpy_dtype_promotion("standard"):
        tx = METHODS[name]()
        state = jax.eval_shape(tx.init, params)
        begin = time.process_time()
        lowered = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(params, state, params)
        traced = time.process_time()
        lowered.compile()
    return traced - begin, time.process_time() - traced


def _turns(tx: Any, start: Any, grads: Any) -> Callable[[], Any]:
    """Returns what takes one more step of a run, whose first step has been taken, and gives its results."""
    jitted = jax.jit(step_of(tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, start)
    run = jax.block_until_ready(jitted(params, tx.init(params), grads))
    name = next(iter(params))

    def turn() -> Any:
        nonlocal run
        run = jitted(*run, grads)
        run[0][name].block_until_ready()  # all results of a program are there at once
        return run

    return turn
