"""The short form of the fuzzer, and that it sees what it looks for."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks import fuzz, fuzz_pickles
from sfcore.exchange import CheckpointError

ROOT = Path(__file__).parent.parent


# What begins at once; the other parts first import a framework and train, and are among the many cases.
SHORT = dict.fromkeys(fuzz.CASES, 30) | {"plan": 100, "pickles": 20}


def test_nothing_that_is_read_ends_in_a_traceback_a_wait_or_changed_numbers(tmp_path):
    # A process of its own, because it forks, which it must not do where JAX has run already.
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "fuzz", "--out", str(tmp_path)]
    counts = [word for part, count in SHORT.items() for word in ("--part", part, f"--count={part}={count}")]
    done = subprocess.run([*command, *counts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "fuzz.jsonl").read_text().splitlines()]
    assert {row["part"]: row["cases"] for row in rows} == SHORT
    assert all(row.get("refused") or row.get("right") for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_that_is_read_does_so_in_many_more_cases(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "fuzz", "--seed", "1", "--count", "600"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


ATTACKS = 200


def test_no_pickle_is_executed_and_each_is_refused(tmp_path):
    marker = tmp_path / "executed"
    found = fuzz_pickles.variants(str(marker))
    assert len(found) > ATTACKS
    path = tmp_path / "model.pt"
    for number, (name, content) in enumerate(found.items()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            fuzz_pickles.opened(path)[number % 2]()
        assert not marker.exists(), name


@pytest.mark.parametrize(
    "name", ["os.system", "eval", "subprocess.call", "torch.storage", "getattr of a module"]
)
def test_the_pickles_would_be_executed_by_a_reader_that_lets_them(name, tmp_path):
    marker = tmp_path / "executed"
    function, arguments = fuzz_pickles.payloads(str(marker))[name]
    opcodes = fuzz_pickles.carriers(str(marker), function, arguments)["reduce"]
    with suppress(Exception):
        pickle.loads(fuzz_pickles.formats(opcodes)["a pickle"])
    assert marker.exists() == (name != "torch.storage")  # which torch has mended


def _raises(draw, folder):
    def read():
        raise IndexError("list index out of range")

    return read


def _spins(draw, folder):
    def read():
        while True:
            pass

    return read


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (_raises, r"IndexError at test_fuzz.py:\d+: list index out of range"),
        (_spins, "more than 0.2 s"),
        (lambda draw, folder: lambda: False, "changed numbers"),
        (lambda draw, folder: lambda: True, "right"),
    ],
)
def test_each_kind_of_failure_is_seen(case, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    begin = time.monotonic()
    found = fuzz.attempt(case, random.Random(0), tmp_path)
    assert re.fullmatch(outcome, found)
    assert time.monotonic() - begin < 60


def test_a_case_is_made_of_its_number_alone(tmp_path):
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fuzz.a_checkpoint(random.Random("checkpoint 0 7"), tmp_path / name)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()})
    made = [{name: content for name, content in one.items() if name != "meta.json"} for one in made]
    assert made[0] == made[1]
