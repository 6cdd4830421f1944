"""Training with sftorch under FSDP2: each process keeps its part of the weights and of the state.

    torchrun --nproc-per-node 2 examples/fsdp.py
    torchrun --nproc-per-node 2 examples/fsdp.py        again: it goes on where it stopped

Every process calls the same things: step, eval, train, save. Each writes its own part, and a run goes on
with any number of processes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import sftorch
from _digits import Settings, batches, initial_weights, load
from sftorch.checkpoint import Checkpoints
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


def train(folder: Path, steps: int, every: int, rank: int, world: int) -> float:
    """Trains up to `steps`, from the newest checkpoint in the folder; returns the test accuracy at x."""
    settings = Settings("adamw", 0.01, 0.9, 0.0, 20, 1.0, steps, 64, 1, 0, every)
    digits, (model, optimizer) = load(), build(settings)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(model, optimizer)
        done = restored.meta.step if restored and restored.meta else 0
        for step, (images, labels) in enumerate(batches(settings, digits), start=1):
            if step <= done:
                continue
            share = slice(rank, None, world)  # of equal size: FSDP takes the mean of the means
            loss = cross_entropy(
                model(torch.from_numpy(images[0])[share]), torch.from_numpy(labels[0])[share]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % every == 0:
                checkpoints.save(model, optimizer)
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
