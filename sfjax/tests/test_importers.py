"""Runs of optax.contrib.schedule_free and of plain Adam go on in sfjax, wherever their states sit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax
from sfcore.hyperparameters import AdamW
from sfjax.checkpoint import CheckpointError, import_optax
from sfjax.checkpoint._importers import shortest
from sfjax.tests import runs
from sfjax.tests.runs import assert_close, assert_same, gradients, start, typed

LR = 0.05
CONTRIB = {
    "sgd": (optax.contrib.schedule_free_sgd(LR), sfjax.schedule_free_sgd(LR)),
    "adamw": (
        optax.contrib.schedule_free_adamw(LR, weight_decay=0.1),
        sfjax.schedule_free_adamw(LR, weight_decay=0.1),
    ),
    "adam base": (
        optax.contrib.schedule_free(optax.adam(LR, b1=0.0), LR),
        sfjax.schedule_free_adamw(LR),
    ),
}


def run(*arguments: Any) -> tuple[Any, Any]:
    """Returns what `runs.run` does, with the implicit promotions that Optax's Adam needs."""
    with jax.numpy_dtype_promotion("standard"):
        return runs.run(*arguments)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", list(CONTRIB))
def test_a_contrib_run_goes_on_as_if_it_had_stayed(name: str) -> None:
    old, new = CONTRIB[name]
    params = typed(start())
    half, state = run(old, params, gradients(10))
    expected, expected_state = run(old, half, gradients(20)[10:], state)
    begun = import_optax(state, half, half, new.init(half))
    actual, actual_state = run(new, begun.params, gradients(20)[10:], begun.opt_state)
    # Float64, the same law at a constant lr; contrib divides to get x: 2e-14 measured.
    assert_close(actual, expected, 1e-12)
    assert_close(
        sfjax.schedule_free_eval_params(actual_state, actual),
        optax.contrib.schedule_free_eval_params(expected_state, expected),
        1e-12,
    )
    assert int(sfjax.find_state(begun.opt_state).step) == 10 == int(state.step_count) - 1


def test_a_contrib_state_is_found_anywhere_in_a_chain() -> None:
    inner = optax.contrib.schedule_free_adamw(LR)
    params = typed(start(), jnp.float32)
    tx = sfjax.schedule_free_adamw(LR)
    wrappers = {
        "chain": optax.chain(optax.clip(1.0), optax.chain(optax.identity(), inner)),
        "named": optax.named_chain(("clip", optax.clip(1.0)), ("sf", inner)),
        "finite": optax.apply_if_finite(inner, 2),
        "accumulate": optax.MultiSteps(inner, 2),
    }
    for name, old in wrappers.items():
        half, state = run(old, params, gradients(4))
        begun = import_optax(state, half, params, tx.init(params))
        assert_same(begun.params, half)
        (found,) = [node for node in _states(state) if hasattr(node, "step_count")]
        assert_same(sfjax.find_state(begun.opt_state).z, found.z)
        assert int(sfjax.find_state(begun.opt_state).step) == int(found.step_count) - 1, name


def _states(tree: Any) -> list[Any]:
    found: list[Any] = []
    jax.tree.leaves(tree, is_leaf=lambda node: bool(found.append(node)))  # type: ignore[func-returns-value]
    return found


def test_several_contrib_states_go_to_several_of_ours() -> None:
    labels = {"a": "x", "b": "x", "c": "y"}
    old = optax.partition(
        {"x": optax.contrib.schedule_free_sgd(LR), "y": optax.contrib.schedule_free_adamw(LR, b1=0.8)}, labels
    )
    new = optax.partition(
        {"x": sfjax.schedule_free_sgd(LR), "y": sfjax.schedule_free_adamw(LR, b1=0.8)}, labels
    )
    params = typed(start(), jnp.float32)
    half, state = run(old, params, gradients(3))
    begun = import_optax(state, half, params, new.init(params))
    ours, theirs = sfjax.find_states(begun.opt_state), [n for n in _states(state) if hasattr(n, "step_count")]
    for mine, its in zip(ours, theirs, strict=True):
        assert_same(jax.tree.leaves(mine.z), jax.tree.leaves(its.z))
        np.testing.assert_allclose(mine.b1, its.b1)


