"""python -m sfcore: exit codes, refusals, tables and JSON, and no framework where none is needed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import schedulefree
import torch

from sfcore import __main__, exchange, store
from sfcore.tests import examples, runs


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = runs.torch_run(lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01))
    return runs.store_checkpoint(tmp_path / "run", model, optimizer)


class Custom:
    """What a careless program pickles."""


def _unknown(path, kind):
    if kind == "nothing":
        return
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
        ("nothing", "is missing"),
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
    assert "usage: python -m sfcore" in capsys.readouterr().err


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
