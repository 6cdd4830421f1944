"""State crosses between FSDP2, DDP and one process by torch.distributed.checkpoint, and a run goes on."""

from __future__ import annotations

import pytest

from sftorch.tests import launcher
from sftorch.tests.crossing_runs import LAYOUTS

PROGRAM = "sftorch.tests.crossing_runs"
SHORT, LONG = ("bfloat16",), ("float32", "lean", "8bit", "8bit, float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("short")


@pytest.fixture(scope="module")
def short(folder):
    return launcher.run(PROGRAM, 2, folder, *SHORT)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return launcher.run(PROGRAM, 2, tmp_path_factory.mktemp("long"), *LONG)


def assert_goes_on_everywhere(found, precision):
    for of_rank in found:
        for flat in (False, True):
            for layout in LAYOUTS:
                end = of_rank["end"][precision, flat, layout]
                assert len(end) > 15
                crossed = {to: of_rank["crossed"][precision, flat, layout, to] for to in LAYOUTS}
                assert crossed == dict.fromkeys(LAYOUTS, end), (flat, layout)


def assert_goes_on_in_full(found, precision):
    for of_rank in found:
        for of_first in (False, True):
            end, *others = of_rank["full"][precision, of_first]
            assert len(end) > 15
            assert others == [end, end]


@pytest.mark.slow
def test_a_run_goes_on_in_every_layout_from_the_files_of_every_other(short):
    assert_goes_on_everywhere(short, *SHORT)


def test_a_full_state_dict_is_gathered_and_goes_on_in_parts_and_whole(short):
    assert_goes_on_in_full(short, *SHORT)


def test_a_plain_state_dict_is_divided_as_the_parameters_are(short):
    for of_rank in short:
        end, divided = of_rank["whole"]
        assert len(end) > 15
        assert divided == end


@pytest.mark.slow
@pytest.mark.parametrize("precision", LONG)
def test_a_run_in_other_precisions_goes_on_in_every_layout(long, precision):
    assert_goes_on_everywhere(long, precision)
    assert_goes_on_in_full(long, precision)


@pytest.mark.slow
def test_a_run_goes_on_on_other_numbers_of_processes(short, folder, tmp_path):
    of_two = short[0]["end"][(*SHORT, False, "fsdp")]
    (tmp_path / "4").mkdir()
    (tmp_path / "2").mkdir()
    four = launcher.run(PROGRAM, 4, tmp_path / "4", *SHORT, str(folder))
    two = launcher.run(PROGRAM, 2, tmp_path / "2", *SHORT, str(tmp_path / "4"))
    for of_rank in (*four, *two):
        assert_goes_on_everywhere([of_rank], *SHORT)
        assert len(of_rank["from others"]) == 2 * len(LAYOUTS) ** 2
        assert all(end == of_two for end in of_rank["from others"])
