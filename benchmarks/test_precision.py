"""The problem that shows what 16 bits cost, and what the benchmark writes."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks import precision, precision_problem, precision_torch

# What torch's compiler says of itself when torchao's step is compiled.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def test_the_problem_is_the_same_every_time_and_starts_from_numbers_that_bfloat16_has():
    one, two = precision_problem.make(0, 10), precision_problem.make(0, 20)
    assert all(np.array_equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert np.array_equal(one.batches, two.batches[:10])
    assert not any((weight.view(np.uint32) & 0xFFFF).any() for weight in one.weights.values())


def test_a_run_leaves_the_problem_as_it_was():
    problem = precision_problem.make(0, 100)
    start = {name: weight.copy() for name, weight in problem.weights.items()}
    precision_torch.train("float32", problem, 3e-3)
    assert all(np.array_equal(start[name], problem.weights[name]) for name in start)


def test_bfloat16_parameters_learn_as_float32_ones_and_stall_without_the_rest_of_y():
    problem = precision_problem.make(0, 400)
    loss = {
        name: precision_torch.train(name, problem, 3e-3).curve[-1]
        for name in ("float32", "exact", "rounded", "schedulefree")
    }
    assert loss["exact"] == pytest.approx(loss["float32"], rel=0.01)  # measured 0.2%
    assert loss["rounded"] > 1.1 * loss["float32"]
    assert loss["schedulefree"] > 1.1 * loss["float32"]


def test_it_writes_a_row_a_method_a_figure_and_a_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- precision -->\n<!-- /precision -->\nafter\n")
    options = ["--seeds", "1", "--steps", "100", "--frameworks", "torch"]
    precision.main([*options, "--out", str(tmp_path), "--markdown", str(page)])
    rows = [json.loads(line) for line in (tmp_path / "precision.jsonl").read_text().splitlines()]
    here = [one for one in precision_torch.METHODS.values() if not one.needs or find_spec(one.needs)]
    assert len(rows) == len(precision.LRS) * len(here)
    assert {row["method"]: row["bytes"] for row in rows} | {"lean": 8.0, "exact": 12.0} == {
        row["method"]: row["bytes"] for row in rows
    }
    assert (tmp_path / "precision.png").stat().st_size > 10_000
    assert page.read_text().count("| torch: ") == len(here)
    for method in ("float32", "adamw"):
        assert [row["ratio"]["median"] for row in rows if row["method"] == method] == [1.0] * 2


def test_what_rounds_at_random_runs_with_every_seed_of_that(tmp_path):
    options = ["--seeds", "2", "--draws", "3", "--steps", "100", "--frameworks", "torch", "--methods", "8bit"]
    (tmp_path / "precision.jsonl").write_text("")
    precision.main([*options, "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "precision.jsonl").read_text().splitlines()]
    found = {(row["lr"], row["method"]): (row["n"], row["draws"]) for row in rows}
    assert found == {(lr, name): (2, n) for lr in precision.LRS for name, n in (("float32", 1), ("8bit", 3))}
    ratios = [row["ratio"] for row in rows if row["method"] == "8bit"]
    assert all(one["min"] < one["median"] < one["max"] for one in ratios)


@pytest.mark.parametrize("name", [name for name, one in precision_torch.METHODS.items() if one.needs])
def test_a_peer_has_its_moments_in_8_bits_and_learns(name):
    pytest.importorskip(precision_torch.METHODS[name].needs)
    problem = precision_problem.make(0, 200)
    run = precision_torch.train(name, problem, 3e-3)
    wide = precision_torch.METHODS[name].dtype.itemsize
    assert wide + 2 < run.bytes < wide + 2.1
    assert run.curve[-1] < 0.5 * run.curve[0]
