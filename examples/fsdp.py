"""Training with sftorch under FSDP2: each process keeps its part of the weights and of the state.

    torchrun --nproc-per-node 2 examples/fsdp.py
    torchrun --nproc-per-node 2 examples/fsdp.py        again: it goes on where it stopped

Every process calls the same things: step, eval, train, save. The state goes through
torch.distributed.checkpoint, from which a run goes on with any number of processes.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import sftorch
from _digits import Settings, batches, initial_weights, load
from train_torch import make_network, set_weights


def build(settings: Settings) -> tuple[nn.Module, sftorch.AdamWScheduleFree]:
    """Returns a network in parts, and its optimizer, which is made of the parts."""
    model = make_network()
    set_weights(model, initial_weights(settings.seed))
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return model, sftorch.AdamWScheduleFree(model.parameters(), lr=settings.lr, warmup_steps=20)


def state_of(model: nn.Module, optimizer: Any, step: int) -> dict[str, Any]:
    """Returns what is saved; loading writes into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the state dict of a .* is one of y")  # it is, to go on from
        weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "step": step}


def train(folder: Path, steps: int, every: int, rank: int, world: int) -> float:
    """Trains up to `steps`, from what is in the folder; returns the test accuracy at x."""
    settings = Settings("adamw", 0.01, 0.9, 0.0, 20, 1.0, steps, 64, 1, 0, every)
    digits, (model, optimizer) = load(), build(settings)
    done, newest = 0, max(folder.glob("step_*/.metadata"), default=None)
    if newest is not None:
        state = state_of(model, optimizer, 0)
        dcp.load(state, checkpoint_id=newest.parent)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        done = state["step"]
    for step, (images, labels) in enumerate(batches(settings, digits), start=1):
        if step <= done:
            continue
        share = slice(rank, None, world)
        loss = cross_entropy(model(torch.from_numpy(images[0])[share]), torch.from_numpy(labels[0])[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            dcp.save(state_of(model, optimizer, step), checkpoint_id=folder / f"step_{step:06}")
    with optimizer.evaluation(), torch.no_grad():
        hits = model(torch.from_numpy(digits.test_images)).argmax(-1) == torch.from_numpy(digits.test_labels)
    return hits.float().mean().item()


def main() -> None:
    """Reads the options and what torchrun says, and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/fsdp"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50)
    options = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    accuracy = train(options.out, options.steps, options.save_every, rank, world)
    if rank == 0:
        print(f"{world} process(es), {options.steps} steps: {accuracy:.2%} of the test digits right at x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
