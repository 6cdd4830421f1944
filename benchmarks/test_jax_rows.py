"""The JAX rows of the benchmarks of precision and of steps."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from benchmarks import precision_jax, precision_problem, step_jax


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("exact", "lean") else pytest.mark.slow)
        for name in precision_jax.METHODS
    ],
)
def test_a_row_trains_and_says_what_it_takes(name: str) -> None:
    run = precision_jax.train(name, precision_problem.make(0, steps=200), lr=0.01)
    assert len(run.curve) == 3
    assert run.curve[-1] < 0.5 * run.curve[0]
    # optax.contrib: y, z and the two moments of its adam, all in bfloat16.
    want = {"float32": 12, "exact": 14, "exact-float16": 14, "lean": 8, "optax.contrib": run.bytes}
    # 5 and 7 bytes, and of each row's exponents 2 over the length of the row.
    want |= {"8bit": pytest.approx(5.1, abs=0.2), "8bit-float32": pytest.approx(7.1, abs=0.2)}
    assert run.bytes == want[name]


def test_exact_16_bits_end_where_float32_ends() -> None:
    problem = precision_problem.make(1, steps=300)
    wide, narrow = (precision_jax.train(name, problem, lr=0.01).curve[-1] for name in ("float32", "exact"))
    # The gradients are taken at y rounded to bfloat16, so the runs part a little; measured: 2e-3.
    assert narrow == pytest.approx(wide, rel=0.02)


def test_the_tree_of_steps_is_gpt2s() -> None:
    shapes = step_jax.gpt2_like(768)
    assert len(shapes) == 148
    assert sum(jnp.zeros(shape, jnp.int8).size for shape in shapes.values()) == 124_439_808


def test_steps_are_timed_in_turn() -> None:
    found = step_jax.rows({"w": (8, 4), "b": (3,)}, rounds=3)
    assert [(row.name, len(row.seconds)) for row in found] == [(name, 3) for name in step_jax.PEERED]
    assert all(seconds > 0 for row in found for seconds in row.seconds)


def test_compiling_is_timed() -> None:
    assert all(seconds > 0 for seconds in step_jax.seconds_to_compile("sfjax.schedule_free_sgd", leaves=2))
