"""One folder of checkpoints of several processes of jax.distributed: any number of them goes on."""

import json
import shutil

import numpy as np
import pytest

from sfcore.convert import convert
from sfcore.inspection import inspect
from sfjax.checkpoint import CheckpointError, read
from sfjax.tests.process_runs import run


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def two(scratch):
    """Returns what two processes did: saved, restored, refused what must be."""
    folder = str(scratch / "run")
    cases = [["save", {"folder": folder}], ["restore", {"folder": folder}], ["bad_calls", {"folder": folder}]]
    return scratch / "run", run(scratch, 2, cases)


def test_two_processes_go_on_in_the_same_bits(two):
    _, found = two
    saved, restored = ([one[case] for one in found] for case in (0, 1))
    assert {one["end"] for one in restored} == {saved[0]["end"]}
    assert all(len(one["notices"]) == 1 for one in restored)
    assert all(one["joined"] == [] for one in restored)  # no process holds all of it


def test_each_goes_on_with_its_own_random_numbers_and_place(two):
    _, found = two
    assert [one[1]["drawn"] for one in found] == [one[0]["drawn"] for one in found]
    assert found[0][0]["drawn"] != found[1][0]["drawn"]
    assert [one[1]["position"] for one in found] == [10, 11]


def test_no_process_writes_what_another_has(two):
    folder, _ = two
    meta = json.loads((folder / "3" / "meta" / "metadata").read_text())
    parts = [meta["tensors"][f"state-0000{rank}-of-00002"] for rank in (1, 2)]
    sizes = [
        sum(np.prod(one["shape"]) for one in part.values() if one["leaf"] == "params/w") for part in parts
    ]
    assert sizes == [2048, 2048]
    assert sum(one["leaf"] == "params/b" for part in parts for one in part.values()) == 1


def test_here_it_is_read_and_converted(two, tmp_path):
    folder, _ = two
    meta, state, inference = read(folder / "3")
    assert (meta.step, len(meta.ranks)) == (3, 2)
    assert state["z/w"].shape == (512, 8)
    found = inspect(folder)
    assert found["verified"]
    assert (found["step"], found["parameters"], found["elements"]) == (3, 4, 4134)
    path, _ = convert(folder, tmp_path / "x.safetensors", "inference")
    assert path.exists()
    assert inference["v"].dtype.name == "bfloat16"


def flip(folder):
    """Changes a byte of what the second process wrote."""
    file = max(
        (folder / "3" / "state" / "ocdbt.process_1" / "d").iterdir(), key=lambda one: one.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose(folder):
    shutil.rmtree(folder / "3" / "state" / "ocdbt.process_1")


@pytest.mark.parametrize("damage", [flip, lose])
def test_damage_to_what_one_process_wrote_is_noticed(two, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(two[0], copy)
    damage(copy)
    with pytest.raises(CheckpointError, match=r"is damaged|is missing"):
        read(copy / "3")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("step", "step must be the same on every rank, got 7 on rank 0 of 2 and 8 on rank 1 of 2"),
        ("model", "'params/b' (dtype and shape) must be the same on every rank"),
        ("argument", "rank 1 of 2 cannot save, so none does: position must be a whole number >= 0, got -1"),
        ("own weights", "params/b must be the same on every process, or an array over all of them"),
    ],
)
def test_processes_that_differ_are_refused_on_all(two, case, message):
    for one in two[1]:
        assert message in one[2][case]


def test_nothing_of_a_refused_save_stays(two):
    assert sorted(file.name for file in two[0].iterdir()) == [".writer.lock", "3"]


def test_a_process_that_never_calls_is_named_within_the_limit(two):
    first, second = (one[2]["never"] for one in two[1])
    assert first == (
        "every rank must save, got no word of rank 1 of 2 within 0.5 s: make the same calls "
        "on every rank, or see why it stopped."
    )
    assert second is None


@pytest.mark.slow
def test_four_two_and_one_processes_have_equal_digests(scratch):
    folders = [str(scratch / name) for name in ("four", "two", "one")]
    whole = run(scratch, 4, [["save", {"folder": folders[0]}]])
    chain = [
        run(scratch, 2, [["restore", {"folder": folders[0], "again": folders[1]}]], devices=2),
        run(scratch, 1, [["restore", {"folder": folders[1], "again": folders[2]}]], devices=4),
        run(scratch, 2, [["restore", {"folder": folders[2]}]], devices=2),
        run(scratch, 4, [["restore", {"folder": folders[0]}]]),
    ]
    found = [one[0] for ranks in chain for one in ranks]
    assert len({one["then"] for one in found}) == 1
    assert {one["end"] for one in found} == {whole[0][0]["end"]}


@pytest.mark.slow
def test_eight_four_and_one_devices_have_equal_digests(scratch):
    folders = [str(scratch / name) for name in ("8", "4", "1")]
    whole = run(scratch, 1, [["save", {"folder": folders[0]}]], devices=8)
    chain = [
        run(scratch, 1, [["restore", {"folder": folders[0], "again": folders[1]}]], devices=4),
        run(scratch, 1, [["restore", {"folder": folders[1], "again": folders[2]}]], devices=1),
        run(scratch, 1, [["restore", {"folder": folders[2]}]], devices=8),
    ]
    found = [one[0] for ranks in chain for one in ranks]
    assert len({one["then"] for one in found}) == 1
    assert {one["end"] for one in found} == {whole[0][0]["end"]}
