"""The launcher of sd-scripts on a toy of its shape; the real one: `sfcore/tests/test_sd_scripts_runs.py`."""

import argparse
import inspect
import json
import os
import pickle
import random
import runpy
import subprocess
import sys
import types
from contextlib import ExitStack
from importlib.metadata import EntryPoint
from multiprocessing import Value
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import sfcore
import sftorch
from sfcore import __main__
from sfcore.plan._text import tomllib
from sftorch.tests import accelerators, sd_scripts_toy
from sftorch.trainers import sd_scripts
from sftorch.trainers.sd_scripts import __main__ as program

TOTAL, ACCUMULATION, AT = 9, 2, 7  # updates; of 6 an epoch, the last of which has one batch
PATCH = sd_scripts.PATCH.read_text(encoding="utf-8")


def forget():
    accelerators.forget()
    for name in [one for one in sys.modules if one.partition(".")[0] in ("train_network", "library")]:
        del sys.modules[name]


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The folder of the toy; nothing that is loaded from there stays."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    forget()
    yield sd_scripts_toy.write(tmp_path / "sd scripts")
    forget()


def run(scripts, name, *more, script="train_network.py", total=TOTAL, seed=("--seed", "3")):
    """Returns what a run of the program leaves in its folder `name`."""
    forget()
    out = scripts / name
    out.mkdir(exist_ok=True)
    words = ["--max_train_steps", str(total), "--gradient_accumulation_steps", str(ACCUMULATION)]
    assert program.main([str(scripts / script), *words, "--output_dir", str(out), *seed, *more]) == 0
    return torch.load(out / "last.pt")


def same(one, other):
    return all(torch.equal(one["x"][name], x) for name, x in other["x"].items())


@pytest.mark.parametrize("script", ["train_network.py", "sdxl_train_network.py"])
def test_a_resumed_run_is_the_run_without_a_stop(scripts, script):
    main = sys.modules["__main__"]
    whole = run(scripts, "whole", script=script)
    run(scripts, "stopped", "--save", "7", total=AT, script=script)
    resumed = run(scripts, "resumed", "--resume", str(scripts / "stopped" / "7"), script=script)
    assert len(whole["losses"]) == 11 + 6  # of the second epoch, three updates
    assert resumed["losses"] == whole["losses"][11 + 2 :]
    assert same(whole, resumed)
    assert sys.modules["__main__"] is main


def test_a_state_keeps_the_seed_of_a_run_that_was_given_none(scripts):
    stopped = run(scripts, "stopped", "--save", "6", seed=(), total=AT)
    resumed = run(scripts, "resumed", "--resume", str(scripts / "stopped" / "6"), seed=(), total=AT)
    assert resumed["seed"] == stopped["seed"]
    assert resumed["losses"] == stopped["losses"][11:]
    assert same(stopped, resumed)


def test_what_is_changed_is_said(scripts, capsys):
    run(scripts, "stopped", "--save", "7", total=AT)
    said = capsys.readouterr().err
    assert f"schedulefree launch: {scripts / 'train_network.py'} runs with " in said
    assert "--skip_until_initial_step" not in said
    state = scripts / "stopped" / "7"
    run(scripts, "resumed", "--resume", str(state), seed=("--seed", "4"))
    said = capsys.readouterr().err
    assert "--skip_until_initial_step is added" in said
    assert "--seed is 4, and was 3 before" in said
    told = json.loads((state / "train_state.json").read_text())
    (state / "train_state.json").write_text(json.dumps(told | {"seed": None}))
    run(scripts, "resumed", "--resume", str(state))
    assert "the state was not saved by this launcher" in capsys.readouterr().err
    said = run(scripts, "resumed", "--resume", str(state), "--initial_step", "2")
    assert len(said["losses"]) == 11 + 6 - 4  # behind the second update


