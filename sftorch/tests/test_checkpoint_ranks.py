"""One folder of checkpoints of many processes: any layout and number of them goes on from any other."""

import pytest
import torch

from sftorch.tests.ranks import Launcher

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def ranks():
    with Launcher("sftorch.tests.rank_runs") as launcher:
        yield launcher


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


# Layout and number of processes that save, and that restore.
WAYS = [
    (("fsdp", 2), ("fsdp", 2)),
    (("ddp", 2), ("ddp", 2)),
    (("fsdp", 2), ("one", 1)),
    (("one", 1), ("fsdp", 2)),
    (("fsdp", 2), ("ddp", 2)),
    (("ddp", 2), ("fsdp", 2)),
]
SLOW_WAYS = [
    (("fsdp", 4), ("fsdp", 4)),
    (("fsdp", 4), ("fsdp", 2)),
    (("fsdp", 4), ("one", 1)),
    (("fsdp", 2), ("fsdp", 4)),
    (("hsdp", 4), ("fsdp", 2)),
    (("fsdp", 2), ("hsdp", 4)),
]


@pytest.mark.parametrize(
    ("of", "to"), [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in SLOW_WAYS)], ids=str
)
def test_a_run_goes_on_in_any_layout(ranks, tmp_path, of, to):
    before = ranks.run(of[1], "saved", tmp_path, of[0], {})
    after = ranks.run(to[1], "restored", tmp_path, to[0], {})
    for one in after:
        assert_same(one["then"], before[0]["then"])
        if of == to:
            assert_same(one["end"], before[0]["end"])
