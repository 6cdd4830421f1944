"""Every kind of damage: a clear error that names file, leaf and way out, never a wrong array."""

import json
import os
import shutil

import numpy as np
import pytest

from sfcore import exchange, store
from sfcore.exchange import CheckpointError
from sfcore.meta import Meta
from sfcore.tests import examples


@pytest.fixture
def saved(tmp_path):
    return store.write(tmp_path / "run", examples.meta(1), examples.state(), examples.inference())


def _rewrite(path, **leaves):
    """Replaces leaves of the state file, None removes one; the record stays."""
    held = exchange.read_tensors(path / store.STATE)
    held |= {f"z/{name}": leaf for name, leaf in leaves.items()}
    exchange.write_tensors(path / store.STATE, {n: a for n, a in held.items() if a is not None})


@pytest.mark.parametrize("file", [store.STATE, store.INFERENCE, store.META])
def test_a_flipped_bit_in_any_byte_is_noticed_or_changes_nothing(saved, file):
    whole = (saved / file).read_bytes()
    expected = store.read(saved), store.read(saved, store.INFERENCE)[1]
    harmless = 0
    # Every byte of the leaves and their header; of the long JSON every third, to save time.
    for place in range(0, len(whole), 3 if file == store.META else 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        (saved / file).write_bytes(flipped)
        try:
            (meta, state), inference = store.read(saved), store.read(saved, store.INFERENCE)[1]
        except CheckpointError as error:
            noticed = str(error)
            assert str(saved) in noticed
        else:
            harmless += 1
            assert meta == expected[0][0]
            assert examples.same(state, expected[0][1])
            assert examples.same(inference, expected[1])
    # Only white space between the fields of a JSON may change its byte and keep its meaning.
    assert harmless <= 0.02 * len(whole)


@pytest.mark.parametrize("file", [store.STATE, store.INFERENCE, store.META])
def test_a_file_cut_at_any_byte_is_noticed(saved, file):
    whole = (saved / file).read_bytes()
    for length in range(0, len(whole), 7 if file == store.META else 1):
        (saved / file).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"damaged|truncated"):
            store.read(saved, store.INFERENCE if file == store.INFERENCE else store.STATE)


def test_a_truncated_file_names_the_leaf_that_is_cut(saved):
    whole = (saved / store.STATE).read_bytes()
    (saved / store.STATE).write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=r"truncated in leaf 'z/w': .* 96 bytes of data, got 92"):
        store.read(saved)


def test_bytes_after_the_end_are_noticed(saved):
    with open(saved / store.STATE, "ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="must end after 96 bytes of data, got 100"):
        store.read(saved)


@pytest.mark.parametrize("file", [store.STATE, store.INFERENCE, store.META])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_random_bytes_are_no_checkpoint(saved, file, size):
    (saved / file).write_bytes(np.random.default_rng(size).bytes(size))
    with pytest.raises(CheckpointError, match="damaged"):
        store.read(saved, store.INFERENCE if file == store.INFERENCE else store.STATE)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"w": None}, "must hold the leaf 'z/w', got none of that name"),
        ({"w": None, "ww": np.zeros(2)}, "must hold the leaf 'z/w', got none of that name but 'z/ww'"),
        ({"new": np.zeros(2)}, "only the leaves of its record, got 'z/new'"),
        ({"w": np.zeros((2, 3), np.float32)}, r"leaf 'z/w' must have shape \[3, 2\], got \[2, 3\]"),
        ({"w": np.zeros((3, 2), np.float64)}, "leaf 'z/w' must have dtype float32, got float64"),
        ({"w": np.zeros((3, 2), np.float32)}, "leaf 'z/w' must have crc32"),
    ],
    ids=["missing", "renamed", "added", "shape", "dtype", "content"],
)
def test_a_leaf_that_differs_from_the_record_is_named(saved, leaves, message):
    _rewrite(saved, **leaves)
    with pytest.raises(CheckpointError, match=message) as error:
        store.read(saved)
    assert str(saved / store.STATE) in str(error.value)
    assert "restore an older checkpoint" in str(error.value)


@pytest.mark.parametrize("file", [store.STATE, store.META])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        store.read(saved)


