"""A process that leaves the other one alone with a collective, for test_refused_together.py.

The words are the engine, "fsdp" or "ddp", and what the second process does: it "sleeps" or it "ends".
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sftorch

PATIENCE = timedelta(seconds=3)


def heard(engine: str, how: str, rank: int, folder: Path) -> Any:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(4, 3)
    if engine == "fsdp":
        group = dist.new_group(timeout=PATIENCE)
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    else:
        model = DistributedDataParallel(model)
    optimizer = sftorch.SGDScheduleFree(model.parameters(), lr=0.1)
    try:
        for step in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.eval()
            if rank == 1 and step == 1:
                if engine == "ddp":
                    with torch.no_grad():
                        model.module.weight[0, 0] += 1.0  # type: ignore[index, operator]
                elif how == "sleeps":
                    time.sleep(3 * PATIENCE.total_seconds())
                    return None
                else:
                    return None
            optimizer.train()
        model(torch.ones(2, 4)).sum().backward()
    except Exception as error:
        return type(error), str(error)
    return None


def main(rank: int, world: int, folder: Path, engine: str, how: str) -> None:
    torch.save(heard(engine, how, rank, folder), folder / f"{rank}.pt")
    os._exit(0)  # the group is broken, and there is nothing to wait for
