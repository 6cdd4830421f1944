"""A run of several processes goes on in the other framework, on a mesh, and comes back bit for bit."""

import pytest
import torch

from sfcore import store
from sfcore.convert import convert
from sfjax.tests import process_runs
from sftorch.tests.launcher import Launcher

OPTIONS = {"net": "even", "no buffer": True}


@pytest.mark.slow
@pytest.mark.parametrize(("of_torch", "of_jax"), [(2, 2), (4, 2)])
def test_from_fsdp_to_a_mesh_and_back_is_the_identity(of_torch, of_jax, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with Launcher("sftorch.tests.rank_runs") as ranks:
        before = ranks.run(of_torch, "saved", tmp_path / "torch", "fsdp", OPTIONS)
        newest = str(store.newest(tmp_path / "torch"))
        case = ["take_over", {"source": newest, "folder": str(tmp_path / "jax")}]
        found = process_runs.run(scratch, of_jax, [case], devices=2)
        assert [(one[0]["step"], one[0]["laid"]) for one in found] == [(3, True)] * of_jax
        said = f"the place in the data is that of one of the {of_torch} processes that wrote the checkpoint"
        for one in found:
            assert [notice[: len(said)] for notice in one[0]["notices"]] == [said] * (of_torch != of_jax)
        convert(tmp_path / "jax", tmp_path / "back", "torch")
        for kind, count in (("fsdp", of_torch), ("one", 1)):
            for after in ranks.run(count, "restored", tmp_path / "back", kind, OPTIONS):
                then = after["then"]
                assert then.keys() == before[0]["then"].keys()
                assert [name for name in then if not torch.equal(then[name], before[0]["then"][name])] == []
