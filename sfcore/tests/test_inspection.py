"""inspect says what a file is, where it stands and what its iterates are, whoever wrote it."""

import os
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import pytorch_optimizer
import schedulefree
import torch

import sfjax
import sftorch
from sfcore import exchange, inspection, store
from sfcore.exchange import CheckpointError
from sfcore.tests import examples, runs

# x and y in float32, against upstream's own eval() and train(); relative to |y|, measured: at most 5.1e-8.
CLOSE = 2.5e-7

OPTIMIZERS = {
    "schedulefree sgd": (schedulefree.SGDScheduleFree, {"lr": 0.1}, "schedulefree", "sgd"),
    "schedulefree adamw": (
        schedulefree.AdamWScheduleFree,
        {"lr": 0.01, "warmup_steps": 3},
        "schedulefree",
        "adamw",
    ),
    "schedulefree radam": (schedulefree.RAdamScheduleFree, {"lr": 0.01}, "schedulefree", "radam"),
    "pytorch_optimizer sgd": (pytorch_optimizer.ScheduleFreeSGD, {"lr": 0.1}, "pytorch_optimizer", "sgd"),
    "pytorch_optimizer adamw": (
        pytorch_optimizer.ScheduleFreeAdamW,
        {"lr": 0.01},
        "pytorch_optimizer",
        "adamw",
    ),
    "sftorch sgd": (sftorch.SGDScheduleFree, {"lr": 0.1, "momentum": 0.8}, "sftorch", "sgd"),
    "sftorch adamw": (sftorch.AdamWScheduleFree, {"lr": 0.01, "prior_steps": 5}, "sftorch", "adamw"),
}


def _norms(iterates):
    found = {name: np.linalg.norm(vector) for name, vector in iterates.items()}
    return found | {"z - x": np.linalg.norm(iterates["z"] - iterates["x"])}


def _check(found, expected):
    for name, norm in expected.items():
        assert found["norms"][name] == pytest.approx(norm, rel=0, abs=CLOSE * expected["y"]), name


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_torch_file_of_model_and_optimizer_shows_its_iterates_in_either_mode(tmp_path, case, mode):
    build, options, program, kind = OPTIMIZERS[case]
    model, optimizer = runs.torch_run(lambda params: build(params, **options))
    expected = _norms(runs.torch_iterates(model, optimizer))
    getattr(optimizer, mode)()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    found = inspection.inspect(tmp_path / "run.pt")
    assert found["what"] == f"state of {program} ({kind})"
    assert found["step"] == runs.STEPS
    assert found["parameters"] == 6
    assert found["weights_hold"] == ("y" if mode == "train" else "x")
    assert found["groups"][0]["hyperparameters"]["lr"] == options["lr"]
    _check(found, expected)


def test_tensors_beside_the_state_dicts_are_not_taken_for_weights(tmp_path):
    model, optimizer = runs.torch_run(sftorch.AdamWScheduleFree)
    expected = _norms(runs.torch_iterates(model, optimizer))
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    others = {"rng": torch.get_rng_state(), "best_loss": torch.tensor(0.5)}
    torch.save(content | others, tmp_path / "run.pt")
    _check(inspection.inspect(tmp_path / "run.pt"), expected)
    torch.save({"model": model.state_dict()} | others, tmp_path / "model.pt")
    found = inspection.inspect(tmp_path / "model.pt")
    assert found["parameters"] == len(model.state_dict())


@pytest.mark.parametrize(
    "content",
    [
        {"param_groups": 5},
        {"param_groups": [5], "state": {}},
        {"schedulefree_state": {}},
        {"optimizer": {"param_groups": [{"params": [0], "k": 2, "weight_sum": 1.0}], "state": {}}},
        {"optimizer_states": 5},
        {"w": torch.empty(2, device="meta")},
    ],
)
def test_a_torch_file_of_no_use_is_refused_by_its_name(tmp_path, content):
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(
        CheckpointError, match=r"run\.pt must be something to resume from|must be a dense tensor"
    ):
        inspection.inspect(tmp_path / "run.pt")


