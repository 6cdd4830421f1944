"""schedulefree plan: exit codes, table, JSON, preview, repair."""

import json
import subprocess
import sys

import pytest

from sfcore import __main__
from sfcore.plan import _report, check
from sfcore.plan._text import as_text, tomllib

GOOD = {"optimizer": "sftorch.AdamWScheduleFree", "lr": 0.001, "warmup_steps": 50, "total_steps": 1000}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(GOOD))
    return str(path)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ([], 0),
        (["--strict"], 0),
        (["--set", "ema=True"], 0),
        (["--set", "ema=True", "--strict"], 1),
        (["--set", "ema=True", "--strict", "--ignore", "SF505"], 0),
        (["--set", "batchnorm=True"], 1),
        (["--set", "batchnorm=True", "--fix"], 0),
        (["--set", "lr"], 2),
        (["--ignore", "SF999"], 2),
    ],
)
def test_exit_codes(good, capsys, more, code):
    assert __main__.main(["plan", good, *more]) == code
    assert any(capsys.readouterr())


def test_fields_alone_make_a_plan(capsys):
    assert __main__.main(["plan", "--set", "optimizer=AdamW", "scheduler=constant", "warmup_steps=100"]) == 1
    assert "SF101 warmup_steps must be 0 with a scheduler that has no warm-up" in capsys.readouterr().out


