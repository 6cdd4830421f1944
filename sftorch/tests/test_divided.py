"""DTensors of two processes: FSDP2 takes the kernel, and its runs have the bits of one process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sfcore.native import build
from sftorch.tests.divided_runs import DTYPES, RUNS, WORLD
from sftorch.tests.plain import same_bits

# All cases are one run of both processes; test_layouts has a short one by default.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns what each process found in all the cases of divided_runs."""
    if isinstance(build.find(), str):
        pytest.skip(build.find())
    folder = tmp_path_factory.mktemp("divided")
    command = [sys.executable, "-m", "sftorch.tests.divided_runs"]
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    running = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            started = subprocess.Popen([*command, str(rank), str(folder)], stdout=file, stderr=file)
            running.append(started)
    try:
        codes = [process.wait(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * WORLD, "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    differing = [name for name in a if not same_bits([a[name]], [b[name]])]
    assert differing == []


@pytest.mark.parametrize(("kind", "dtype", "fused"), RUNS, ids=str)
def test_fsdp_has_the_bits_of_one_process_and_its_kernel(found, kind, dtype, fused):
    for of_rank in found:
        one = of_rank["stepped"][kind, dtype, fused]
        divided, alone = one["runs"]
        assert len(divided) == len(alone) == (2 if kind == "closure" else 5)
        for a, b in zip(divided, alone, strict=True):
            assert_same(a, b)
        assert not same_bits([divided[0]["a.weight"]], [divided[-1]["a.weight"]])
        if kind != "closure":
            before, shipped, evaluated, after, _ = divided
            assert_same({name: evaluated[name] for name in shipped}, shipped)
            assert_same(before, after)
            assert not same_bits([shipped["a.weight"]], [before["a.weight"]])
        in_parts, whole = one["counts"]
        assert in_parts == whole
        taken, left = whole[:2]
        no_kernel = kind == "closure" and dtype == torch.bfloat16
        assert (taken, left) == ((0, 30) if no_kernel else (30, 0))  # 6 tensors, 5 steps
        if kind not in ("closure", "x stored") and dtype != torch.bfloat16:
            assert whole[2] > 6  # eval() and train() take it, too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_in_parts_goes_on_from_its_state_dict_which_is_in_parts(found, dtype):
    for of_rank in found:
        assert of_rank["resumed"][dtype]["divided"]
        assert_same(*of_rank["resumed"][dtype]["ends"])


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("how", ["whole", "a sum", "by columns"])
def test_gradients_that_lie_otherwise_are_redistributed(found, how, fused):
    for of_rank in found:
        ends = of_rank["other placements"]
        assert same_bits([ends[f"{how}, fused={fused}"]], [ends[f"alone, fused={fused}"]])


def test_whole_and_divided_tensors_step_in_one_group(found):
    assert [of_rank["beside plain ones"] for of_rank in found] == [[(3, 0), (0, 3), (0, 3)]] * WORLD


def test_fused_true_raises_where_no_kernel_takes_a_part(found):
    for of_rank in found:
        said, still = of_rank["refused"]["float16"]
        assert said.startswith(
            "fused must be None or False here, got True: parameters on cpu must be of one of"
        )
        assert still
        said, still = of_rank["refused"]["a plain gradient"]
        assert said.startswith("gradients must be DTensors where their parameters are, got Tensor for ")
        assert still


def test_autograd_notices_that_parts_moved_under_a_graph(found):
    for of_rank in found:
        assert len(of_rank["noticed"]) == 2
        assert all("modified by an inplace operation" in said for said in of_rank["noticed"])


def test_a_run_in_parts_is_watched(found):
    for of_rank in found:
        assert of_rank["watched"]["nothing"] is None
        assert of_rank["watched"]["steps"] == 4
        assert of_rank["watched"]["recent"]
