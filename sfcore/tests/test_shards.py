"""An array in pieces is read as one, in whole or in part, and never with a hole in it."""

import itertools

import numpy as np
import pytest

from sfcore import exchange, store, together
from sfcore.exchange import CheckpointError
from sfcore.shards import Piece, Place, Spread
from sfcore.tests import examples
from sfcore.tests.test_ranks import on_ranks

WHOLE = np.arange(35.0).reshape(7, 5)


def cut(*sizes):
    """Returns an array in pieces of these sizes on both axes."""
    pieces = []
    for i, j in itertools.product(range(0, 7, sizes[0]), range(0, 5, sizes[1])):
        held = WHOLE[i : i + sizes[0], j : j + sizes[1]]
        pieces.append(Piece((i, j), held.shape, lambda held=held: held))
    return Spread("w", WHOLE.dtype, WHOLE.shape, pieces)


@pytest.mark.parametrize("sizes", [(7, 5), (2, 5), (7, 2), (3, 2), (1, 1)], ids=str)
def test_any_part_is_what_it_is_in_the_whole(sizes):
    spread = cut(*sizes)
    assert np.array_equal(spread, WHOLE)
    assert spread.size == 35
    for start in itertools.product(range(7), range(5)):
        for stop in ((7, 5), (start[0] + 1, 5), (min(start[0] + 2, 7), start[1] + 1), start):
            shape = [b - a for a, b in zip(start, stop, strict=True)]
            expected = WHOLE[start[0] : stop[0], start[1] : stop[1]]
            assert np.array_equal(spread.region(start, shape), expected)


def test_a_number_is_one_piece():
    spread = Spread("w", np.dtype(float), (), [Piece((), (), lambda: np.float64(3))])
    assert spread.region((), ()) == 3.0
    assert np.asarray(spread).shape == ()


def test_a_hole_is_noticed_where_it_is_wanted():
    spread = cut(2, 5)
    del spread.pieces[1]
    assert np.array_equal(spread.region((0, 0), (2, 5)), WHOLE[:2])
    with pytest.raises(CheckpointError, match=r"'w' must have all its elements .* got 25 of the 35"):
        np.asarray(spread)


def written(folder, count=3, lines=7):
    """Writes a checkpoint whose leaves are in pieces, some of them without any on the last rank."""
    x = WHOLE.astype(np.float32)

    def work(ranks):
        mine = slice(ranks.rank * 3, ranks.rank * 3 + 3)
        place, piece = Place("y/w", [mine.start, 0], x.shape), x[mine]
        part = together.Part({"y/w": piece}, {"w": piece}, {"y/w": place}, {"w": place._replace(leaf="w")})
        if ranks.is_first:
            part.state["buffer/b"] = np.ones(2)
        return together.write(ranks, folder, examples.meta(), part, True)

    return on_ranks(count, work, limit=10.0)


def test_what_several_wrote_is_read_as_one(tmp_path):
    paths = written(tmp_path)
    assert paths == [tmp_path / "step_000000001"] * 3
    meta, state = store.read(paths[0])
    assert np.array_equal(state["y/w"], WHOLE)
    assert state["buffer/b"].tolist() == [1.0, 1.0]
    assert np.array_equal(store.read(paths[0], store.INFERENCE)[1]["w"], WHOLE)
    assert len(meta.ranks) == 3
    assert store.choose(tmp_path, "latest-good").skipped == []


def test_parts_are_sealed_and_say_what_they_are(tmp_path):
    path = written(tmp_path)[0]
    _, record = exchange.read_header(path / "inference-00002-of-00003.safetensors")
    assert record["w"]["start"] == [3, 0]
    assert record["w"]["of"] == [7, 5]


@pytest.mark.parametrize("file", ["state-00003-of-00003", "inference-00001-of-00003"])
def test_latest_good_verifies_every_part(tmp_path, file):
    path = written(tmp_path)[0]
    damaged = path / f"{file}.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"{file}.safetensors is damaged: leaf '(y/)?w' must have crc32"
    ):
        store.choose(tmp_path, "latest-good")


def test_one_that_cannot_write_leaves_nothing(tmp_path):
    def work(ranks):
        def fill(path):
            assert path.is_dir()
            if ranks.rank == 1:
                raise OSError("no")

        return together.put(ranks, tmp_path, 3, fill, lambda path, parts: None)

    found = on_ranks(2, work, limit=10.0)
    assert all("rank 1 of 2 cannot write its part" in str(one) for one in found)
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith((".partial", "step"))] == []
