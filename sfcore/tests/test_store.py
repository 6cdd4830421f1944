"""A folder of checkpoints: written, found, replaced, pruned, cleaned."""

import json
import os
import stat

import numpy as np
import pytest
import safetensors

from sfcore import exchange, inspection, store
from sfcore.convert import convert
from sfcore.exchange import CheckpointError
from sfcore.tests import examples


def _save(folder, step, **options):
    return store.write(folder, examples.meta(step, **options), examples.state(step), examples.inference(step))


def test_what_was_written_is_read_bit_for_bit(tmp_path):
    path = _save(tmp_path / "new" / "folder", 3)
    meta, state = store.read(path)
    _, inference = store.read(path, store.INFERENCE)
    assert path.name == "step_000000003"
    assert meta.step == 3
    assert examples.same(state, examples.state(3))
    assert examples.same(inference, examples.inference(3))


def test_a_save_leaves_nothing_beside_the_checkpoint(tmp_path):
    path = _save(tmp_path, 3)
    assert examples.listed(tmp_path) == [path.name]
    assert sorted(os.listdir(path)) == [store.INFERENCE, store.META, store.STATE]


def test_inference_weights_say_what_they_are_to_other_programs(tmp_path):
    path = _save(tmp_path, 3)
    with safetensors.safe_open(path / store.INFERENCE, "numpy") as file:
        about = file.metadata()
        record = store.read_meta(path).tensors[store.INFERENCE]
        assert json.loads(about.pop("leaves")) == record
        assert about.pop("crc32").isdecimal()
        assert about == {"format": "pt", "weights_hold": "x", "step": "3"}


def _weights_alone(folder):
    path = folder / "shipped.safetensors"
    path.write_bytes((_save(folder / "run", 3) / store.INFERENCE).read_bytes())
    return path


READERS = {
    "inspect": lambda path: inspection.inspect(path),
    "weights:PATH": lambda path: store.weights(path),
    "convert": lambda path: convert(path, path.with_name("again.safetensors"), "inference"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_weights_read_alone_must_be_the_numbers_that_were_written(read, tmp_path):
    path = _weights_alone(tmp_path)
    read(path)
    whole = path.read_bytes()
    for old, new in [
        (whole[-4:], b"\0\0\0\1"),
        (b'"F32"', b'"I32"'),
        (b'"step":"3"', b'"step":"9"'),
        (b'"step":"3"', b'"ste_":"3"'),
        (b'"weights_hold"', b'"weights_hole"'),
        (b'"crc32":"', b'"crc33":"'),
        (b'"leaves"', b'"leafes"'),
    ]:
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match="is damaged"):
            read(path)
    path.write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="leaf 'w' must have crc32"):
        read(path)


def test_weights_without_a_record_in_their_header_are_read_as_they_are(tmp_path):
    x, path = {"w": np.ones(2)}, tmp_path / "x.safetensors"
    for header in ({}, {"weights_hold": "x", "step": "3"}, {"crc32": "of another program"}, {"leaves": "4"}):
        exchange.write_tensors(path, x, header)
        assert examples.same(store.weights(path)[0], x)
        assert not inspection.inspect(path)["verified"]
    exchange.write_tensors(path, x, sealed=True)
    assert inspection.inspect(path)["verified"]


@pytest.mark.parametrize("leaves", ["5", "{", "[]", '{"w": 1}', '{"w": {"dtype": "float32"}}', "[" * 100_000])
def test_a_record_in_a_header_that_is_none_is_refused(leaves, tmp_path):
    text = {"weights_hold": "x", "leaves": leaves}
    path = tmp_path / "x.safetensors"
    exchange.write_tensors(path, {"w": np.ones(2)}, text | {"crc32": str(exchange.crc_of(text))})
    with pytest.raises(CheckpointError, match="must be a record of leaves"):
        store.weights(path)


def test_the_record_of_the_caller_is_not_written_to(tmp_path):
    meta = examples.meta(1)
    store.write(tmp_path, meta, examples.state(), {})
    assert meta.tensors == {}


