"""Checkpoints of earlier versions, of ours and of Optax's, load as what they were; see frozen/make.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import sfjax
from sfcore.hyperparameters import AdamW
from sfjax.checkpoint import Checkpoints, import_optax
from sfjax.tests.frozen import make
from sfjax.tests.runs import assert_close

FROZEN = Path(make.__file__).parent
EXPECTED = json.loads((FROZEN / "expected.json").read_text())
OPTIONS: dict[str, Any] = {"weight_decay": 0.01}


def _close(tree: Any, expected: dict[str, Any], tolerance: float) -> None:
    found = make.numbers(tree)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], np.asarray(value), rtol=tolerance, atol=tolerance, err_msg=name
        )


def test_todays_checkpoint_loads_and_goes_on() -> None:
    tx, params = make.ours(), make.begin()
    extra = {"key": jax.random.key(0), "text": ""}
    restored = Checkpoints(FROZEN / "today").restore(
        params,
        tx.init(params),
        extra_state=extra,
        hyperparameters=AdamW(lr=0.05, warmup_steps=4, weight_decay=0.01),
        accumulation=4,
        strict=True,
    )
    assert restored is not None
    _close((restored.params, restored.opt_state), EXPECTED["today"]["held"], 0)
    assert restored.extra_state["text"] == "frozen"
    np.testing.assert_array_equal(
        jax.random.key_data(restored.extra_state["key"]), jax.random.key_data(jax.random.key(3))
    )
    meta = restored.meta
    assert (meta.step, meta.epoch, meta.position, meta.metrics) == (2, 1, 10, {"loss": 0.25})
    assert (meta.accumulation, meta.extra["note"]) == ({"steps": 4, "position": 2}, "kept")
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps cannot do without
        after = make.run(tx, restored.params, restored.opt_state, 10, 15)
    # A compiler of another version may round differently; 1e-6 is some 10 ulps of the largest numbers.
    _close(after, EXPECTED["today"]["five on"], 1e-6)


def _read(name: str, tx: Any, typed: bool) -> Any:
    target = jax.eval_shape(lambda: {"params": make.begin(), "opt_state": tx.init(make.begin())})
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(FROZEN / name, target if typed else None)


# Orbax tells users of restores without a target that it falls back on the sharding that was saved.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "as dicts"])
def test_a_checkpoint_of_optax_contrib_loads(typed: bool) -> None:
    old = _read("optax_0_2_8", make.contrib(), typed)
    params = make.begin()
    tx = optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.05, 4, **OPTIONS))
    start = import_optax(old["opt_state"], old["params"], params, tx.init(params))
    held = EXPECTED["optax_0_2_8"]
    # contrib recovers x by a division, which costs it some ulps.
    _close(sfjax.schedule_free_eval_params(start.opt_state, start.params), held["x"], 2e-6)
    _close(sfjax.find_state(start.opt_state).z, _below(held, "1/1/z/"), 0)
    _close(
        sfjax.find_state(start.opt_state).base_optimizer_state.nu,
        _below(held, "1/1/base_optimizer_state/0/nu/"),
        0,
    )
    _close(start.params, _below(held, "0/"), 0)
    assert int(sfjax.find_state(start.opt_state).step) == 10


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "as dicts"])
def test_a_checkpoint_of_optax_adamw_loads(typed: bool) -> None:
    old = _read("optax_adamw", make.plain(), typed)
    params = make.begin()
    tx = optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.05, **OPTIONS))
    start = import_optax(
        old["opt_state"], old["params"], params, tx.init(params), hyperparameters=AdamW(lr=0.05)
    )
    held = EXPECTED["optax_adamw"]
    state = sfjax.find_state(start.opt_state)
    _close(state.base_optimizer_state.nu, _below(held, "1/1/0/nu/"), 0)
    _close(start.params, _below(held, "0/"), 0)
    _close(state.z, _below(held, "0/"), 0)
    assert_close(sfjax.schedule_free_eval_params(start.opt_state, start.params), start.params, 0)
    assert int(state.step) == 10


def _below(held: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value for name, value in held["held"].items() if name.startswith(prefix)
    }
