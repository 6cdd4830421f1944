"""ScheduleFree+ in both twins: three sequences in NumPy, a recorded run of upstream's, and its mistakes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sfjax
import sftorch
from sfcore import HyperparameterError, averaging, convert
from sfcore.hyperparameters import AdamW
from sfcore.laws import LAWS
from sfjax.checkpoint import Checkpoints as JaxCheckpoints
from sftorch.checkpoint import Checkpoints, import_state_dict

SIZE, LR = 7, 0.3
START, TARGET = np.linspace(-1, 2, SIZE), np.linspace(1, -1, SIZE)
CURVATURE = np.geomspace(0.1, 3, SIZE)
EVERYTHING = {"anneal": 30, "r": 2.0, "c_warmup": 5, "weight_decay": 5.0, "polyak_beta": 0.8, "f_star": 0.01}


def loss_and_gradient(y, step):
    """Returns a quadratic with noise, above 0."""
    noise = 0.1 * np.random.default_rng(step).normal(size=SIZE)
    away = y - TARGET - noise
    return float(0.5 * (CURVATURE * away * away).sum() + 0.02), CURVATURE * away


def reference(
    steps, mistake="", clip=1.0, *, anneal=0, r=0.0, c_warmup=0, weight_decay=0.0, polyak_beta=0.0, f_star=0.0
):
    """Returns x, y, z after some steps, of the equations as they are written, or with a mistake."""
    x = y = z = START
    m = v = np.zeros(SIZE)
    ema = weight_sum = lr_max = 0.0
    options = LAWS["adamw"].defaults | {
        "beta_rule": "anneal" if anneal else "constant",
        "beta_anneal_steps": anneal,
    }
    for t in range(1, steps + 1):
        loss, g = loss_and_gradient(y, t)
        g = clip * g
        beta = averaging.beta_after(t, options)
        l1, inner = np.abs(g).sum(), beta * float(g @ (z - x))
        if mistake != "clip":
            l1, inner = l1 / clip, inner / clip
        ema = polyak_beta * ema + (1 - polyak_beta) * math.sqrt(math.pi / 2) * l1
        norm = ema / (1 - polyak_beta**t)
        if mistake == "corrected twice":
            ema = norm
        lr = LR * max(0.0, loss - f_star + inner) / norm
        lr_max = max(lr_max, lr)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        direction = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        z = z - lr * direction - lr * lr * weight_decay * y
        weight = t**r * lr_max**2
        c = 1.0
        if t > c_warmup:
            weight_sum += weight
            c = weight / weight_sum
        x = (1 - c) * x + c * z
        y = beta * x + (1 - beta) * z
    return x, y, z


def in_torch(steps, clip=1.0, *, anneal=0, **options):
    p = torch.nn.Parameter(torch.tensor(START))
    optimizer = sftorch.AdamCScheduleFreePlusPaper([p], LR, sf_beta1_anneal_steps=anneal, **options)
    for t in range(1, steps + 1):
        loss, g = loss_and_gradient(p.detach().numpy(), t)
        p.grad = torch.from_numpy(clip * g)
        optimizer.step(loss=loss, clip=clip)
    x = optimizer.eval_params()[p]
    return tuple(one.detach().numpy().copy() for one in (x, p, optimizer.state[p]["z"]))


def in_jax(steps, clip=1.0, *, anneal=0, **options):
    tx = sfjax.schedule_free_plus(LR, b1_anneal_steps=anneal, **options)
    params = jnp.asarray(START)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, steps + 1):
        loss, g = loss_and_gradient(np.asarray(params), t)
        updates, state = update(jnp.asarray(clip * g), state, params, value=loss, clip=clip)
        params = optax.apply_updates(params, updates)
    return tuple(np.asarray(one) for one in sfjax.iterates(state, params))


@pytest.mark.parametrize("run", [in_torch, in_jax])
@pytest.mark.parametrize(("options", "clip"), [({}, 1.0), (EVERYTHING, 1.0), (EVERYTHING, 0.01)], ids=str)
def test_both_twins_take_the_three_sequences(run, options, clip):
    with jax.enable_x64(True):
        for found, expected in zip(
            run(60, clip, **options), reference(60, clip=clip, **options), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("mistake", "clip"), [("corrected twice", 1.0), ("clip", 0.5)])
@pytest.mark.parametrize("run", [in_torch, in_jax])
def test_a_mistake_of_upstreams_would_be_caught_by_step_20(run, mistake, clip):
    with jax.enable_x64(True):
        x, *_ = run(20, clip, **EVERYTHING)
        wrong, *_ = reference(20, mistake, clip, **EVERYTHING)
    assert np.abs(x - wrong).max() > 0.01


# Of facebookresearch/schedule_free at 70785b5, AdamCScheduleFreePlusPaper.
UPSTREAM_X = [
    1.027691403615239,
    0.6548044204117794,
    0.39603970095099633,
    -0.0048592456133524226,
    -0.28693366010294247,
    -0.7241422126384242,
    -0.8979988788576774,
]
UPSTREAM_Y = [
    1.0284843889504598,
    0.6528083993898036,
    0.39672367917927603,
    -0.005105660355736557,
    -0.28799798780936336,
    -0.7226860465337004,
    -0.9017166950097626,
]


@pytest.mark.parametrize("run", [in_torch, in_jax])
def test_without_smoothing_it_is_upstreams_run(run):
    with jax.enable_x64(True):
        x, y, _ = run(60, anneal=30, r=2.0, c_warmup=5, weight_decay=5.0)
    np.testing.assert_allclose(x, UPSTREAM_X, rtol=1e-11)
    np.testing.assert_allclose(y, UPSTREAM_Y, rtol=1e-11)


def test_without_a_gradient_nothing_moves_and_nothing_divides_by_zero():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sftorch.AdamCScheduleFreePlusPaper([p])
    tx = sfjax.schedule_free_plus()
    params = jnp.ones(3)
    state = tx.init(params)
    for _ in range(3):
        p.grad = torch.zeros(3)
        optimizer.step(loss=2.0)
        updates, state = tx.update(jnp.zeros(3), state, params, value=2.0)
        params = optax.apply_updates(params, updates)
    assert p.tolist() == params.tolist() == [1.0, 1.0, 1.0]
    p.grad = torch.ones(3)
    optimizer.step(loss=2.0)
    updates, state = tx.update(jnp.ones(3), state, params, value=2.0)
    assert p.tolist() == pytest.approx(optax.apply_updates(params, updates).tolist(), rel=1e-6)
    assert p.tolist() != [1.0, 1.0, 1.0]


def test_a_step_that_is_skipped_leaves_the_norm():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sftorch.AdamCScheduleFreePlusPaper([p], polyak_beta=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    norms = []
    for factor in (1.0, math.inf, 1.0):
        loss = (p * p).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        p.grad.mul_(factor)
        scaler.unscale_(optimizer)
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        norms.append(optimizer.param_groups[0]["grad_l1_ema"])
    assert norms[0] == norms[1] == pytest.approx(6 * math.sqrt(math.pi / 2))
    assert norms[2] != norms[1]
    assert optimizer.metrics()[0]["step"] == 2
    tx = optax.apply_if_finite(sfjax.schedule_free_plus(polyak_beta=0.9), 5)
    params = jnp.ones(3)
    state = tx.init(params)
    _, first = tx.update(2 * params, state, params, value=3.0)
    _, second = tx.update(jnp.full(3, jnp.nan), first, params, value=3.0)
    assert second.inner_state.grad_l1_ema == first.inner_state.grad_l1_ema > 0


def test_losses_of_micro_batches_are_averaged_and_a_closure_gives_its_own():
    runs = []
    for form in ("mean", "list", "closure"):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = sftorch.AdamCScheduleFreePlusPaper([p])
        p.grad = torch.ones(3, dtype=torch.float64)
        if form == "closure":
            assert optimizer.step(lambda: 2.0) == 2.0
        elif form == "list":
            optimizer.step(loss=[1.0, torch.tensor(3.0)])
        else:
            assert optimizer.step_func(2.0) == 2.0
        runs.append(p.tolist())
    assert runs[0] == runs[1] == runs[2]
    tx = sfjax.schedule_free_plus()
    params = jnp.ones(3)
    (one, _), (other, _) = (
        tx.update(params, tx.init(params), params, value=value) for value in (2.0, jnp.array([1.0, 3.0]))
    )
    assert one.tolist() == other.tolist()


def test_what_it_cannot_do_is_refused_by_name_before_anything_changes():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = sftorch.AdamCScheduleFreePlusPaper([p])
    p.grad = torch.ones(3)
    for call, message in (
        (optimizer.step, "loss must be passed"),
        (lambda: optimizer.step(lambda: 1.0, loss=1.0), r"loss must be passed .* in one way"),
        (lambda: optimizer.step(loss=1.0, clip=0.0), r"clip must be a finite number > 0, got 0\.0"),
        (lambda: optimizer.step(loss=math.nan), "loss and gradients must be finite"),
        (lambda: optimizer.step(3.0), r"closure must be a function, got 3\.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="which takes Polyak steps"):
        sftorch.step_in_backward(optimizer)
    with pytest.raises(HyperparameterError) as caught:
        sftorch.AdamCScheduleFreePlusPaper([p], betas=(1.0, 0.9), sf_beta1=2.0)
    assert [line.split(" must")[0] for line in caught.value.problems] == ["sf_beta1", "betas[0]"]
    with pytest.raises(HyperparameterError, match=r"polyak_beta must be a number in \[0, 1\)"):
        sftorch.AdamCScheduleFreePlusPaper([p], polyak_beta=1.0)
    with pytest.raises(HyperparameterError, match="polyak_beta"):
        sfjax.schedule_free_plus(polyak_beta=1.0)
    groups = [{"params": [p]}, {"params": [torch.nn.Parameter(torch.ones(1))], "f_star": 1.0}]
    apart = sftorch.AdamCScheduleFreePlusPaper(groups)
    p.grad = torch.ones(3)
    with pytest.raises(HyperparameterError, match="polyak_beta and f_star must be the same in all groups"):
        apart.step(loss=1.0)
    tx, params = sfjax.schedule_free_plus(), jnp.ones(3)
    state = tx.init(params)
    with pytest.raises(TypeError, match="value must be the loss, got None"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match=r"clip must be a finite number > 0, got -1\.0"):
        tx.update(params, state, params, value=1.0, clip=-1.0)
    with pytest.raises(TypeError, match="state must be a ScheduleFreePlusState"):
        tx.update(params, state.inner, params, value=1.0)
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_16_bits_and_the_lean_form_take_polyak_steps():
    wide, _, _ = in_torch(60, **EVERYTHING)
    for precision in ("exact", "lean"):
        p = torch.nn.Parameter(torch.tensor(START, dtype=torch.bfloat16))
        options = {name: value for name, value in EVERYTHING.items() if name != "anneal"}
        optimizer = sftorch.AdamCScheduleFreePlusPaper(
            [p], LR, sf_beta1_anneal_steps=30, precision=precision, **options
        )
        tx = sfjax.schedule_free_plus(LR, b1_anneal_steps=30, precision=precision, **options)
        params = jnp.asarray(START, jnp.bfloat16)
        state, update = tx.init(params), jax.jit(tx.update)
        for t in range(1, 61):
            loss, g = loss_and_gradient(p.detach().double().numpy(), t)
            p.grad = torch.from_numpy(g).bfloat16()
            optimizer.step(loss=loss)
            loss, g = loss_and_gradient(np.asarray(params, np.float64), t)
            updates, state = update(jnp.asarray(g, jnp.bfloat16), state, params, value=loss)
            params = optax.apply_updates(params, updates)
        # Measured: at most 0.02.
        for found in (
            optimizer.eval_params()[p].double().numpy(),
            sfjax.schedule_free_eval_params(state, params),
        ):
            assert np.abs(np.asarray(found, np.float64) - wide).max() < 0.1 * np.abs(wide - START).max()


def torch_run(steps, model=None, optimizer=None):
    """Takes the steps of a range with every option; returns model and optimizer."""
    if model is None:
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.tensor(START))
        options = {name: value for name, value in EVERYTHING.items() if name != "anneal"}
        optimizer = sftorch.AdamCScheduleFreePlusPaper([model.w], LR, sf_beta1_anneal_steps=30, **options)
    for t in steps:
        loss, g = loss_and_gradient(model.w.detach().numpy(), t)
        model.w.grad = torch.from_numpy(g)
        optimizer.step(loss=loss)
    return model, optimizer


def jax_run(steps, params=None, state=None):
    """The same in JAX; returns parameters and state."""
    options = {name: value for name, value in EVERYTHING.items() if name != "anneal"}
    tx = sfjax.schedule_free_plus(LR, b1_anneal_steps=30, **options)
    if params is None:
        params = {"w": jnp.asarray(START)}
        state = tx.init(params)
    for t in steps:
        loss, g = loss_and_gradient(np.asarray(params["w"]), t)
        updates, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    return params, state


def test_a_resumed_run_ends_in_the_same_bits_and_crosses_there_and_back(tmp_path):
    with jax.enable_x64(True):
        whole, uncut = torch_run(range(1, 21))
        model, optimizer = torch_run(range(1, 11))
        with Checkpoints(tmp_path / "torch") as checkpoints:
            checkpoints.save(model, optimizer)
        model, optimizer = torch_run(range(0))
        Checkpoints(tmp_path / "torch").restore(model, optimizer)
        torch_run(range(11, 21), model, optimizer)
        assert torch.equal(model.w, whole.w)
        groups = [one.state_dict()["param_groups"] for one in (optimizer, uncut)]
        assert groups[0] == groups[1]  # and no option that it has not

        path, _ = convert.convert(tmp_path / "torch", tmp_path / "crossed", to="jax")
        rule = {"beta_rule": "anneal", "beta_anneal_steps": 30, "decay_power": 2, "weight_decay": 5.0}
        config = AdamW(lr=LR, b2=0.95, inner_momentum=0.9, r=2.0, c_warmup=5, **rule)
        with JaxCheckpoints(tmp_path / "new") as theirs:
            found = theirs.restore(*jax_run(range(0)), resume=path, hyperparameters=config)
            assert "beta" not in {row.name for row in found.changes}
        crossed, state = jax_run(range(11, 16), found.params, found.opt_state)
        with JaxCheckpoints(tmp_path / "jax") as theirs:
            theirs.save(15, crossed, state, hyperparameters=config)
            theirs.wait()
            again = theirs.restore(*jax_run(range(0)))
        once, state = jax_run(range(16, 21), crossed, state)
        twice, _ = jax_run(range(16, 21), again.params, again.opt_state)
        np.testing.assert_array_equal(once["w"], twice["w"])
        np.testing.assert_allclose(once["w"], whole.w.detach().numpy(), rtol=1e-11)

        path, _ = convert.convert(tmp_path / "jax", tmp_path / "back", to="torch")
        model, optimizer = torch_run(range(0))
        Checkpoints(tmp_path / "newer").restore(model, optimizer, resume=path)
        torch_run(range(16, 21), model, optimizer)
        np.testing.assert_allclose(model.w.detach().numpy(), whole.w.detach().numpy(), rtol=1e-11)


@pytest.mark.parametrize("holds", ["x", "y"])
def test_upstreams_state_is_imported_and_its_run_goes_on(holds):
    whole, _ = torch_run(range(1, 21))
    model, before = torch_run(range(1, 11))
    y, x, state = model.w.detach().clone(), before.eval_params()[model.w], before.state[model.w]
    group = dict(before.param_groups[0], params=[0], train_mode=holds == "y")
    names = ("lr", "betas", "sf_beta1", "eps", "r", "k", "train_mode", "weight_sum", "lr_max", "scheduled_lr")
    names += ("polyak_beta", "sf_beta1_anneal_steps", "sf_beta1_max", "c_warmup", "weight_lr_power")
    tensors = {"x": x, "y": y, **{name: state[name].clone() for name in ("z", "exp_avg", "exp_avg_sq")}}
    theirs = {
        "state": {0: tensors},
        "param_groups": [{name: group[name] for name in (*names, "weight_decay", "grad_l1_ema", "params")}],
    }
    model, optimizer = torch_run(range(0))
    if holds == "x":
        optimizer.eval()
    with torch.no_grad():
        model.w.copy_(x if holds == "x" else y)
    notices = import_state_dict(optimizer, theirs)
    assert notices == ["schedulefree's state is carried over"]
    optimizer.train()
    torch.testing.assert_close(optimizer.eval_params()[model.w], x, rtol=1e-13, atol=1e-13)
    optimizer.param_groups[0]["grad_l1_ema"] = group["grad_l1_ema"]  # which upstream's has corrected twice
    torch_run(range(11, 21), model, optimizer)
    torch.testing.assert_close(model.w, whole.w, rtol=1e-11, atol=1e-12)