def test_a_folder_is_readable_for_whom_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        path = _save(tmp_path, 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert stat.S_IMODE((path / store.STATE).stat().st_mode) == 0o644


def test_steps_are_numbers_and_not_text(tmp_path):
    for step in (2, 10, 9, 1_000_000_000):
        _save(tmp_path, step)
    (tmp_path / "step_3").mkdir()
    (tmp_path / "notes.txt").touch()
    assert list(store.steps(tmp_path)) == [2, 9, 10, 1_000_000_000]
    assert store.newest(tmp_path).name == "step_1000000000"


def test_a_folder_that_is_not_there_holds_no_steps(tmp_path):
    assert store.steps(tmp_path / "none") == {}
    with pytest.raises(CheckpointError, match="must hold a checkpoint"):
        store.newest(tmp_path / "none")


def test_saving_a_step_again_replaces_it_as_often_as_one_likes(tmp_path):
    for note in "abc":
        path = _save(tmp_path, 5, extra={"note": note})
    assert examples.listed(tmp_path) == [path.name]
    assert store.newest(tmp_path) == path
    assert store.read(path)[0].extra == {"note": "c"}


def test_a_leaf_without_a_role_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="leaf 'w' must be named ROLE/NAME"):
        store.write(tmp_path / "f", examples.meta(), {"w": np.zeros(2)}, {})
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_cannot_rank_is_refused_and_leaves_nothing(tmp_path, value):
    with pytest.raises(CheckpointError, match="metrics must be finite"):
        _save(tmp_path, 1, metrics={"loss": value})
    assert examples.listed(tmp_path) == []


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 1.0, 2.0, 4.0], start=1):
        _save(tmp_path, step, metrics={"loss": loss})
    gone = store.prune(tmp_path, keep_newest=2, keep_best=1)
    assert list(store.steps(tmp_path)) == [2, 4, 5]
    assert [path.name for path in gone] == ["step_000000001", "step_000000003"]


def test_the_best_may_be_the_newest(tmp_path):
    for step, loss in enumerate([3.0, 2.0, 1.0], start=1):
        _save(tmp_path, step, metrics={"loss": loss})
    store.prune(tmp_path, keep_newest=1, keep_best=1)
    assert list(store.steps(tmp_path)) == [3]


def test_checkpoints_without_the_metric_or_with_a_damaged_record_rank_nowhere(tmp_path):
    _save(tmp_path, 1, metrics={"loss": 5.0})
    _save(tmp_path, 2)
    (_save(tmp_path, 3, metrics={"loss": 0.0}) / store.META).write_text("{}")
    _save(tmp_path, 4, metrics={"accuracy": 0.0})
    store.prune(tmp_path, keep_newest=1, keep_best=1)
    assert list(store.steps(tmp_path)) == [1, 4]


@pytest.mark.parametrize(("newest", "best"), [(0, 1), (-1, 0), (1, -1)])
def test_pruning_never_leaves_a_run_without_its_newest(tmp_path, newest, best):
    _save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="keep_newest must be >= 1"):
        store.prune(tmp_path, newest, best)
    assert list(store.steps(tmp_path)) == [1]


def test_clean_removes_leftovers_and_nothing_else(tmp_path):
    path = _save(tmp_path, 1)
    (tmp_path / ".partial-a").mkdir()
    (tmp_path / ".partial-a" / "state.safetensors").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    assert store.clean(tmp_path) == [tmp_path / ".partial-a"]
    assert examples.listed(tmp_path) == ["notes", path.name]
    assert store.clean(tmp_path / "none") == []


def test_clean_removes_the_older_of_two_checkpoints_of_a_step(tmp_path):
    path = _save(tmp_path, 1)
    newer = tmp_path / f"{path.name}.1"
    path.rename(newer)
    older = _save(tmp_path, 2).rename(path)
    assert store.clean(tmp_path) == [older]
    assert store.newest(tmp_path) == newer


def test_a_removal_that_the_system_refuses_does_not_fail_a_save(tmp_path, monkeypatch):
    _save(tmp_path, 1)
    monkeypatch.setattr(store.files, "remove", lambda path: False)
    path = _save(tmp_path, 1, extra={"note": "second"})
    assert store.newest(tmp_path) == path
