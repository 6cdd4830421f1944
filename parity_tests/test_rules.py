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
from sfcore import averaging, convert
from sfcore.laws import LAWS
from sfjax.checkpoint import Checkpoints as JaxCheckpoints
from sfjax.tests.test_scalars import MILLION, of_a_rule
from sftorch.checkpoint import Checkpoints
from sftorch.law.scalars import Clock, next_step

RULES = [
    {"c_warmup": 9},
    {"refined_c": 20.0, "weight_lr": "current"},
    {"window": 4},
    {"window": 4, "window_rule": "constant", "decay_at": "z"},
    {"decay_power": 2, "c_warmup": 3},
    {"decay_power": "normalized", "warmup_steps": 4},
    {"beta_rule": "anneal", "beta_max": 0.99, "beta_anneal_steps": 8},
    {"beta_rule": "amuse", "beta_hold_steps": 3, "refined_c": 4.0},
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
    tx = sfjax.schedule_free_adamw(LR, weight_decay=DECAY, **LAWS["adamw"].to_jax(options))
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
        crossed, state = in_jax(options, range(6, 12), found.params, found.opt_state)
        for name, p in crossed.items():
            np.testing.assert_allclose(p, resumed[name], rtol=1e-12)

        config = LAWS["adamw"].options(lr=LR, weight_decay=DECAY, **options)
        with JaxCheckpoints(tmp_path / "new") as theirs:
            theirs.save(12, crossed, state, hyperparameters=config)
        path, _ = convert.convert(tmp_path / "new", tmp_path / "back", to="torch")
        model, optimizer = in_torch(options, range(0))
        Checkpoints(tmp_path / "newer").restore(model, optimizer, resume=path)
        in_torch(options, range(12, 15), model, optimizer)
        for name, p in in_torch(options, range(15))[0].named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("refined_c of amuse", 10**5), *(pytest.param(name, 10**6, marks=pytest.mark.slow) for name in MILLION)],
)
def test_the_rules_of_the_average_are_right_after_a_million_steps_in_torch_too(name, steps):
    values, expected = of_a_rule(name, steps)
    clock, c, beta = Clock(0, 0.0, 0.0), 0.0, 0.0
    for step in range(steps):
        clock, c, _, beta, _ = next_step(LAWS["sgd"], clock, step, values)
    # Measured: at most 1.3e-14.
    assert c == pytest.approx(expected, rel=1e-12)
    assert beta == averaging.beta_after(steps, values)


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


CHANGES = [(RULES[-2], {}), ({}, RULES[-1]), (RULES[-2], RULES[-1])]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_a_run_resumed_with_another_rule_of_beta_moves_y_and_not_x(before, after, tmp_path):
    values = LAWS["adamw"].defaults | after
    with jax.enable_x64(True):
        model, optimizer = in_torch(before, range(6))
        x = optimizer.eval_params().values()
        with Checkpoints(tmp_path / "torch") as checkpoints:
            checkpoints.save(model, optimizer)
        model, optimizer = in_torch(after, range(0))
        Checkpoints(tmp_path / "torch").restore(model, optimizer)
        for found, was in zip(optimizer.eval_params().values(), x, strict=True):
            torch.testing.assert_close(found, was, rtol=1e-14, atol=1e-14)
        in_torch(after, range(6, 7), model, optimizer)
        beta = averaging.beta_after(7, values)
        assert optimizer.param_groups[0]["y_beta"] == beta
        now = optimizer.eval_params()
        for p in model.parameters():
            expected = beta * now[p] + (1 - beta) * optimizer.state[p]["z"]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-13)

        params, state = in_jax(before, range(6))
        first = sfjax.schedule_free_eval_params(state, params)
        for name, was in zip(START, x, strict=True):
            np.testing.assert_allclose(first[name], was, rtol=1e-12)
        params, state = in_jax(after, range(6, 7), params, state)
        second = sfjax.schedule_free_eval_params(state, params)
        c = optimizer.metrics()[0]["c"]
        for name, z in state.z.items():
            np.testing.assert_allclose(second[name], (1 - c) * first[name] + c * z, rtol=1e-13)
        assert float(state.b1) == pytest.approx(beta, rel=1e-15)


