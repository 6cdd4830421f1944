"""The layout does not matter: the same gradients give the same bits on 1, 2 and 4 shards, lean included."""

from __future__ import annotations

import pytest

from sftorch.tests import launcher
from sftorch.tests.layout_runs import OPTIMIZERS, PRECISIONS, may_be

PROGRAM = "sftorch.tests.layout_runs"
CASES = [(kind, precision) for kind in OPTIMIZERS for precision in PRECISIONS if may_be(kind, precision)]


def assert_same_in_all_layouts(found, kind, precision):
    for of_rank in found:
        runs = {name: run for (name, *of), run in of_rank["runs"].items() if of == [kind, precision]}
        alone = runs.pop("1")
        assert len(alone) > 50
        assert len({alone["a.weight y"], alone["a.weight x"], alone["a.weight back"]}) == 2
        assert ("b.weight scale" in alone) == precision.startswith("8bit")
        assert len(runs) > 0
        for name, run in runs.items():
            assert run.keys() == alone.keys()
            assert [key for key in run if run[key] != alone[key]] == [], name


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launcher.run(PROGRAM, 2, tmp_path_factory.mktemp("two"), "adamw", "muon")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launcher.run(PROGRAM, 4, tmp_path_factory.mktemp("four"), *OPTIMIZERS)


@pytest.mark.parametrize(("kind", "precision"), [case for case in CASES if case[0] in ("adamw", "muon")])
def test_two_shards_have_the_bits_of_one(two, kind, precision):
    assert {name for name, *_ in two[0]["runs"]} == {"1", "fsdp 2", "tp 2"}
    assert_same_in_all_layouts(two, kind, precision)


def test_muon_goes_on_in_the_same_bits_where_its_matrices_are_cut_otherwise(two):
    for of_rank in two:
        whole, cut = of_rank["resumed"]
        assert len(whole) > 20
        assert cut == whole


def test_a_print_is_the_same_however_a_tensor_is_cut_and_sees_every_part(two):
    for of_rank in two:
        prints = of_rank["large"]
        changed = prints.pop("changed")
        assert len(prints) == 3
        assert len({tuple(one) for one in prints.values()}) == 1
        assert changed != prints["whole"]


def test_the_distance_of_x_from_z_is_that_of_the_whole(two):
    for of_rank in two:
        found = of_rank["distances"]
        assert found["whole"] > 0.1
        assert found["rows"] == pytest.approx(found["whole"], rel=1e-12)
        assert found["columns"] == pytest.approx(found["whole"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_two_and_four_shards_of_every_engine_have_the_bits_of_one(four, kind, precision):
    assert {name for name, *_ in four[0]["runs"]} == {"1", "fsdp 4", "tp 4", "hsdp 2 x 2", "tp 2 x fsdp 2"}
    assert_same_in_all_layouts(four, kind, precision)
    assert len({tuple(one) for name, one in four[0]["large"].items() if name != "changed"}) == 1
