"""eval() and train() on every path: the same bits, and nothing changes where train() raises."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import sftorch
from sftorch.kernels import call
from sftorch.law import lists
from sftorch.state import flips
from sftorch.tests.plain import STEP_SIZE, copies, feed, same_bits, some_grads, some_params

SHAPES = [(1003,), (3, 5), (0,), (), (2, 3, 4)]
PATHS = {"lists": {"fused": False}, "single": {"fused": False, "foreach": False}, "native": {}}


def started(path, dtype=torch.float32, shapes=SHAPES):
    params = some_params(dtype, shapes)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, **PATHS[path])
    feed(optimizer, params, some_grads(5, params))
    return params, optimizer


@pytest.fixture(params=[7, 1 << 18])
def group(request, monkeypatch):
    monkeypatch.setitem(lists.GROUP, "cpu", request.param)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
def test_every_path_has_the_same_x_and_gives_back_y(dtype):
    found = {}
    for path in PATHS:
        params, optimizer = started("single", dtype)
        optimizer.param_groups[0].update({"fused": None, "foreach": True} | PATHS[path])
        y = copies(params)
        beside = list(optimizer.eval_params().values())
        for _ in range(2):
            optimizer.eval()
            found[path] = copies(params)
            assert same_bits(found[path], beside)
            optimizer.train()
            assert same_bits(params, y)
    assert same_bits(found["lists"], found["single"])
    assert same_bits(found["native"], found["single"])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", [0, 1, 4])
def test_weights_that_someone_wrote_to_are_left_with_all_others_as_they_are(which, path):
    """The first ones are back at y by then, and become x again in the bits that they had."""
    params, optimizer = started(path)
    y = copies(params)
    optimizer.eval()
    x = copies(params)
    params[which].data.view(-1)[-1] += 1
    held = copies(params)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"weights must stay x while in eval mode, got other values in 1 "
        ):
            optimizer.train()
        assert same_bits(params, held)
    params[which].data.copy_(x[which])
    optimizer.train()
    assert same_bits(params, y)


def test_an_interrupted_train_can_be_called_again(monkeypatch):
    monkeypatch.setitem(lists.GROUP, "cpu", 100)
    params, optimizer = started("lists")
    y = copies(params)
    optimizer.eval()
    x, copy, calls = copies(params), torch._foreach_copy_, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", cut)
        with pytest.raises(KeyboardInterrupt):
            optimizer.train()
    assert same_bits(params, x)
    optimizer.train()
    assert same_bits(params, y)


@contextmanager
def interrupted(kind, moment, monkeypatch):
    """Lets a job of this kind be interrupted, before or after it is done."""
    run = call.Job.run

    def cut(job, *args):
        if job.kind != kind:
            return run(job, *args)
        if moment == "after":
            run(job, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call.Job, "run", cut)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_the_kernel_of_eval_leaves_y(moment, monkeypatch):
    params, optimizer = started("native")
    optimizer.eval()
    optimizer.train()
    feed(optimizer, params, some_grads(1, params))  # so that what is kept is an older y
    y = copies(params)
    with interrupted(call.Kind.PUT_ASIDE, moment, monkeypatch):
        optimizer.eval()
    assert same_bits(params, y)
    assert not any("y" in optimizer.state[p] for p in params)
    optimizer.eval()
    optimizer.train()
    assert same_bits(params, y)


@pytest.mark.parametrize("name", ["copy_", "sub_", "mul_", "add_"])
def test_an_interrupted_eval_of_lists_leaves_y(name, monkeypatch):
    monkeypatch.setitem(lists.GROUP, "cpu", 100)
    params, optimizer = started("lists")
    y, own, calls = copies(params), getattr(torch, f"_foreach_{name}"), []

    def cut(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, f"_foreach_{name}", cut)
        with pytest.raises(KeyboardInterrupt):
            optimizer.eval()
    assert same_bits(params, y)
    optimizer.eval()
    optimizer.train()
    assert same_bits(params, y)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_the_kernel_leaves_what_was_there(moment, written, monkeypatch):
    params, optimizer = started("native")
    y = copies(params)
    optimizer.eval()
    x = copies(params)
    if written:
        params[0].data[0] += 1
    held = copies(params)
    with interrupted(call.Kind.PUT_BACK, moment, monkeypatch):
        optimizer.train()
    assert same_bits(params, held)
    params[0].data.copy_(x[0])
    optimizer.train()
    assert same_bits(params, y)


# Several chunks of the kernel, which do not begin where tensors do.
LARGE = [(1003,), (70001,), (0,), (40000,), (7,)]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernel_has_the_bits_of_a_single_tensor_in_every_chunk(dtype):
    params, optimizer = started("native", dtype, LARGE)
    y = copies(params)
    optimizer.param_groups[0]["foreach"] = False
    x = list(optimizer.eval_params().values())
    optimizer.param_groups[0]["foreach"] = True
    for _ in range(2):
        optimizer.eval()
        assert same_bits(params, x)
        assert same_bits([optimizer.state[p]["y"] for p in params], y)
        optimizer.train()
        assert same_bits(params, y)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("at", [(0, 0), (1, 35000), (1, 70000), (4, 6)])
def test_one_number_that_someone_wrote_keeps_the_kernel_from_all_others(at):
    """Also from where y was written back in eval mode: that is no x."""
    params, optimizer = started("native", shapes=LARGE)
    y = copies(params)
    optimizer.eval()
    params[3].data.copy_(y[3])
    params[at[0]].data.view(-1)[at[1]] = float("nan")
    held = copies(params)
    tables = {"y": params, "z": [optimizer.state[p]["z"] for p in params]}
    tables["x"] = [optimizer.state[p]["y"] for p in params]
    numbers = (*call.ZEROS[: call.NUMBERS.index("k1")], 1 / 0.9 - 1)
    assert call.Job(call.Kind.PUT_BACK).run(tables, numbers)
    assert same_bits(params, held)
    with pytest.raises(RuntimeError, match=r"got other values in 2 parameter"):
        optimizer.train()
    assert same_bits(params, held)


def test_on_a_device_equality_is_asked_once_for_a_list():
    """`_equal` is for CUDA tensors; a NaN is equal to nothing, and such a tensor is looked at by itself."""
    one = [
        torch.ones(3),
        torch.ones(2),
        torch.tensor([float("nan")]),
        torch.tensor([float("inf")]),
        torch.ones(0),
    ]
    other = copies(one)
    other[1][1] += 1e-6
    assert flips._equal(one, other) == [True, False, False, True, True]
