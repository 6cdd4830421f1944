"""What every environment must do, in seconds: imports, 20 steps beside the reference, a resume.

`python smoke.py jax`, or `torch`, or both. It needs parity_tests on the path, and prints what it ran with.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

STEPS = 20
SHOWN = {
    "": ["schedulefree-twin", "numpy", "ml_dtypes", "safetensors"],
    "jax": ["jax", "jaxlib", "optax", "flax", "orbax-checkpoint"],
    "torch": ["torch"],
}
MODULES = {
    "": ["sfcore.plan", "sfcore.preemption", "sfcore.inspection", "sfcore.convert", "sfcore.watch"],
    "jax": ["sfjax", "sfjax.checkpoint"],
    "flax": ["sfjax.nnx", "sfjax.linen", "sfjax.recalibrate"],
    "torch": ["sftorch", "sftorch.checkpoint", "sftorch.recalibrate", "sftorch.trainers"],
}
DRIVERS = {"jax": "sfjax", "torch": "sftorch foreach"}


def versions(frameworks: list[str]) -> dict[str, str]:
    """Returns name -> version of what is installed and matters."""
    found = {"python": platform.python_version()}
    for name in [name for key in ("", *frameworks) for name in SHOWN[key]]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def imports(framework: str) -> None:
    """Imports what users import, from what is installed and not from a source tree."""
    for name in MODULES[framework]:
        module: ModuleType = importlib.import_module(name)
        if "site-packages" not in str(module.__file__):
            raise RuntimeError(f"{name} must come from an installed wheel, got {module.__file__}")


def parity(framework: str) -> None:
    """Follows the reference through every optimizer with all options on."""
    from parity_tests import golden
    from parity_tests.cases import CASES
    from parity_tests.compare import assert_same
    from parity_tests.drivers import DRIVERS as drivers
    from parity_tests.tolerances import TOLERANCES

    for optimizer in ("sgd", "adamw", "radam"):
        case = replace(CASES[f"{optimizer}-everything"], steps=STEPS)
        recorded = golden.load_record(case.problem)
        for dtype in ("float64", "float32"):
            got = drivers[DRIVERS[framework]].run(case, recorded, dtype)
            assert_same(
                f"{framework} {case.id}", got, golden.replay(case, recorded), TOLERANCES[dtype, "golden"]
            )


def checkpoint(framework: str) -> None:
    """Saves a run, restores it into a fresh one, and goes on in the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        straight, resumed = {"jax": _jax_runs, "torch": _torch_runs}[framework](folder)
    for name in straight:
        if straight[name].tobytes() != resumed[name].tobytes():
            raise RuntimeError(f"{framework}: {name} must be the same bits after a resume, got others")


def _jax_runs(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import jax.numpy as jnp
    import optax

    import sfjax
    from sfjax.checkpoint import Checkpoints

    tx = sfjax.schedule_free_adamw(0.05, warmup_steps=5)
    params: Any = {"w": jnp.arange(4.0), "h": jnp.ones(3, jnp.bfloat16)}
    state: Any = tx.init(params)

    def steps(params: Any, state: Any) -> tuple[Any, Any]:
        for _ in range(STEPS // 2):
            gradients = {name: leaf * leaf for name, leaf in params.items()}
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    fresh = params, state
    params, state = steps(params, state)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(STEPS // 2, params, state)
        checkpoints.wait()
        restored: Any = checkpoints.restore(*fresh)
    runs = steps(params, state), steps(restored.params, restored.opt_state)
    straight, resumed = ({**y, **_x("x ", sfjax.schedule_free_eval_params(s, y))} for y, s in runs)
    return _arrays(straight), _arrays(resumed)


def _torch_runs(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    import sftorch

    def begin() -> tuple[Any, Any]:
        model = torch.nn.ParameterDict({"w": torch.arange(4.0), "h": torch.ones(3, dtype=torch.bfloat16)})
        return model, sftorch.AdamWScheduleFree(model.parameters(), lr=0.05, warmup_steps=5)

    def steps(model: Any, optimizer: Any) -> dict[str, Any]:
        for _ in range(STEPS // 2):
            for parameter in model.values():
                parameter.grad = parameter.detach() ** 2
            optimizer.step()
        y = {name: p.detach().float() for name, p in model.named_parameters()}
        return y | _x("x ", {name: p.float() for name, p in optimizer.eval_state_dict(model).items()})

    first, second = begin(), begin()
    steps(*first)
    with sftorch.checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(*first)
        checkpoints.wait()
        checkpoints.restore(*second)
    return _arrays(steps(*first)), _arrays(steps(*second))


def _x(prefix: str, leaves: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: leaf for name, leaf in leaves.items()}


def _arrays(leaves: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def main(frameworks: list[str]) -> int:
    """Runs every check; prints the versions as JSON first, so that a failure has them too."""
    print(json.dumps(versions(frameworks)), flush=True)
    imports("")
    if "jax" in frameworks and importlib.util.find_spec("flax"):
        imports("flax")
    for framework in frameworks:
        for check in (imports, parity, checkpoint):
            check(framework)
            print(f"{framework}: {check.__name__} ok", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
