"""One folder of checkpoints of many processes: any layout and number of them goes on from any other."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from sfcore import exchange, store
from sfcore.convert import convert
from sfcore.inspection import inspect
from sfcore.lock import WriterLock
from sfcore.preemption import EXIT_SAVED
from sftorch.tests.launcher import Launcher

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks():
    with Launcher("sftorch.tests.rank_runs") as launcher:
        yield launcher


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Returns a function that gives the folder and the results of a run, which is run once."""
    found = {}

    def run(kind, world, options=None, mode="train"):
        key = json.dumps([kind, world, options or {}, mode])
        if key not in found:
            folder = tmp_path_factory.mktemp("saved")
            found[key] = folder, ranks.run(world, "saved", folder, kind, options or {}, mode)
        return found[key]

    return run


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


# Layout and number of processes that save, and that restore.
WAYS = [
    (("fsdp", 2), ("fsdp", 2)),
    (("ddp", 2), ("fsdp", 2)),
]
SLOW_WAYS = [
    (("ddp", 2), ("ddp", 2)),
    (("fsdp", 2), ("one", 1)),
    (("one", 1), ("fsdp", 2)),
    (("fsdp", 2), ("ddp", 2)),
    (("fsdp", 4), ("fsdp", 4)),
    (("fsdp", 4), ("fsdp", 2)),
    (("fsdp", 4), ("one", 1)),
    (("fsdp", 4), ("ddp", 2)),
    (("fsdp", 2), ("fsdp", 4)),
    (("one", 1), ("fsdp", 4)),
    (("hsdp", 4), ("hsdp", 4)),
    (("hsdp", 4), ("fsdp", 2)),
    (("fsdp", 2), ("hsdp", 4)),
]


@pytest.mark.parametrize(
    ("of", "to"), [*WAYS, *(pytest.param(*way, marks=slow) for way in SLOW_WAYS)], ids=str
)
def test_a_run_goes_on_in_any_layout(ranks, saved, of, to):
    folder, before = saved(*of)
    after = ranks.run(to[1], "restored", folder, to[0], {})
    for one in after:
        assert_same(one["then"], before[0]["then"])
        if of == to:
            assert_same(one["end"], before[0]["end"])
        if to[0].endswith("fsdp"):
            assert one["joined"] == []  # no process holds all of it


EVEN = {"net": "even"}
EIGHT = {"net": "wide", "dtype": "bfloat16", "precision": "8bit"}


@slow
@pytest.mark.parametrize("options", [EVEN, EIGHT], ids=["float32", "8bit"])
@pytest.mark.parametrize(
    ("of", "to"),
    [
        (("tp", 2), ("tp", 2)),
        (("tp", 2), ("fsdp", 2)),
        (("tp x fsdp", 4), ("tp x fsdp", 4)),
        (("tp x fsdp", 4), ("fsdp", 2)),
        (("fsdp", 2), ("tp x fsdp", 4)),
    ],
    ids=str,
)
def test_so_does_one_with_parts_along_several_axes(ranks, saved, of, to, options):
    folder, before = saved(*of, options)
    for one in ranks.run(to[1], "restored", folder, to[0], options):
        assert_same(one["then"], before[0]["then"])
        if of == to:
            assert_same(one["end"], before[0]["end"])


