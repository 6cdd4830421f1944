"""The benchmarks of steps and memory: everybody is timed, and the tables hold what was measured."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import _trees, memory, step, step_report, step_torch
from sfcore.native import build


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(_trees.TREES, "tiny", [(7,), (3, 2)])
    yield
    torch.set_num_threads(1)


def test_the_tree_is_gpt2s():
    assert (len(_trees.gpt()), _trees.count(_trees.gpt())) == (148, 50_936_832)
    assert _trees.count(_trees.TREES["gpt2-small"]) == 124_439_808


@pytest.mark.skipif(isinstance(build.find(), str), reason="the floor needs a C compiler")
def test_everybody_takes_a_step_in_every_round():
    rows = step.measure("tiny", 1, rounds=2, seed=0)
    assert [row["name"] for row in rows] == [one.name for one in step_torch.contenders()]
    for row in rows:
        assert row["n"] == 2
        assert row["parameters"] == 13
        assert row["over_floor"]["median"] > 0
    assert next(row for row in rows if row["name"] == step.PEER)["over_peer"]["median"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_state_is_weighed():
    rows = [memory.measure(one, "tiny", torch.float32) for one in step_torch.contenders()[1::2]]
    assert {row["name"]: row["state_bytes"] for row in rows}["sftorch AdamWScheduleFree foreach"] == 8


def test_the_table_has_a_line_for_everybody():
    spread = {"median": 1.05, "q1": 1.0, "q3": 1.1}
    times = [{"name": name, "part": "gpt-1", "over_floor": spread} for name in ("sftorch A", "peer B")]
    weights = [{"name": "sftorch A", "dtype": "float32", "state_bytes": 8.0, "step_bytes": 0.0}]
    times.append({"name": "sfjax C", "part": "gpt-jax", "over_floor": spread})
    seconds = {
        "leaves": 9,
        "trace_seconds": spread,
        "compile_seconds": spread,
        "peer": "B",
        "over_peer": spread,
    }
    times.append({"name": "sfjax C", "part": "compile-jax"} | seconds)
    lines = step_report.markdown(times, weights).splitlines()
    assert "| **sftorch A** | 1.05 (1-1.1) |" in lines
    assert "| peer B | 1.05 (1-1.1) |" in lines
    assert "| **sfjax C** | 1.05 (1-1.1) |" in lines
    assert "| **sfjax C** | 1.05 | 1.05 | 1.05 (1-1.1) |" in lines
    assert "| **sftorch A** | float32 | 8 | 0.00 |" in lines
