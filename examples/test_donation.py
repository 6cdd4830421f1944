"""Loops that donate copy nothing that they could write in place: parameters first, state second.

JAX gives the results the donated buffers of their shape in order, and a moment looks like its parameter.
Every loop of the documentation is compiled here; one that is not in LOOPS makes a test fail.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import _digits
import sfjax
from sfjax.kernels import call

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parent.parent
HAS_KERNEL = call.find() is None
# Of an array, not of a scalar or a random key.
COPY = re.compile(r" = (?:f32|bf16|s16)\[\d[\d,]*\]\S* copy\(")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
JIT = re.compile(r"jit\b")
STEP = re.compile(r"step\b|update\b|apply_gradients\b")


def texts() -> Iterator[tuple[str, str]]:
    """Yields every text with code that users are to follow: a section of a page, an example, a docstring."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for part in re.split(r"^##+ ", page.read_text(), flags=re.MULTILINE):
            code = "\n".join(block for block in BLOCK.findall(part) if "jax" in block)
            yield f"{page.relative_to(ROOT)}, {part.splitlines()[0]}", code
    for path in [*sorted((ROOT / "examples").glob("[!_t]*.py")), ROOT / "examples" / "train_jax.py"]:
        yield str(path.relative_to(ROOT)), path.read_text()
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        yield str(path.relative_to(ROOT)), "\n".join("".join(cell["source"]) for cell in cells)
    for path in sorted((ROOT / "sfjax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                code = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
                yield f"{path.relative_to(ROOT)}, {node.name}", "".join(one.source for one in code)


def loops(source: str) -> Iterator[tuple[str, bool]]:
    """Yields the functions that are compiled and take a step, and whether anything is donated to them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            how, name, what = " ".join(map(ast.unparse, node.decorator_list)), node.name, ast.unparse(node)
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("jit"):
            how, name, what = ast.unparse(node), ast.unparse(node.args[0]), ast.unparse(node.args[0])
        else:
            continue
        if JIT.search(how) and STEP.search(what):
            yield name, "donate" in how


def compiled(lowered: Any) -> Any:
    """Returns a program of XLA."""
    program = lowered.compile()
    return getattr(program, "compiled", program)  # Flax and Equinox have put something around it


def copies(program: Any) -> int:
    """Returns how many arrays a program copies."""
    return len(COPY.findall(program.as_text()))


def start(tx: Any) -> tuple[Any, Any]:
    params = [{"kernel": jnp.asarray(k), "bias": jnp.asarray(b)} for k, b in _digits.initial_weights(0)]
    return params, tx.init(params)


def plain_loop(_: str) -> Any:
    example = importlib.import_module("optax_loop")
    return example.train_step.lower(*start(example.TX), jax.random.key(0))


def equinox_loop(_: str) -> Any:
    eqx, example = importlib.import_module("equinox"), importlib.import_module("equinox_loop")
    model = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))
    state = example.TX.init(eqx.filter(model, eqx.is_inexact_array))
    return example.train_step.lower(example.batch(0), model, state)


def linen_loop(_: str) -> Any:
    example, key = importlib.import_module("flax_linen"), jax.random.key(0)
    variables = example.MODEL.init(key, example.batch(0)[0], False)
    state = example.State.create(apply_fn=example.MODEL.apply, tx=example.TX, key=key, **variables)
    return example.train_step.lower(state, *example.batch(0))


def nnx_loop(_: str) -> Any:
    nnx, example = importlib.import_module("flax.nnx"), importlib.import_module("flax_nnx")
    model = example.Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, example.TX, wrt=nnx.Param)
    return example.train_step.lower(model, optimizer, *next(example.batches()))


class Seen(Exception):
    """The first call of a compiled function has been caught."""


def first_call(name: str, run: Callable[[], Any]) -> Any:
    """Returns what the function of that name is lowered to, which a program compiles within another one."""
    jit, found = jax.jit, []

    def caught(function: Any, **options: Any) -> Any:
        compiled = jit(function, **options)

        def called(*arguments: Any) -> Any:
            if function.__name__ != name:
                return compiled(*arguments)
            found.append(compiled.lower(*arguments))
            raise Seen

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", caught)
        with pytest.raises(Seen):
            run()
    return found[0]


def mesh_loop(_: str) -> Any:
    example = importlib.import_module("jax_mesh")
    return first_call("step", lambda: example.train(devices=1, steps=1))


def tutorial_loop(_: str) -> Any:
    example, resume = importlib.import_module("train_jax"), importlib.import_module("_resume")
    settings = _digits.Settings("adamw", 0.01, 0.9, 0.0, 20, 1.0, 2, 64, accumulate=4, seed=0, every=2)
    plan = resume.Plan(Path("never-written"), None, "none", None)
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps cannot do without
        return first_call("micro_step", lambda: list(example.train(settings, _digits.load(), plan)))


def of_text(code: str, before: str = "") -> Callable[[str], Any]:
    """Returns what lowers the loop of a text, from its code up to where it begins to train."""

    def lowered(source: str) -> Any:
        params = {"w": jnp.ones(3)}  # and what else a page may have had before
        names = {
            "jax": jax,
            "jnp": jnp,
            "optax": optax,
            "sfjax": sfjax,
            "params": params,
            "gradients": params,
        }
        exec(source.split(before)[0] if before else source, names)
        return eval(code, names)

    return lowered


class Loop(NamedTuple):
    """A documented loop that is compiled.

    Attributes:
        lower: what lowers it, from the source of its text.
        leaves: of its parameters.
        most: copies a leaf that it may have, each for a reason; without the kernel XLA makes 1 more.
        is_bare: it is given its gradients, so that a step has no memory to take but for its numbers.
        is_slow: it takes seconds to compile.
    """

    lower: Callable[[str], Any]
    leaves: int
    most: float = 0
    is_bare: bool = False
    is_slow: bool = False


BARE = Loop(of_text("step.lower(params, state, gradients=params)", "params, state = step"), 1, is_bare=True)
LOOPS = {
    "docs/flax.md, Flax NNX: train_step": Loop(
        of_text("train_step.lower(model, optimizer, batches[0])", "with Checkpoints"), 4, is_slow=True
    ),
    "docs/flax.md, Flax linen: train_step": Loop(
        of_text("train_step.lower(state, batches[0])", "with Checkpoints"), 4, is_slow=True
    ),
    "docs/flax.md, Equinox: train_step": Loop(
        of_text("train_step.lower(params, opt_state, jnp.ones((3, 4)))", "batches ="), 4, is_slow=True
    ),
    # Its loss has nothing but params to read, which XLA therefore keeps.
    "docs/flax.md, Plain optax: train_step": Loop(
        of_text("train_step.lower(params, opt_state, key)", "with Checkpoints"), 1, most=2
    ),
    "docs/migration.md, From optax.contrib: step": Loop(  # Optax's optimizer, to be imported from
        lambda source: first_call("step", lambda: exec(source, {})), 1
    ),
    "docs/pitfalls.md, BatchNorm: train_step": Loop(
        of_text("train_step.lower(net, trainer, data[0])", "for batch in data"), 4, is_slow=True
    ),
    # Of update on a CPU, as the page says.
    "docs/pitfalls.md, Donated arguments in JAX: update": Loop(
        of_text("update.lower(params, tx.init(params), params)", "weights ="), 1, most=1
    ),
    "docs/precision.md, Accumulation: optimizer.step": BARE._replace(
        lower=of_text("step.lower(params, state, gradients=params)", "for micro_batch")
    ),
    "docs/precision.md, The native step: tx.step": BARE,
    "docs/resuming.md, And in JAX: step_of": Loop(
        of_text("step_of.lower(jnp.zeros(3), optimizer.init(jnp.zeros(3)), jnp.arange(16))", "def train("), 1
    ),
    "examples/equinox_loop.py: train_step": Loop(equinox_loop, 6, is_slow=True),
    # What convolutions make of their own.
    "examples/flax_linen.py: train_step": Loop(linen_loop, 6, most=2 / 3, is_slow=True),
    "examples/flax_nnx.py: train_step": Loop(nnx_loop, 6, most=2 / 3, is_slow=True),
    "examples/jax_mesh.py: step": Loop(mesh_loop, 3, is_slow=True),
    # The last bias, which XLA reads once more for the loss.
    "examples/optax_loop.py: train_step": Loop(plain_loop, 6, most=1 / 3),
    "examples/train_jax.py: micro_step": Loop(tutorial_loop, 6),
    "examples/notebooks/from_cosine_jax.ipynb: partial(train_step, optimizer)": Loop(
        of_text(
            "jax.jit(partial(train_step, schedule_free(0.01))).lower("
            "initial_params(0), schedule_free(0.01).init(initial_params(0)), batch(0, 0))",
            "METHODS =",
        ),
        4,
    ),
    "sfjax/accumulate.py, accumulate: tx.step": BARE._replace(
        lower=of_text("step.lower(params, state, gradients=params)", "for gradients in")
    ),
    "sfjax/step/transformation.py, Transformation: tx.step": BARE,
}


@functools.cache
def documented() -> dict[str, tuple[str, bool]]:
    """Returns the source of each loop, and whether it donates."""
    return {
        f"{where}: {name}": (source, donates) for where, source in texts() for name, donates in loops(source)
    }


def test_every_documented_loop_is_looked_at() -> None:
    assert sorted(documented()) == sorted(LOOPS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * one.is_slow) for name, one in LOOPS.items()]
)
def test_a_documented_loop_copies_nothing_of_parameters_and_state(name: str) -> None:
    loop, (source, donates) = LOOPS[name], documented()[name]
    program = compiled(loop.lower(source))
    memory = program.memory_analysis()
    assert (memory.alias_size_in_bytes > 0) == donates
    assert copies(program) / loop.leaves <= loop.most + (0 if HAS_KERNEL else 1)
    if loop.is_bare and HAS_KERNEL:
        assert memory.temp_size_in_bytes < 2048  # measured: 0.6 to 0.9 kB


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
    assert copies(compiled(lowered)) / 6 >= 3  # measured: 3, and 8 where it accumulates


def test_a_new_loop_would_be_seen() -> None:
    donating = "@partial(jax.jit, donate_argnums=0)\ndef go(p):\n    return tx.step(p)\n"
    assert list(loops(donating + "other = nnx.jit(tx.update)\nmetrics = jax.jit(accuracy)\n")) == [
        ("go", True),
        ("tx.update", False),
    ]