def test_a_checkpoint_of_lightning_shows_its_optimizer(tmp_path):
    model, optimizer = runs.torch_run(sftorch.AdamWScheduleFree)
    expected = _norms(runs.torch_iterates(model, optimizer))
    content = {"epoch": 1, "state_dict": model.state_dict(), "lr_schedulers": [], "callbacks": {}}
    torch.save(content | {"optimizer_states": [optimizer.state_dict()]}, tmp_path / "last.ckpt")
    found = inspection.inspect(tmp_path / "last.ckpt")
    assert (found["what"], found["step"]) == ("state of sftorch (adamw)", runs.STEPS)
    _check(found, expected)
    torch.save(content | {"optimizer_states": [optimizer.state_dict()] * 2}, tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match=r"several .* optimizer_states\[0\], optimizer_states\[1\]"):
        inspection.inspect(tmp_path / "two.ckpt")


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_state_dict_alone_shows_what_it_has_and_says_what_it_lacks(tmp_path, case):
    build, options, _, _ = OPTIMIZERS[case]
    model, optimizer = runs.torch_run(lambda params: build(params, **options))
    expected = _norms(runs.torch_iterates(model, optimizer))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = inspection.inspect(tmp_path / "optimizer.pt")
    assert found["norms"]["z"] == pytest.approx(expected["z"], rel=CLOSE)
    assert found["norms"]["x"] is found["norms"]["y"] is found["norms"]["z - x"] is None
    assert any("the file holds no weights" in note for note in found["notes"])
    assert any("weights saved beside it hold y" in note for note in found["notes"])


@pytest.mark.parametrize("case", ["sftorch sgd", "sftorch adamw"])
def test_c_is_the_one_of_the_last_step_and_of_the_next(tmp_path, case):
    build, options, _, _ = OPTIMIZERS[case]
    model, optimizer = runs.torch_run(lambda params: build(params, **options))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    group = inspection.inspect(tmp_path / "run.pt")["groups"][0]
    assert group["c"] == pytest.approx(optimizer.metrics()[0]["c"], rel=1e-12)
    optimizer.step()
    assert group["next_c"] == pytest.approx(optimizer.metrics()[0]["c"], rel=1e-12)


def test_c_is_right_while_radam_rests_and_the_average_weighs_every_step_alike(tmp_path):
    model, optimizer = runs.torch_run(lambda p: sftorch.RAdamScheduleFree(p, weight_lr_power=0.0), steps=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    group = inspection.inspect(tmp_path / "run.pt")["groups"][0]
    assert (group["c"], group["next_c"]) == (1 / 3, 1 / 4)


def test_plain_adam_says_that_it_is_not_schedule_free(tmp_path):
    _, optimizer = runs.torch_run(lambda params: torch.optim.AdamW(params))
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    found = inspection.inspect(tmp_path / "adam.pt")
    assert found["what"] == "state of torch.optim.AdamW (plain)"
    assert found["resume"][0].startswith("not Schedule-Free")


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = runs.torch_run(lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01))
    return runs.store_checkpoint(tmp_path / "run", model, optimizer), runs.torch_iterates(model, optimizer)


def test_our_checkpoint_is_verified_and_shown(checkpoint):
    path, iterates = checkpoint
    found = inspection.inspect(path)
    assert found["verified"]
    assert (found["step"], found["epoch"], found["position"], found["metrics"]) == (7, 2, 5, {"loss": 0.25})
    assert found["leaves"] == {"y": 6, "z": 6, "v": 6, "buffer": 3, "rng": 1, "extra": 1}
    assert found["resume"] == [
        "goes on after step 7, epoch 2, micro-batch 5: sftorch.checkpoint.Checkpoints(...)"
        f".restore(model, optimizer, resume={str(path)!r})"
    ]
    _check(found, _norms(iterates))


def test_a_folder_of_checkpoints_shows_the_newest_and_says_so(checkpoint):
    path, _ = checkpoint
    store.write(path.parent, examples.meta(3), examples.state(), {})
    found = inspection.inspect(path.parent)
    assert found["step"] == 7
    assert "holds 2 checkpoint(s); this is the newest, step 7 (3)" in found["notes"][0]


@pytest.mark.parametrize("file", [store.STATE, store.INFERENCE, store.META])
def test_a_file_inside_a_checkpoint_leads_to_the_checkpoint(checkpoint, file):
    found = inspection.inspect(checkpoint[0] / file)
    assert found["path"] == str(checkpoint[0])
    assert found["verified"]


def test_a_damaged_checkpoint_is_an_error_with_the_leaf(checkpoint):
    path, _ = checkpoint
    data = bytearray((path / store.STATE).read_bytes())
    data[-1] ^= 1
    (path / store.STATE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"leaf '.*' must have crc32"):
        inspection.inspect(path)


