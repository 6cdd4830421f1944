"""What divides or copies parameters in ways that modes cannot follow is refused, with what to use instead."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sftorch


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_zero_redundancy_optimizer_is_refused(group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"without modes, got a Schedule-Free one: .*fully_shard \(FSDP2\)"):
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=sftorch.AdamWScheduleFree, lr=0.1)
    sftorch.AdamWScheduleFree(model.parameters(), lr=0.1)  # beside it, nothing is wrong


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(group, original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(nn.Linear(3, 2), device_id=cpu, use_orig_params=original)
    with pytest.raises(ValueError, match=r"params\[0\] must be whole or a DTensor.*fully_shard \(FSDP2\)"):
        sftorch.AdamWScheduleFree(model.parameters())


def flat_partition(optimizer):
    """Does to an optimizer what ZeRO of DeepSpeed does: one flat float32 tensor in a group's place."""
    params = optimizer.param_groups[0]["params"]
    whole = torch.cat([p.detach().view(-1) for p in params])
    half = whole[: len(whole) // 2].clone().requires_grad_()
    half.grad = torch.zeros_like(half)
    optimizer.param_groups[0]["params"] = [half]
    return half


def test_flat_partitions_of_deepspeed_are_refused(monkeypatch):
    model = nn.Linear(3, 2)
    optimizer = sftorch.AdamWScheduleFree(model.parameters())
    half = flat_partition(optimizer)
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    with pytest.raises(RuntimeError, match=r"params must be those of the model, got 1 of shape \(4,\)"):
        optimizer.step()
    assert not optimizer.state
    assert half.grad is not None


def test_parameters_in_parts_may_take_the_place_of_whole_ones(monkeypatch):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = sftorch.AdamWScheduleFree(model.parameters())
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    optimizer.param_groups[0]["params"] = list(other.parameters())  # as accelerate does for FSDP2
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_steps_in_backward_are_refused_with_replicas(group, wrapped_first):
    model = nn.Linear(3, 2)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    if wrapped_first:
        parallel = DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match="must not be used with DistributedDataParallel"):
            sftorch.step_in_backward(optimizer)
    else:
        handle = sftorch.step_in_backward(optimizer)
        parallel = DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match="must not be used with DistributedDataParallel"):
            parallel(torch.ones(1, 3)).sum().backward()
        handle.remove()
    assert all(torch.equal(p, value) for p, value in zip(parallel.parameters(), before, strict=True))


def test_steps_in_backward_are_taken_beside_replicas_of_another_model(group):
    model, other = nn.Linear(3, 2), DistributedDataParallel(nn.Linear(3, 2))
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.1)
    handle = sftorch.step_in_backward(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    handle.remove()
    assert optimizer.metrics()[0]["step"] == 1
    assert len(list(other.parameters())) == 2
