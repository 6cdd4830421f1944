"""Code written for `optax.contrib.schedule_free*` runs with sfjax: names, positions, states of chains."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfjax

NAMES = ("schedule_free", "schedule_free_adamw", "schedule_free_eval_params", "schedule_free_sgd")


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_are_optaxs(name):
    ours = inspect.signature(getattr(sfjax, name)).parameters.values()
    theirs = inspect.signature(getattr(optax.contrib, name)).parameters.values()
    places = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD][: len(places)] == places


@pytest.mark.parametrize("optimizer", ["schedule_free_sgd", "schedule_free_adamw"])
def test_the_state_of_a_chain_gives_x_whole_or_picked_out_of_it(optimizer):
    goal = jnp.arange(3.0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), getattr(sfjax, optimizer)(0.1))
    params = jnp.zeros(3)
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(params - goal, state, params)
        params = optax.apply_updates(params, updates)
    whole = sfjax.schedule_free_eval_params(state, params)
    np.testing.assert_array_equal(whole, sfjax.schedule_free_eval_params(state[1], params))
    assert not jnp.array_equal(whole, params)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