def test_a_half_written_file_is_an_error_with_its_place(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text('{"optimizer":')
    assert __main__.main(["plan", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "line 1, column 14" in error


SETTINGS = """
[optimizer]
optimizer_type = "AdamW"
learning_rate = 1e-4

[schedule]
lr_scheduler = "constant"
lr_warmup_steps = 100
max_train_steps = 1000
"""


def test_the_founding_story_is_caught_in_a_file_of_settings_and_repaired_beside_the_command_line(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(SETTINGS)
    command = "accelerate launch train_network.py --config_file c --output_name lora"
    assert __main__.main(["plan", command]) == 1
    out = capsys.readouterr().out
    assert "SF101 lr_warmup_steps in c.toml must be 0 with a scheduler that has no warm-up, got 100" in out
    assert __main__.main(["plan", command, "--fix", "--out", "new.sh"]) == 0
    out = capsys.readouterr().out
    assert "changed       SF101 lr_scheduler in c.toml: 'constant' -> 'constant_with_warmup'" in out
    assert out.endswith("written: new.sh\nwritten: new.toml\n")
    repaired = "accelerate launch train_network.py --config_file new.toml --output_name lora\n"
    assert (tmp_path / "new.sh").read_text() == repaired
    assert check(tmp_path / "new.sh").problems == ()
    assert (tmp_path / "c.toml").read_text() == SETTINGS
    assert __main__.main(["plan", command, "--fix", "--out", "other.toml"]) == 0
    assert (tmp_path / "other.sh").read_text() == repaired.replace("new", "other")


def test_a_missing_file_of_settings_has_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert __main__.main(["plan", "accelerate launch train_network.py --config_file c.toml"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: --config_file: c.toml must be a readable file, got No such file")


def test_the_table_shows_what_the_run_will_do(good, capsys):
    __main__.main(["plan", good])
    out = capsys.readouterr().out
    assert "warm-up       50 optimizer steps, by optimizer" in out
    assert "lr at step    1: 2e-05, 50: 0.001, 500: 0.001, 1000: 0.001" in out


def test_json_holds_the_problems_and_no_nan(good, capsys):
    __main__.main(["plan", good, "--json", "--set", "lr=nan", "beta=2"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    shown = [(p["code"], p["field"], p["found"]) for p in found["problems"]]
    assert shown == [("SF301", "lr", "nan"), ("SF301", "beta", 2)]


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_repaired_configuration_is_written_and_clean(tmp_path, good, capsys, suffix):
    path = tmp_path / f"bad{suffix}"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(GOOD | {"scheduler": "cosine", "warmup_steps": 0.1}))
    assert __main__.main(["plan", str(bad), "--fix", "--out", str(path)]) == 0
    assert "changed       SF202 warmup_steps: 0.1 -> 100" in capsys.readouterr().out
    assert check(path).problems == ()
    assert check(path).config["scheduler"] == "constant"


def test_every_toml_file_is_written_as_it_was_read():
    text = """
    "😀 é" = "ü\\u007f\\n'\\\\"
    when = [1979-05-27T07:32:00Z, 1979-05-27, 07:32:00]
    numbers = [1e-5, inf, 3, true]
    [a]
    lr = 1
    [a.b.c]
    lr = 2
    [[datasets]]
    resolution = 512
    [[datasets.subsets]]
    image_dir = 'C:\\images'
    """
    fields = tomllib.loads(text)
    assert tomllib.loads(as_text(fields, ".toml")) == fields


def test_a_preview_is_a_png(tmp_path, good):
    path = tmp_path / "plan.png"
    assert __main__.main(["plan", good, "--preview", str(path)]) == 0
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_preview_says_what_is_drawn():
    config = {"LoRA_type": "Standard", "optimizer": "AdamWScheduleFree", "lr_scheduler": "cosine"}
    plan = check(config | {"max_train_steps": 1000, "lr_warmup": 10})
    ignored = "AdamWScheduleFree, scheduler cosine, which is ignored"
    assert _report.title(plan) == f"{ignored}\n1000 optimizer steps, warm-up none"
    drawn = [(name, log) for name, _, log in _report.curves(plan)]
    assert drawn == [("lr, step size of the update", False), ("c, share of the newest z in x", True)]
    plan = check(optimizer="AdamW", scheduler="linear", warmup_ratio=0.1, total_steps=1000)
    told = "AdamW, scheduler linear\n1000 optimizer steps, warm-up 100 optimizer steps, by scheduler"
    assert _report.title(plan) == told
    assert [name for name, *_ in _report.curves(plan)] == ["lr, step size of the update"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"warmup_ratio": 0.1, "max_steps": 1000}, "100 optimizer steps, by scheduler"),
        ({"warmup_ratio": 0.1}, "a part of a run of unknown length, by scheduler"),
        ({"warmup_steps": 0.05, "max_steps": 1000}, "50 optimizer steps, by scheduler"),
        ({"max_steps": 1000}, "none"),
    ],
)
def test_a_share_of_the_run_is_shown_in_steps(tmp_path, capsys, fields, told):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"optim": "adamw_torch", "lr_scheduler_type": "cosine"} | fields))
    __main__.main(["plan", str(path)])
    assert f"warm-up       {told}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.yaml"], "run.yaml must be TOML, JSON or a script with a command line, got YAML: write its"),
        (["none.json"], "none.json must be a readable file, got No such file or directory: check the path"),
        (
            ["run.json", "--ignore", "SF999"],
            "ignore must be codes of rules, got 'SF999': docs/rules.md lists them",
        ),
        (
            ["run.json", "--ignore", "sf101"],
            "ignore must be codes of rules, got 'sf101': did you mean SF101?",
        ),
    ],
)
def test_what_cannot_be_looked_at_gets_a_clear_answer(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("optimizer: AdamW\n")
    (tmp_path / "run.json").write_text(json.dumps(GOOD))
    assert __main__.main(["plan", *arguments]) == 2
    out, error = capsys.readouterr()
    assert (out, error.startswith(f"error: {message}")) == ("", True), error


def test_a_preview_of_an_unknown_length_is_refused(tmp_path, capsys):
    arguments = [
        "plan",
        "--set",
        "optimizer=AdamW",
        "scheduler=cosine",
        "--preview",
        str(tmp_path / "plan.png"),
    ]
    assert __main__.main(arguments) == 2
    assert "say total_steps" in capsys.readouterr().err


def test_a_preview_without_matplotlib_says_what_to_install(tmp_path, good, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert __main__.main(["plan", good, "--preview", str(tmp_path / "plan.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_plan_needs_no_framework_and_no_matplotlib():
    code = (
        "import sys, sfcore.plan as p; p.check(lr=0.01, total_steps=10); "
        "assert not {'torch', 'jax', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_script_with_a_command_line_is_read_and_its_repair_reads_back(tmp_path, capsys):
    script, repaired = tmp_path / "train.sh", tmp_path / "repaired.sh"
    script.write_text(
        "accelerate launch train_network.py \\\n  --optimizer_type sftorch.AdamWScheduleFree \\\n"
        "  --learning_rate 1e-3 --lr_scheduler constant --lr_warmup_steps 100 --max_train_steps 2000\n"
    )
    assert __main__.main(["plan", str(script)]) == 1
    assert "--lr_warmup_steps" in capsys.readouterr().out
    assert __main__.main(["plan", str(script), "--fix", "--out", str(repaired)]) == 0
    assert __main__.main(["plan", str(repaired), "--strict"]) == 0
    assert repaired.read_text().startswith("accelerate launch train_network.py --optimizer_type sftorch.")
