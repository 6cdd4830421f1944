"""schedulefree, also python -m sfcore: exit codes, refusals, tables, JSON; frameworks only where needed."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import schedulefree
import torch

import sfcore
from sfcore import __main__, exchange, store
from sfcore.plan._text import tomllib
from sfcore.tests import examples, runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = runs.torch_run(lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01))
    return runs.store_checkpoint(tmp_path / "run", model, optimizer)


class Custom:
    """What a careless program pickles."""


def _unknown(path, kind):
    if kind == "empty folder":
        path.mkdir()
    elif kind == "other folder":
        path.mkdir()
        (path / "notes.txt").touch()
    elif kind == "pickle":
        torch.save({"model": Custom()}, path)
    elif kind == "numbers":
        torch.save({"loss": 1.0}, path)
    elif kind == "other optimizer":
        torch.save({"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}, path)
    elif kind == "two models":
        torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, path)
    elif kind == "half a torch file":
        torch.save({"w": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "state without its record":
        exchange.write_tensors(path, examples.state())
    else:
        path.write_bytes(
            {"text": b"hello, world, hello", "empty file": b"", "bad header": b"\0\0\0\0\0\0\0\0{"}[kind]
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty folder", "got an empty folder: known are"),
        ("other folder", "got a folder of other files: known are"),
        ("pickle", "which is not executed"),
        ("numbers", "a torch file without a state dict"),
        ("other optimizer", "an optimizer that is not known"),
        ("two models", "several state dicts of one kind, a, b"),
        ("half a torch file", "is damaged"),
        ("state without its record", "without its meta.json"),
        ("text", "begins with b'hello, w'"),
        ("empty file", "an empty file"),
        ("bad header", "is damaged"),
    ],
)
def test_what_is_not_known_is_refused_with_exit_code_1(tmp_path, capsys, kind, message):
    path = tmp_path / "it"
    _unknown(path, kind)
    assert __main__.main(["inspect", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert str(path) in printed.err


@pytest.mark.parametrize("arguments", [["inspect"], ["convert", "--to", "jax", "dst"]])
def test_what_is_not_there_has_exit_code_2(tmp_path, capsys, arguments):
    command, *more = arguments
    assert __main__.main([command, str(tmp_path / "it"), *more]) == 2
    out, error = capsys.readouterr()
    assert (out, error.startswith("error: ")) == ("", True)
    assert f"{tmp_path / 'it'} is missing" in error


def test_a_missing_package_has_exit_code_2_and_its_pip_line(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert __main__.main(["inspect", str(checkpoint)]) == 2
    assert "pip install rich" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert __main__.main(["completion", "bash"]) == 2
    assert "pip install 'schedulefree-twin[completion]'" in capsys.readouterr().err


def test_the_table_shows_what_the_json_says(checkpoint, capsys):
    path = checkpoint
    assert __main__.main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["norms"].keys() == {"x", "y", "z", "z - x", "v"}
    assert __main__.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    for text in ("|z - x|", "c, next step", "beta that built y", "resume: goes on after step 7", str(path)):
        assert text in shown
    assert f"{found['norms']['x']:.6g}" in shown


def test_numbers_that_json_lacks_become_text(tmp_path, capsys):
    state = {f"{role}/w": np.full(2, np.nan, np.float32) for role in ("y", "z")}
    clock = {"step": 1, "lr_max": 1.0, "weight_sum": 1.0}
    meta = examples.meta(1, groups=[{"hyperparameters": {"beta": 0.9}, "clock": clock, "parameters": ["w"]}])
    meta.parameters = {"w": {"shape": [2], "dtype": "float32", "clock": clock}}
    path = store.write(tmp_path, meta, state, {})
    assert __main__.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["norms"]["x"] == "nan"


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["convert", "a", "b"], ["convert", "a", "b", "--to", "tf"]]
)
def test_a_wrong_command_line_has_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(arguments)
    assert error.value.code == 2
    assert "usage: schedulefree" in capsys.readouterr().err


def program(*arguments, **more):
    command = [sys.executable, "-m", "sfcore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def test_the_program_says_its_version_and_what_its_exit_codes_mean():
    assert program("--version").stdout == f"schedulefree-twin {sfcore.__version__}\n"
    for command in ([], ["plan"], ["inspect"], ["convert"]):
        shown = program(*command, "--help")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert all(f"\n  {code}  " in shown.stdout for code in (0, 1, 2))
    assert program("plan", "--set", "lr=0.01", "total_steps=10", "warmup_steps=2").returncode == 0
    assert program("plan", "--set", "optimizer=SGD", "lr=-1").returncode == 1
    assert program("plan", "nothing.toml").returncode == 2


def test_bytes_that_are_no_character_are_shown_and_not_stumbled_over():
    for arguments, code in ((["--set", b"\xff=1", "optimizer=AdamW"], 1), ([b"\xff.toml"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "sfcore", "plan", *arguments], capture_output=True, check=False
        )
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
        assert b"\\udcff" in done.stdout + done.stderr


def test_the_installed_script_is_the_same_program():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"schedulefree": "sfcore.__main__:main"}


def test_a_pager_that_ends_early_is_no_error(checkpoint):
    command = (
        f'"{sys.executable}" -m sfcore inspect --json "{checkpoint}" 2>&1 | true; echo ${{PIPESTATUS[0]}}'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pl"], {"plan"}),
        (["plan", "--str"], {"--strict"}),
        (["plan", "--source", ""], {"own", "sd-scripts", "kohya", "hf"}),
        (["convert", "a", "b", "--to", "j"], {"jax"}),
        (["inspect", "pypro"], {"pyproject.toml"}),
    ],
)
def test_bash_completes_commands_options_choices_and_files(tmp_path, words, expected):
    script = tmp_path / "completion.bash"
    script.write_text(program("completion", "bash").stdout)
    line = " ".join(["schedulefree", *words])
    ask = (
        f"source {script}; COMP_WORDS=(schedulefree {' '.join(map(shlex.quote, words))}); "
        f"COMP_CWORD={len(words)}; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; "
        f"_shtab_schedulefree schedulefree '{words[-1]}' '{words[-2] if words[1:] else 'schedulefree'}'; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize(("shell", "mark"), [("zsh", "#compdef schedulefree"), ("fish", "-c schedulefree")])
def test_other_shells_get_a_script_of_their_own(shell, mark):
    done = program("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert mark in done.stdout
    assert all(word in done.stdout for word in ("inspect", "preview", "strict"))


PROBE = """
import sys
from sfcore import __main__
code = __main__.main(sys.argv[1:])
loaded = {"jax", "torch", "optax", "orbax", "flax", "rich"} & set(sys.modules)
assert not loaded, loaded
sys.exit(code)
"""


def test_no_framework_is_imported_for_files_that_need_none(checkpoint, tmp_path):
    path = checkpoint
    commands = [
        ["inspect", str(path), "--json"],
        ["inspect", str(path / store.INFERENCE), "--json"],
        ["convert", str(path), str(tmp_path / "jax"), "--to", "jax"],
        ["convert", str(path), str(tmp_path / "x.safetensors"), "--to", "inference"],
    ]
    for arguments in commands:
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
