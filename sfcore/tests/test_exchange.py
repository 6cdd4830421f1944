"""Leaves in safetensors: every dtype comes back bit for bit, and the public package reads the same."""

import errno
import os

import numpy as np
import pytest
import safetensors.numpy

from sfcore import _safetensors, exchange
from sfcore.exchange import CheckpointError
from sfcore.tests import examples


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    leaves = examples.every_dtype()
    record = exchange.write_tensors(tmp_path / "f", leaves)
    assert examples.same(exchange.read_tensors(tmp_path / "f", record), leaves)


def public_dtypes(*unlike):
    """Returns leaf -> array of the dtypes that the installed package has: 0.4.5 has fewer."""
    missing = unlike if "C64" in safetensors.numpy._TYPES else (*unlike, "complex", "fnuz")
    return {
        name: leaf
        for name, leaf in examples.every_dtype().items()
        if not any(word in name for word in missing)
    }


def test_the_safetensors_package_reads_what_is_written(tmp_path):
    leaves = public_dtypes("float8")
    exchange.write_tensors(tmp_path / "f", leaves)
    read = safetensors.numpy.load_file(tmp_path / "f")
    for name, leaf in leaves.items():
        assert read[name].tobytes() == leaf.tobytes()
        assert "complex128" in name or read[name].dtype == leaf.dtype


def test_what_the_safetensors_package_writes_is_read(tmp_path):
    leaves = public_dtypes("complex128")
    safetensors.numpy.save_file(leaves, tmp_path / "f", metadata={"format": "pt"})
    assert examples.same(exchange.read_tensors(tmp_path / "f"), leaves)


@pytest.mark.parametrize("order", ["C", "F", "reversed", "big endian"])
def test_memory_layout_and_byte_order_do_not_matter(tmp_path, order):
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    array = {
        "C": plain,
        "F": np.asfortranarray(plain),
        "reversed": np.ascontiguousarray(plain[::-1])[::-1],
        "big endian": plain.astype(">f4"),
    }[order]
    record = exchange.write_tensors(tmp_path / "f", {"y/w": array})
    read = exchange.read_tensors(tmp_path / "f", record)["y/w"]
    assert read.dtype == np.float32
    assert np.array_equal(read, plain)


def test_no_leaves_make_a_file_too(tmp_path):
    record = exchange.write_tensors(tmp_path / "f", {})
    assert exchange.read_tensors(tmp_path / "f", record) == {}


@pytest.mark.parametrize("dtype", ["longdouble", "U3", "object", "datetime64[s]"])
def test_a_dtype_without_a_place_in_the_format_is_refused_by_leaf(tmp_path, dtype):
    with pytest.raises(CheckpointError, match="leaf 'extra/odd' must have a dtype of safetensors"):
        exchange.write_tensors(tmp_path / "f", {"y/w": np.zeros(2), "extra/odd": np.zeros(2, dtype)})
    assert not (tmp_path / "f").exists()


def test_read_arrays_belong_to_the_reader(tmp_path):
    exchange.write_tensors(tmp_path / "f", {"y/w": np.zeros(2)})
    exchange.read_tensors(tmp_path / "f")["y/w"] += 1
    assert exchange.read_tensors(tmp_path / "f")["y/w"].tolist() == [0, 0]


def test_fingerprints_tell_name_dtype_shape_bits_and_sign_of_zero_apart():
    zeros = np.zeros((2, 2), np.float32)
    variants = [
        {"w": zeros},
        {"v": zeros},
        {"w": zeros.view(np.int32)},
        {"w": zeros.reshape(4)},
        {"w": -zeros},
        {"w": zeros, "b": zeros},
        {},
    ]
    assert len({exchange.fingerprint(v) for v in variants}) == len(variants)


def test_fingerprints_do_not_depend_on_order_or_layout():
    a, b = np.arange(6.0).reshape(2, 3), np.ones(2)
    expected = exchange.fingerprint({"a": a, "b": b})
    assert exchange.fingerprint({"b": b, "a": np.asfortranarray(a)}) == expected


@pytest.mark.parametrize("leaf", ["w", "weights/w", "", "/w"])
def test_a_leaf_without_a_role_is_refused(leaf):
    with pytest.raises(CheckpointError, match="must be named ROLE/NAME"):
        exchange.split(leaf)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_is_made_while_it_is_written_makes_the_same_file(tmp_path, sealed):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 2), np.int16), "c": np.ones(2) * (1 + 2j)}
    arrays |= {"d": np.ones((), np.float32)}
    cuts = {"a": [1, 5], "b": [], "c": [1], "d": []}

    def made(name):
        array = arrays[name]
        pieces = lambda: iter(np.split(array.reshape(-1), cuts[name]))  # noqa: E731
        return exchange.Made(array.dtype, array.shape, pieces)

    leaves = {name: made(name) for name in arrays}
    text = {"format": "pt"}
    record = exchange.write_tensors(tmp_path / "arrays", arrays, text, sealed)
    assert exchange.write_tensors(tmp_path / "made", leaves, text, sealed) == record
    assert (tmp_path / "made").read_bytes() == (tmp_path / "arrays").read_bytes()
    assert examples.same(exchange.read_tensors(tmp_path / "made", record), arrays)
    assert exchange.fingerprint(leaves) == exchange.fingerprint(arrays)
    assert {name: exchange.describe(leaf) for name, leaf in leaves.items()} == record
    assert all(np.array_equal(np.asarray(leaf), arrays[name]) for name, leaf in leaves.items())


@pytest.mark.parametrize("sealed", [False, True])
def test_a_large_file_is_synced_while_it_is_written_and_is_the_same_file(tmp_path, monkeypatch, sealed):
    leaves = {f"w{i}": np.arange(i, i + 5.0) for i in range(9)}
    record = exchange.write_tensors(tmp_path / "at once", leaves, sealed=sealed)
    sizes, fsync = [], os.fsync

    def noted(handle):
        sizes.append(os.fstat(handle).st_size)
        fsync(handle)

    monkeypatch.setattr(_safetensors, "_AT_ONCE", 100)
    monkeypatch.setattr("os.fsync", noted)
    assert exchange.write_tensors(tmp_path / "f", leaves, sealed=sealed) == record
    content = (tmp_path / "f").read_bytes()
    assert content == (tmp_path / "at once").read_bytes()
    assert len(sizes) == 4  # of 120 bytes each, and the end
    assert sizes[0] < sizes[-1] == len(content)


def test_a_sync_that_fails_while_more_is_written_is_an_error(tmp_path, monkeypatch):
    """The system tells of it once: the sync at the end succeeds."""
    failing = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fsync(handle):
        if failing:
            raise failing.pop()

    monkeypatch.setattr(_safetensors, "_AT_ONCE", 100)
    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        exchange.write_tensors(tmp_path / "f", {f"w{i}": np.zeros(20) for i in range(9)})


@pytest.mark.parametrize("number", range(20))
def test_a_seal_has_room_for_every_number(tmp_path, number):
    """CRCs of one to ten digits, in a header whose length is fixed before they are known."""
    leaves = {f"w{i}": np.random.default_rng(1000 * number + i).random(3) for i in range(7)}
    record = exchange.write_tensors(tmp_path / "f", leaves, {"step": "3"}, sealed=True)
    assert exchange.read_header(tmp_path / "f") == ({"step": "3"}, record)
    assert safetensors.numpy.load_file(tmp_path / "f").keys() == leaves.keys()
