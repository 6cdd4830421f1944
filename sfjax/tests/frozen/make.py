"""Writes the frozen checkpoints beside this file: `python sfjax/tests/frozen/make.py`.

today/             a run of this package in the middle of an accumulation, by sfjax.checkpoint
optax_0_2_8/       a run of optax.contrib.schedule_free_adamw in a chain, by Orbax alone
optax_adamw/       a run of plain optax.adamw, by Orbax alone
expected.json      what each must hold, and today's run five micro-batches on

They were written once, by the versions in expected.json, and stay as they are: a later version must read
them. Run this only to add a new one, into an empty folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import sfjax
from sfcore.hyperparameters import AdamW
from sfjax.checkpoint import Checkpoints

HERE = Path(__file__).parent
PACKAGES = ("jax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


def begin() -> dict[str, Any]:
    """Returns the parameters that the runs start from."""
    rng = np.random.default_rng(0)
    return {"dense": {"kernel": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32), "bias": jnp.zeros(3)}}


def gradients(steps: int) -> list[Any]:
    """Returns the gradients of every run."""
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), begin())
        for _ in range(steps)
    ]


def ours() -> Any:
    """Returns the transformation of today/."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.05, 4, weight_decay=0.01))
    return optax.MultiSteps(tx, 4).gradient_transformation()


def contrib() -> Any:
    """Returns the transformation of optax_0_2_8/."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.contrib.schedule_free_adamw(0.05, 4, weight_decay=0.01)
    )


def plain() -> Any:
    """Returns the transformation of optax_adamw/."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05))


def run(tx: Any, params: Any, state: Any, first: int, last: int) -> tuple[Any, Any]:
    """Returns (params, state) after gradients first..last-1."""
    update = jax.jit(tx.update)
    for g in gradients(last)[first:]:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def numbers(tree: Any) -> dict[str, Any]:
    """Returns path -> nested lists."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).tolist()
        for path, leaf in leaves
    }


def main(folder: Path) -> None:
    """Writes everything into a folder."""
    expected: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    tx = ours()
    params, state = run(tx, begin(), tx.init(begin()), 0, 10)
    hyperparameters = AdamW(lr=0.05, warmup_steps=4, weight_decay=0.01)
    place = {"epoch": 1, "position": 10, "metrics": {"loss": 0.25}, "extra": {"note": "kept"}}
    extra_state = {"key": jax.random.key(3), "text": "frozen"}
    with Checkpoints(folder / "today") as checkpoints:
        checkpoints.save(
            2,
            params,
            state,
            hyperparameters=hyperparameters,
            accumulation=4,
            extra_state=extra_state,
            **place,
        )
    after = run(tx, params, state, 10, 15)
    expected["today"] = {"held": numbers((params, state)), "five on": numbers(after)}
    for name, make in (("optax_0_2_8", contrib), ("optax_adamw", plain)):
        tx = make()
        params, state = run(tx, begin(), tx.init(begin()), 0, 10)
        with ocp.StandardCheckpointer() as writer:
            writer.save((folder / name).absolute(), {"params": params, "opt_state": state})
        expected[name] = {"held": numbers((params, state))}
        if make is contrib:
            expected[name]["x"] = numbers(optax.contrib.schedule_free_eval_params(state[1], params))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
