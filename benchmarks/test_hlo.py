"""The step compiles to one kernel a leaf without copies; where there is no compiler, what a CPU can say."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo
from benchmarks.hlo_read import count
from sfjax.kernels import call
from sfjax.step import eight

SMALL = ((512, 512), (256, 384))
GOAL = {  # bytes a parameter: the least that reads and writes each array once
    "schedule_free_sgd": 20.0,
    "schedule_free_adamw": 28.0,
    "schedule_free_adamw, b1=0": 28.0,
    "schedule_free_radam": 28.0,
    "clip_by_global_norm, schedule_free_adamw": 32.0,
    "accumulate, micro-step": 12.0,
}


def read(program: str, where: Any, shapes: Any) -> dict[str, float]:
    tx, dtype, due = hlo.programs()[program]
    return hlo.measured(hlo.compiled(tx, where, dtype, shapes), due, shapes)


@pytest.mark.parametrize(("program", "state"), [("schedule_free_sgd", 8.0), ("schedule_free_adamw", 12.0)])
def test_every_donated_buffer_is_used_again(program: str, state: float) -> None:
    found = read(program, hlo.device("CPU"), SMALL)
    assert found["donated_bytes_a_parameter"] == state
    # XLA's CPU backend has no kernels of several results: one a result, and a copy of what two of them read.
    assert found["copies_a_leaf"] <= 1.0
    assert found["bytes_a_parameter"] <= {"schedule_free_sgd": 40.05, "schedule_free_adamw": 56.05}[program]


@pytest.mark.skipif(call.find() is not None, reason="the native step needs a C compiler")
@pytest.mark.parametrize(("program", "state", "least"), [("sgd", 8.0, 20.0), ("adamw", 12.0, 28.0)])
def test_the_native_step_reads_and_writes_each_array_once(program: str, state: float, least: float) -> None:
    found = read(f"schedule_free_{program}, step", hlo.device("CPU"), SMALL)
    assert found["donated_bytes_a_parameter"] == state
    assert found["copies_a_leaf"] == 0
    # A call takes and gives what it changes in place, and so is taken to read and to write it.
    assert found["bytes_a_parameter"] == pytest.approx(least, abs=0.01)
    assert found["temporary_bytes_a_parameter"] <= 0.01


def test_a_micro_step_of_accumulate_touches_gradients_and_mean_alone() -> None:
    found = read("accumulate, micro-step", hlo.device("CPU"), SMALL)
    kernels = 1 / len(SMALL) if call.find() is None else 1.0  # one for all leaves, or one for each
    assert (found["kernels_a_leaf"], found["copies_a_leaf"]) == (kernels, 0.0)
    assert found["bytes_a_parameter"] == pytest.approx(12.0, abs=0.01)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[hlo]")
@pytest.mark.parametrize("program", GOAL)
def test_on_a_tpu_each_array_is_read_and_written_once(program: str) -> None:
    found = read(program, hlo.device("TPU v5e"), hlo.SHAPES)
    assert found["bytes_a_parameter"] == pytest.approx(GOAL[program], abs=0.01)
    assert found["copies_a_leaf"] == 0


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the plugin: pip install -e .[hlo]"
)
@pytest.mark.parametrize("program", [*GOAL, "schedule_free_adamw, bfloat16"])
def test_on_an_h100_a_leaf_is_one_kernel(program: str) -> None:
    found = read(program, hlo.device("H100"), hlo.SHAPES)
    goal = GOAL | {"schedule_free_adamw, bfloat16": 30.0}
    assert found["bytes_a_parameter"] == pytest.approx(goal[program], abs=0.01)
    # The norm is one more.
    assert found["kernels_a_leaf"] == (2.0 if program.startswith("clip") else 1.0)
    assert (found["copies_a_leaf"], found["temporary_bytes_a_parameter"]) == (0, 0)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the plugin: pip install -e .[hlo]"
)
@pytest.mark.parametrize(("dtype", "read_twice", "written"), [("bfloat16", 7, 5), ("float32", 11, 7)])
def test_codes_take_an_h100_two_kernels_with_nothing_between(
    dtype: str, read_twice: int, written: int
) -> None:
    found = read(f"schedule_free_adamw, {dtype} 8bit", hlo.device("H100"), hlo.SHAPES)
    # The exponents of rows are some bytes more.
    assert found["bytes_a_parameter"] == pytest.approx(2 * read_twice + written, abs=0.05)
    assert (found["kernels_a_leaf"], found["copies_a_leaf"]) == (2, 0)
    assert found["temporary_bytes_a_parameter"] <= 0.01


def test_elsewhere_the_two_passes_of_codes_are_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> dict[str, float]:
        return read("schedule_free_adamw, bfloat16 8bit", hlo.device("CPU"), SMALL)

    both = measured()
    monkeypatch.setattr(eight, "is_compiled", lambda tree: False)
    assert both == measured()
    monkeypatch.undo()
    monkeypatch.setattr(eight, "again", jax.lax.optimization_barrier)
    assert measured()["bytes_a_parameter"] > both["bytes_a_parameter"]


def test_the_reader_counts_loops_by_their_turns_and_every_copy() -> None:
    def program(x: jax.Array, turns: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c[0] < turns, lambda c: (c[0] + 1, c[1] * 2.0), (0, x))[1]

    text = jax.jit(program, donate_argnums=0).lower(jnp.ones(1024), 3).compile().as_text()
    none, three = (count(text, least=4096, taken=turns) for turns in (0, 3))
    assert (none.kernels, three.kernels) == (0, 3)
    assert three.traffic - none.traffic == pytest.approx(3 * 8192, abs=100)
    swap = jax.jit(lambda x, y: (y, x), donate_argnums=(0, 1)).lower(jnp.ones(1024), jnp.ones(1024))
    assert count(swap.compile().as_text(), least=4096).copies >= 1
