"""Generalized primal averaging in both twins: the paper's three sequences, with decay at z."""

from __future__ import annotations

import enum
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sfjax
import sftorch
from sfcore import HyperparameterError, convert
from sfcore.hyperparameters import AdamW
from sfcore.laws import LAWS
from sfjax.checkpoint import Checkpoints as JaxCheckpoints
from sftorch.checkpoint import Checkpoints, import_state_dict

LR, DECAY, STEPS = 0.05, 0.3, 40
START = np.linspace(-1, 2, 5)


def gradient(t):
    return np.random.default_rng(t).normal(size=START.size)


def reference(mu_x=0.9967, mu_y=0.7, mistake=False):
    """Returns x, y and z, of the paper's equations, or of a decay that moves z alone."""
    x = y = z = START
    m = v = np.zeros_like(START)
    for t in range(1, STEPS + 1):
        g = gradient(t)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        delta = -LR * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        pull = -LR * DECAY * z
        if mistake:
            y = y + (1 - mu_x) * (z - y) + (1 - mu_y * mu_x) * delta
            z = z + delta + pull
            x = y + (1 / mu_y - 1) * (y - z)
            continue
        z = z + delta + pull
        x = mu_x * x + (1 - mu_x) * z
        y = mu_y * x + (1 - mu_y) * z
    return x, y, z


def in_torch(**options):
    p = torch.nn.Parameter(torch.tensor(START))
    optimizer = sftorch.GPAAdamW([p], LR, weight_decay=DECAY, **options)
    for t in range(1, STEPS + 1):
        p.grad = torch.from_numpy(gradient(t))
        optimizer.step()
    return optimizer, p


def all_of(optimizer, p):
    return tuple(one.detach().numpy() for one in (optimizer.eval_params()[p], p, optimizer.state[p]["z"]))


@pytest.mark.parametrize("path", [{}, {"fused": False}, {"foreach": False}], ids=str)
@pytest.mark.parametrize(("mu_x", "mu_y"), [(0.9967, 0.7), (0.8, 0.5), (0.0, 1.0)])
def test_torch_takes_the_papers_sequences(mu_x, mu_y, path):
    found = all_of(*in_torch(eval_interp_coeff=mu_x, train_interp_coeff=mu_y, **path))
    for mine, theirs in zip(found, reference(mu_x, mu_y), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-13)


def test_jax_takes_them_too():
    with jax.enable_x64(True):
        tx = sfjax.generalized_primal_averaging(optax.adam(LR), LR, weight_decay=DECAY)
        params = jnp.asarray(START)
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(1, STEPS + 1):
            updates, state = update(jnp.asarray(gradient(t)), state, params)
            params = optax.apply_updates(params, updates)
        for mine, theirs in zip(sfjax.iterates(state, params), reference(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-12)


def test_a_decay_of_z_alone_would_be_seen():
    x, *_ = all_of(*in_torch())
    wrong, *_ = reference(mistake=True)
    assert np.abs(wrong - x).max() > 0.05 * np.abs(x - START).max()


class Averaging(enum.Enum):
    GPA = 1
    SCHEDULE_FREE = 2


def test_its_other_average_is_adamws():
    p = torch.nn.Parameter(torch.tensor(START))
    options = {"inner_momentum": 0.9, "weight_decay": DECAY, "decay_at": "z", "r": 1.0}
    plain = sftorch.AdamWScheduleFree([p], LR, (0.7, 0.999), **options)
    for t in range(1, STEPS + 1):
        p.grad = torch.from_numpy(gradient(t))
        plain.step()
    for kind in ("schedule_free", Averaging.SCHEDULE_FREE):
        _, other = in_torch(iterate_averaging_type=kind, weight_pow_coeff=1.0)
        assert torch.equal(p, other)
    _, other = in_torch(iterate_averaging_type=Averaging.GPA)
    assert not torch.equal(p, other)


def test_it_resumes_in_the_same_bits(tmp_path):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor(START))
    optimizer = sftorch.GPAAdamW([model.w], LR, weight_decay=DECAY)
    for t in range(1, 21):
        model.w.grad = torch.from_numpy(gradient(t))
        optimizer.step()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
    model.w = torch.nn.Parameter(torch.zeros(START.size, dtype=torch.float64))
    optimizer = sftorch.GPAAdamW([model.w], LR, weight_decay=DECAY)
    assert not any("configured" in one for one in Checkpoints(tmp_path).restore(model, optimizer).notices)
    for t in range(21, STEPS + 1):
        model.w.grad = torch.from_numpy(gradient(t))
        optimizer.step()
    _, whole = in_torch()
    assert torch.equal(model.w, whole)


