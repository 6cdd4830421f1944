"""The rules of the average and of the decay: they resume in the same bits, and cross to the other twin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sfjax
import sftorch
from sfcore import convert
from sfjax.checkpoint import Checkpoints as JaxCheckpoints
from sftorch.checkpoint import Checkpoints

RULES = [
    {"c_warmup": 9},
    {"refined_c": 20.0, "weight_lr": "current"},
    {"window": 4},
    {"window": 4, "window_rule": "constant", "decay_at": "z"},
    {"decay_power": 2, "c_warmup": 3},
]
LR, DECAY = 0.1, 0.2
START = {"w": np.linspace(-1, 1, 6).reshape(2, 3), "b": np.ones(3)}


def gradient(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step)
    return {name: draw.normal(size=start.shape) for name, start in START.items()}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, start in START.items():
            self.register_parameter(name, torch.nn.Parameter(torch.tensor(start)))


def in_torch(options, steps, model=None, optimizer=None):
    """Takes the steps of a range; returns model and optimizer."""
    if model is None:
        model = Model()
        optimizer = sftorch.AdamWScheduleFree(model.parameters(), LR, weight_decay=DECAY, **options)
    for step in steps:
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradient(step)[name])
        optimizer.step()
    return model, optimizer


def in_jax(options, steps, params=None, state=None):
    """Takes the steps of a range; returns parameters and state."""
    tx = sfjax.schedule_free_adamw(LR, weight_decay=DECAY, **options)
    if params is None:
        params = {name: jnp.asarray(start) for name, start in START.items()}
        state = tx.init(params)
    for step in steps:
        updates, state = jax.jit(tx.update)(gradient(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_resumed_run_ends_in_the_same_bits_and_crosses(options, tmp_path):
    with jax.enable_x64(True):
        whole, _ = in_torch(options, range(12))
        model, optimizer = in_torch(options, range(6))
        with Checkpoints(tmp_path / "torch") as checkpoints:
            checkpoints.save(model, optimizer)
        model, optimizer = in_torch(options, range(0))
        Checkpoints(tmp_path / "torch").restore(model, optimizer)
        in_torch(options, range(6, 12), model, optimizer)
        for name, p in whole.named_parameters():
            assert torch.equal(p, dict(model.named_parameters())[name])

        params, state = in_jax(options, range(6))
        with JaxCheckpoints(tmp_path / "jax") as theirs:
            theirs.save(6, params, state)
            found = theirs.restore(*in_jax(options, range(0)))
        resumed, _ = in_jax(options, range(6, 12), found.params, found.opt_state)
        for name, p in in_jax(options, range(12))[0].items():
            np.testing.assert_array_equal(p, resumed[name])
            np.testing.assert_allclose(p, whole.get_parameter(name).detach().numpy(), rtol=1e-12)

        path, _ = convert.convert(tmp_path / "torch", tmp_path / "crossed", to="jax")
        with JaxCheckpoints(tmp_path / "new") as theirs:
            found = theirs.restore(*in_jax(options, range(0)), resume=path)
        crossed, _ = in_jax(options, range(6, 12), found.params, found.opt_state)
        for name, p in crossed.items():
            np.testing.assert_allclose(p, resumed[name], rtol=1e-12)


def test_a_configuration_with_another_rule_is_noticed_and_goes_on(tmp_path):
    model, optimizer = in_torch({"window": 4}, range(6))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
    model, optimizer = in_torch({"weight_lr": "current"}, range(0))
    found = Checkpoints(tmp_path).restore(model, optimizer)
    told = " ".join(found.notices)
    assert "window" in told
    assert "weight_lr" in told
    in_torch({}, range(6, 8), model, optimizer)
    assert optimizer.metrics()[0]["c"] == pytest.approx(1 / 8)