def test_what_a_resume_cannot_keep_is_said(monkeypatch, tmp_path):
    args = argparse.Namespace(resume="user/repository/state", initial_step=None, initial_epoch=None)
    args.skip_until_initial_step, args.seed, said = True, None, []
    sd_scripts._resume(args, said.append)
    assert ["the same if --seed is that of user/repository/state" in one for one in said] == [True]
    (tmp_path / "train_state.json").write_text('{"current_step": 3, "seed": 1}')
    args.resume = str(tmp_path)
    said.clear()
    sd_scripts._resume(args, said.append)
    assert said == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    sd_scripts._resume(args, said.append)
    assert ["random numbers of the first process alone" in one for one in said] == [True]


def test_a_state_that_does_not_say_where_it_stands_is_refused(scripts, capsys):
    (scripts / "old").mkdir()
    assert program.main([str(scripts / "train_network.py"), "--resume", str(scripts / "old")]) == 2
    assert "resume must be a state with train_state.json, got " in capsys.readouterr().err


def test_another_version_of_the_script_is_refused_with_every_place(scripts, capsys):
    path = scripts / "train_network.py"
    text = path.read_text(encoding="utf-8")
    text = text.replace("global_step = initial_step", "global_step = initial_step // 2")
    path.write_text(text.replace("shuffle=True", "shuffle=False"), encoding="utf-8")
    assert program.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: train_network.py must have the lines of the patch once each, got 0 times ")
    assert "'train_dataset_group,'" in said
    assert "'if initial_step > 0:  # only if skip_until_initial_step is specified'" in said
    assert said.count(" times ") == 2
    assert "is none of the versions that docs/kohya.md names" in said
    assert "train_network" not in sys.modules


@pytest.mark.parametrize("script", ["train_network.py", "train_db.py"])
@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("def verify_training_args(args)", "def verify_args(args)", "verify_training_args"),
        ("def get_optimizer(args, trainable_params)", "def get_optimizer(args)", "get_optimizer"),
        ("class LossRecorder", "class SeededReads", "SeededReads"),
    ],
)
def test_another_version_of_the_library_is_refused(scripts, capsys, script, old, new, name):
    path = scripts / "library" / "train_util.py"
    path.write_text(path.read_text().replace(old, new))
    assert program.main([str(scripts / script)]) == 2
    said = capsys.readouterr().err
    assert f"error: library/train_util.py must be as it is known here, got other {name}: this sd-" in said
    assert not hasattr(sys.modules["library.train_util"], "seed_of_state")


def test_other_scripts_are_refused(scripts, tmp_path, capsys):
    (scripts / "train_textual_inversion.py").write_text("import library\n")
    (tmp_path / "sdxl_train_network.py").write_text("import train_network\n")
    paths = scripts / "train_textual_inversion.py", tmp_path / "sdxl_train_network.py", scripts / "none.py"
    for path in paths:
        assert program.main([str(path)]) == 2
        assert f"got {path}: " in capsys.readouterr().err


def shipped(scripts, name, *more, steps=6, optimizer="sftorch.AdamWScheduleFree"):
    """Returns what train_db.py leaves, with the launcher."""
    forget()
    out = scripts / name
    out.mkdir()
    words = ["--optimizer_type", optimizer, "--max_train_steps", str(steps), "--output_dir", str(out), *more]
    assert program.main([str(scripts / "train_db.py"), *words]) == 0
    return torch.load(out / "last.pt")


