"""The torch half of exact.py: `python -m benchmarks.exact_torch whole|resumed FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sftorch
from benchmarks.exact import Combination, combinations, write
from sfcore.exchange import fingerprint
from sftorch.checkpoint import Checkpoints

MAKERS = {
    "sgd": lambda params: sftorch.SGDScheduleFree(params, lr=0.1, weight_decay=0.01, warmup_steps=15),
    "adamw": lambda params: sftorch.AdamWScheduleFree(params, lr=0.01, weight_decay=0.01, warmup_steps=15),
    "radam": lambda params: sftorch.RAdamScheduleFree(params, lr=0.01, weight_decay=0.01),
}


def build(one: Combination, seed: int) -> tuple[nn.Module, Any]:
    """Returns a network with dropout, so that the random state matters, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4))
    model.to(getattr(torch, one.precision))
    return model, MAKERS[one.optimizer](model.parameters())


def go_on(
    one: Combination, model: nn.Module, optimizer: Any, start: int, checkpoints: Checkpoints | None
) -> str:
    """Trains from micro-batch `start` to the end, saving on the way; returns a digest of the whole state."""
    for taken in range(start, one.micro_batches):
        if checkpoints is not None and taken == one.saved_at:
            save(one, model, optimizer, checkpoints)
        images = torch.rand(6, 8, dtype=torch.float64).to(
            getattr(torch, one.precision)
        )  # of the global generator
        loss = model(images).float().square().mean() / one.accumulate
        loss.backward()
        if (taken + 1) % one.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return digest(model, optimizer)


def save(one: Combination, model: nn.Module, optimizer: Any, checkpoints: Checkpoints) -> None:
    """Saves in the combination's mode and goes on in train mode."""
    place = (one.accumulate, one.saved_at % one.accumulate)
    if one.mode == "eval":
        optimizer.eval()
    checkpoints.save(model, optimizer, position=one.saved_at, accumulation=place)
    checkpoints.wait()
    optimizer.train()


def digest(model: nn.Module, optimizer: Any) -> str:
    """Returns a SHA-256 of everything that the next step depends on."""
    arrays = {"rng": torch.get_rng_state().numpy()}
    for name, p in model.named_parameters():
        for key, value in (("p", p.detach()), *sorted(optimizer.state[p].items())):
            tensor = torch.as_tensor(value)
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            arrays[f"{key}/{name}"] = bits.numpy()
    return fingerprint(arrays)


def main(part: str, folder: Path) -> None:
    """Runs every combination, from the start or from its checkpoint."""
    torch.set_num_threads(1)
    digests = {}
    for one in combinations():
        with Checkpoints(folder / one.name) as checkpoints:
            model, optimizer = build(one, seed=0 if part == "whole" else 1)
            if part == "whole":
                digests[one.name] = go_on(one, model, optimizer, 0, checkpoints)
                continue
            restored = checkpoints.restore(model, optimizer, accumulation=one.accumulate)
            assert restored is not None
            assert restored.meta is not None
            digests[one.name] = go_on(one, model, optimizer, restored.meta.position, None)
    write(part, folder, digests)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
