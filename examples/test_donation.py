"""Loops that donate copy nothing that they could write in place: parameters first, state second.

JAX gives the results the donated buffers of their shape in order, and a moment looks like its parameter.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import _digits
import sfjax
from sfjax.kernels import call

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "precision.md").read_text()
# What the convolutions of the models make of their own; measured: 0 to 0.67. XLA alone copies 1 more.
MOST = 0.7 if call.find() is None else 2
COPY = re.compile(
    r" = (?:f32|bf16|s16)\[\d[\d,]*\]\S* copy\("
)  # of an array, not of a scalar or a random key


def copies(lowered: Any, leaves: int) -> float:
    """Returns how many arrays a compiled step copies, per leaf of the parameters."""
    program = lowered.compile()
    program = getattr(program, "compiled", program)  # Flax and Equinox have put something around it
    assert program.memory_analysis().alias_size_in_bytes > 0
    return len(COPY.findall(program.as_text())) / leaves


def start(tx: Any) -> tuple[Any, Any]:
    params = [{"kernel": jnp.asarray(k), "bias": jnp.asarray(b)} for k, b in _digits.initial_weights(0)]
    return params, tx.init(params)


def plain_loop() -> Any:
    example = importlib.import_module("optax_loop")
    return example.train_step.lower(*start(example.TX), jax.random.key(0))


def equinox_loop() -> Any:
    eqx, example = importlib.import_module("equinox"), importlib.import_module("equinox_loop")
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
    state = example.TX.init(eqx.filter(model, eqx.is_inexact_array))
    return example.train_step.lower(example.batch(0), model, state)


def linen_loop() -> Any:
    example, key = importlib.import_module("flax_linen"), jax.random.key(0)
    variables = example.MODEL.init(key, example.batch(0)[0], False)
    state = example.State.create(apply_fn=example.MODEL.apply, tx=example.TX, key=key, **variables)
    return example.train_step.lower(state, *example.batch(0))


def nnx_loop() -> Any:
    nnx, example = importlib.import_module("flax.nnx"), importlib.import_module("flax_nnx")
    model = example.Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, example.TX, wrt=nnx.Param)
    return example.train_step.lower(model, optimizer, *next(example.batches()))


@pytest.mark.parametrize(
    "loop",
    [
        plain_loop,
        nnx_loop,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (equinox_loop, linen_loop)),
    ],
)
def test_an_example_copies_nothing_of_parameters_and_state(loop: Callable[[], Any]) -> None:
    assert copies(loop(), leaves=6) <= MOST


def blocks(page: str, title: str) -> str:
    """Returns the Python of a section of a page."""
    section = re.split(r"\n##+ ", (DOCS / page).read_text().split(f"# {title}\n")[1])[0]
    return "\n".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


@pytest.mark.skipif(call.find() is not None, reason="XLA alone copies, and takes 4 bytes a parameter")
def test_a_documented_step_copies_nothing_and_takes_no_memory() -> None:
    names: dict[str, Any] = {}
    exec(blocks("precision.md", "Accumulation"), names)
    for native in (False, True):
        if native:
            exec(blocks("precision.md", "The native step"), names)
        params, state = names["params"], names["state"]
        lowered = names["step"].lower(params, state, gradients=params)
        assert copies(lowered, leaves=1) == 0
        # Of a parameter of three: the numbers of a step, whatever there is to move; measured: 0.6 to 0.9 kB.
        assert lowered.compile().memory_analysis().temp_size_in_bytes < 2048


def test_the_update_of_the_pitfalls_copies_one_array_a_parameter() -> None:
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "sfjax": sfjax}
    exec(blocks("pitfalls.md", "Donated arguments in JAX"), names)
    tx, weights = names["tx"], {"w": jnp.ones(3)}
    assert copies(names["update"].lower(weights, tx.init(weights), weights), leaves=1) <= 1


@pytest.mark.parametrize("accumulates", [False, True])
def test_state_before_parameters_would_be_seen(accumulates: bool) -> None:
    tx = importlib.import_module("optax_loop").TX
    tx = sfjax.accumulate(tx, 4) if accumulates else tx
    params, state = start(tx)

    def step(state: Any, params: Any, gradients: Any) -> Any:
        if accumulates:
            return tx.step(params, state, gradients=gradients)
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(state, params, params)
    assert copies(lowered, leaves=6) >= 3  # measured: 3, and 8 where it accumulates
