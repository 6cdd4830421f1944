"""What save accepts, keeps and refuses."""

import json
import signal
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sftorch
from sfcore import store
from sftorch.checkpoint import CheckpointError, Checkpoints
from sftorch.tests.checkpoint_runs import Case, build, train

CASE = Case("adamw", "float32", 1, 4, "train")


def started(updates=3):
    model, optimizer = build(CASE)
    train(model, optimizer, CASE, 0, updates)
    return model, optimizer


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal to one thread")
def test_a_save_after_an_interrupted_wait_does_not_reach_the_one_in_flight(tmp_path, monkeypatch):
    model, optimizer = started()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A test run that was started in the background ignores SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    going_on, write = threading.Event(), store.write
    monkeypatch.setattr(store, "write", lambda *arguments: going_on.wait(60) and write(*arguments))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, step=1)
        interrupt = (threading.get_ident(), signal.SIGINT)
        threading.Timer(0.5, signal.pthread_kill, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
        signal.signal(signal.SIGINT, handler)
        train(model, optimizer, CASE, 3, 4)
        threading.Timer(0.5, going_on.set).start()
        checkpoints.save(model, optimizer, step=2)
    _, arrays = store.read(store.steps(tmp_path)[1])
    assert all(np.array_equal(arrays[f"y/{name}"], value) for name, value in expected.items())


@pytest.mark.parametrize("runs", [True, False])
def test_a_save_interrupted_while_its_thread_starts_leaves_later_ones_possible(tmp_path, monkeypatch, runs):
    model, optimizer = started()
    start = threading.Thread.start

    def interrupted(thread):
        if runs:
            start(thread)
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(model, optimizer, step=1)
    assert checkpoints._writer._idle.wait(60)  # or everything after it would hang
    checkpoints.save(model, optimizer, step=2)
    assert checkpoints.wait() == store.steps(tmp_path)[2]
    checkpoints.close()


@pytest.mark.parametrize("resume", ["auto", "weights:{}"])
def test_a_state_that_is_half_restored_is_not_saved_until_it_is_whole(tmp_path, monkeypatch, resume):
    model, optimizer = started()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, optimizer)
    train(model, optimizer, CASE, 3, 5)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sftorch._apply._put_entries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.restore(model, optimizer)
    with pytest.raises(CheckpointError, match=r"one step's state.*call restore\(\) again"):
        checkpoints.save(model, optimizer)
    checkpoints.restore(model, optimizer, resume=resume.format(tmp_path))
    checkpoints.save(model, optimizer)
    checkpoints.close()


def test_the_newest_and_the_best_are_kept(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path, keep_newest=2, keep_best=1) as checkpoints:
        for step, loss in enumerate((0.5, 0.1, 0.3, 0.4, 0.2)):
            checkpoints.save(model, optimizer, step=step, metrics={"loss": loss})
    assert list(store.steps(tmp_path)) == [1, 3, 4]


def test_weights_of_another_optimizer_are_named_once_and_hold_x_if_it_is_in_eval(tmp_path, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    ours, other = (sftorch.SGDScheduleFree(layer.parameters(), lr=0.1) for layer in model)
    for _ in range(3):
        model(torch.ones(4, 2)).sum().backward()
        ours.step()
        other.step()
    x = other.eval_params()[model[1].weight]
    assert not torch.equal(x, model[1].weight)
    other.eval()
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        checkpoints.save(model, ours)
    shipped = load_file(checkpoints.wait() / store.INFERENCE)
    assert torch.equal(shipped["1.weight"], x)
    assert ["2 weights" in message and "'1.weight'" in message for message in caplog.messages] == [True]


def test_a_step_saved_again_is_replaced(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        for epoch in range(3):
            checkpoints.save(model, optimizer, epoch=epoch)
    restored = checkpoints.restore(model, optimizer)
    assert list(store.steps(tmp_path)) == [3]
    assert (restored.meta.step, restored.meta.epoch) == (3, 2)


@pytest.mark.parametrize("damaged", [False, True])
def test_newer_checkpoints_of_an_abandoned_run_are_set_aside(tmp_path, caplog, damaged):
    model, optimizer = build(CASE)
    checkpoints = Checkpoints(tmp_path, background=False)
    for step in (3, 9):
        checkpoints.save(model, optimizer, step=step)
    if damaged:
        (tmp_path / "step_000000009" / "state.safetensors").write_bytes(b"")
    checkpoints.restore(model, optimizer, resume="latest-good" if damaged else 3)
    checkpoints.save(model, optimizer, step=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "set-aside",
        "step_000000003",
        "step_000000005",
    ]
    assert "is newer than step 5, where this run is: it was set aside" in caplog.messages[-1]
    assert checkpoints.restore(model, optimizer).meta.step == 5


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_a_step_that_is_no_count_is_refused(tmp_path, step):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match="step must be a whole number >= 0"):
        Checkpoints(tmp_path).save(model, optimizer, step=step)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "low", True, torch.ones(2)])