def test_inference_weights_say_that_they_are_x(checkpoint, tmp_path):
    path, iterates = checkpoint
    shutil.copy(path / store.INFERENCE, tmp_path / "ship.safetensors")
    found = inspection.inspect(tmp_path / "ship.safetensors")
    assert found["what"] == "inference weights of schedulefree-twin, x at step 7"
    assert found["resume"][0].endswith("they are x")
    assert "prior_steps=" in found["resume"][0]
    assert found["norms"]["weights"] > np.linalg.norm(iterates["x"])


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_weights_alone_say_that_nobody_knows_which_iterate_they_are(tmp_path, kind):
    weights = {"fc.weight": torch.full((2, 2), 2.0)}
    path = tmp_path / f"weights.{kind}"
    if kind == "torch":
        torch.save({"epoch": 3, "state_dict": weights}, path)
    else:
        exchange.write_tensors(path, {name: value.numpy() for name, value in weights.items()})
    found = inspection.inspect(path)
    assert found["what"] == f"weights without optimizer state ({kind})"
    assert found["norms"] == {"weights": 4.0}
    assert "whether they are x or y is not recorded" in found["resume"][0]


def _flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def test_an_orbax_checkpoint_of_sfjax_is_shown(tmp_path):
    from sfjax.checkpoint import Checkpoints

    params, state = runs.jax_run(runs.sfjax_transformation())
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(7, params, state, hyperparameters={"optimizer": "adamw", "lr": 0.01, "beta": 0.9})
    x, y, z = sfjax.iterates(state, params)
    for path in (tmp_path / "run", tmp_path / "run" / "7"):
        found = inspection.inspect(path)
        assert found["verified"]
        assert (found["framework"], found["optimizer"], found["step"]) == ("jax", "adamw", 7)
        assert found["groups"][0]["c"] == pytest.approx(float(sfjax.metrics(state)["c"]), rel=1e-6)
        _check(found, _norms({"x": _flat(x), "y": _flat(y), "z": _flat(z)}))


def test_an_orbax_checkpoint_of_optax_is_shown(tmp_path):
    transformation = optax.contrib.schedule_free_adamw(0.01)
    params, state = runs.jax_run(optax.chain(optax.clip(1.0), transformation))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "one", {"params": params, "opt_state": state})
    found = inspection.inspect(tmp_path / "one")
    x = optax.contrib.schedule_free_eval_params(state[1], params)
    assert found["what"] == "state of optax.contrib.schedule_free on Orbax"
    assert found["step"] == 7
    assert found["leaves"] == {"z": 2, "y": 2, "v": 2}
    _check(found, _norms({"x": _flat(x), "y": _flat(params), "z": _flat(state[1].z)}))


def test_other_trees_of_the_parameters_names_are_not_taken_for_them(tmp_path):
    transformation = optax.MultiSteps(optax.contrib.schedule_free_adamw(0.01), 2).gradient_transformation()
    params, state = runs.jax_run(transformation)  # ends in the middle of an accumulation
    expected = np.linalg.norm(_flat(params))
    average = jax.tree.map(lambda leaf: leaf + 7, params)
    content = {"average": average, "opt_state": state, "params": params}
    for own, y in (("params", expected), ("weights", None)):
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / own, {own if key == "params" else key: v for key, v in content.items()})
        norms = inspection.inspect(tmp_path / own)["norms"]
        assert norms["y"] == (y and pytest.approx(y)), own


def test_an_orbax_folder_without_a_schedule_free_state_is_refused(tmp_path):
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "one", {"params": np.ones(3)})
    with pytest.raises(CheckpointError, match="without a Schedule-Free state in it"):
        inspection.inspect(tmp_path / "one")


@pytest.mark.slow
def test_a_changed_byte_of_a_torch_file_of_the_older_kind_is_an_error_or_changes_nothing(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    intact = (tmp_path / "w.pt").read_bytes()
    errors = []
    for place in range(len(intact)):
        changed = bytearray(intact)
        changed[place] ^= 2
        (tmp_path / "w.pt").write_bytes(changed)
        try:
            inspection.inspect(tmp_path / "w.pt")
        except CheckpointError as error:
            errors.append(str(error))
    assert len(errors) > len(intact) / 2
    assert all(str(tmp_path / "w.pt") in error for error in errors)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        CheckpointError, match="got a pipe or a device, which must be written to a file first"
    ):
        inspection.inspect(tmp_path / "pipe")
