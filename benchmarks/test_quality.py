"""The sweep tunes on validation data, the twins land on the same loss, the tables say what the rows say."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality, quality_data, quality_report, quality_torch
from benchmarks.quality_methods import METHODS, factor, setting
from benchmarks.quality_problems import PROBLEMS

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_minute_shows_what_the_whole_shows_and_a_second_run_measures_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "quality", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # the twins land on the same loss
    text = (tmp_path / "quality.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["part"] for row in rows].count("sweep") == [row["part"] for row in rows].count("twin") == 8
    of = {(row["problem"], row["method"]): row for row in rows if row["part"] == "sweep"}
    free, constant = of["digits", "sf-adamw"], of["digits", "adamw-constant"]
    assert quality_report.gap(quality_report.ends(free), quality_report.ends(constant)).errors > 2  # 4.6
    assert free["chosen"]["error"][-1] < 0.05  # 0.025
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).returncode == 0
    assert (tmp_path / "quality.jsonl").read_text() == text


def quadratic(steps):
    return PROBLEMS["quadratic"]._replace(steps=steps)


@pytest.mark.parametrize("method", ["sf-adamw", "gpa"])
def test_the_twins_land_on_the_same_loss(method):
    job = quality.Job("sweep", quadratic(40), METHODS[method], 2)
    swept = quality.measure(job)
    again = job._replace(part="twin", rate=swept["chosen"]["rate"])
    row = quality.measure(again, swept)
    assert row["short"]["apart"] < 1e-5
    assert row["full"]["torch"] == pytest.approx(row["full"]["jax"], rel=1e-4)
    assert row["close"]


def test_twins_that_part_are_run_again_in_float64(monkeypatch):
    job = quality.Job("sweep", quadratic(40), METHODS["sf-adamw"], 2)
    swept = quality.measure(job)
    again = job._replace(part="twin", rate=swept["chosen"]["rate"])
    swept["chosen"]["mean"][-1] += 2 * swept["chosen"]["se"][-1]
    row = quality.measure(again, swept)
    assert row["close"]
    assert row["float64"]["apart"] < 1e-12
    replay = quality_torch.replay
    monkeypatch.setattr(quality_torch, "replay", lambda *a: 1.01 * replay(*a))
    assert not quality.measure(again, swept)["close"]


def test_another_rate_is_another_run_and_the_best_of_validation_is_chosen():
    row = quality.measure(quality.Job("sweep", quadratic(40), METHODS["sf-adamw"], 2))
    assert len(set(row["test"])) == len(row["rates"]) == 7
    best = int(np.argmin(row["validation"]))
    assert row["chosen"]["rate"] == row["rates"][best]
    assert row["chosen"]["edge"] == (best in (0, 6))
    assert row["chosen"]["mean"][-1] == pytest.approx(row["test"][best])


@pytest.mark.parametrize(
    ("name", "middle", "end"),
    [("adamw-cosine", 0.5, 0.0), ("adamw-linear", 0.5, 0.0), ("adamw-wsd", 1, 0), ("sf-adamw", 1, 1)],
)
def test_a_schedule_ends_where_it_should(name, middle, end):
    method = METHODS[name]
    run = setting(method, 1000, ())
    lrs = [float(factor(method, run, step, np)) for step in range(1000)]
    assert lrs[:2] == pytest.approx([0.02, 0.04])
    assert lrs[525] == pytest.approx(middle)
    assert lrs[-1] == pytest.approx(end, abs=0.01)


def test_muon_takes_the_matrices_that_are_neither_first_nor_last():
    assert PROBLEMS["digits"].matrices() == {"hidden0_w", "hidden1_w"}
    assert PROBLEMS["iris"].matrices() == set()
    assert len(PROBLEMS["kjv"].matrices()) == 12


def test_a_problem_gives_the_same_numbers_every_time_and_a_shorter_run_the_first_of_them():
    digits = PROBLEMS["digits"]
    one, two = digits.weights(3), digits.weights(3)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert np.array_equal(digits.batches(3, 5), digits.batches(3, 9)[:5])
    assert not np.array_equal(digits.batches(3, 5), digits.batches(4, 5))
    parts = [{tuple(one) for one in part.inputs} for part in digits.data]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == 1797


def sweep_row(problem, method, test, error=0.1, edge=False):
    chosen = {"rate": 0.001, "edge": edge, "validation": 1.0, "test": [test], "mean": [float(np.mean(test))]}
    chosen |= {"se": [0.01], "error": [error], "error_se": [0.01]}
    row = {"part": "sweep", "problem": problem, "method": method, "steps": 2000, "seeds": len(test)}
    return row | {"points": [2000], "rates": [0.001], "test": [float(np.mean(test))], "chosen": chosen}


def test_the_report_says_where_it_loses_and_says_nothing_of_where_it_wins():
    found = [
        sweep_row("digits", "sf-adamw", [1.0, 1.1, 1.05]),
        sweep_row("digits", "adamw-cosine", [0.9, 1.0, 0.96]),
        sweep_row("kjv", "sf-adamw", [1.0, 1.1, 1.05]),
        sweep_row("kjv", "adamw-cosine", [1.2, 1.31, 1.25]),
        sweep_row("iris", "sf-adamw", [1.0, 1.1, 1.0]),
        sweep_row("iris", "adamw-linear", [1.1, 1.0, 1.01]),
    ]
    lines = quality_report.loses(found).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| digits, batch 32", "loses"], ["| Iris", "ties"]]


def test_every_row_can_be_sent_to_a_process_and_has_a_name_of_its_own():
    jobs = quality.sweeps(quick=False, seeds=5)
    sent = pickle.loads(pickle.dumps(jobs))
    assert [job.asked() for job in sent] == [job.asked() for job in jobs]
    assert len({job.key for job in jobs}) == len(jobs) > 100


def test_a_rate_at_the_edge_of_its_grid_is_marked_and_a_run_that_diverged_too():
    row = sweep_row("digits", "sf-adamw", [1.0, 1.1], edge=True)
    row |= {"rates": list(PROBLEMS["digits"].rates), "test": [1.05, *[None] * 5]}
    row["chosen"]["rate"] = row["rates"][0]
    text = quality_report.rates([row])
    assert "**1.05** (edge)" in text
    assert text.count("diverged") == 5


def test_a_row_takes_the_place_of_the_one_with_its_name(tmp_path):
    path = tmp_path / "quality.jsonl"
    for loss in (1.0, 2.0):
        quality.write(path, sweep_row("digits", "sf-adamw", [loss, loss]))
    quality.write(path, sweep_row("digits", "gpa", [3.0, 3.0]))
    assert [row["test"] for row in quality.read(path)] == [[2.0], [3.0]]


def test_data_that_is_not_what_was_measured_is_refused(tmp_path):
    (tmp_path / "letter").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"letter must have the SHA-256 .*, got "):
        quality_data.read("letter", tmp_path)
    with pytest.raises(FileNotFoundError, match="benchmarks quality --fetch"):
        quality_data.read("glass", tmp_path)
    with pytest.raises(ValueError, match="must begin with RDX2"):
        quality_data._read_rda(b"RDX3\nX\n")


@pytest.mark.parametrize("wrong", [["--seeds", "1"], ["--jobs", "0"], ["--only", "fashon"]])
def test_a_wrong_option_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        quality.parse(wrong)
    assert "must be" in capsys.readouterr().err
