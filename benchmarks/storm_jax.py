"""The programs of storm_programs.py in JAX: they restore if they can, and go on to the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sfjax
from benchmarks import exact_jax
from benchmarks.storm_programs import ROUNDED, Program, until_done
from sfjax.checkpoint import Checkpoints


def lr(one: Program) -> Any:
    """Returns a learning rate, or a schedule of it."""
    return (lambda step: 0.05 + 0.01 * jnp.cos(step)) if one.scheduler else 0.05


MAKERS: dict[str, Callable[[Program], Any]] = {
    "sgd": lambda one: sfjax.schedule_free_sgd(lr(one), weight_decay=0.01),
    "adamw": lambda one: sfjax.schedule_free_adamw(lr(one), weight_decay=0.01),
    "radam": lambda one: sfjax.schedule_free_radam(lr(one), weight_decay=0.01),
    "wrapper": lambda one: sfjax.schedule_free(optax.sgd(lr(one), momentum=0.5), lr(one)),
    "muon": lambda one: sfjax.schedule_free_muon(lr(one), weight_decay=0.01, output_axis="last"),
    "normuon": lambda one: sfjax.schedule_free_muon(lr(one), normalize="rows", decay_at="z"),
    "plus": lambda one: sfjax.schedule_free_plus(lr(one), polyak_beta=0.9, b1_anneal_steps=9),
    "gpa": lambda one: sfjax.generalized_primal_averaging(optax.adam(lr(one)), lr(one), weight_decay=0.01),
    "anneal": lambda one: sfjax.schedule_free_adamw(lr(one), b1_rule="anneal", b1_anneal_steps=9),
    "amuse": lambda one: sfjax.schedule_free_muon(lr(one), b1_rule="amuse", b1_hold_steps=3),
    "lean": lambda one: sfjax.schedule_free_adamw(lr(one), precision="lean"),
    "8bit": lambda one: sfjax.schedule_free_adamw(lr(one), precision="8bit"),
}


def build(one: Program, seed: int) -> tuple[Any, Any, Any]:
    """Returns parameters, state, and a jitted micro-step that draws its batch and dropout from a key."""
    rounded = one.precision in ROUNDED
    exact_jax.MAKERS["program"] = lambda: MAKERS[one.precision if rounded else one.optimizer](one)
    named: Any = dataclasses.replace(
        one, optimizer="program", precision="bfloat16" if rounded else one.precision
    )
    found: tuple[Any, Any, Any] = exact_jax.build(named, seed)
    return found


def run(one: Program, folder: Path, again: bool) -> str:
    """Runs a program in a folder; returns a digest of its end."""
    # What a run before this one has compiled; most of a short run is that.
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    with Checkpoints(folder, background=one.background, keep_newest=one.keep_newest) as checkpoints:
        return until_done(lambda: _run(one, checkpoints), again)


def _run(one: Program, checkpoints: Checkpoints) -> str:
    params, state, micro_step = build(one, seed=1)
    key, position = jax.random.key(7), 0
    restored = checkpoints.restore(
        params, state, extra_state={"key": jax.random.key(8)}, accumulation=one.accumulate
    )
    if restored is None:
        params, state, micro_step = build(one, seed=0)
    else:
        params, state, key = restored.params, restored.opt_state, restored.extra_state["key"]
        position = restored.meta.position
    for taken in range(position, one.micro_batches):
        if taken in one.evaluates:
            jax.block_until_ready(sfjax.schedule_free_eval_params(state, params))
        if taken in one.saves:
            checkpoints.save(
                taken // one.accumulate,
                params,
                state,
                extra_state={"key": key},
                position=taken,
                accumulation=(one.accumulate, taken % one.accumulate),
            )
            if taken in one.waits:
                checkpoints.wait()
        params, state, key = micro_step(params, state, key)
    return exact_jax.digest((params, state, jax.random.key_data(key)))
