"""The main example does what the README promises: both frameworks learn, and they agree."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import train

OPTIMIZERS = ("sgd", "adamw", "radam")
# radam moves from step 6 on (b2 = 0.999), so 60 steps are enough to see every optimizer move.
SHORT = ("--steps", "60", "--every", "20")
# Measured: 3e-6 over the 1,500 default steps, 3e-5 over 60 of radam, whose steps are smaller at first.
# A warm-up that is one step off makes it 0.7.
GAP = 1e-4
# Measured: losses 4e-6 apart, no image of the 360 judged differently; one may be, on another machine.
LOSS, ACCURACY = 1e-4, 1.5 / 360


def run(out: Path, *arguments: str) -> dict:
    return train.main([*arguments, "--out", str(out)])


def points(result: dict, framework: str) -> list[dict]:
    return result["frameworks"][framework]["points"]


def assert_same_curves(one: list[dict], other: list[dict]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a["step"] == b["step"]
        for name in a.keys() - {"step"}:
            slack = ACCURACY if "accuracy" in name else LOSS * b[name]
            assert a[name] == pytest.approx(b[name], rel=0, abs=slack), (a["step"], name)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Returns what runs with short arguments, each set once."""

    @functools.cache
    def run_once(*arguments: str) -> dict:
        return run(tmp_path_factory.mktemp("short"), *SHORT, *arguments)

    return run_once


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("default")
    return run(out), out


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_default_run_gets_97_percent_of_the_test_digits_right_at_x(default_run, framework):
    result, _ = default_run
    assert points(result, framework)[-1]["test_accuracy_x"] >= 0.97


def test_default_curves_agree(default_run):
    result, _ = default_run
    assert max(gap["x"] for gap in result["twin_gap"]) <= GAP
    assert_same_curves(points(result, "jax"), points(result, "torch"))


def test_result_and_picture_are_written(default_run):
    result, out = default_run
    assert json.loads((out / "result.json").read_text()) == result
    picture = imread(out / "curves.png")
    assert picture.shape[1] > picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", ["1", pytest.param("4", marks=pytest.mark.slow)])
def test_the_twins_take_the_same_path(short_run, optimizer, accumulate):
    result = short_run("--optimizer", optimizer, "--accumulate", accumulate)
    assert [gap["step"] for gap in result["twin_gap"]] == [20, 40, 60]
    assert max(max(gap["x"], gap["y"]) for gap in result["twin_gap"]) <= GAP
    for framework in ("jax", "torch"):
        first, *_, last = points(result, framework)
        assert last["test_loss_x"] < 0.8 * first["test_loss_x"]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_accumulation_does_not_change_the_path(short_run, framework):
    whole, cut = (short_run("--optimizer", "adamw", "--accumulate", parts) for parts in ("1", "4"))
    assert_same_curves(points(whole, framework), points(cut, framework))


def test_the_seed_decides_the_run(tmp_path):
    first, again, other = (
        points(run(tmp_path, *SHORT, "--framework", "torch", "--seed", seed), "torch") for seed in "778"
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_one_framework_alone_has_no_gap(tmp_path, capsys, framework):
    result = run(tmp_path, *SHORT, "--framework", framework)
    assert list(result["frameworks"]) == [framework]
    assert result["twin_gap"] == []
    assert "twins" not in capsys.readouterr().out
    assert imread(tmp_path / "curves.png").size


def test_the_last_step_is_evaluated_when_every_does_not_divide_the_steps(tmp_path):
    result = run(tmp_path, "--framework", "torch", "--steps", "7", "--every", "3")
    assert [point["step"] for point in points(result, "torch")] == [3, 6, 7]


def test_a_run_that_diverges_still_writes_valid_json(tmp_path):
    run(
        tmp_path,
        "--framework",
        "torch",
        "--optimizer",
        "sgd",
        "--steps",
        "9",
        "--lr",
        "1e30",
        "--clip",
        "1e9",
    )
    text = (tmp_path / "result.json").read_text()
    assert "null" in text
    assert json.loads(text, parse_constant=pytest.fail)


@pytest.mark.slow
def test_the_script_runs_from_anywhere_and_shows_its_table(tmp_path):
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "train.py"), "--framework", "torch", "--steps", "20"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "acc. x" in done.stdout
    assert "20/20" in done.stderr  # the progress bar
    assert (tmp_path / "out" / "digits" / "result.json").exists()


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory):
    """Returns the folder of a run that killed itself at step 45 in JAX, the first."""
    out = tmp_path_factory.mktemp("killed")
    stopped = ("--save-every", "10", "--resume", "auto", "--kill-at", "45")
    assert killed(out, *stopped) == -signal.SIGKILL
    return out


