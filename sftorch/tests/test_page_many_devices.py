"""The code of docs/many-devices.md runs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import sftorch
from sftorch.tests.pages import run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])

    def forward(self, inputs):
        return self.layers[1](torch.tanh(self.layers[0](inputs)))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_code_of_the_page_runs(group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, inputs = "many-devices.md", torch.ones(2, 3)
    torch.manual_seed(0)
    names = run(page, "FSDP2", model=Net(), inputs=inputs)
    torch.manual_seed(1)
    other = fully_shard(Net())
    own = sftorch.AdamWScheduleFree(other.parameters(), lr=0.01)
    known = {"model": names["model"], "optimizer": names["optimizer"], "folder": tmp_path / "saved"}
    run(
        page,
        "The state crosses torch.distributed.checkpoint",
        **known,
        other_model=other,
        other_optimizer=own,
    )
    pairs = list(zip(names["model"].parameters(), other.parameters(), strict=True))
    assert len(pairs) == 4
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)
    assert own.metrics()[0]["step"] == 1
    taken = []
    run(page, "Checkpoints", model=other, optimizer=own, loader=[inputs], train_on=taken.append)
    assert len(taken) == 1