FORMS = {
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "lean": {"dtype": "bfloat16", "precision": "lean"},
    "8bit": EIGHT,
    "8bit, float32": {"net": "wide", "precision": "8bit", "inner_momentum": 0.8},
    "wrapper": {"wrapper": True},
    "x is stored": {"betas": [0.0, 0.999]},
    "momentum": {"inner_momentum": 0.8},
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("form", [pytest.param(form, marks=slow) for form in FORMS])
@pytest.mark.parametrize("to", [("fsdp", 2), ("one", 1)], ids=str)
def test_every_form_of_the_state_does(ranks, saved, form, mode, to):
    folder, before = saved("fsdp", 2, FORMS[form], mode)
    for one in ranks.run(to[1], "restored", folder, to[0], FORMS[form], mode):
        assert_same(one["then"], before[0]["then"])
        if to == ("fsdp", 2):
            assert_same(one["end"], before[0]["end"])


@slow
@pytest.mark.parametrize(("before", "after"), [("exact", "8bit"), ("8bit", "exact"), ("8bit", "lean")])
def test_a_precision_is_changed_alike_in_every_layout(ranks, saved, before, after):
    folder, _ = saved("fsdp", 2, EIGHT | {"precision": before})
    of_two = ranks.run(2, "restored", folder, "fsdp", EIGHT | {"precision": after})
    (alone,) = ranks.run(1, "restored", folder, "one", EIGHT | {"precision": after})
    assert ("a.weight scale" in alone["then"]) == (after == "8bit")
    for one in of_two:
        assert [notice.partition(":")[0] for notice in one["notices"]] == ["precision (group 0)"]
        assert_same(one["then"], alone["then"])
        assert_same(one["end"], alone["end"])


@slow
def test_rows_in_parts_come_into_codes_in_the_first_step(ranks, saved):
    folder, _ = saved("fsdp", 2, EIGHT | {"precision": "exact"})
    for one in ranks.run(2, "restored", folder, "tp", EIGHT):
        assert "a.weight scale" in one["then"]  # cut by rows
        assert "b.weight scale" not in one["then"]
        assert one["end"]["b.weight scale"].shape == (18, 2)


def test_every_rank_draws_on_and_has_its_place_and_extra(ranks, saved):
    folder, before = saved("fsdp", 2)
    after = ranks.run(2, "restored", folder, "fsdp", {})
    assert [one["drawn"] for one in after] == [one["drawn"] for one in before]
    assert before[0]["drawn"] != before[1]["drawn"]
    assert [one["position"] for one in after] == [10, 11]
    assert [one["extra"]["rank"].item() for one in after] == [0, 1]
    assert all(one["notices"] == [] for one in after)


def test_another_number_of_ranks_is_noticed(ranks, saved):
    folder, before = saved("fsdp", 2)
    (one,) = ranks.run(1, "restored", folder, "one", {})
    assert one["drawn"] == before[0]["drawn"]
    assert len(one["notices"]) == 1
    assert "is of 2 process(es), this run has 1: random numbers" in one["notices"][0]


@slow
def test_ranks_that_are_new_keep_their_random_states(ranks, saved):
    folder, before = saved("fsdp", 2)
    after = ranks.run(4, "restored", folder, "fsdp", {})
    drawn = [one["drawn"] for one in after]
    assert drawn[:2] == [one["drawn"] for one in before]
    assert len(set(drawn)) == 4
    assert "the others keep the random states they have" in after[3]["notices"][0]


def test_under_ddp_rank_0_alone_writes_what_all_have(saved):
    folder, _ = saved("ddp", 2)
    path = store.newest(folder)
    files = {file.name for file in path.iterdir()}
    assert files == {
        "meta.json",
        "state.safetensors",
        "inference.safetensors",
        "state-00002-of-00002.safetensors",
    }
    own = exchange.read_tensors(path / "state-00002-of-00002.safetensors")
    assert {leaf.rpartition("/")[0] for leaf in own} == {"rng/rank1", "extra/rank1"}


def test_under_fsdp_every_rank_writes_its_parts_once(saved):
    path = store.newest(saved("fsdp", 2)[0])
    meta = store.read_meta(path)
    sizes = dict.fromkeys(("y/a.weight", "z/a.weight", "v/a.weight", "y/c.weight"), 0)
    for file in store.files_of(meta, store.STATE):
        for leaf, about in meta.tensors[file].items():
            if leaf in sizes:
                sizes[leaf] += int(np.prod(about["shape"]))
    assert sizes == {"y/a.weight": 42, "z/a.weight": 42, "v/a.weight": 42, "y/c.weight": 5}


@slow
def test_codes_lie_together_in_every_part_and_are_read_as_those_of_one_process(ranks, saved, tmp_path):
    folder, _ = saved("fsdp", 2, EIGHT)
    path = store.newest(folder)
    assert inspect(folder)["verified"]
    for file in store.files_of(store.read_meta(path), store.STATE):
        header = json.loads((path / file).read_bytes()[8:].partition(b"}}")[0] + b"}}")
        assert header["y+gap/a.weight"]["dtype"] == "U32"
        assert not {"y/a.weight", "gap/a.weight"} & header.keys()
    convert(folder, tmp_path / "whole", "exchange")  # which holds z and v themselves
    exact = EIGHT | {"precision": "exact"}
    found = [ranks.run(1, "restored", where, "one", exact)[0] for where in (folder, tmp_path / "whole")]
    assert_same(found[1]["then"], found[0]["then"])


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=slow)])
def test_the_folder_is_read_as_that_of_one_process(ranks, saved, tmp_path, kind):
    folder, before = saved(kind, 2)
    found = inspect(folder)
    assert found["verified"]
    assert (found["step"], found["parameters"], found["elements"]) == (3, 6, 95)
    path, _ = convert(folder, tmp_path / "whole", "exchange")
    state = store.read(path)[1]
    for name in ("a.weight", "c.bias"):
        assert np.array_equal(state[f"y/{name}"], before[0]["then"][name])
        assert np.array_equal(state[f"z/{name}"], before[0]["then"][f"{name} z"])
    (after,) = ranks.run(1, "restored", tmp_path / "whole", "one", {})
    assert_same(after["then"], before[0]["then"])


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=slow)])
def test_x_is_joined_for_inference_and_a_start_from_weights(ranks, saved, tmp_path, kind):
    folder, before = saved("fsdp", 2, None, "eval")
    shipped, _ = convert(folder, tmp_path / "x.safetensors", "inference")
    x = exchange.read_tensors(shipped)
    assert x.keys() == {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias", "seen"}
    # In eval mode the parameters are x.
    assert all(np.array_equal(x[name], before[0]["then"][name]) for name in x)
    for source in (folder, shipped):
        for one in ranks.run(2, "restored", tmp_path / "none", kind, {}, "train", f"weights:{source}"):
            assert all(np.array_equal(x[name], one["then"][name]) for name in x)


def damaged(folder, tmp_path, damage):
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    damage(store.newest(copy))
    return copy


def lose(path):
    (path / "state-00002-of-00002.safetensors").unlink()


def flip(path):
    file = path / "state-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def shorten(path):
    file = path / "state-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def swap(path):
    one, two = (path / f"state-0000{i}-of-00002.safetensors" for i in (1, 2))
    one.rename(path / "x")
    two.rename(one)
    (path / "x").rename(two)


DAMAGE = {lose: "missing", flip: "must have crc32", shorten: "truncated", swap: "is damaged"}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=slow)])
def test_damage_to_one_part_is_refused_by_every_rank(ranks, saved, tmp_path, kind, damage):
    folder = damaged(saved("fsdp", 2)[0], tmp_path, damage)
    for one in ranks.run(2, "refused", folder, kind):
        assert DAMAGE[damage] in one["error"]
        assert "state-0000" in one["error"]
        assert one["unchanged"]
    assert not inspect_or_error(folder)