@pytest.mark.parametrize("rule", RULES[-2:], ids=str)
def test_x_is_the_mean_of_5000_z_while_beta_rises_in_jax(rule):
    rule = rule | ({"beta_anneal_steps": 3000} if "beta_max" in rule else {"refined_c": 0.0})
    tx = sfjax.schedule_free_sgd(0.01, b1=0.7, **LAWS["sgd"].to_jax(rule))
    with jax.enable_x64(True):
        start = jnp.linspace(-1.0, 1.0, 7)
        noise = jnp.asarray(np.random.default_rng(0).normal(size=(5000, 7)))

        def step(carry, g):
            params, state, total = carry
            updates, state = tx.update(g + params, state, params)
            return (params + updates, state, total + state.z), None

        carry = (start, tx.init(start), jnp.zeros(7))
        (params, state, total), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, noise))(carry)
        mean, beta = (
            np.asarray(total) / 5000,
            averaging.beta_after(5000, LAWS["sgd"].defaults | {"beta": 0.7} | rule),
        )
        x = sfjax.schedule_free_eval_params(state, params)
        # Measured: at most 4e-15.
        np.testing.assert_allclose(x, mean, atol=1e-12, rtol=0)
        np.testing.assert_allclose(params, beta * mean + (1 - beta) * state.z, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", RULES[-2:], ids=str)
def test_the_wrappers_have_the_rules_of_beta_too(rule):
    model, plain = Model().double(), Model().double()
    wrapper = sftorch.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=LR), **rule)
    optimizer = sftorch.SGDScheduleFree(plain.parameters(), LR, **rule)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(start) for name, start in START.items()}
        tx = sfjax.schedule_free(optax.sgd(LR), LR, **LAWS["wrapper"].to_jax(rule))
        state = tx.init(params)
        for step in range(12):
            grads = gradient(step)
            for one in (model, plain):
                for name, p in one.named_parameters():
                    p.grad = torch.from_numpy(grads[name])
            wrapper.step()
            optimizer.step()
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        for name, p in plain.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-13, atol=1e-13)
            np.testing.assert_allclose(params[name], p.detach().numpy(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", RULES[-2:], ids=str)
@pytest.mark.parametrize("precision", ["exact", "lean"])
def test_16_bits_follow_a_beta_that_rises(rule, precision):
    """Both forms against float32, in both twins; the lean form rounds."""
    start = torch.linspace(-1, 1, 64, dtype=torch.float64)
    wide, narrow = (torch.nn.Parameter(start.to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    wide.data.copy_(narrow.data)
    optimizers = [
        sftorch.AdamWScheduleFree([wide], 0.02, **rule),
        sftorch.AdamWScheduleFree([narrow], 0.02, precision=precision, **rule),
    ]
    factories = [sfjax.schedule_free_adamw(0.02, precision=precision, **LAWS["adamw"].to_jax(rule))]
    params = jnp.asarray(narrow.detach().float().numpy(), jnp.bfloat16)
    state = factories[0].init(params)
    update = jax.jit(factories[0].update)
    for step in range(60):
        g = np.random.default_rng(step).normal(size=64).astype(np.float32)
        narrow.grad, wide.grad = torch.from_numpy(g).bfloat16(), torch.from_numpy(g).bfloat16().float()
        for optimizer in optimizers:
            optimizer.step()
        updates, state = update(jnp.asarray(g, jnp.bfloat16), state, params)
        params = optax.apply_updates(params, updates)
    (x,), (found,) = (one.eval_params().values() for one in optimizers)
    in_jax = sfjax.schedule_free_eval_params(state, params, dtype=jnp.float32)
    moved = float((x - start.float()).norm())
    # Measured: exact the same x in bfloat16, but next to a tie, and 2e-6 in JAX; lean 0.006, beside bfloat16.
    if precision == "exact":
        assert ((found.float() - x).abs() <= 2**-8 * x.abs()).all()
    else:
        assert float((found.float() - x).norm()) < 0.05 * moved + 2**-8 * float(x.norm())
    limit = 1e-4 if precision == "exact" else 0.05
    assert float(np.linalg.norm(np.asarray(in_jax) - x.numpy())) < limit * moved
