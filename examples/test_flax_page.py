"""docs/flax.md tells the truth: its blocks run, twice, and the second time they have nothing left to do."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import sfjax
from test_donation import HAS_KERNEL, compiled, copies

PAGE = (Path(__file__).parent.parent / "docs" / "flax.md").read_text()
MOST = 0 if HAS_KERNEL else 2  # copies a leaf

pytestmark = pytest.mark.optimized


def copies_a_leaf(lowered, leaves: int) -> float:
    """Returns how many arrays a step, which must write in place, copies per leaf of the parameters."""
    program = compiled(lowered)
    assert program.memory_analysis().alias_size_in_bytes > 0
    return copies(program) / leaves


def run(title: str) -> dict:
    """Runs the blocks of a section one after another; returns their names."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        exec(compile(code, f"docs/flax.md: {title}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_section_is_tested():
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE) == [
        "Flax NNX",
        "Flax linen",
        "Equinox",
        "Plain optax",
    ]
    assert PAGE.count("```python") == 5


def test_nnx_serves_the_copy_that_was_shipped_and_resumes():
    first, again = run("Flax NNX"), run("Flax NNX")
    assert (first["restored"], again["restored"].meta.step) == (None, 10)
    batch = first["batches"][0]
    for served in (first["served"], again["shipped"]):
        np.testing.assert_array_equal(served(batch), first["shipped"](batch))
    assert not np.array_equal(first["shipped"].layers[0].kernel[...], first["model"].layers[0].kernel[...])
    step = first["train_step"].lower(first["model"], first["optimizer"], batch)
    assert copies_a_leaf(step, 4) <= MOST


def test_linen_evaluates_x_with_statistics_of_its_own_and_resumes():
    first, again = run("Flax linen"), run("Flax linen")
    assert (first["restored"], again["restored"].meta.step) == (None, 10)
    np.testing.assert_array_equal(again["outputs"], first["outputs"])
    state, stats = first["state"], first["x"]["batch_stats"]["BatchNorm_0"]
    np.testing.assert_array_equal(
        first["x"]["params"]["Dense_0"]["kernel"], state.eval_params["Dense_0"]["kernel"]
    )
    # The batches are 0..11 + i in rows of 4: their means are 4..7 + i, and i is 4.5 on average.
    np.testing.assert_allclose(stats["mean"], np.arange(4) + 8.5, rtol=1e-5)
    assert copies_a_leaf(first["train_step"].lower(state, first["batches"][0]), 4) <= MOST


@pytest.mark.parametrize(("title", "beside"), [("Equinox", "batch"), ("Plain optax", "key")])
def test_a_loop_resumes_where_it_was(title, beside):
    first, again = run(title), run(title)
    assert first["restored"] is None
    assert again["restored"].meta.step in (10, 20)
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, again[name], first[name])
    x = sfjax.schedule_free_eval_params(first["opt_state"], first["params"])
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (x, first["params"])), strict=True))
    step = first["train_step"].lower(first["params"], first["opt_state"], first[beside])
    leaves = len(jax.tree.leaves(x))
    assert copies_a_leaf(step, leaves) <= 2  # of three numbers, which the loss reads too