def test_it_crosses_to_jax_and_back(tmp_path):
    """Where it is AdamW with a constant window; sfjax's GPA is around any base, whose state is its own."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor(START))
    optimizer = sftorch.GPAAdamW([model.w], LR, weight_decay=DECAY)
    config = AdamW(
        lr=LR, beta=0.7, inner_momentum=0.9, weight_decay=DECAY, decay_at="z", window=1 / (1 - 0.9967),
        window_rule="constant",
    )  # fmt: skip
    tx = sfjax.schedule_free_adamw(**LAWS["adamw"].to_jax(asdict(config)))

    def train(model, optimizer, steps):
        for t in steps:
            model.w.grad = torch.from_numpy(gradient(t))
            optimizer.step()

    train(model, optimizer, range(1, 16))
    with Checkpoints(tmp_path / "torch") as checkpoints:
        checkpoints.save(model, optimizer)
    path, _ = convert.convert(tmp_path / "torch", tmp_path / "crossed", to="jax")
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(START)}
        with JaxCheckpoints(tmp_path / "jax") as theirs:
            found = theirs.restore(params, tx.init(params), resume=path, hyperparameters=config)
            assert found.changes == []
            params, state = found.params, found.opt_state
            for t in range(16, 31):
                updates, state = jax.jit(tx.update)({"w": jnp.asarray(gradient(t))}, state, params)
                params = optax.apply_updates(params, updates)
            theirs.save(30, params, state, hyperparameters=config)
    path, _ = convert.convert(tmp_path / "jax", tmp_path / "back", to="torch")
    model.w = torch.nn.Parameter(torch.zeros(START.size, dtype=torch.float64))
    optimizer = sftorch.GPAAdamW([model.w], LR, weight_decay=DECAY)
    Checkpoints(tmp_path / "newer").restore(model, optimizer, resume=path)
    train(model, optimizer, range(31, STEPS + 1))
    for mine, theirs in zip(all_of(optimizer, model.w), reference(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-12)


def test_bad_values_are_refused_by_the_names_of_its_user_all_at_once():
    with pytest.raises(HyperparameterError) as caught:
        in_torch(beta1=1.0, train_interp_coeff=2.0, eval_interp_coeff=1.0, iterate_averaging_type="ema")
    names = [line.split(" must")[0] for line in caught.value.problems]
    assert names == ["train_interp_coeff", "beta1", "iterate_averaging_type", "eval_interp_coeff"]
    with pytest.raises(HyperparameterError) as caught:
        sfjax.generalized_primal_averaging(optax.sgd(0.1), 0.1, mu_y=2.0, mu_x=1.0, weight_decay=-1.0)
    assert [line.split(" must")[0] for line in caught.value.problems] == ["mu_y", "mu_x", "weight_decay"]


def test_metas_state_is_imported_and_its_run_goes_on():
    """As their GPAAdamW saves it: the clock of a group, in tensors, in the state of its first parameter."""
    whole, p = in_torch(decay_at="y")
    x = whole.eval_params()[p].clone()
    shared = {"step": torch.tensor(STEPS), "lr_max": torch.tensor(LR), "weight_sum": torch.tensor(0.0)}
    state = {name: whole.state[p][name].clone() for name in ("z", "exp_avg", "exp_avg_sq")}
    group = {"lr": LR, "eps": 1e-8, "train_interp_coeff": 0.7, "beta1": 0.9, "beta2": 0.999}
    group |= {"weight_pow_coeff": 0.0, "weight_lr_power": 2, "weight_decay": DECAY, "params": [0]}
    group |= {"eval_interp_coeff": 0.9967, "iterate_averaging_type": Averaging.GPA}
    theirs = {
        "state": {0: state | shared | {"train_mode": torch.tensor(True)}},
        "param_groups": [group],
    }
    q = torch.nn.Parameter(p.detach().clone())
    optimizer = sftorch.GPAAdamW([q], LR, weight_decay=DECAY, decay_at="y")
    notices = import_state_dict(optimizer, theirs)
    assert notices == ["GPAAdamW's state is carried over"]
    assert torch.equal(optimizer.eval_params()[q], x)
    for t in range(STEPS, STEPS + 5):
        p.grad = torch.from_numpy(gradient(t))
        q.grad = p.grad.clone()
        whole.step()
        optimizer.step()
    assert torch.equal(p, q)
