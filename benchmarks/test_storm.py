"""Runs that are killed again and again, in saves too, end in the bits of the run that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import exact
from benchmarks.storm_programs import MEMBERS

ROOT = Path(__file__).parent.parent
SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_ten_kills_change_no_bit_and_leave_nothing_behind(framework, tmp_path):
    # A process of its own, because it forks, which it must not do where JAX has run already.
    command = [sys.executable, "-m", "benchmarks", "storm", "--framework", framework]
    options = ["--kills", "10", "--steps", "1000", "--seed", "1", "--out", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "storm.jsonl").read_text())
    assert (row["part"], row["kills"], row["same bits"], row["leftovers"]) == (framework, 10, True, [])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("framework", "steps"), [("torch", 600), ("jax", 150)])
def test_ten_kills_of_two_ranks_change_no_bit_and_leave_nothing_behind(framework, steps, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "storm", "--ranks", "2"]
    options = ["--framework", framework, "--kills", "10", "--steps", str(steps), "--seed", "1"]
    done = subprocess.run(
        [*command, *options, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "storm.jsonl").read_text())
    assert (row["kills"], row["same bits"], row["leftovers"]) == (10, True, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "optimizer", "kills", "steps", "life"),
    [
        ("torch", "plus", 1, 150, 0.05),
        *(pytest.param("torch", one, 10, 1500, 0.1, marks=SLOW) for one in MEMBERS),
        *(pytest.param("jax", one, 3, 600, 3, marks=SLOW) for one in MEMBERS),
    ],
)
def test_kills_of_a_member_of_the_family_change_no_bit(framework, optimizer, kills, steps, life, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "storm", "--framework", framework]
    options = ["--optimizer", optimizer, "--kills", str(kills), "--steps", str(steps), "--life", str(life)]
    done = subprocess.run(
        [*command, *options, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "storm.jsonl").read_text())
    assert (row["part"], row["kills"], row["same bits"]) == (f"{optimizer} {framework}", kills, True)


@pytest.mark.parametrize(
    ("framework", "count"),
    [("torch", 3), pytest.param("torch", 40, marks=SLOW), pytest.param("jax", 8, marks=SLOW)],
)
def test_programs_that_are_cut_at_any_line_end_in_the_bits_of_the_uncut_ones(framework, count, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "storm", "--kind", "programs"]
    options = ["--framework", framework, "--programs", str(count), "--seed", "2", "--out", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "storm.jsonl").read_text())
    assert (row["part"], row["programs"], row["problems"]) == (f"programs {framework}", count, [])
    assert sum(row["cuts"].values()) >= count


def forgets_where_it_was(one, folder, again):
    folder.mkdir(exist_ok=True)
    (folder / "runs").open("a").write(".")
    return (folder / "runs").read_text()


def falls_over(one, folder, again):
    raise ValueError("something unreadable was left behind")


@pytest.mark.parametrize(
    ("run", "problem"), [("forgets_where_it_was", "other bits"), ("falls_over", "something unreadable")]
)
def test_a_program_that_does_not_end_as_it_would_have_is_seen(run, problem, tmp_path):
    program = (
        "import json, pathlib, sys; from benchmarks import storm_programs, test_storm\n"
        "run, folder = getattr(test_storm, sys.argv[1]), pathlib.Path(sys.argv[2])\n"
        "print(json.dumps(storm_programs.storm('torch', run, range(2), 0, folder)))"
    )
    command = [sys.executable, "-c", program, run, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    problems = json.loads(done.stdout)["problems"]
    assert len(problems) == 2
    assert all(problem in one for one in problems)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_every_combination_resumes_in_a_fresh_process_to_the_same_bits(framework, tmp_path):
    digests = exact.run(framework, tmp_path)
    assert len(digests) == 24
    assert [name for name, (whole, resumed) in digests.items() if whole != resumed] == []
    assert (
        len({whole for whole, _ in digests.values()}) == 12
    )  # accumulate and precision matter, the mode does not


@pytest.mark.parametrize(("digests", "code"), [(("a", "a"), 0), (("a", "b"), 1)])
def test_what_was_compared_is_kept_and_a_difference_is_the_exit_code(monkeypatch, tmp_path, digests, code):
    found = {one.name: ("a", "a") for one in exact.combinations()} | {"sgd-float32-1-train": digests}
    monkeypatch.setattr(exact, "run", lambda framework, folder: found)
    assert exact.main(["--framework", "jax", "--out", str(tmp_path)]) == code
    rows = [json.loads(line) for line in (tmp_path / "exact.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert [row["same_bits"] for row in rows].count(False) == code