def test_a_metric_that_is_no_finite_number_is_refused_before_anything_is_written(tmp_path, value):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match="loss"):
        Checkpoints(tmp_path / "new").save(model, optimizer, metrics={"loss": value})
    assert not (tmp_path / "new").exists()


def test_metrics_may_be_tensors_and_numpy_scalars(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, metrics={"loss": torch.tensor(0.5), "accuracy": np.float32(0.25)})
        assert checkpoints.restore(model, optimizer).meta.metrics == {"loss": 0.5, "accuracy": 0.25}


@pytest.mark.parametrize("accumulation", [(4, 4), (0, 0), (4, -1), 4, (4,)])
def test_an_accumulation_that_cannot_be_is_refused(tmp_path, accumulation):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match="0 <= position < steps"):
        Checkpoints(tmp_path).save(model, optimizer, accumulation=accumulation)


@pytest.mark.parametrize(("name", "value"), [("keep_newest", 0), ("keep_best", -1), ("keep_newest", 1.5)])
def test_numbers_that_keep_nothing_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        Checkpoints(tmp_path, **{name: value})


def test_a_model_without_the_optimizers_parameters_is_refused(tmp_path):
    _, optimizer = started()
    with pytest.raises(CheckpointError, match=r"got 6 that it does not, the first: parameter 0 of group 0"):
        Checkpoints(tmp_path).save(torch.nn.Linear(2, 2), optimizer)


def test_extra_comes_back_as_it_was(tmp_path):
    model, optimizer = started()
    extra = {
        "nested": {"list": [1, 2.5, None, True], "tuple": (1, (2, 3)), "set": {4}},
        "milestones": Counter({30: 1, 60: 2}),
        "by number": {1: "one", (2, 3): "pair"},
        "tensor": torch.arange(3, dtype=torch.bfloat16),
        "array": np.arange(4.0),
        "infinity": float("inf"),
        "__is__": "a key that the format uses itself",
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, extra=extra)
        found = checkpoints.restore(model, optimizer).extra
    assert torch.equal(found.pop("tensor"), extra.pop("tensor"))
    assert np.array_equal(found.pop("array"), extra.pop("array"))
    assert found == extra
    assert type(found["milestones"]) is Counter


def test_tensors_of_extra_whose_paths_are_the_same_come_back_each(tmp_path):
    model, optimizer = started()
    extra = {
        "a": {"b": torch.tensor(1.0)},
        "a/b": torch.tensor(2.0),
        "n": {1: torch.tensor(3.0), "1": torch.tensor(4.0)},
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, extra=extra)
        assert checkpoints.restore(model, optimizer).extra == extra


def test_a_key_of_extra_that_is_taken_is_refused(tmp_path):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match="extra must have keys of yours, got 'model_extra_state'"):
        Checkpoints(tmp_path).save(model, optimizer, extra={"model_extra_state": 1})


def test_extra_that_has_no_form_is_refused_with_its_place(tmp_path):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match=r"extra/scheduler/1 must be JSON-like or a tensor, got object"):
        Checkpoints(tmp_path).save(model, optimizer, extra={"scheduler": [0, object()]})


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (torch.eye(2).to_sparse(), "a dense tensor, got torch.sparse_coo"),
        (torch.ones(2, device="meta"), "a dense tensor, got meta"),
        (np.array(["text"]), "an array of numbers, got dtype dtype\\('<U4'\\)"),
        (np.ones(1, ">f4"), "an array of numbers, got dtype dtype\\('>f4'\\)"),
    ],
    ids=["sparse", "meta", "text", "other byte order"],
)
def test_an_array_that_has_no_form_is_refused_with_its_place(tmp_path, background, value, rule):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match=f"extra/mine must be {rule}"):
        Checkpoints(tmp_path, background=background).save(model, optimizer, extra={"mine": value})


