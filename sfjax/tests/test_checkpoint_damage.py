"""Every kind of damage is a clear error that names file and leaf, and touches nothing that lives."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfjax
from sfcore import exchange
from sfcore.inspection import inspect
from sfcore.tests.examples import listed
from sfjax.checkpoint import CheckpointError, Checkpoints
from sfjax.tests.checkpoint_runs import begin, data_files, flip, go, saved, snapshot, transformation
from sfjax.tests.runs import assert_same


def _truncate(step: Path) -> None:
    for file in data_files(step):  # all: some hold what a later file has superseded, and nobody reads them
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _remove_data(step: Path) -> None:
    for file in data_files(step):
        file.unlink()


def _empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def _newer_format(step: Path) -> None:
    file = step / "meta" / "metadata"
    body = json.loads(file.read_text())
    body.pop("crc32")
    body["format_version"] = 99
    file.write_text(json.dumps(body | {"crc32": exchange.crc_of(body)}))


def _lose_record(step: Path) -> None:
    (step / "meta" / "metadata").unlink()


def _lose_state(step: Path) -> None:
    shutil.rmtree(step / "state")


def _cut_tree(step: Path) -> None:
    file = step / "state" / "_METADATA"
    file.write_text(file.read_text()[:100])


def _change_key(step: Path) -> None:
    file = step / "state" / "_METADATA"
    start, key, end = file.read_text().rpartition('"key": ')
    assert key
    file.write_text(f'{start}"kex": {end}')


def _forget_leaf(step: Path) -> None:
    file = step / "state" / "_METADATA"
    tree = json.loads(file.read_text())
    del tree["tree_metadata"]["('params', 'c', 'd')"]
    file.write_text(json.dumps(tree))


def _flip_record(step: Path) -> None:
    flip(step / "meta" / "metadata", 40)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated file": (_truncate, r"state is damaged: leaf '.+' cannot be read"),
    "missing file": (_remove_data, r"state is damaged: leaf '.+' cannot be read"),
    "missing leaf": (_forget_leaf, r"must hold the leaf 'params/c/d', got none"),
    "empty folder": (_empty, r"metadata is missing: the folder is empty"),
    "newer format": (_newer_format, r"format version <= 2, got 99.*upgrade"),
    "missing record": (_lose_record, r"metadata is missing"),
    "missing state": (_lose_state, r"state is missing"),
    "cut description": (_cut_tree, r"_METADATA is damaged"),
    "changed key": (_change_key, r"_METADATA is damaged"),
    "flipped record": (_flip_record, r"metadata is damaged|must say it is"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named_and_nothing_live_changes(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    key = np.random.default_rng(7)
    with saved(tmp_path, extra_state={"data": key}) as (checkpoints, params, opt_state):
        damage(tmp_path / "3")
        before, random = snapshot(params, opt_state), key.bit_generator.state
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(params, opt_state, extra_state={"data": key})
        with pytest.raises(CheckpointError, match="must hold a checkpoint that verifies"):
            checkpoints.restore(params, opt_state, extra_state={"data": key}, resume="latest-good")
        assert snapshot(params, opt_state) == before
        assert key.bit_generator.state == random


def test_a_flipped_bit_anywhere_in_the_arrays_is_found_and_its_leaf_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    named = set()
    params = {name: jnp.asarray(rng.standard_normal((30, 20)), jnp.float32) for name in "abc"}
    opt_state = transformation("adamw").init(params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, params, opt_state)
        checkpoints.wait()
        for file in data_files(tmp_path / "3"):
            whole = file.read_bytes()
            for at in rng.choice(len(whole), min(len(whole), 20), replace=False):
                flip(file, int(at), int(rng.integers(8)))
                try:
                    restored = checkpoints.restore(params, opt_state)
                except CheckpointError as error:
                    found = re.search(r"state is damaged: leaf '(.+?)'", str(error))
                    named.add(found[1] if found else str(error))
                else:  # a byte that nothing reads
                    assert restored is not None
                    assert_same((restored.params, restored.opt_state), (params, opt_state))
                file.write_bytes(whole)
    assert {"params/a", "params/b", "params/c"} & named
    assert all(name.startswith(("params/", "opt_state/")) for name in named), named


def test_a_changed_value_that_decodes_is_found_by_its_checksum(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        file = tmp_path / "3" / "meta" / "metadata"
        body = json.loads(file.read_text())
        body.pop("crc32")
        body["tensors"]["state"]["opt_state/1/z/a"]["crc32"] ^= 1
        file.write_text(json.dumps(body | {"crc32": exchange.crc_of(body)}))
        with pytest.raises(CheckpointError, match=r"leaf 'opt_state/1/z/a' must have crc32 \d+, got \d+"):
            checkpoints.restore(params, opt_state)


def test_damaged_inference_weights_make_a_checkpoint_no_longer_good(tmp_path: Path) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        flip(tmp_path / "3" / "inference" / "inference.safetensors", -1)
        with pytest.raises(CheckpointError, match=r"inference\.safetensors is damaged: leaf"):
            checkpoints.restore(params, opt_state, resume="latest-good")


def test_latest_good_falls_back_and_says_what_was_skipped_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):
        checkpoints.save(5, *go(transformation("adamw"), params, opt_state, 3, 5))
        checkpoints.wait()
        _truncate(tmp_path / "5")
        with caplog.at_level(logging.INFO, "sfjax.checkpoint"):
            restored = checkpoints.restore(params, opt_state, resume="latest-good")
    assert restored is not None
    assert restored.meta.step == 3
    (skipped,) = restored.skipped
    assert skipped.path == tmp_path / "5"
    assert "cannot be read" in skipped.why
    assert any(str(tmp_path / "5") in notice and skipped.why in notice for notice in restored.notices)
    assert "skipped" in caplog.text


@pytest.mark.parametrize(
    ("change", "problems", "message"),
    [
        (lambda p: p | {"a": jnp.ones((3, 3))}, 3, r"params/a must have the shape \(3, 3\).*got \(3, 2\)"),
        (
            lambda p: p | {"a": p["a"].astype(jnp.bfloat16)},
            1,
            r"params/a must have the dtype bfloat16.*got float32",
        ),
        (lambda p: p | {"new": jnp.ones(2)}, 2, r"params/new must be in the checkpoint"),
        (
            lambda p: {k: v for k, v in p.items() if k != "b"},
            2,
            r"the checkpoint's params/b must have a place",
        ),
    ],
    ids=["wrong shape", "wrong dtype", "parameter too many", "parameter too few"],
)
def test_another_model_is_refused_with_every_leaf(
    change: Any, problems: int, message: str, tmp_path: Path
) -> None:
    with saved(tmp_path) as (checkpoints, params, _):
        other = change(params)
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoints.restore(other, transformation("adamw").init(other))
        assert str(caught.value).count("\n  ") == problems, caught.value


def test_a_file_without_permission_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with saved(tmp_path) as (checkpoints, params, opt_state):

        def refuse(self: Path, *_: Any, **__: Any) -> str:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "read_text", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\): give this user"):
            checkpoints.restore(params, opt_state)


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk or the quota is full; free space"),
        (errno.EACCES, "no permission; choose a folder"),
    ],
    ids=["disk full", "no permission"],
)
def test_a_failed_save_is_reported_and_leaves_the_older_checkpoint(
    number: int, message: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tx, params = transformation("sgd"), begin()
    opt_state = tx.init(params)
    checkpoints = Checkpoints(tmp_path, background=background)
    checkpoints.save(1, params, opt_state)
    checkpoints.wait()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, "no")

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "write_tensors", fail)
        with pytest.raises(CheckpointError, match=rf"cannot write the checkpoint of step 2 .*{message}"):
            _save_and_wait(checkpoints, 2, params, opt_state)
    assert listed(tmp_path) == ["1"]
    checkpoints.save(3, params, opt_state)
    checkpoints.close()
    assert listed(tmp_path) == ["1", "3"]


def _save_and_wait(checkpoints: Checkpoints, *arguments: Any) -> None:
    checkpoints.save(*arguments)
    checkpoints.wait()


def test_a_folder_that_cannot_be_made_is_an_error_at_the_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    params = begin()
    with pytest.raises(CheckpointError, match=r"cannot write into .*file.*choose a folder"):
        Checkpoints(tmp_path / "file" / "under").save(1, params, transformation("sgd").init(params))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), jnp.inf, "0.5", True])
def test_a_metric_that_cannot_rank_is_refused_before_anything_is_written(value: Any, tmp_path: Path) -> None:
    params = begin()
    with pytest.raises(CheckpointError, match="metrics must be finite numbers, got loss"):
        Checkpoints(tmp_path / "new").save(
            1, params, transformation("sgd").init(params), metrics={"loss": value}
        )
    assert not (tmp_path / "new").exists()


def test_state_without_schedule_free_is_refused(tmp_path: Path) -> None:
    import optax

    params = begin()
    with pytest.raises(ValueError, match="opt_state must hold a ScheduleFreeState"):
        Checkpoints(tmp_path / "new").save(1, params, optax.adam(0.1).init(params))
    assert sfjax.find_states(optax.adam(0.1).init(params)) == []


def test_float64_is_not_quietly_narrowed(tmp_path: Path) -> None:
    with saved(tmp_path, extra_state={"wide": np.ones(2)}) as (checkpoints, params, opt_state):
        target = {"wide": jax.ShapeDtypeStruct((2,), np.float32)}
        with pytest.raises(
            CheckpointError, match=r"extra_state/wide must have the dtype float32.*got float64"
        ):
            checkpoints.restore(params, opt_state, extra_state=target)


def test_a_pipe_in_the_place_of_data_is_refused_at_once(tmp_path: Path) -> None:
    params = begin()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, transformation("sgd").init(params))
    for file in data_files(tmp_path / "1"):
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(CheckpointError, match="must be a file, got a link or a pipe"):
        inspect(tmp_path / "1")
