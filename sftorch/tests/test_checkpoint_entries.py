"""What a checkpoint holds beside the parameters, and parameters that are unlike others."""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sftorch
from sfcore import store
from sftorch.checkpoint import CheckpointError, Checkpoints
from sftorch.tests.checkpoint_runs import PLAIN, Counting, build, started, train


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


def test_frozen_and_late_parameters_come_back(tmp_path):
    model, _ = build(PLAIN)
    model[0].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    optimizer = sftorch.AdamWScheduleFree([p for p in model.parameters() if p.requires_grad])
    optimizer.add_param_group({"params": [model[3].bias], "lr": 0.5})
    train(model, optimizer, PLAIN, 0, 3)
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