def inspect_or_error(folder):
    try:
        return inspect(folder)
    except exchange.CheckpointError:
        return None


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=slow)])
def test_ranks_that_differ_are_refused_on_all_and_nothing_is_written(ranks, tmp_path, kind):
    found = ranks.run(2, "bad_calls", tmp_path / "run", kind)
    expected = {
        "step": "step must be the same on every rank, got 7 on rank 0 of 2 and 8 on rank 1 of 2",
        "model": "parameter 'bias' (dtype and shape) must be the same on every rank, got ['float32', [3]] on",
        "optimizer": "optimizer must be the same on every rank, got 'adamw' on rank 0 of 2 and 'sgd' on",
        "argument": "rank 1 of 2 cannot save, so none does: position must be a whole number >= 0, got -1",
        "every argument": "position must be a whole number >= 0, got -1",
        "extra": "rank 1 of 2 cannot save a copy, so none does: extra/rank1/it must be JSON-like",
        "metric": "rank 1 of 2 cannot save, so none does: metrics must be finite numbers, got loss = nan",
    }
    for one in found:
        assert {case: one["said"][case][: len(text)] for case, text in expected.items()} == expected
        assert one["left"] == []
        assert one["step"] == 2
    first, second = (one["said"]["type"] for one in found)
    assert first.startswith(
        "rank 1 of 2 cannot save, so none does: TypeError: model must be a torch.nn.Module"
    )
    assert second.startswith("model must be a torch.nn.Module")
    assert found[0]["said"]["never"] == (
        "every rank must save, got no word of rank 1 of 2 within 0.5 s: make the same calls on every rank, "
        "or see why it stopped."
    )


def test_a_second_run_on_the_folder_is_refused_on_every_rank(ranks, tmp_path):
    lock = WriterLock(tmp_path)
    lock.take()
    try:
        found = ranks.run(2, "one_writer", tmp_path, "ddp")
    finally:
        lock.release()
    assert all(f"process {os.getpid()}" in said and "must have one writer" in said for said in found)


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=slow)])
def test_a_full_disk_of_one_rank_fails_on_all_and_leaves_the_older_checkpoint(ranks, tmp_path, background):
    for one in ranks.run(2, "failing_disk", tmp_path / "run", "fsdp", background):
        assert len(one["said"]) == 1
        assert "rank 1 of 2 cannot write its part, so none does" in one["said"][0]
        assert "the disk or the quota is full" in one["said"][0]
        assert [name for name in one["left"] if name.startswith(("step", ".partial"))] == ["step_000000002"]
        assert one["path"].endswith("step_000000004")


@slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_of_an_unfinished_update_go_on(ranks, tmp_path, kind):
    for before, after in ranks.run(2, "accumulated", tmp_path, kind, True):
        assert_same(after, before)


@slow
@pytest.mark.parametrize(("kind", "finding"), [("ddp", "others on each"), ("fsdp", "none in p.grad")])
def test_gradients_that_differ_by_rank_are_refused(ranks, tmp_path, kind, finding):
    for said in ranks.run(2, "accumulated", tmp_path, kind, False):
        assert f"must be the same on every rank, got {finding}" in said


@pytest.mark.parametrize("signalled", [1, pytest.param(0, marks=slow)])
@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=slow)])
def test_a_signal_to_one_rank_saves_on_all_after_the_same_update(ranks, tmp_path, kind, signalled):
    stopped = ranks.run(2, "preempted", tmp_path / "run", kind, signalled, 4)
    assert [one["code"] for one in stopped] == [EXIT_SAVED] * 2
    assert len({one["step"] for one in stopped}) == 1
    assert 5 <= stopped[0]["step"] < 18
    resumed = ranks.run(2, "preempted", tmp_path / "run", kind, signalled, None)
    assert [(one["code"], one["from"]) for one in resumed] == [(None, stopped[0]["step"])] * 2
    whole = ranks.run(2, "preempted", tmp_path / "whole", kind, signalled, None)
    assert_same(resumed[0]["end"], whole[0]["end"])
