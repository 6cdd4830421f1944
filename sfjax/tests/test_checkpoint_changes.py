"""What the configuration changes is told in a table, done as it says, and refused when strict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import sfjax
from sfcore.checks import HyperparameterError
from sfcore.hyperparameters import SGD, AdamW, RAdam
from sfjax.checkpoint import CheckpointError, Checkpoints
from sfjax.tests.checkpoint_runs import LR, begin, go, saved, transformation
from sfjax.tests.runs import assert_close, assert_same

SAVED = AdamW(lr=LR, warmup_steps=3)


def _restored(checkpoints: Checkpoints, tx: Any, params: Any, **arguments: Any) -> Any:
    restored = checkpoints.restore(params, tx.init(params), **arguments)
    assert restored is not None
    return restored


def test_the_same_configuration_changes_nothing_and_passes_strict(tmp_path: Path) -> None:
    with saved(tmp_path, hyperparameters=SAVED, accumulation=1) as (checkpoints, params, _):
        restored = _restored(
            checkpoints, transformation("adamw"), params, hyperparameters=SAVED, accumulation=1, strict=True
        )
    assert restored.changes == []
    assert restored.notices == [f"resuming at step 3 from {tmp_path / '3'}"]


def test_the_table_names_saved_and_configured_values_and_their_effect(tmp_path: Path) -> None:
    now = AdamW(lr=0.2, warmup_steps=3, weight_decay=0.1, beta=0.95)
    with saved(tmp_path, hyperparameters=SAVED, accumulation=4) as (checkpoints, params, _):
        tx = transformation("adamw")
        restored = _restored(checkpoints, tx, params, hyperparameters=now, accumulation=8)
        with pytest.raises(CheckpointError, match=r"strict=True, got 4 difference\(s\)") as caught:
            _restored(checkpoints, tx, params, hyperparameters=now, accumulation=8, strict=True)
    assert {change.name: (change.saved, change.configured) for change in restored.changes} == {
        "lr": (LR, 0.2),
        "beta": (0.9, 0.95),
        "weight_decay": (0.0, 0.1),
        "accumulation": (4, 8),
    }
    effects = {change.name: change.effect for change in restored.changes}
    assert "from the next step" in effects["lr"]
    assert "so that x stays" in effects["beta"]
    assert "8 micro-batches" in effects["accumulation"]
    assert all(
        str(change) in restored.notices and str(change) in str(caught.value) for change in restored.changes
    )


@pytest.mark.parametrize(("name", "value"), [("weight_lr_power", 0.0), ("r", 1.0)])
def test_other_weights_leave_c_as_it_was(tmp_path: Path, name: str, value: float) -> None:
    now = replace(SAVED, **{name: value})
    with saved(tmp_path, steps=40, hyperparameters=SAVED) as (checkpoints, params, opt_state):
        tx = transformation("adamw", **{name: value})
        restored = _restored(checkpoints, tx, params, hyperparameters=now)
    (change,) = restored.changes
    assert change.name == name
    assert "so that c goes on as it was" in change.effect
    before = float(sfjax.metrics(opt_state)["c"])
    _, after = go(tx, restored.params, restored.opt_state, 40, 41)
    # c falls by 1 / 41 with the step itself; r = 1 weighs it 41 / 40 heavier.
    np.testing.assert_allclose(sfjax.metrics(after)["c"], before, rtol=0.03)


def test_what_is_not_given_is_not_compared(tmp_path: Path) -> None:
    with saved(tmp_path, hyperparameters=SAVED) as (checkpoints, params, _):
        restored = _restored(
            checkpoints, transformation("adamw"), params, hyperparameters={"lr": LR}, strict=True
        )
    assert restored.changes == []


@pytest.mark.parametrize("told", [None, {"lr": LR}])
def test_a_changed_beta_of_a_live_target_is_noticed_without_being_told(told: Any, tmp_path: Path) -> None:
    with saved(tmp_path, hyperparameters=told) as (checkpoints, params, _):
        restored = _restored(checkpoints, transformation("adamw", b1=0.95), params, hyperparameters=told)
        with pytest.raises(CheckpointError, match=r"strict=True, got 1 difference\(s\)"):
            _restored(
                checkpoints, transformation("adamw", b1=0.95), params, hyperparameters=told, strict=True
            )
    assert [change.name for change in restored.changes] == ["beta"]


RISING = {"b1_rule": "anneal", "b1_anneal_steps": 50}


def test_a_beta_that_a_rule_has_raised_is_no_change_of_it(tmp_path: Path) -> None:
    """Without hyperparameters a state does not know of the rule: that is said, and nothing that is not so."""
    config = AdamW(lr=LR, beta_rule="anneal", beta_anneal_steps=50)
    tx = transformation("adamw", **RISING)
    for saving, restoring in ((None, None), ({"lr": LR}, None), (None, config), (config, None)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with saved(folder, tx, steps=20, hyperparameters=saving) as (checkpoints, params, state):
            assert float(sfjax.find_state(state).b1) > 0.91
            restored = _restored(checkpoints, tx, params, hyperparameters=restoring)
            assert restored.changes == []
            told = [one for one in restored.notices if one.startswith("beta")]
            in_doubt = config not in (saving, restoring)
            assert len(told) == in_doubt
            if in_doubt:
                assert "if by b1_rule, it goes on as it was" in told[0]
                with pytest.raises(CheckpointError, match="say which with hyperparameters="):
                    _restored(checkpoints, tx, params, hyperparameters=restoring, strict=True)


def test_a_value_that_inject_hyperparams_keeps_is_not_said_to_change(tmp_path: Path) -> None:
    tx = optax.inject_hyperparams(sfjax.schedule_free_sgd)
    with saved(tmp_path, tx(LR), hyperparameters={"lr": LR}) as (checkpoints, params, _):
        restored = _restored(checkpoints, tx(0.2), params, hyperparameters={"lr": 0.2})
        scheduled = _restored(checkpoints, tx(lambda _: 0.2), params, hyperparameters={"lr": 0.2})
    assert float(restored.opt_state.hyperparams["learning_rate"]) == np.float32(LR)
    assert (
        "goes on with it; write the configured one into opt_state.hyperparams" in restored.changes[0].effect
    )
    assert "from the next step" in scheduled.changes[0].effect


@pytest.mark.parametrize(
    ("name", "message"),
    [("weigth_decay", r"got 'weigth_decay'; did you mean 'weight_decay'\?$"), ("foo", "got 'foo'$")],
)
def test_an_unknown_hyperparameter_is_refused(tmp_path: Path, name: str, message: str) -> None:
    params = begin()
    with pytest.raises(HyperparameterError, match=message):
        Checkpoints(tmp_path).save(1, params, transformation("sgd").init(params), hyperparameters={name: 0.1})


@pytest.mark.parametrize("beta", [0.5, 0.98, 0.0, 1.0])
def test_a_changed_beta_moves_y_and_keeps_x(beta: float, tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        tx = transformation("adamw", b1=beta, weight_decay=0.0)
        restored = _restored(checkpoints, tx, params)
    x = sfjax.schedule_free_eval_params(opt_state, params)
    assert_same(sfjax.schedule_free_eval_params(restored.opt_state, restored.params), x)
    zero = jax.tree.map(np.zeros_like, params)
    updates, state = jax.jit(tx.update)(zero, restored.opt_state, restored.params)
    moved = optax.apply_updates(restored.params, updates)
    c = float(sfjax.metrics(state)["c"])
    z = sfjax.iterates(state, moved)[2]
    # With a zero gradient Adam's direction is 0, so z stays and x' = (1 - c) x + c z.
    expected = jax.tree.map(lambda a, b: (1 - c) * np.asarray(a) + c * np.asarray(b), x, z)
    # float32 rounding of y and of x decoded from it, 4e-7 measured at beta = 0.5
    assert_close(sfjax.schedule_free_eval_params(state, moved), expected, 2e-6)


def test_adamw_and_radam_carry_everything_over(tmp_path: Path) -> None:
    with saved(tmp_path, hyperparameters=SAVED) as (checkpoints, params, opt_state):
        tx = transformation("radam")
        restored = _restored(checkpoints, tx, params, hyperparameters=RAdam(lr=LR, b2=0.9))
    assert_same(restored.opt_state[1], opt_state[1])
    (kind, *_) = restored.changes
    assert (kind.name, kind.saved, kind.configured) == ("optimizer", "adamw", "radam")
    assert kind.effect == "carried over: x, y, z, the average, the second moment v"


def test_sgd_takes_the_average_over_in_its_own_units_and_drops_v(tmp_path: Path) -> None:
    with saved(tmp_path, hyperparameters=SAVED) as (checkpoints, params, opt_state):
        tx = transformation("sgd")
        restored = _restored(checkpoints, tx, params, hyperparameters=SGD(lr=5.0))
        with pytest.raises(CheckpointError, match=r"hyperparameters must give lr > 0 when another kind"):
            _restored(checkpoints, tx, params)
    old, new = sfjax.find_state(opt_state), sfjax.find_state(restored.opt_state)
    assert_same((new.z, new.step, restored.params), (old.z, old.step, params))
    # The average of as many steps, now at lr 5: c is what it would have been.
    np.testing.assert_allclose(new.weight_sum / new.lr_max**2, old.weight_sum / old.lr_max**2, rtol=1e-6)
    assert float(new.lr_max) == 5.0
    assert "the second moment v is not used and is dropped" in restored.notices


def test_adamw_after_sgd_starts_v_and_its_bias_correction_anew(tmp_path: Path) -> None:
    with saved(tmp_path, transformation("sgd"), hyperparameters=SGD(lr=LR)) as (
        checkpoints,
        params,
        opt_state,
    ):
        tx = transformation("adamw", warmup_steps=0)
        restored = _restored(checkpoints, tx, params, hyperparameters=AdamW(lr=0.01))
    state = sfjax.find_state(restored.opt_state)
    assert int(state.step) == 0
    assert_same(state.z, sfjax.find_state(opt_state).z)
    assert "the second moment v starts anew" in restored.notices
    x = sfjax.schedule_free_eval_params(opt_state, params)
    after = go(tx, restored.params, restored.opt_state, 3, 4)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), x, sfjax.schedule_free_eval_params(after[1], after[0])
    )
    # lr 0.01 and c of about 1/3.3 on a step; without the rescaled clock x would jump to z.
    assert max(jax.tree.leaves(moved)) < 0.2


def test_an_accumulation_can_come_and_go_between_updates(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        tx = transformation("adamw", 4)
        restored = _restored(checkpoints, tx, params, strict=True)
        assert_same(sfjax.find_state(restored.opt_state), sfjax.find_state(opt_state))
        state = restored.opt_state
        with jax.numpy_dtype_promotion("standard"):
            params, state = go(tx, params, state, 3, 5)
        checkpoints.save(4, params, state)
        restored = _restored(checkpoints, transformation("adamw"), params)
        assert "micro-batches that were accumulated are dropped" in restored.notices
        assert restored.meta.accumulation["position"] == 2


def test_a_changed_accumulation_drops_an_unfinished_update_and_says_where_to_take_it_again(
    tmp_path: Path,
) -> None:
    tx = transformation("adamw", 4)
    params = begin()
    params, opt_state = go(tx, params, tx.init(params), 0, 7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, opt_state, accumulation=4, batch_size=16, position=7)
        restored = checkpoints.restore(params, opt_state, accumulation=2, batch_size=8)
        kept = checkpoints.restore(params, opt_state, accumulation=4, batch_size=16, strict=True)
    assert restored is not None
    assert kept is not None
    assert int(restored.opt_state.mini_step) == 0
    assert int(restored.opt_state.gradient_step) == 1
    assert not np.any(restored.opt_state.acc_grads["a"])
    assert (restored.meta.position, restored.meta.accumulation["position"]) == (4, 0)
    assert any("3 micro-batches of an unfinished update are dropped" in notice for notice in restored.notices)
    assert [(c.name, c.saved, c.configured) for c in restored.changes] == [
        ("accumulation", 4, 2),
        ("batch_size", 16, 8),
    ]
    assert_same(kept.opt_state, opt_state)


def test_every_part_of_a_partition_forgets_its_unfinished_update(tmp_path: Path) -> None:
    def four(tx: Any) -> Any:
        return optax.MultiSteps(tx, 4).gradient_transformation()

    parts = {"x": four(sfjax.schedule_free_sgd(LR)), "y": four(sfjax.schedule_free_adamw(LR))}
    tx = optax.partition(parts, {"a": "x", "b": "y", "c": "x"})
    with saved(tmp_path, tx, 3, accumulation=4) as (checkpoints, params, _):
        restored = _restored(checkpoints, tx, params, accumulation=2)
    for part in restored.opt_state.inner_states.values():
        assert int(part.inner_state.mini_step) == 0


def test_an_unfinished_update_of_a_length_that_nobody_recorded_goes_on(tmp_path: Path) -> None:
    tx = transformation("adamw", 4)
    params = begin()
    params, opt_state = go(tx, params, tx.init(params), 0, 7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, opt_state, position=7)
        kept = _restored(checkpoints, tx, params, accumulation=4, strict=True)
        dropped = _restored(checkpoints, tx, params, accumulation=3)
    assert_same(kept.opt_state, opt_state)
    assert (kept.meta.position, dropped.meta.position) == (7, 4)


def test_state_of_other_transformations_starts_anew_where_the_target_has_it(tmp_path: Path) -> None:
    more = optax.chain(optax.clip(1.0), optax.ema(0.9), sfjax.schedule_free_adamw(LR, warmup_steps=3))
    with saved(tmp_path) as (checkpoints, params, opt_state):
        restored = _restored(checkpoints, more, params)
        assert_same(sfjax.find_state(restored.opt_state), sfjax.find_state(opt_state))
        assert any("opt_state/1/count is not in the checkpoint" in notice for notice in restored.notices)
        with pytest.raises(CheckpointError, match=r"opt_state/1/count must be in the checkpoint.*tx\.init"):
            checkpoints.restore(params, jax.eval_shape(more.init, params))


def test_starting_anew_does_not_give_the_live_state_away(tmp_path: Path) -> None:
    more = optax.chain(optax.ema(0.9), sfjax.schedule_free_adamw(LR))
    with saved(tmp_path) as (checkpoints, params, _):
        live = more.init(params)
        checkpoints.restore(params, live)
    assert [int(leaf.size) for leaf in jax.tree.leaves(live)]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(live))