def test_a_grad_scaler_comes_back(tmp_path):
    model, optimizer = started()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, extra={"scaler": scaler.state_dict()})
        other = torch.amp.GradScaler("cpu")
        other.load_state_dict(checkpoints.restore(model, optimizer).extra["scaler"])
    assert other.state_dict() == scaler.state_dict()


def test_the_record_says_what_it_is(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, epoch=2, position=7, batch_size=5, accumulation=(4, 1))
        meta = json.loads((checkpoints.wait() / "meta.json").read_text())
    assert (meta["framework"], meta["optimizer"], meta["precision"], meta["weights_hold"]) == (
        "torch",
        "adamw",
        "float32",
        "y",
    )
    assert (meta["step"], meta["epoch"], meta["position"]) == (3, 2, 7)
    assert meta["accumulation"] == {"steps": 4, "position": 1, "batch_size": 5}
    assert meta["groups"][0]["hyperparameters"]["beta"] == 0.9
    assert meta["groups"][0]["parameters"] == [name for name, _ in model.named_parameters()]
    assert meta["parameters"]["0.weight"]["clock"]["step"] == 3
    assert [meta["parameters"][name]["kind"] for name in ("0.weight", "1.weight")] == [
        "Linear",
        "BatchNorm1d",
    ]
    assert meta["fingerprints"]["x"] != meta["fingerprints"]["y"]
    assert "torch" in meta["versions"]


def test_frozen_and_late_parameters_come_back(tmp_path):
    model, _ = build(CASE)
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    optimizer = sftorch.AdamWScheduleFree([p for p in model.parameters() if p.requires_grad])
    optimizer.add_param_group({"params": [model[3].bias], "lr": 0.5})
    train(model, optimizer, CASE, 0, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        frozen = model[0].weight.clone()
        with torch.no_grad():
            model[0].weight.zero_()
        checkpoints.restore(model, optimizer)
    assert torch.equal(model[0].weight, frozen)
    assert "z" not in optimizer.state.get(model[3].bias, {})


def test_tied_parameters_are_saved_once_and_shipped_under_both_names(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    _, state = store.read(path)
    _, shipped = store.read(path, store.INFERENCE)
    assert [leaf for leaf in state if leaf.endswith("weight")] == ["y/a.weight"]
    assert shipped.keys() == model.state_dict().keys()


def test_a_model_with_state_of_its_own_comes_back(tmp_path):
    class Counting(torch.nn.Linear):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    model = torch.nn.Sequential(Counting(2, 2))
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    model[0].calls = 5
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, extra={"mine": 1})
        model[0].calls = 0
        assert checkpoints.restore(model, optimizer).extra == {"mine": 1}
    assert model[0].calls == 5


@pytest.mark.parametrize("resume", ["auto", "weights:"])
def test_state_of_its_own_that_is_a_tensor_comes_back_in_whatever_shape(tmp_path, resume):
    class Growing(torch.nn.Linear):
        seen = ()

        def get_extra_state(self):
            return torch.tensor(self.seen)

        def set_extra_state(self, state):
            self.seen = tuple(state.tolist())

    model = torch.nn.Sequential(Growing(2, 2))
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    model[0].seen = (5.0, 6.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    model[0].seen = (7.0,)
    checkpoints.restore(model, optimizer, resume=f"weights:{path}" if resume == "weights:" else resume)
    assert model[0].seen == (5.0, 6.0)
    assert load_file(path / store.INFERENCE)["0._extra_state"].tolist() == [5.0, 6.0]


def test_what_a_module_adds_to_the_state_dict_itself_comes_back(tmp_path):
    class Scaled(torch.nn.Linear):
        scale = 1

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "scale"] = self.scale

        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.scale = state_dict.pop(prefix + "scale")
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = torch.nn.Sequential(Scaled(2, 2))
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    model[0].scale = 5
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        model[0].scale = 0
        checkpoints.restore(model, optimizer)
    assert model[0].scale == 5


def test_weights_that_were_written_to_in_eval_mode_are_not_saved(tmp_path):
    model, optimizer = started()
    optimizer.eval()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="rebase"):
        Checkpoints(tmp_path).save(model, optimizer)


