"""convert refuses what it cannot do right, and leaves nothing behind."""

import errno
import os

import numpy as np
import pytest
import schedulefree
import torch

import sftorch
from sfcore import exchange
from sfcore.convert import convert
from sfcore.exchange import CheckpointError
from sfcore.tests import runs


@pytest.fixture
def torch_checkpoint(tmp_path):
    model, optimizer = runs.torch_run(lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01))
    return runs.store_checkpoint(tmp_path / "torch", model, optimizer), model, optimizer


def _weights(path):
    exchange.write_tensors(path, {"w": np.ones(2)})


def _optimizer_alone(path):
    _, optimizer = runs.torch_run(lambda params: schedulefree.SGDScheduleFree(params))
    torch.save(optimizer.state_dict(), path)


def _plain(path):
    model, optimizer = runs.torch_run(lambda params: torch.optim.AdamW(params))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def _wrapper(path):
    model, optimizer = runs.torch_run(
        lambda params: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1), momentum=0.8)
    )
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def _nothing(path):
    pass


@pytest.mark.parametrize(
    ("make", "to", "message"),
    [
        (_weights, "exchange", "must have optimizer state, got weights without"),
        (_weights, "inference", "must say whether it holds x or y"),
        (_optimizer_alone, "jax", "must hold the weights and their names beside the state"),
        (_optimizer_alone, "inference", "must hold the weights and their names beside the state"),
        (_plain, "torch", "must be of a Schedule-Free optimizer"),
        (_plain, "inference", "must be of a Schedule-Free optimizer"),
        # Its options are those of the base, whose momentum is another.
        (_wrapper, "jax", "must say the beta that built y"),
        (_wrapper, "inference", "must say the beta that built y"),
        (_nothing, "exchange", "is missing"),
    ],
)
def test_a_source_that_is_not_enough_is_refused(tmp_path, make, to, message):
    make(tmp_path / "src")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "src", tmp_path / "dst", to)
    assert not (tmp_path / "dst").exists()


def _saved_in_groups(path, named, later=False):
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
    held = list(model.named_parameters() if named else model.parameters())
    optimizer = sftorch.AdamWScheduleFree([{"params": held[2:]}, {"params": held[:2]}], lr=0.1)
    content = {"model": {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = content if later else {"model": model.state_dict()}
    torch.save(content | {"optimizer": optimizer.state_dict()}, path)
    return {name: tensor.numpy().copy() for name, tensor in optimizer.eval_state_dict(model).items()}


@pytest.mark.parametrize(("named", "later"), [(False, False), (True, True)])
def test_weights_that_are_not_those_of_the_state_are_refused(tmp_path, named, later):
    # Of equal shapes, in another order than the groups; and of another step.
    _saved_in_groups(tmp_path / "src", named, later)
    with pytest.raises(CheckpointError, match=r"in one file, both of the same step, .*named_parameters"):
        convert(tmp_path / "src", tmp_path / "dst", "inference")


def test_groups_in_another_order_than_the_model_keep_their_names(tmp_path):
    x = _saved_in_groups(tmp_path / "src", named=True)
    found = exchange.read_tensors(convert(tmp_path / "src", tmp_path / "dst", "inference")[0])
    assert all(np.allclose(found[name], x[name], rtol=1e-6, atol=0) for name in x)


def test_nothing_is_overwritten(torch_checkpoint, tmp_path):
    path, _, _ = torch_checkpoint
    with pytest.raises(CheckpointError, match="must not hold step 7 yet"):
        convert(path, path.parent, "jax")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(CheckpointError, match="must not be there yet"):
        convert(path, tmp_path / "x.safetensors", "inference")
    assert (tmp_path / "x.safetensors").read_bytes() == b""


@pytest.mark.parametrize("to", ["torch", "exchange", "inference"])
def test_a_map_without_use_is_refused(torch_checkpoint, tmp_path, to):
    with pytest.raises(CheckpointError, match="a map has no use here"):
        convert(torch_checkpoint[0], tmp_path / "same", to, {"a": "b"})
    assert not (tmp_path / "same").exists()


def test_an_unknown_target_is_refused(torch_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="to must be one of jax, torch, exchange, inference, got 'tf'"):
        convert(torch_checkpoint[0], tmp_path / "dst", "tf")


def test_a_file_in_place_of_the_folder_says_so(torch_checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; choose a folder"):
        convert(torch_checkpoint[0], tmp_path / "file" / "x.safetensors", "inference")


@pytest.mark.parametrize("to", ["inference", "exchange", "jax"])
def test_a_full_disk_leaves_nothing(torch_checkpoint, tmp_path, monkeypatch, to):
    path, _, _ = torch_checkpoint
    (tmp_path / "dst").mkdir()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="the disk or the quota is full"):
        convert(path, tmp_path / "dst" / "it", to)
    assert [p for p in (tmp_path / "dst").rglob("*") if p.is_file()] == []