def test_the_b1_that_built_y_is_the_users_to_say() -> None:
    params = typed(start(), jnp.float32)
    old = optax.contrib.schedule_free_sgd(LR, b1=0.9)
    half, state = run(old, params, gradients(3))
    # The state says 0.9 while the update was built with another b1: what a resume with a changed b1 leaves.
    later = optax.contrib.schedule_free_sgd(LR, b1=0.5)
    half, state = run(later, half, gradients(5)[3:], state)
    assert float(state.b1) == np.float32(0.9)
    tx = sfjax.schedule_free_sgd(LR, b1=0.5)
    begun = import_optax(state, half, params, tx.init(params), hyperparameters={"beta": 0.5})
    expected = optax.contrib.schedule_free_eval_params(state._replace(b1=0.5), half)
    assert_close(sfjax.schedule_free_eval_params(begun.opt_state, begun.params), expected, 1e-6)


def test_scalars_that_contrib_kept_in_bfloat16_are_rounded_back_and_mentioned() -> None:
    params = typed(start(), jnp.bfloat16)
    half, state = run(optax.contrib.schedule_free_sgd(LR), params, gradients(3))
    begun = import_optax(state, half, params, sfjax.schedule_free_sgd(LR).init(params))
    assert float(sfjax.find_state(begun.opt_state).b1) == np.float32(0.9)
    assert any("bfloat16" in notice for notice in begun.notices)


@pytest.mark.parametrize(
    ("dtype", "value"), [("bfloat16", 0.9), ("bfloat16", 0.98), ("float32", 0.95), ("float16", 0.5)]
)
def test_a_rounded_number_is_given_back_as_it_was_meant(dtype: str, value: float) -> None:
    assert shortest(np.asarray(value, jnp.dtype(dtype))) == value


def test_adam_keeps_v_and_its_weights_count_as_an_average() -> None:
    params = typed(start(), jnp.float32)
    half, state = run(optax.chain(optax.clip(1.0), optax.adamw(LR)), params, gradients(8))
    tx = sfjax.schedule_free_adamw(LR)
    begun = import_optax(state, half, params, tx.init(params), hyperparameters=AdamW(lr=LR))
    mine = sfjax.find_state(begun.opt_state)
    assert_same((begun.params, mine.z), (half, half))
    assert_same(mine.base_optimizer_state.nu, state[1][0].nu)
    assert int(mine.step) == 8
    assert "the first moment m is not used and is dropped" in begun.notices
    _, after = run(tx, begun.params, gradients(9)[8:], begun.opt_state)
    # The 8 steps that Adam has counted stand for as many of the average.
    np.testing.assert_allclose(sfjax.metrics(after)["c"], 1 / 9, rtol=1e-5)


def test_adam_keeps_m_where_the_target_has_inner_momentum() -> None:
    params = typed(start(), jnp.float32)
    half, state = run(optax.adamw(LR), params, gradients(4))
    tx = sfjax.schedule_free_adamw(LR, inner_momentum=0.9, prior_steps=50)
    begun = import_optax(state, half, params, tx.init(params))
    assert_same(sfjax.find_state(begun.opt_state).base_optimizer_state.mu, state[0].mu)
    assert any("prior_steps that the transformation was built with" in notice for notice in begun.notices)


def test_what_is_neither_is_refused() -> None:
    params = typed(start(), jnp.float32)
    tx = sfjax.schedule_free_sgd(LR)
    with pytest.raises(
        CheckpointError, match=r"source_state must hold optax\.contrib\.schedule_free's state or one of Adam"
    ):
        import_optax(optax.sgd(LR).init(params), params, params, tx.init(params))


@pytest.mark.parametrize("form", ["flattened", "of another model"])
def test_adam_of_other_parameters_is_refused(form: str) -> None:
    params = typed(start(), jnp.float32)
    state = optax.flatten(optax.adam(LR)).init(params) if form == "flattened" else optax.adam(LR).init([1.0])
    with pytest.raises(
        CheckpointError, match="source_params must be those of Adam's state, got none for its '"
    ):
        import_optax(state, params, params, sfjax.schedule_free_adamw(LR).init(params))


def test_adam_without_a_known_lr_is_refused() -> None:
    params = typed(start(), jnp.float32)
    half, state = run(optax.adam(LR), params, gradients(2))
    with pytest.raises(CheckpointError, match="hyperparameters must give lr > 0"):
        import_optax(state, half, params, sfjax.schedule_free_adamw(LR).init(params))