def test_a_save_in_an_evaluation_in_inference_mode_leaves_later_ones_possible(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        with torch.inference_mode(), optimizer.evaluation():
            checkpoints.save(model, optimizer)
        train(model, optimizer, CASE, 3, 6)
        checkpoints.save(model, optimizer)
    assert list(store.steps(tmp_path)) == [3, 6]


AT_EXIT = """
import atexit, sys, torch, sftorch
from sftorch.checkpoint import Checkpoints
model = torch.nn.Linear(2, 1)
optimizer = sftorch.AdamWScheduleFree(model.parameters())
atexit.register(Checkpoints(sys.argv[1]).save, model, optimizer, step=7)
"""


def test_a_save_while_the_program_ends_is_there_when_it_has_ended(tmp_path):
    subprocess.run([sys.executable, "-c", AT_EXIT, tmp_path], check=True)
    assert list(store.steps(tmp_path)) == [7]


def test_a_relative_folder_stays_where_it_was_when_the_program_goes_elsewhere(tmp_path, monkeypatch):
    model, optimizer = started()
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoints.save(model, optimizer)
    assert checkpoints.wait() == tmp_path / "run" / "step_000000003"


def test_the_first_save_of_another_object_leaves_a_save_in_flight_alone(tmp_path, monkeypatch):
    model, optimizer = started()
    filled, goes_on = threading.Event(), threading.Event()

    def fill(*args, inner=store._fill):
        inner(*args)
        filled.set()
        goes_on.wait()

    with monkeypatch.context() as patch, Checkpoints(tmp_path) as checkpoints:
        patch.setattr(store, "_fill", fill)
        checkpoints.save(model, optimizer, step=4)
        filled.wait()
        patch.undo()
        Checkpoints(tmp_path, background=False).save(model, optimizer, step=3)
        goes_on.set()
    assert list(store.steps(tmp_path)) == [3, 4]


def test_a_restore_in_inference_mode_leaves_a_state_that_can_be_trained_on(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, fused=False)
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            checkpoints.save(model, optimizer)
            with torch.inference_mode():
                checkpoints.restore(model, optimizer)
    assert optimizer.param_groups[0]["k"] == 2


def test_a_checkpoint_that_was_moved_and_linked_to_leaves_nothing_when_it_goes(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path / "run", keep_newest=1) as checkpoints:
        checkpoints.save(model, optimizer, step=1)
        path = checkpoints.wait()
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert checkpoints.restore(model, optimizer).meta.step == 1
        checkpoints.save(model, optimizer, step=2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_000000002"]
    assert (tmp_path / "elsewhere" / store.META).exists()


def test_an_empty_folder_starts_anew_and_none_never_restores(tmp_path):
    model, optimizer = started()
    for folder in (tmp_path, tmp_path / "not there yet"):
        assert Checkpoints(folder).restore(model, optimizer) is None
        assert Checkpoints(folder).restore(model, optimizer, resume="latest-good") is None
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        assert checkpoints.restore(model, optimizer, resume="none") is None


@pytest.mark.parametrize("form", [str, lambda path: path])
def test_a_path_may_be_a_checkpoint_or_a_folder_of_them(tmp_path, form):
    model, optimizer = started()
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    other = Checkpoints(tmp_path / "b")
    for place in (path, tmp_path / "a"):
        assert other.restore(model, optimizer, resume=form(place)).path == path


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.complex128])
def test_other_dtypes_and_shapes_come_back(tmp_path, dtype):
    shapes = [(2, 3), (), (0,)]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(s).to(dtype)) for s in shapes])
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()], repr(optimizer.state_dict())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        checkpoints.restore(model, optimizer)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before[0], strict=True))
    assert repr(optimizer.state_dict()) == before[1]
