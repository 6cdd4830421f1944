"""The count of launches finds what is known of torch's own, and holds our lists to their bounds."""

import pytest
import torch

import sftorch
from benchmarks import launches
from benchmarks._trees import TREES

GPT = TREES["gpt"]


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "RAdamScheduleFree"])
@pytest.mark.parametrize(("decay", "most"), [(0.01, 80), (0.0, 60)])
def test_a_step_of_lists_on_cuda_stays_within_its_bounds(kind, decay, most):
    found = launches.measure(getattr(sftorch, kind), GPT, decay)
    assert found["launches"] <= 20
    assert found["bytes"] <= most
    assert found["temporary_bytes"] <= 4


def test_torchs_own_are_counted_as_its_source_tells():
    """AdamW: foreach reads and writes 20 floats a parameter, the fused one 7, and makes none."""
    foreach, fused = (launches.contenders()[f"torch.optim.AdamW {name}"] for name in ("foreach", "fused"))
    assert launches.measure(foreach, GPT, 0.01)["bytes"] == 80
    found = launches.measure(fused, GPT, 0.01)
    assert found["bytes"] == pytest.approx(28, abs=0.01)
    assert found["temporary_bytes"] < 0.01


def test_launches_are_those_of_the_tables_of_torch():
    small, large = [torch.empty(1)] * 65, [torch.empty(1, device="meta").expand(321 * 65_536)]
    assert launches._launches("_foreach_add_", (small, small), makes=False) == 2  # 64 in a table
    assert launches._launches("_foreach_add_", (large, large), makes=False) == 2  # 320 blocks
    assert launches._launches("add_", (small[0],), makes=False) == 1
