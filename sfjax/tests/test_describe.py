"""sfjax.describe says what the optimizer then does."""

import jax.numpy as jnp
import optax
import pytest

import sfjax


def test_arguments_may_be_given_as_to_the_optimizer():
    by_place = sfjax.describe(sfjax.schedule_free_adamw, 2**-7, 50, 0.95, total_steps=1000)
    by_name = sfjax.describe(
        sfjax.schedule_free_adamw,
        learning_rate=jnp.asarray(2**-7),
        warmup_steps=50,
        b1=0.95,
        total_steps=1000,
    )
    assert by_place.splitlines() == by_name.splitlines()
    assert "optimizer     sfjax.schedule_free_adamw" in by_place
    assert "lr at step    1: 0.000156, 50: 0.00781, 500: 0.00781, 1000: 0.00781" in by_place
    assert "SF" not in by_place


def test_problems_are_told_in_jaxs_words():
    told = sfjax.describe(sfjax.schedule_free_sgd, 1e-3, b1=0.5, warmup_steps=200, total_steps=100)
    assert "SF204 warmup_steps" in told
    assert "SF303 learning_rate" in told
    assert "SF304 b1" in told


def test_every_optimizer_describes_itself():
    for optimizer in (sfjax.schedule_free_sgd, sfjax.schedule_free_adamw, sfjax.schedule_free_radam):
        assert "error" not in sfjax.describe(optimizer)
    assert "error" not in sfjax.describe(sfjax.schedule_free, optax.sgd(0.1), 0.1, prior_steps=10)
    told = sfjax.describe(sfjax.schedule_free_plus, warmup_steps=50, f_star=-1.0, total_steps=1000)
    assert "optimizer     sfjax.schedule_free_plus\n" in told
    assert "warm-up       50 optimizer steps, by optimizer" in told
    assert "Polyak steps" in told
    assert "SF" not in told, told
    told = sfjax.describe(sfjax.generalized_primal_averaging, optax.adam(0.01), 0.01, mu_x=0.9)
    assert "c at step     1: 0.1, " in told
    assert "SF" not in told, told


def test_a_schedule_is_checked_by_its_largest_value():
    told = sfjax.describe(sfjax.schedule_free_sgd, optax.linear_schedule(0.0, 1000.0, 100), total_steps=1000)
    assert "SF302 learning_rate must be near the useful range, got 1000.0" in told
    assert told.endswith("a schedule; its largest value is checked, not its course")


def test_a_misspelt_argument_is_refused():
    with pytest.raises(TypeError, match="have no warmup_stepz"):
        sfjax.describe(sfjax.schedule_free_sgd, 1.0, warmup_stepz=3)


def test_the_wrapper_may_be_told_where_its_base_decays():
    told = sfjax.describe(sfjax.schedule_free, optax.sgd(0.1), 0.1, decay_at="z")
    assert "error" not in told
    assert "decay_at must be 'y' or 'z', got 'x'" in sfjax.describe(
        sfjax.schedule_free, optax.sgd(0.1), 0.1, decay_at="x"
    )