def killed(out: Path, *arguments: str) -> int:
    """Returns the exit code of a run that kills itself."""
    script = Path(__file__).parent / "train.py"
    command = [sys.executable, str(script), *SHORT, "--out", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("how", ["auto", pytest.param("latest-good", marks=pytest.mark.slow)])
def test_a_killed_run_is_started_again_and_ends_in_the_same_bits(
    tmp_path, capsys, short_run, killed_run, how
):
    whole = short_run("--optimizer", "adamw", "--accumulate", "1")
    shutil.copytree(killed_run, tmp_path / "stopped")
    resumed = run(tmp_path / "stopped", *SHORT, "--save-every", "10", "--resume", how)
    assert resumed["frameworks"]["jax"]["resumed_from_step"] in (30, 40)  # the save of 40 was in flight
    assert resumed["frameworks"]["torch"]["resumed_from_step"] == 0
    for framework in ("jax", "torch"):
        assert resumed["frameworks"][framework]["sha256"] == whole["frameworks"][framework]["sha256"]
        kept = [p for p in points(whole, framework) if p in points(resumed, framework)]
        assert kept == points(resumed, framework)
    assert [gap["step"] for gap in resumed["twin_gap"]] == [p["step"] for p in points(resumed, "jax")]
    assert "digits right at x" in capsys.readouterr().out


def test_a_run_that_is_over_is_started_again_without_harm(tmp_path, capsys):
    arguments = (*SHORT, "--framework", "torch", "--save-every", "60", "--resume", "auto")
    first, again = run(tmp_path, *arguments), run(tmp_path, *arguments)
    assert again["frameworks"]["torch"]["sha256"] == first["frameworks"]["torch"]["sha256"]
    assert "nothing was left to do after step 60" in capsys.readouterr().out


def test_a_run_can_start_from_the_weights_of_another(tmp_path):
    run(tmp_path / "first", *SHORT, "--framework", "torch", "--save-every", "60")
    weights = f"weights:{tmp_path / 'first' / 'checkpoints' / 'torch'}"
    result = run(tmp_path / "second", *SHORT, "--framework", "torch", "--resume", weights)
    assert result["frameworks"]["torch"]["resumed_from_step"] == 0
    assert points(result, "torch")[0]["test_accuracy_x"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        ("--steps 0", ["--steps must be a whole number >= 1, got 0"]),
        ("--steps many", ["--steps: must be a whole number, got 'many'"]),
        ("--lr fast", ["--lr: must be a number, got 'fast'"]),
        ("--lr -1", ["--lr must be a finite number >= 0, got -1.0"]),
        ("--beta 1.5", ["--beta must be a number in [0, 1], got 1.5"]),
        ("--weight-decay nan", ["--weight-decay must be a finite number >= 0, got nan"]),
        ("--warmup-steps 0.05", ["--warmup-steps must be a whole number", "got 0.05", "not a fraction"]),
        ("--optimizer radam --warmup-steps 5", ["--warmup-steps must be 0 with radam, got 5"]),
        ("--accumulate 3", ["--accumulate must divide --batch-size 64, got 3"]),
        ("--accumulate 0", ["--accumulate must be a whole number >= 1, got 0"]),
        ("--batch-size 0", ["--batch-size must be a whole number >= 1, got 0"]),
        ("--every 0", ["--every must be a whole number >= 1, got 0"]),
        ("--clip 0", ["--clip must be a finite number > 0, got 0"]),
        ("--seed -1", ["--seed must be a whole number >= 0, got -1"]),
        ("--save-every 0", ["--save-every must be a whole number >= 1, got 0"]),
        ("--kill-at 0", ["--kill-at must be a whole number >= 1, got 0"]),
        ("--resume weights:", ["--resume: must be none, auto, latest-good or weights:PATH, got 'weights:'"]),
        ("--resume latest", ["--resume: must be none, auto, latest-good or weights:PATH, got 'latest'"]),
        ("--framework tensorflow", ["--framework", "'tensorflow'"]),
        ("--optimiser sgd", ["unknown argument --optimiser: did you mean --optimizer?"]),
        ("extra", ["unknown argument extra: see --help"]),
        ("--lr -1 --steps 0", ["--lr must be", "--steps must be"]),
    ],
)
def test_a_bad_argument_is_refused_with_rule_and_value(tmp_path, capsys, arguments, sentences):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "new", *arguments.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert [sentence for sentence in sentences if sentence not in message] == []
    assert not (tmp_path / "new").exists()


def test_an_out_that_is_a_file_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run(tmp_path / "file")
    assert "--out must be a folder that can be made" in capsys.readouterr().err


def test_a_missing_framework_is_named_with_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "train_jax", raising=False)
    with pytest.raises(SystemExit):
        run(tmp_path, "--framework", "jax")
    assert "--framework jax needs flax, which is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_weights_that_are_not_there_are_named_without_a_traceback(tmp_path, capsys, framework):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--framework", framework, "--resume", f"weights:{tmp_path / 'none.safetensors'}")
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.safetensors'} is missing")
