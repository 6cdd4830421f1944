"""The codes of precision="8bit" in a file: y and its gap in one leaf, and back in the same bits."""

import numpy as np
import pytest

from sfcore import codes, exchange
from sfcore.exchange import CheckpointError


def some(rows=5, columns=30, seed=0):
    random = np.random.default_rng(seed)
    y = random.standard_normal((rows, columns)).astype(np.float32)
    y[0, :4] = np.inf, -np.inf, np.nan, -0.0
    y = (y.view(np.uint32) & np.uint32(0xFFFFFC00)).view(np.float32)
    gap = (random.integers(-512, 512, (rows, columns)) * 64).astype(np.int16)
    v = random.integers(0, 256, (rows, columns)).astype(np.uint8)
    scale = random.integers(-120, 128, (rows, 2)).astype(np.int8)
    return {"v/w": v, "gap/w": gap, "y/w": y, "scale/w": scale, "y/b": np.ones(3, np.float32)}


def test_a_file_has_both_in_four_bytes_and_gives_back_the_same_bits(tmp_path):
    leaves, path = some(), tmp_path / "state.safetensors"
    record = exchange.write_tensors(path, leaves)
    assert set(record) == set(leaves)
    found = exchange.read_tensors(path, record)
    reader = exchange.open_tensors(path, record)
    for leaf, array in leaves.items():
        for back in (found[leaf], reader(leaf)()):
            assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    stored = codes.put_together(leaves)
    assert list(stored) == ["v/w", "y+gap/w", "scale/w", "y/b"]
    assert sum(array.nbytes for array in stored.values()) == 5 * 150 + 10 + 12
    assert set(leaves) == {"v/w", "gap/w", "y/w", "scale/w", "y/b"}


@pytest.mark.parametrize("what", ["y", "gap", "no scale", "dtype", "shape"])
def test_what_would_lose_a_bit_stays_apart(what):
    leaves = some()
    if what == "y":
        leaves["y/w"].view(np.uint32)[2, 3] |= 1
    elif what == "gap":
        leaves["gap/w"][2, 3] |= 1
    elif what == "no scale":
        del leaves["scale/w"]
    elif what == "dtype":
        leaves["y/w"] = leaves["y/w"].astype(np.float64)
    else:
        leaves["gap/w"] = leaves["gap/w"][:2]
    assert codes.put_together(leaves).keys() == leaves.keys()


def test_a_file_that_is_not_what_was_written_is_named(tmp_path):
    path, leaves = tmp_path / "state.safetensors", some()
    record = exchange.write_tensors(path, leaves)
    for stored, message in (
        ({"y+gap/w": np.zeros((5, 30), np.int16)}, "must lie in a leaf of uint32, got int16"),
        ({"y+gap/w": np.zeros((5, 30), np.uint32), "y/w": leaves["y/w"]}, "must hold 'y/w' once"),
        ({"y+gap/w": np.zeros((5, 30), np.uint32)}, "must have crc32"),
    ):
        others = {leaf: leaves[leaf] for leaf in ("v/w", "scale/w", "y/b")}
        exchange._safetensors.write(path, others | stored, {})
        with pytest.raises(CheckpointError, match=message):
            exchange.read_tensors(path, record)