def test_a_script_that_never_calls_eval_saves_and_draws_x_and_trains_as_before(scripts, capsys, monkeypatch):
    before = Accelerator.prepare
    found = shipped(scripts, "a")
    assert "never calls optimizer.eval(): what it saves and draws is x" in capsys.readouterr().err
    assert Accelerator.prepare is before
    forget()
    words = ["--optimizer_type", "sftorch.AdamWScheduleFree", "--max_train_steps", "6"]
    monkeypatch.setattr(sys, "argv", ["train_db.py", *words, "--output_dir", str(scripts / "a")])
    with pytest.raises(AssertionError, match="y was drawn"):  # alone
        runpy.run_path(str(scripts / "train_db.py"), run_name="__main__")
    optimizer, models = by_hand(6)
    for name, model in models.items():
        x = optimizer.eval_state_dict(model) if name != "vae" else model.state_dict()
        assert all(torch.equal(found["saved"][name][k], x[k]) for k in x)
        assert all(torch.equal(found["y"][name][k], p) for k, p in model.named_parameters())
        moved = [not torch.equal(x[k], found["y"][name][k]) for k in x]
        assert all(moved) == (name != "vae")


def by_hand(steps):
    """Returns what train_db.py of the toy trains, without it."""
    torch.manual_seed(3)
    unet, text_encoder, vae = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1), torch.nn.Linear(1, 1)
    optimizer = sftorch.AdamWScheduleFree([*unet.parameters(), *text_encoder.parameters()], lr=0.05)
    for step in range(steps):
        text_encoder(unet(torch.ones(4, 3) * (step + 1))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, {"unet": unet, "text_encoder": text_encoder, "vae": vae}


def test_a_state_of_such_a_script_goes_on_in_the_same_bits(scripts, capsys):
    whole, _ = shipped(scripts, "whole"), shipped(scripts, "part", steps=2)
    capsys.readouterr()
    resumed = shipped(scripts, "on", "--resume", str(scripts / "part" / "state"), steps=6)
    assert "counts steps from 0 after a resume" in capsys.readouterr().err
    assert not torch.equal(whole["saved"]["unet"]["weight"], resumed["saved"]["unet"]["weight"])
    part, models = by_hand(2)
    for step in range(6):  # from 0 again
        models["text_encoder"](models["unet"](torch.ones(4, 3) * (step + 1))).square().mean().backward()
        part.step()
        part.zero_grad()
    x = part.eval_state_dict(models["unet"])
    assert all(torch.equal(resumed["saved"]["unet"][k], x[k]) for k in x)


def test_upstreams_class_is_refused_where_only_its_eval_gives_x(scripts, capsys):
    words = ["--optimizer_type", "schedulefree.AdamWScheduleFree", "--max_train_steps", "2"]
    assert program.main([str(scripts / "train_db.py"), *words, "--output_dir", str(scripts)]) == 2
    assert "optimizer_type must be one of sftorch's, got AdamWScheduleFree" in capsys.readouterr().err
    plain = shipped(scripts, "plain", optimizer="torch.optim.SGD")
    assert torch.equal(plain["saved"]["unet"]["weight"], plain["y"]["unet"]["weight"])


def environment():
    root = Path(sfcore.__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}


def test_a_command_line_that_begins_otherwise_is_written_as_it_must_be(capsys):
    assert program.main(["accelerate", "launch", "--num_processes", "1", "a b/train_network.py", "--v2"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "\n  accelerate launch --num_processes 1 -m sftorch.trainers.sd_scripts 'a b/train_network.py' --v2\n"
    )
    assert program.main(["--v2"]) == 2
    assert "SCRIPT must be given" in capsys.readouterr().err


def test_the_command_finds_the_program(monkeypatch, capsys):
    pages = tomllib.loads((Path(sfcore.__file__).parents[1] / "pyproject.toml").read_text())
    registered = pages["project"]["entry-points"][__main__.LAUNCHERS]

    def entry_points(group, name):
        return [EntryPoint(name, registered[name], group)] if group == __main__.LAUNCHERS else []

    monkeypatch.setattr(__main__, "entry_points", entry_points)
    assert __main__.main(["launch", "sd-scripts", "--", "none.py", "--resume", "it"]) == 2
    assert "got none.py: " in capsys.readouterr().err
    monkeypatch.setattr(__main__, "entry_points", lambda group, name: [])
    assert __main__.main(["launch", "sd-scripts", "none.py"]) == 2
    assert capsys.readouterr().err == (
        "error: no launcher of sd-scripts is installed: pip install 'schedulefree-twin[torch]'\n"
    )
    gone = EntryPoint("sd-scripts", "nothing_of_that_name:main", __main__.LAUNCHERS)
    monkeypatch.setattr(__main__, "entry_points", lambda group, name: [gone])
    assert __main__.main(["launch", "sd-scripts", "none.py"]) == 2
    assert "cannot be loaded here: No module named 'nothing_of_that_name'" in capsys.readouterr().err


@pytest.mark.slow
def test_accelerate_launches_it_as_a_module(scripts):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no"]
    command += ["-m", "sftorch.trainers.sd_scripts", str(scripts / "sdxl_train_network.py")]
    command += ["--max_train_steps", str(TOTAL), "--gradient_accumulation_steps", str(ACCUMULATION)]
    (scripts / "out").mkdir()
    subprocess.run(
        [*command, "--seed", "3", "--output_dir", str(scripts / "out")], check=True, env=environment()
    )
    launched = torch.load(scripts / "out" / "last.pt")
    here = run(scripts, "here", script="sdxl_train_network.py")
    assert launched["losses"] == here["losses"]
    assert same(launched, here)


def test_every_optimizer_with_modes_gets_its_modes(scripts):
    """sd-scripts looks at the end of the name alone."""
    train_util = types.ModuleType("train_util")
    exec(sd_scripts_toy.TRAIN_UTIL, vars(train_util))
    sd_scripts._resume_right(train_util, ExitStack(), print)
    optimizer = types.SimpleNamespace(train=lambda: "y", eval=lambda: "x")
    modes = train_util.get_optimizer_train_eval_fn(optimizer, argparse.Namespace())
    assert [mode() for mode in modes] == ["y", "x"]
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    assert [mode() for mode in train_util.get_optimizer_train_eval_fn(plain, None)] == [None, None]


def test_the_patch_for_upstream_has_what_the_launcher_puts_into_their_library():
    added = [line[1:] for line in PATCH.splitlines() if line.startswith("+") and not line.startswith("+++")]
    for one in (sd_scripts.SeededReads, sd_scripts.seed_of_state):
        source = inspect.getsource(one).splitlines()
        start = added.index(source[0])
        assert added[start : start + len(source)] == source


def test_a_patch_fits_once_or_not_at_all():
    patch = "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n@@ -5 +5,2 @@\n d\n+e\n"
    assert sd_scripts.patched("0\na\nb\nd\n", patch, "f") == "0\na\nc\nd\ne\n"
    assert sd_scripts.patched("a\nb\n", patch, "g") == "a\nb\n"
    with pytest.raises(ValueError, match=r"f must have .*, got 0 times 'b', 2 times 'd'"):
        sd_scripts.patched("d\nd\n", patch, "f")


class Reads:
    def __init__(self):
        self.epoch, self.width = None, 5

    def set_current_epoch(self, epoch):
        self.epoch = epoch
        random.seed(1)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.epoch, random.random(), np.random.random(), torch.rand(1).item()


def test_a_batch_is_read_in_the_same_way_whatever_was_read_before_and_nothing_else_is_drawn():
    epoch = Value("i", 2)
    reads = sd_scripts.SeededReads(Reads(), epoch, 7)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    first = [reads[index] for index in (0, 1, 2)]
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert [reads[index] for index in (2, 1, 0)] == first[::-1]
    assert len({each for one in first for each in one[1:]}) == 9
    assert first[0][0] == 2
    epoch.value = 3
    assert reads[0][1:] != first[0][1:]
    assert (len(reads), reads.width) == (4, 5)
    copy = pickle.loads(pickle.dumps(sd_scripts.SeededReads(Reads(), types.SimpleNamespace(value=2), 7)))
    assert copy[1] == first[1]