def _empty(path):
    path.mkdir()


def _file(path):
    path.touch()


def _other(path):
    path.mkdir()
    (path / "model.bin").touch()


def _run(path):
    store.write(path, examples.meta(), {}, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "nothing of that name: check the path"),
        (_empty, "an empty folder"),
        (_file, "a file: pass the folder it lies in"),
        (_other, "no checkpoint of ours"),
        (_run, "a folder of checkpoints: pass one of them"),
    ],
)
def test_a_path_that_is_no_checkpoint_says_what_it_is(tmp_path, make, message):
    make(tmp_path / "it")
    with pytest.raises(CheckpointError, match=message):
        store.read_meta(tmp_path / "it")


def test_a_record_without_the_file_is_named(saved):
    meta = store.read_meta(saved)
    del meta.tensors[store.STATE]
    (saved / store.META).write_text(meta.to_json())
    with pytest.raises(CheckpointError, match=r"must record state\.safetensors"):
        store.read(saved)


def test_latest_good_skips_what_is_damaged_and_says_why(tmp_path):
    for step in range(1, 7):
        store.write(tmp_path, examples.meta(step), examples.state(step), examples.inference(step))
    held = store.steps(tmp_path)
    _rewrite(held[6], w=None)
    (held[5] / store.INFERENCE).unlink()
    (held[4] / store.META).write_text("{")
    shutil.rmtree(held[3])
    held[3].mkdir()
    path, skipped, _ = store.latest_good(tmp_path)
    assert path == held[2]
    assert [s.path for s in skipped] == [held[6], held[5], held[4], held[3]]
    for s, word in zip(skipped, ["'z/w'", store.INFERENCE, store.META, "empty folder"], strict=True):
        assert word in s.why


def test_latest_good_skips_a_newer_format(tmp_path):
    store.write(tmp_path, examples.meta(1), {}, {})
    newer = store.write(tmp_path, examples.meta(2), {}, {})
    body = json.loads((newer / store.META).read_text()) | {"format_version": 99}
    (newer / store.META).write_text(json.dumps(body))
    path, skipped, _ = store.latest_good(tmp_path)
    assert path.name == "step_000000001"
    assert "upgrade" in skipped[0].why


def test_nothing_good_lists_every_reason(tmp_path):
    with pytest.raises(CheckpointError, match="it holds none"):
        store.latest_good(tmp_path)
    for step in (1, 2):
        (store.write(tmp_path, examples.meta(step), {}, {}) / store.STATE).unlink()
    with pytest.raises(CheckpointError, match=r"(?s)step_000000002: .*missing.*step_000000001: .*missing"):
        store.latest_good(tmp_path)


def test_a_header_that_asks_for_the_moon_is_refused_without_allocating(saved):
    for header in (
        {"y/w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"y/w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"y/w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"y/w": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}},
        {"y/w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"y/w": {"dtype": "F32", "shape": True, "data_offsets": [0, 4]}},
        {"y/w": 3},
        [],
    ):
        text = json.dumps(header).encode()
        (saved / store.STATE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(CheckpointError, match="damaged"):
            store.read(saved)


def test_the_live_record_is_whole_after_reading():
    text = examples.meta(1, extra={"a": 1}).to_json()
    assert Meta.from_json(text).to_json() == text


@pytest.mark.parametrize("shape", [[1] * 100, [2**62] * 200_000, [0, 2**62, 2**62]])
def test_a_shape_that_no_array_can_have_is_refused_at_once(tmp_path, shape):
    size = 0 if 0 in shape else 4
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(CheckpointError, match=r"w\.safetensors is damaged: .*leaf 'w' must have"):
        exchange.read_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("file", [store.STATE, store.INFERENCE, store.META])
def test_a_pipe_or_a_device_in_a_files_place_is_refused_at_once(saved, file):
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (saved / file).unlink()
        put(saved / file)
        with pytest.raises(CheckpointError, match=f"{file} is damaged: it must be a file, got a pipe or"):
            store.PLAIN.verify(saved)


def test_a_record_larger_than_any_is_not_read(saved):
    with (saved / store.META).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="must have at most 67108864 bytes, got 1099511627776"):
        store.read(saved)
