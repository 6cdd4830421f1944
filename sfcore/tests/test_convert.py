"""convert: the same numbers under other names, bit for bit, or a reason why not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import schedulefree
import torch

import sfjax
from sfcore import __main__, exchange, names, store
from sfcore.convert import convert
from sfcore.iterates import iterates
from sfcore.meta import Meta
from sfcore.tests import examples, runs


@pytest.fixture
def torch_checkpoint(tmp_path):
    model, optimizer = runs.torch_run(lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01))
    return runs.store_checkpoint(tmp_path / "torch", model, optimizer), model, optimizer


def _all(path):
    meta, state = store.read(path)
    return meta, state, store.read(path, store.INFERENCE)[1]


def test_torch_to_jax_and_back_is_the_identity(torch_checkpoint, tmp_path):
    path, _, _ = torch_checkpoint
    there, _ = convert(path, tmp_path / "jax", "jax")
    back, _ = convert(there, tmp_path / "back", "torch")
    (meta, state, x), (meta_back, state_back, x_back) = _all(path), _all(back)
    assert examples.same(state, state_back)
    assert examples.same(x, x_back)
    for name in (
        "framework",
        "step",
        "epoch",
        "position",
        "metrics",
        "parameters",
        "optimizer",
    ):
        assert getattr(meta, name) == getattr(meta_back, name), name
    assert meta.groups[0]["clock"].items() <= meta_back.groups[0]["clock"].items()
    assert meta.groups[0]["parameters"] == meta_back.groups[0]["parameters"]


def test_jax_names_and_layouts_are_those_of_flax(torch_checkpoint, tmp_path):
    path, model, _ = torch_checkpoint
    meta, state, x = _all(convert(path, tmp_path / "jax", "jax")[0])
    assert meta.framework == "jax"
    assert meta.groups[0]["parameters"] == ["0/kernel", "0/bias", "1/scale", "1/bias", "4/kernel", "4/bias"]
    assert meta.parameters["4/kernel"]["shape"] == [12, 2]
    assert meta.groups[0]["clock"]["beta"] == 0.9
    assert np.array_equal(state["y/4/kernel"], model[4].weight.detach().numpy().T)
    assert np.array_equal(state["y/0/kernel"], model[0].weight.detach().numpy().transpose(2, 3, 1, 0))
    assert np.array_equal(x["1/mean"], model[1].running_mean.numpy())
    assert int(state["extra/torch/1.num_batches_tracked"]) == runs.STEPS


def test_a_map_gives_the_names_and_the_flattening(torch_checkpoint, tmp_path, capsys):
    path, _, _ = torch_checkpoint
    entries = {
        "Conv_0": "0",
        "BatchNorm_0": "1",
        "Dense_0/bias": "4.bias",
        "Dense_0/kernel": {
            "torch": "4.weight",
            "split": [2, 2, 3, 2],
            "axes": [3, 2, 0, 1],
            "jax_shape": [12, 2],
        },
    }
    (tmp_path / "map.json").write_text(json.dumps(entries))
    arguments = [str(path), str(tmp_path / "jax"), "--to", "jax", "--map", str(tmp_path / "map.json")]
    assert __main__.main(["convert", *arguments]) == 0
    assert f"written: {tmp_path / 'jax' / 'step_000000007'}" in capsys.readouterr().out
    state = _all(tmp_path / "jax" / "step_000000007")[1]
    theirs = store.read(path)[1]["z/4.weight"].reshape(2, 3, 2, 2)
    assert np.array_equal(state["z/Dense_0/kernel"], theirs.transpose(2, 3, 1, 0).reshape(12, 2))
    assert "v/Conv_0/kernel" in state
    assert "buffer/BatchNorm_0/var" in state


def test_names_that_cannot_be_told_are_all_listed(tmp_path, capsys):
    meta = examples.meta(
        1, groups=[{"hyperparameters": {}, "clock": {}, "parameters": ["a.weight", "b.weight"]}]
    )
    meta.groups[0]["clock"] = {"step": 1, "lr_max": 1.0, "weight_sum": 1.0}
    meta.parameters = {
        n: {"shape": [2, 2], "dtype": "float32", "clock": None} for n in ("a.weight", "b.weight")
    }
    state = {f"y/{name}": np.ones((2, 2), np.float32) for name in meta.parameters}
    path = store.write(tmp_path / "run", meta, state, {})
    assert __main__.main(["convert", str(path), str(tmp_path / "jax"), "--to", "jax"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("may be a Linear's without bias or an Embedding's") == 2
    assert not (tmp_path / "jax").exists()


def _jax_exchange(folder, **options):
    from sfjax.checkpoint import export_exchange

    params, state = runs.jax_run(runs.sfjax_transformation())
    hyperparameters = {"optimizer": "adamw", "lr": 0.01, "beta": 0.9}
    buffers = {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    options = {"hyperparameters": hyperparameters, "buffers": buffers} | options
    return export_exchange(folder, params, state, step=7, **options)


def test_jax_to_torch_and_back_is_the_identity(tmp_path):
    path = _jax_exchange(tmp_path / "jax")
    there, _ = convert(path, tmp_path / "torch", "torch")
    back, _ = convert(there, tmp_path / "back", "jax", {"bn": "bn"})
    (meta, state, x), (meta_back, state_back, x_back) = _all(path), _all(back)
    assert int(state_back.pop("extra/torch/bn.num_batches_tracked")) == 0
    assert examples.same(state, state_back)
    assert examples.same(x, x_back)
    assert meta.parameters == meta_back.parameters


def test_torch_gets_the_counters_that_its_batchnorm_wants(tmp_path):
    there, _ = convert(_jax_exchange(tmp_path / "jax"), tmp_path / "torch", "torch")
    meta, state, x = _all(there)
    assert meta.framework == "torch"
    assert meta.groups[0]["torch"]["books"]["y_beta"] == pytest.approx(0.9)
    assert state["buffer/bn.num_batches_tracked"].dtype == np.int64
    assert x.keys() == {"fc.weight", "fc.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def test_orbax_goes_to_every_target(tmp_path):
    from sfjax.checkpoint import Checkpoints

    params, state = runs.jax_run(runs.sfjax_transformation())
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(7, params, state, hyperparameters={"optimizer": "adamw", "lr": 0.01, "beta": 0.9})
    x, y, z = sfjax.iterates(state, params)
    meta, leaves, _ = _all(convert(tmp_path / "run", tmp_path / "exchange", "exchange")[0])
    assert meta.framework == "jax"
    assert np.array_equal(leaves["z/fc/kernel"], z["fc"]["kernel"])
    leaves = _all(convert(tmp_path / "run", tmp_path / "torch", "torch")[0])[1]
    assert np.array_equal(leaves["y/fc.weight"], y["fc"]["kernel"].T)
    path, _ = convert(tmp_path / "run", tmp_path / "x.safetensors", "inference")
    assert np.allclose(exchange.read_tensors(path)["fc/kernel"], x["fc"]["kernel"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_file_of_schedulefree_goes_to_every_target(tmp_path, mode):
    model, optimizer = runs.torch_run(lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01))
    optimizer.eval()
    x = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    getattr(optimizer, mode)()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    shipped = exchange.read_tensors(convert(tmp_path / "run.pt", tmp_path / "x.safetensors", "inference")[0])
    assert shipped.keys() == x.keys()
    for name, value in x.items():
        # One rounding of float32 against another, values up to 1; measured: at most 3e-8.
        assert np.allclose(shipped[name], value, rtol=0, atol=1.5e-7), name
    meta, state, _ = _all(convert(tmp_path / "run.pt", tmp_path / "exchange", "exchange")[0])
    assert (meta.framework, meta.weights_hold, meta.step) == ("torch", "y" if mode == "train" else "x", 7)
    assert state.keys() >= {"z/0.weight", "v/0.weight", "y/0.weight", "buffer/1.running_mean"}
    assert meta.precision == "float32"
    assert "z/0/kernel" in _all(convert(tmp_path / "run.pt", tmp_path / "jax", "jax")[0])[1]


def test_a_run_of_torch_goes_on_in_jax(tmp_path):
    from sfjax.checkpoint import import_exchange

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01, warmup_steps=10)
    rng = np.random.default_rng(0)
    grads = [
        {n: rng.standard_normal(p.shape).astype(np.float32) for n, p in model.named_parameters()}
        for _ in range(60)
    ]

    def step(recorded):
        for name, p in model.named_parameters():
            p.grad = torch.tensor(recorded[name])  # a copy, because upstream writes to it
        optimizer.step()

    optimizer.train()
    for recorded in grads[:10]:
        step(recorded)
    path = runs.store_checkpoint(tmp_path / "torch", model, optimizer)
    there, _ = convert(path, tmp_path / "jax", "jax")
    found = names.to_jax({n: tuple(p.shape) for n, p in model.named_parameters()})
    start = found.to_jax({n: p.detach().clone().numpy() for n, p in model.named_parameters()})
    transformation = sfjax.schedule_free_adamw(0.01, warmup_steps=10)
    params = jax.tree.map(jnp.zeros_like, start)
    restored = import_exchange(there, params, transformation.init(params))
    params, state = restored.params, restored.opt_state
    update = jax.jit(transformation.update)
    for recorded in grads[10:]:
        step(recorded)
        updates, state = update(found.to_jax(recorded), state, params)
        params = optax.apply_updates(params, updates)
    moved = found.to_jax({n: p.detach().numpy() for n, p in model.named_parameters()})
    way = max(np.abs(moved[n] - start[n]).max() for n in moved)
    # 50 float32 steps of two programs, relative to the way; measured: 1.3e-6.
    assert max(np.abs(moved[n] - params[n]).max() for n in moved) <= 1e-5 * way


def test_gradients_of_an_unfinished_update_go_back_to_their_place_in_the_data(torch_checkpoint, tmp_path):
    path, _, _ = torch_checkpoint
    meta, state, x = _all(path)
    meta.accumulation, meta.position = {"steps": 4, "position": 3}, 11
    state |= {f"grad/{name}": state[f"y/{name}"] for name in meta.parameters}
    store.write(tmp_path / "middle", meta, state, x)
    there, notices = convert(tmp_path / "middle", tmp_path / "jax", "jax")
    moved, leaves, _ = _all(there)
    assert (moved.accumulation, moved.position) == ({"steps": 4, "position": 0}, 8)
    assert not exchange.of_role(leaves, "grad")
    assert any("take them again from position 8" in notice for notice in notices)
    kept, _ = convert(tmp_path / "middle", tmp_path / "same", "exchange")
    assert examples.same(_all(kept)[1], state)


@pytest.mark.parametrize("hold", ["y", "x"])
@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
def test_x_follows_from_what_a_checkpoint_holds(hold, beta):
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 5))
    y = beta * x + (1 - beta) * z
    clock = {"step": 1, "lr_max": 1.0, "weight_sum": 1.0}
    meta = Meta("torch", "sgd", 1, weights_hold=hold)
    meta.groups = [{"hyperparameters": {"beta": beta}, "clock": clock, "parameters": ["w"]}]
    meta.parameters = {"w": {"shape": [5], "dtype": "float64", "clock": clock}}
    state = {"y/w": x if hold == "x" else y, "z/w": z} | ({"x/w": x} if beta == 0 else {})
    (found,) = iterates(meta, state)
    # float64, values up to 2, one division by beta; measured: at most 2.3e-16 over 50 seeds.
    assert np.allclose(found.x, x, rtol=0, atol=1e-15)
    assert np.allclose(found.y, y, rtol=0, atol=1e-15)
