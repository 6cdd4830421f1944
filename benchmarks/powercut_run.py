"""The run whose power is cut: saves of every kind, steps replaced, steps back, and what was acknowledged."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.powercut import ACKNOWLEDGED, FOLDER


def _torch() -> tuple[Any, Callable[[Any, int, dict[str, float]], None]]:
    import torch

    import sftorch
    from sftorch.checkpoint import Checkpoints

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.1)

    def save(checkpoints: Any, step: int, metrics: dict[str, float]) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        checkpoints.save(model, optimizer, step=step, metrics=metrics)

    return Checkpoints, save


def _jax() -> tuple[Any, Callable[[Any, int, dict[str, float]], None]]:
    import jax
    import jax.numpy as jnp
    import optax

    import sfjax
    from sfjax.checkpoint import Checkpoints

    optimizer = sfjax.schedule_free_adamw(0.1)
    run = {"params": {"w": jnp.ones((4, 8)), "b": jnp.ones(4)}}
    run["state"] = optimizer.init(run["params"])

    @jax.jit
    def update(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    def save(checkpoints: Any, step: int, metrics: dict[str, float]) -> None:
        run["params"], run["state"] = update(run["params"], run["state"])
        checkpoints.save(step, run["params"], run["state"], metrics=metrics)

    return Checkpoints, save


def main(framework: str, root: Path, saves: int, seed: int) -> None:
    """Saves so often; a step is now and then saved again, or one further back."""
    make, save = {"torch": _torch, "jax": _jax}[framework]()
    draw = random.Random(seed)
    (root / ACKNOWLEDGED).mkdir()
    step = 0
    for part in range(2):  # the second finds what the first has left
        with make(root / FOLDER, background=part == 0) as checkpoints:
            for count in range(saves // 2 + part * (saves % 2)):
                step = max(1, step + draw.choice([1, 1, 1, 1, 0, -2]))
                save(checkpoints, step, {"loss": draw.random()})
                if part or draw.random() < 0.7:
                    checkpoints.wait()
                    (root / ACKNOWLEDGED / f"{part}-{count}-{step}").mkdir()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
