"""What is wrong on one of the processes that hold a model is refused on all, and nothing changes."""

from __future__ import annotations

import pytest
import torch

from sftorch.tests import launcher
from sftorch.tests.refusal_runs import CASES


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launcher.run("sftorch.tests.refusal_runs", 2, tmp_path_factory.mktemp("refusals"))


def absent(folder, *words):
    """Returns what each of two processes heard, of which one is gone."""
    with launcher.Launcher("sftorch.tests.absent_runs") as of_two:
        of_two.outcomes(2, "main", folder, *words)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_all_processes_refuse(found, case):
    heard = [of_rank["heard"][case] for of_rank in found]
    assert [one["said"] for one in heard] == [heard[0]["said"]] * 2
    kind, text = heard[0]["said"]
    assert kind in ("RuntimeError", "ValueError", "HyperparameterError")
    assert " must " in text
    assert "of 2 processes, and raised by all)" in text
    assert not any(one["changed"] for one in heard)


def test_the_table_is_long_enough_and_names_ranks(found):
    assert len(CASES) >= 20
    heard = found[0]["heard"]
    assert "said by rank 0 of 2" in heard["touched on rank 0"]["said"][1]
    assert "said by rank 1 of 2" in heard["touched on rank 1"]["said"][1]
    assert "said by rank 0 and 1 more of 2" in heard["touched on both"]["said"][1]


def test_a_plain_step_takes_no_collective_and_a_check_takes_one(found):
    for of_rank in found:
        counts = of_rank["collectives"]
        assert counts == {"step": 0, "eval": 0, "train": 1, "eval_params": 0, "state_dict": 1, "metrics": 0}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", pytest.param("sleeps", marks=pytest.mark.slow)])
def test_a_process_that_never_calls_is_waited_for_no_longer_than_its_group_says(how, tmp_path):
    first, _ = absent(tmp_path, "fsdp", how)
    assert first is not None
    kind, text = first
    assert issubclass(kind, RuntimeError)
    assert " must " not in text  # gloo's own words, of a time that is over or a connection that is lost


@pytest.mark.slow
def test_a_replica_that_raises_and_ends_leaves_no_other_waiting(tmp_path):
    first, second = absent(tmp_path, "ddp", "ends")
    assert second[1].startswith("weights must stay x while in eval mode")
    assert issubclass(first[0], RuntimeError)


def test_no_evaluation_leaves_whole_weights_behind(found):
    for of_rank in found:
        adamw, closure, *alone = of_rank["evaluated"]
        assert [adamw, closure] == alone
        assert len(set(adamw)) == 10
