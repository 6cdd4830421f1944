"""The plan against the real code of sd-scripts: its parser, get_optimizer, get_scheduler_fix, and its facts.

SD_SCRIPTS names a checkout of github.com/kohya-ss/sd-scripts, MUSUBI_TUNER one of
github.com/kohya-ss/musubi-tuner, KOHYA_SS one of github.com/bmaltais/kohya_ss; without them the tests are
skipped. Nothing of theirs is kept here: the functions are taken out of their files and run as they are, with
torch, transformers and schedulefree.
"""

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections import Counter
from enum import Enum
from pathlib import Path

import pytest
import schedulefree
import torch

import sftorch
from sfcore.laws import LAWS
from sfcore.plan import ConfigError, check
from sfcore.plan import _sd_scripts as facts
from sfcore.plan._text import as_text, tomllib
from sfcore.plan._trainers import SD_SCRIPTS
from sftorch.trainers import sd_scripts as launcher

SD, MUSUBI = (os.environ.get(name, "") for name in ("SD_SCRIPTS", "MUSUBI_TUNER"))
needs_sd = pytest.mark.skipif(not SD, reason="SD_SCRIPTS names no checkout of kohya-ss/sd-scripts")
KOHYA = os.environ.get("KOHYA_SS", "")
needs_kohya = pytest.mark.skipif(not KOHYA, reason="KOHYA_SS names no checkout of bmaltais/kohya_ss")
needs_musubi = pytest.mark.skipif(not MUSUBI, reason="MUSUBI_TUNER names no checkout of musubi-tuner")
pytestmark = pytest.mark.timeout(1800)  # on a busy machine, by hand
WANTED = ("add_optimizer_arguments", "get_optimizer", "get_scheduler_fix", "is_schedulefree_optimizer")
WANTED += ("get_dummy_scheduler", "read_config_from_file")


class Piecewise(Enum):
    PIECEWISE_CONSTANT = "piecewise_constant"


def piecewise(optimizer, step_rules, last_epoch=-1):
    """What diffusers does with the rules; it is not installed here."""
    rules = step_rules.split(",")
    for rule in rules[:-1]:
        value, steps = rule.split(":")
        int(steps), float(value)
    float(rules[-1])


@functools.cache
def real():
    """Returns the functions of library/train_util.py, as they stand there."""
    path = Path(SD) / "library" / "train_util.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name in WANTED]
    assert len(body) == len(WANTED)
    future = ast.parse("from __future__ import annotations").body
    optimization = importlib.import_module("transformers.optimization")
    scope = {
        "argparse": argparse,
        "ast": ast,
        "importlib": importlib,
        "logger": types.SimpleNamespace(info=lambda text: None, warning=lambda text: None),
        "os": os,
        "torch": torch,
        "transformers": importlib.import_module("transformers"),
        "toml": types.SimpleNamespace(load=lambda file: tomllib.loads(file.read())),
        "SchedulerType": optimization.SchedulerType,
        "TYPE_TO_SCHEDULER_FUNCTION": optimization.TYPE_TO_SCHEDULER_FUNCTION,
        "DiffusersSchedulerType": Piecewise,
        "DIFFUSERS_TYPE_TO_SCHEDULER_FUNCTION": {Piecewise.PIECEWISE_CONSTANT: piecewise},
    }
    module = ast.fix_missing_locations(ast.Module(body=[*future, *body], type_ignores=[]))
    exec(compile(module, str(path), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in WANTED})


def parser():
    made = argparse.ArgumentParser(exit_on_error=True)
    real().add_optimizer_arguments(made)
    made.add_argument("--max_train_steps", type=int, default=1600)
    made.add_argument("--gradient_accumulation_steps", type=int, default=1)
    made.add_argument("--config_file", default=None)
    made.add_argument("--output_config", action="store_true")
    return made


def stops(words, monkeypatch):
    """Returns why the real code stops before it trains; "" if it does not."""
    monkeypatch.setattr("sys.argv", ["train_network.py", *words])
    try:
        args = real().read_config_from_file(parser().parse_args(), parser())
        weights = [torch.nn.Parameter(torch.ones(3))]
        _, _, optimizer = real().get_optimizer(args, weights)
        scheduler = real().get_scheduler_fix(args, optimizer, 1)
        weights[0].grad = torch.ones(3)
        for _ in range(30):  # StepLR looks at the rate at its tenth
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Errors of the plan that say that the script stops; others are about runs that are not as they are written.
STOPS = {"SF001", "SF002", "SF003", "SF004", "SF101", "SF104", "SF106", "SF107", "SF108", "SF206", "SF301"}
STOPS |= {"SF306", "SF508"}
IGNORED = {"SF103"}

OPTIMIZERS = [
    [],
    ["--optimizer_type", "AdamW"],
    ["--optimizer_type", "adamw", "--optimizer_args", "weight_decay=0.01", "betas=0.9,0.99"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "betas=0.9"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "betas=0.9,1.5"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "weight_decay=-0.1"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "warmup_steps=10"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "momentum=0.9"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "fused"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "lr=0.1"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "eps=1e-6", "amsgrad=True"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "weight_decay=a"],
    ["--optimizer_type", "AdamW", "--optimizer_args", "weight_decay=0.1=2"],
    ["--optimizer_type", "AdmaW"],
    ["--optimizer_type", "Adam"],
    ["--optimizer_type", "adam"],
    ["--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9"],
    ["--optimizer_type", "SGDNesterov"],
    ["--optimizer_type", "SGDNesterov", "--optimizer_args", "nesterov=True"],
    ["--optimizer_type", "SGDNesterov", "--optimizer_args", "momentum=0.5", "weight_decay=0.1"],
    ["--optimizer_type", "NAdam", "--optimizer_args", "momentum_decay=0.01"],
    ["--optimizer_type", "RMSprop", "--optimizer_args", "alpha=0.9"],
    ["--optimizer_type", "torch.optim.RAdam"],
    ["--optimizer_type", "torch.optim.Radam"],
    ["--optimizer_type", "torch.optim.Adafactor"],
    ["--optimizer_type", "CAME"],
    ["--optimizer_type", "dadaptation.DAdaptAdam"],
    ["--optimizer_type", "Adafactor"],
    ["--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"],
    ["--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False", "warmup_init=True"],
    ["--optimizer_type", "Adafactor", "--optimizer_args", "eps=1e-30,1e-3", "clip_threshold=2.0"],
    ["--optimizer_type", "transformers.optimization.Adafactor"],
    ["--optimizer_type", "transformers.optimization.Adafactor", "--optimizer_args", "relative_step=False"],
    ["--optimizer_type", "AdamWScheduleFree"],
    ["--optimizer_type", "AdamWScheduleFree", "--optimizer_args", "warmup_steps=10", "r=1.0"],
    ["--optimizer_type", "AdamWScheduleFree", "--optimizer_args", "prior_steps=800"],
    ["--optimizer_type", "AdamWScheduleFree", "--optimizer_args", "inner_momentum=0.0"],
    ["--optimizer_type", "AdamWScheduleFree", "--optimizer_args", "warmup=10"],
    ["--optimizer_type", "AdamWScheduleFree", "--optimizer_args", "foreach=False"],
    ["--optimizer_type", "adamwschedulefree", "--optimizer_args", "warmup_steps=10"],
    ["--optimizer_type", "SGDScheduleFree", "--optimizer_args", "momentum=0.95", "warmup_steps=10"],
    ["--optimizer_type", "SGDScheduleFree", "--optimizer_args", "betas=0.9,0.99"],
    ["--optimizer_type", "RAdamScheduleFree", "--optimizer_args", "warmup_steps=10"],
    ["--optimizer_type", "RAdamScheduleFree", "--optimizer_args", "warmup_steps=0"],
    ["--optimizer_type", "RAdamScheduleFree", "--optimizer_args", "silent_sgd_phase=False"],
    ["--optimizer_type", "schedulefree.RAdamScheduleFree"],
    ["--optimizer_type", "schedulefree.AdamScheduleFree"],
    ["--optimizer_type", "sftorch.AdamWScheduleFree", "--optimizer_args", "prior_steps=8", "warmup_steps=5"],
    ["--optimizer_type", "sftorch.AdamWScheduleFree", "--optimizer_args", "precision='lean'", "seed=3"],
    ["--optimizer_type", "sftorch.AdamWScheduleFree", "--optimizer_args", "b1=0.9"],
    ["--optimizer_type", "sftorch.AdamWScheduleFree", "--optimizer_args", "betas=0.9"],
    ["--optimizer_type", "sftorch.AdmWScheduleFree"],
    ["--optimizer_type", "sftorch.SGDScheduleFree", "--optimizer_args", "b2=0.9"],
    ["--optimizer_type", "pytorch_optimizer.ScheduleFreeAdamW"],
    ["--optimizer_type", "ProdigyPlusScheduleFree"],
    ["--use_8bit_adam", "--optimizer_type", "AdamW"],
    ["--fused_backward_pass", "--optimizer_type", "AdamW"],
    ["--fused_backward_pass", "--optimizer_type", "Adafactor"],
    ["--fused_backward_pass", "--optimizer_type", "Adafactor", "--gradient_accumulation_steps", "2"],
]
_T = "--lr_scheduler_type"
SCHEDULES = [
    [],
    ["--lr_scheduler", "constant", "--lr_warmup_steps", "100"],
    ["--lr_scheduler", "constant", "--lr_warmup_steps", "0.0001"],
    ["--lr_scheduler", "constant", "--lr_warmup_steps", "5%"],
    ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "0.05"],
    ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "100.0"],
    ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "1e2"],
    ["--lr_scheduler", "Constant"],
    ["--lr_scheduler", ""],
    ["--lr_scheduler", "cosin"],
    ["--lr_scheduler", "cosine", "--lr_warmup_steps", "100"],
    ["--lr_scheduler", "cosine", "--lr_scheduler_args", "num_cycles=1.5"],
    ["--lr_scheduler", "cosine", "--lr_scheduler_args", "cycles=1.5"],
    ["--lr_scheduler", "linear", "--lr_scheduler_args", "num_cycles=2"],
    ["--lr_scheduler", "cosine_with_restarts", "--lr_scheduler_num_cycles", "3"],
    ["--lr_scheduler", "cosine_with_restarts", "--lr_scheduler_num_cycles", "1.5"],
    ["--lr_scheduler", "polynomial", "--lr_scheduler_power", "2"],
    ["--lr_scheduler", "polynomial", "--lr_scheduler_args", "lr_end=1.0"],
    ["--lr_scheduler", "inverse_sqrt", "--lr_warmup_steps", "10", "--lr_scheduler_timescale", "100"],
    ["--lr_scheduler", "cosine_with_min_lr"],
    ["--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_min_lr_ratio", "0.1"],
    ["--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_args", "min_lr=1e-6"],
    [
        *("--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_args", "min_lr=1e-6"),
        *("--lr_scheduler_min_lr_ratio", "0.1"),
    ],
    ["--lr_scheduler", "warmup_stable_decay"],
    ["--lr_scheduler", "warmup_stable_decay", "--lr_decay_steps", "0.2", "--lr_warmup_steps", "10"],
    ["--lr_scheduler", "cosine_warmup_with_min_lr", "--lr_scheduler_min_lr_ratio", "0.1"],
    ["--lr_scheduler", "reduce_lr_on_plateau"],
    ["--lr_scheduler", "piecewise_constant"],
    ["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules='1:10,0.1:20,0.01'"],
    ["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules=1:10,0.1:20,0.01"],
    ["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules='1:x,2'"],
    ["--lr_scheduler", "adafactor"],
    ["--lr_scheduler", "adafactor:1e-4"],
    ["--lr_scheduler", "adafactor", "--lr_warmup_steps", "10"],
    [_T, "CosineAnnealingLR", "--lr_scheduler_args", "T_max=100"],
    [_T, "CosineAnnealingLR"],
    [_T, "CosineAnnealingLR", "--lr_scheduler_args", "T_max=100", "--lr_warmup_steps", "10"],
    [_T, "CosineAnnealingLR", "--lr_scheduler_args", "T_max=100", "min=0"],
    [_T, "cosineannealinglr", "--lr_scheduler_args", "T_max=100"],
    [_T, "OneCycleLR", "--lr_scheduler_args", "max_lr=0.1"],
    [_T, "OneCycleLR", "--lr_scheduler_args", "max_lr=0.1", "total_steps=100"],
    [_T, "torch.optim.lr_scheduler.StepLR", "--lr_scheduler_args", "step_size=10"],
    [_T, "StepLR", "--lr_scheduler_args", "step_size"],
    [_T, "LambdaLR", "--lr_scheduler_args", "lr_lambda=1"],
    [_T, "ReduceLROnPlateau"],
    [_T, "ConstantLR", "--lr_scheduler", "anything"],
]
GRID = [[*o, *s] for o, s in itertools.product(OPTIMIZERS, SCHEDULES)]
ALONE = [
    ["--learning_rate", "abc"],
    ["--learning_rate"],
    ["--learning_rate", "-1"],
    ["--max_train_steps", "10.5"],
    ["--lr_sch", "cosine"],
    ["--lr_warmup", "10"],
    ["--learning_r", "1e-3", "--lr_warmup_s", "10"],
]


@needs_sd
def test_no_stop_of_the_real_code_is_missed_and_nothing_that_runs_is_said_to_stop(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    count, wrong = Counter(), []
    for more in (["--learning_rate", "1e-3"], []):
        for words in [*GRID, *ALONE]:
            words = [*more, *words]
            plan = check(["accelerate", "launch", "train_network.py", *words])
            why = stops(words, monkeypatch)
            codes = {problem.code for problem in plan.errors}
            if why and not codes & STOPS:
                wrong.append(f"missed: {' '.join(words)}: {why}, got {sorted(codes)}")
            elif codes & STOPS and not why:
                found = [str(p) for p in plan.errors if p.code in STOPS]
                wrong.append(f"false: {' '.join(words)}: {found}")
            else:
                count["stops" if why else "ignored" if codes & IGNORED else "runs"] += 1
    assert not wrong, "\n".join([f"{len(wrong)} wrong, {dict(count)} right", *wrong[:60]])
    assert sum(count.values()) > 5000


@needs_sd
def test_what_a_repair_leaves_without_errors_runs_in_the_real_code(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.chdir(tmp_path)
    repaired, wrong = 0, []
    for words in GRID:
        plan = check(["train_network.py", "--learning_rate", "1e-3", *words], fix=True)
        if plan.changes and not plan.errors:
            repaired += 1
            why = stops(plan.config[1:], monkeypatch)
            missing = why.startswith(("ImportError", "ModuleNotFoundError"))  # a package, here
            wrong += [f"{words} -> {plan.config}: {why}"] if why and not missing else []
    assert not wrong, "\n".join(wrong[:30])
    assert repaired > 300
    story = (
        'lr_scheduler = "constant"\nlr_warmup_steps = 100\nlearning_rate = 1e-4\n[a]\nmax_train_steps = 999\n'
    )
    (tmp_path / "c.toml").write_text(story)
    assert stops(["--config_file", "c"], monkeypatch).startswith("ValueError")
    plan = check(["train_network.py", "--config_file", "c"], fix=True)
    (tmp_path / "c.toml").write_text(as_text(plan.files["c.toml"], ".toml"))
    assert stops(plan.config[1:], monkeypatch) == ""


def arguments(path):
    """Yields the calls of add_argument in a file, as (name of the option, keywords)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that are none
        tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args:
            name = getattr(node.args[0], "value", "")
            if isinstance(name, str) and name.startswith("--"):
                yield name[2:], {one.arg: ast.unparse(one.value) for one in node.keywords}


def training_scripts(root):
    return [path for path in root.glob("*.py") if "train" in path.name or path.name == "fine_tune.py"]


@needs_sd
def test_the_options_are_those_of_the_checkout_and_of_their_kinds():
    root = Path(SD)
    files = [*root.glob("library/*.py"), *training_scripts(root)]
    found = dict(each for path in files for each in arguments(path))
    found = {name: told for name, told in found.items() if not name.startswith("support_")}  # of a tool
    assert set(facts.OPTIONS) == set(found)
    for name, kind in facts.KINDS.items():
        told = found[name]
        expected = {"int": "int", "float": "float", "steps": "int_or_float", "text": "str", "list": "str"}
        assert told.get("type") == expected.get(kind), name
        assert ("nargs" in told) == (kind == "list"), name
        assert ("action" in told) == (kind == "flag"), name
    usual = {"lr": "learning_rate", "total_steps": "max_train_steps", "scheduler": "lr_scheduler"}
    for neutral, option in usual.items():
        assert ast.literal_eval(found[option]["default"]) == SD_SCRIPTS.defaults[neutral]


def evaluates(root, path):
    """Returns whether a script, or the one whose trainer it extends, calls eval() of the optimizer."""
    text = path.read_text(encoding="utf-8")
    parents = [root / f"{name}.py" for name in ("train_network",) if f"({name}.NetworkTrainer)" in text]
    return any("optimizer_eval_fn()" in one.read_text(encoding="utf-8") for one in (path, *parents))


@needs_sd
def test_the_scripts_do_what_the_table_says():
    root = Path(SD)
    ours = {name for name, script in facts.SCRIPTS.items() if not script.musubi}
    assert ours == {path.stem for path in training_scripts(root)}
    for path in training_scripts(root):
        text, script = path.read_text(encoding="utf-8"), facts.SCRIPTS[path.stem]
        assert script.evaluates == evaluates(root, path), path.stem
        assert script.resumes == (path.stem == "train_network" or "(train_network.NetworkTrainer)" in text)
        assert script.blockwise == ('"--blockwise_fused_optimizers"' in text), path.stem
        if script.mended and path.stem != "train_controlnet":  # which is train_control_net by another name
            assert "train_util.get_optimizer(" in text
            assert "accelerator.prepare(" in text
            assert "sample_images(" in text
            assert (
                "train_util.save_sd_model_on_" in text
                or "sdxl_train_util.save_sd_model_on_" in text
                or ("model.state_dict()" in text.split("def save_model(")[1].split("torch.save(")[0])
            ), path.stem


@needs_musubi
def test_the_scripts_of_musubi_tuner_are_known_and_all_call_eval():
    folder = Path(MUSUBI) / "src" / "musubi_tuner"
    scripts = [
        path for path in folder.glob("*train*.py") if '__name__ == "__main__"' in path.read_text("utf-8")
    ]
    assert {path.stem for path in scripts} == {name for name, one in facts.SCRIPTS.items() if one.musubi}
    trainers = [*scripts, *folder.glob("training/*.py")]
    loops = [path for path in trainers if "optimizer.step()" in path.read_text(encoding="utf-8")]
    assert loops
    assert all("optimizer_eval_fn()" in path.read_text(encoding="utf-8") for path in loops)


def trained_with(folder, runs):
    """Returns what each run tells; see sd_scripts_train.py."""
    program = [sys.executable, str(Path(__file__).with_name("sd_scripts_train.py")), str(folder)]
    done = subprocess.run(program, input=json.dumps(runs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# (accumulation, updates of the run, a state every so many), with 96 micro-batches an epoch; in docs/kohya.md.
LENGTHS = ((1, 288, 96), (1, 240, 110), (2, 144, 48), (2, 120, 30), (4, 72, 24), (4, 60, 15), (5, 50, 17))


@needs_sd
def test_a_resumed_run_trains_on_as_many_micro_batches_as_the_plan_says(tmp_path):
    """The real loop, resumed from its own states."""
    runs, cases = [], []
    for accumulation, total, every in LENGTHS:
        common = ["--max_train_steps", str(total), "--gradient_accumulation_steps", str(accumulation)]
        folder = tmp_path / f"{accumulation} {total}"
        runs.append(
            [*common, "--output_dir", str(folder), "--save_state", "--save_every_n_steps", str(every)]
        )
        runs[-1] += ["--output_name", "a"]
        for skip in ((), ("--skip_until_initial_step",)):
            words = [*common, *skip, "--resume", str(folder / f"a-step{every:08}-state")]
            cases.append(["train_network.py", *words])
            runs.append([*words, "--output_dir", str(tmp_path / "out"), "--output_name", "b"])
    told = trained_with(SD, [{"words": words} for words in runs])
    trained = [one["trained"] for one, words in zip(told, runs, strict=True) if "--resume" in words]
    plans = [check(words, samples=96) for words in cases]
    assert [plan.resumed[0] for plan in plans] == trained
    for plan, n in zip(plans, trained, strict=True):
        codes = {problem.code for problem in plan.problems} & {"SF402", "SF403"}
        assert bool(codes) == (n != plan.resumed[1]), plan.config
        assert all(f"trains on {n} micro-batches" in p.why for p in plan.problems if p.code in codes)


def beside(checkout, folder, patch=None):
    """Returns a folder with a toy of a script beside what it needs of a checkout, patched or not."""
    folder.mkdir()
    for name in ("train_network.py", "fine_tune.py", "library", "networks"):
        if patch is None:
            (folder / name).symlink_to(Path(checkout, name).resolve())
        else:
            copy = shutil.copytree if Path(checkout, name).is_dir() else shutil.copy
            copy(Path(checkout, name), folder / name)
    if patch is not None:
        subprocess.run(["git", "apply", str(patch)], cwd=folder, check=True)
    for base, run in (("train_network", "as_script"), ("fine_tune", "as_fine_tuning")):
        text = f"import {base}\nfrom sd_scripts_train import {run}\n\n{run}({base})\n"
        (folder / f"toy_{base}.py").write_text(text)
    return folder


BATCHES = 23  # of an epoch, which no accumulation divides
LAW_OPTIONS = {
    "AdamWScheduleFree": [
        "--learning_rate",
        "0.05",
        "--optimizer_args",
        "warmup_steps=3",
        "weight_decay=0.1",
    ],
    "RAdamScheduleFree": ["--learning_rate", "0.05", "--optimizer_args", "weight_decay=0.1"],
    "SGDScheduleFree": ["--learning_rate", "0.5", "--optimizer_args", "warmup_steps=3"],
}
# Accumulation -> updates of the run, and after how many a state is saved: inside an epoch.
STOPS_AT = {1: (58, 26), 2: (30, 14), 4: (15, 8)}


class Course:
    """The options of one run, its stops and its resumes."""

    def __init__(self, folder, law, accumulation, shuffled, launched, *more):
        self.folder, self.accumulation = folder / f"{law} {accumulation} {shuffled} {launched}", accumulation
        self.total, self.at = STOPS_AT[accumulation]
        self.words = ["--optimizer_type", f"sftorch.{law}", *LAW_OPTIONS[law], *more]
        self.words += ["--gradient_accumulation_steps", str(accumulation)]
        self.spec = {"samples": BATCHES, "shuffled": shuffled, "launched": launched}

    def run(self, name, *more, total=None, kill=None):
        words = [*self.words, "--max_train_steps", str(total or self.total), *more]
        words += ["--output_dir", str(self.folder / name), "--output_name", "a"]
        return self.spec | {"words": words} | ({"kill": kill} if kill else {})

    def whole(self):
        return self.run("whole")

    def killed(self):
        """Inside of an update, and three micro-batches after a state."""
        at = self.at // -(-BATCHES // self.accumulation) * BATCHES  # those of whole epochs
        at += self.at % -(-BATCHES // self.accumulation) * self.accumulation
        return self.run("killed", "--save_state", "--save_every_n_steps", str(self.at), kill=at + 3)

    def stopped(self):
        return self.run("stopped", "--save_state", total=self.at)

    def resumed(self, stop, *more):
        state = {"killed": f"a-step{self.at:08}-state", "stopped": "a-state"}[stop]
        return self.run(f"after {stop}", "--resume", str(self.folder / stop / state), *more)


def assert_the_same(whole, resumed):
    assert resumed["losses"] == whole["losses"][-resumed["trained"] :]
    assert {**resumed, "trained": 0, "losses": 0} == {**whole, "trained": 0, "losses": 0}


@needs_sd
@pytest.mark.parametrize("accumulation", STOPS_AT)
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
def test_with_the_launcher_a_resumed_run_is_the_run_without_a_stop(tmp_path, shuffled, accumulation):
    """Killed or stopped, in the same bits, and the file is x; their train_network.py, their networks.lora."""
    folder = beside(SD, tmp_path / "scripts")
    courses = [Course(tmp_path, law, accumulation, shuffled, True) for law in LAW_OPTIONS]
    runs = [
        (one.whole(), one.killed(), one.stopped(), one.resumed("killed"), one.resumed("stopped"))
        for one in courses
    ]
    told = trained_with(folder, [run for each in runs for run in each])
    for course in courses:
        whole, killed, stopped, *resumed = [told.pop(0) for _ in range(5)]
        assert killed is None
        assert stopped["trained"] < whole["trained"]
        for one in resumed:
            assert one["trained"] == whole["trained"] - stopped["trained"], course.words
            assert_the_same(whole, one)
        assert whole["weights"] == whole["x"] != whole["y"]


@needs_sd
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
def test_without_the_launcher_the_plan_says_what_a_resumed_run_trains_on(tmp_path, shuffled):
    runs, cases = [], []
    for law, accumulation in itertools.product(LAW_OPTIONS, STOPS_AT):
        course = Course(tmp_path, law, accumulation, shuffled, False)
        runs += [course.killed(), course.resumed("killed")]
        runs += [course.resumed("killed", "--skip_until_initial_step")]
        cases += runs[-2:]
    told = trained_with(SD, runs)
    trained = [one["trained"] for one in told if one]
    plans = [check(["train_network.py", *run["words"]], samples=BATCHES) for run in cases]
    assert len(trained) == 2 * len(LAW_OPTIONS) * len(STOPS_AT)
    assert [plan.resumed[0] for plan in plans] == trained
    for plan, n in zip(plans, trained, strict=True):
        codes = {problem.code for problem in plan.problems} & {"SF402", "SF403"}
        assert bool(codes) == (n != plan.resumed[1]), plan.config


@needs_sd
@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
def test_without_the_launcher_runs_of_whole_epochs_go_on_from_the_end_of_one(tmp_path, shuffled):
    """The commands of docs/kohya.md: killed in each of three epochs, and resumed by --initial_epoch."""
    runs = []
    for accumulation in STOPS_AT:
        more = ("--max_data_loader_n_workers", "2", "--save_state", "--save_every_n_epochs", "1")
        course = Course(tmp_path, "AdamWScheduleFree", accumulation, shuffled, False, *more)
        course.total = 3 * -(-BATCHES // accumulation)
        first = ["--resume", str(course.folder / "killed" / "a-000001-state"), "--initial_epoch", "2"]
        second = ["--resume", str(course.folder / "again" / "a-000002-state"), "--initial_epoch", "3"]
        runs += [course.whole(), course.run("killed", kill=BATCHES + 9)]
        runs += [course.run("again", *first, kill=BATCHES + 9), course.run("last", *second)]
    told = trained_with(SD, runs)
    for whole, killed, again, last in zip(told[::4], told[1::4], told[2::4], told[3::4], strict=True):
        assert (killed, again, last["trained"]) == (None, None, BATCHES)
        assert_the_same(whole, last)


@needs_sd
def test_without_workers_the_first_batch_after_a_resume_is_another(tmp_path):
    """sd-scripts tells its data the epoch after the first batch of it is read."""
    course = Course(tmp_path, "AdamWScheduleFree", 4, True, False)
    course.total = 12
    state = ["--resume", str(course.folder / "whole" / "a-000001-state"), "--initial_epoch", "2"]
    runs = [course.run("whole", "--save_state", "--save_every_n_epochs", "1"), course.run("again", *state)]
    whole, again = trained_with(SD, runs)
    assert again["trained"] == BATCHES
    same = [a == b for a, b in zip(whole["losses"][-BATCHES:], again["losses"], strict=True)]
    assert same[:5] == [False, True, True, True, False]  # the update that it is part of


@needs_sd
def test_the_launcher_goes_on_with_workers_without_a_seed_and_from_the_end_of_an_epoch(tmp_path):
    folder, told = beside(SD, tmp_path / "scripts"), []
    workers = Course(tmp_path / "a", "AdamWScheduleFree", 4, True, True, "--max_data_loader_n_workers", "2")
    unseeded = Course(tmp_path / "b", "AdamWScheduleFree", 2, True, True)
    unseeded.spec["unseeded"] = True
    ends = Course(tmp_path / "c", "SGDScheduleFree", 4, True, True)
    ends.at = 6
    runs = [each for one in (workers, ends) for each in (one.whole(), one.killed(), one.resumed("killed"))]
    runs += [unseeded.run("killed", "--save_state", "--save_every_n_steps", "14")]
    runs += [unseeded.resumed("killed"), unseeded.resumed("killed")]
    by_epochs = ["--save_state", "--save_every_n_epochs", "1"]
    runs += [ends.run("by epochs", *by_epochs, kill=BATCHES + 5)]
    runs += [ends.run("last", "--resume", str(ends.folder / "by epochs" / "a-000001-state"))]
    told = trained_with(folder, runs)
    assert_the_same(told[0], told[2])
    assert_the_same(told[3], told[5])
    assert_the_same(told[6], told[7])
    assert_the_same(told[6], told[8])
    assert_the_same(told[3], told[10])


@needs_sd
@pytest.mark.parametrize("accumulation", [1, 4])
def test_with_the_launcher_fine_tune_saves_x_and_trains_as_before(tmp_path, accumulation):
    """The loop of fine_tune.py, which never calls optimizer.eval()."""
    folder, runs = beside(SD, tmp_path / "scripts"), []
    for law, launched in itertools.product(LAW_OPTIONS, (True, False)):
        words = ["--optimizer_type", f"sftorch.{law}", *LAW_OPTIONS[law], "--output_name", "a"]
        words += ["--gradient_accumulation_steps", str(accumulation), "--max_train_steps", "9"]
        words += ["--save_every_n_steps", "4", "--output_dir", str(tmp_path / f"{law} {launched}")]
        runs.append({"script": "fine_tune", "launched": launched, "words": words, "samples": BATCHES})
    told = trained_with(folder, runs)
    for launched, plain in zip(told[::2], told[1::2], strict=True):
        assert launched["losses"] == plain["losses"]
        assert len(launched["losses"]) > 8
        assert [*launched["files"]] == ["a-step00000004.ckpt", "a-step00000008.ckpt", "a.ckpt"]
        assert launched["files"]["a.ckpt"]["x"] != launched["files"]["a.ckpt"]["y"]
        for name, file in launched["files"].items():
            assert file["weights"] == file["x"]
            assert plain["files"][name] == file | {"weights": file["y"]}  # it ships y


@needs_sd
def test_the_patch_for_upstream_mends_a_fault_that_is_there_without_it(tmp_path):
    """`git apply` in a copy of the checkout; then no launcher is needed."""
    patch = Path(sftorch.__file__).parent / "trainers" / "sd_scripts" / "resume.patch"
    plain, mended = beside(SD, tmp_path / "plain"), beside(SD, tmp_path / "mended", patch)
    course = Course(tmp_path, "AdamWScheduleFree", 4, True, False)
    runs = [course.whole(), course.killed(), course.resumed("killed", "--skip_until_initial_step")]
    whole, _, resumed = trained_with(plain, runs)
    assert resumed["trained"] == 0
    assert resumed["losses"] != whole["losses"][-27:]
    whole, _, resumed = trained_with(mended, runs)
    assert resumed["trained"] == 27
    assert_the_same(whole, resumed)
    launched = trained_with(plain, [run | {"launched": True} for run in runs])
    assert_the_same(whole, launched[0])
    assert_the_same(whole, launched[2])


RESUMED = "train_network.py --max_train_steps 30 --gradient_accumulation_steps 2 --resume there"
LAUNCHED = [
    f"schedulefree launch sd-scripts -- {RESUMED}",
    f"python -m sfcore launch sd-scripts {RESUMED}",
    f"accelerate launch --num_processes 1 -m sftorch.trainers.sd_scripts sd-scripts/{RESUMED}",
]


@pytest.mark.parametrize("command", LAUNCHED)
def test_the_plan_knows_the_launcher_which_resumes_where_the_state_stands(command):
    """14 of 30 updates, of 12 an epoch: 23 + 4 of 23 + 23 + 12 micro-batches are done."""
    words = command.split()
    for plan in (
        check(words, samples=BATCHES, initial_step=14),
        check([*words, "--initial_step", "14", "--skip_until_initial_step"], samples=BATCHES),
        check([*words, "--initial_step", "14"], samples=BATCHES),
    ):
        assert plan.resumed == (31, 31)
        assert not {problem.code for problem in plan.problems} & {"SF402", "SF403"}


LENGTHS_OF = """
import json, sys
sys.path.insert(0, sys.argv[1])
import sd_scripts_train as toy
sys.meta_path.insert(0, toy.Finder())
import library.config_util as config
import library.train_util as train_util
from library.strategy_base import LatentsCachingStrategy
from library.strategy_sd import SdSdxlLatentsCachingStrategy
from train_network import setup_parser
LatentsCachingStrategy.set_strategy(SdSdxlLatentsCachingStrategy(True, False, 1, False))
found = []
for words in json.load(sys.stdin):
    args = setup_parser().parse_args(words)
    train_util.prepare_dataset_args(args, True)
    make = config.BlueprintGenerator(config.ConfigSanitizer(True, True, args.masked_loss, True))
    if args.dataset_config:
        user = config.load_user_config(args.dataset_config)
    elif args.in_json:
        each = [{"image_dir": args.train_data_dir, "metadata_file": args.in_json}]
        user = {"datasets": [{"subsets": each}]}
    else:
        each = config.generate_dreambooth_subsets_config_by_subdirs(args.train_data_dir, args.reg_data_dir)
        user = {"datasets": [{"subsets": each}]}
    group, _ = config.generate_dataset_group_by_blueprint(make.generate(user, args).dataset_group)
    found.append(len(group))
print("lengths", json.dumps(found))
"""
DATA_CONFIG = """
[general]
batch_size = 2
resolution = 256
[[datasets]]
[[datasets.subsets]]
image_dir = "train/3_cat"
num_repeats = 4
[[datasets.subsets]]
image_dir = "train/3_cat"
num_repeats = 9
[[datasets]]
batch_size = 5
[[datasets.subsets]]
image_dir = "train/2_dog"
[[datasets.subsets]]
image_dir = "regular/1_animal"
is_reg = true
num_repeats = 2
"""
DATA = [
    ["--train_data_dir", "train"],
    ["--train_data_dir", "train", "--train_batch_size", "4"],
    ["--train_data_dir", "train", "--train_batch_size", "3", "--reg_data_dir", "regular"],
    ["--train_data_dir", "train", "--reg_data_dir", "many"],
    ["--train_data_dir", "train", "--enable_bucket", "--bucket_no_upscale"],
    ["--train_data_dir", "train/3_cat", "--in_json", "meta.json", "--dataset_repeats", "3"],
    ["--dataset_config", "data.toml"],
    ["--dataset_config", "data.toml", "--dataset_repeats", "7", "--train_batch_size", "9"],
    ["--dataset_config", "data.json"],
]
BATCHES_OF_DATA = [21, 6, 14, 42, 21, 9, 12, 19, 12]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Folders of images, of 5 cats thrice, 3 dogs twice, and others."""
    from PIL import Image

    for folder, count in (("train/3_cat", 5), ("train/2_dog", 3), ("regular/1_animal", 2), ("many/7_all", 9)):
        (tmp_path / folder).mkdir(parents=True)
        for at in range(count):
            Image.new("RGB", (320, 256)).save(tmp_path / folder / f"{at}.{('png', 'jpg', 'PNG')[at % 3]}")
        (tmp_path / folder / "0.txt").write_text("words")
    for folder in ("train/none", "train/4_empty", "train/0_zero"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (320, 256)).save(tmp_path / "train" / "0_zero" / "a.png")
    (tmp_path / "data.toml").write_text(DATA_CONFIG)
    (tmp_path / "data.json").write_text(json.dumps(tomllib.loads(DATA_CONFIG)))
    entries = {name: {"caption": "a", "image_size": [320, 256]} for name in ("0.png", "1.jpg", "2.PNG")}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_batches_of_an_epoch_follow_from_images_repeats_and_batch_sizes(data):
    epochs = ["--max_train_epochs", "2"]
    for words, batches in zip(DATA, BATCHES_OF_DATA, strict=True):
        plan = check(["train_network.py", *words, *epochs])
        assert plan.total_steps == 2 * batches, words
        plan = check(["train_network.py", *words, *epochs], devices=2, accumulation=3)
        assert plan.total_steps == 2 * math.ceil(math.ceil(batches / 2) / 3), words
    for words in (["--enable_bucket", "--train_batch_size", "2"], ["--validation_split", "0.1"]):
        assert check(["train_network.py", *DATA[0], *words, *epochs]).total_steps is None, words
    assert check(["train_network.py", *DATA[0], *epochs], samples=8).total_steps == 16
    for gone in (["--train_data_dir", "gone"], ["--dataset_config", "gone.toml"], []):
        assert check(["train_network.py", *gone, *epochs]).total_steps is None


def test_kohyas_form_computes_its_steps_of_folders_and_epochs(data):
    preset = {"LoRA_type": "Standard", "lr_warmup": 0, "optimizer": "AdamW", "train_data_dir": "train"}
    preset |= {"epoch": "3", "train_batch_size": 2, "gradient_accumulation_steps": 4, "max_train_steps": 0}
    assert check(preset).total_steps == 8  # 21 * 3 / 8, rounded once
    assert check(preset | {"reg_data_dir": "regular"}).total_steps == 16
    assert check(preset | {"max_train_steps": 5}).total_steps == 5
    assert check(preset | {"dataset_config": "data.toml"}).total_steps == 1600
    for wrong in ({"train_data_dir": "gone"}, {"train_batch_size": "a"}, {"train_batch_size": [0]}):
        assert check(preset | wrong).total_steps is None


def test_a_configuration_of_data_alone_is_none_of_a_run(data):
    with pytest.raises(ConfigError, match=r"config must be of a run, got datasets.* as dataset_config"):
        check("data.toml")


@needs_sd
def test_the_batches_of_an_epoch_are_those_of_the_real_data_sets(data):
    for package in ("voluptuous", "toml", "imagesize"):
        pytest.importorskip(package)
    search = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    program = [sys.executable, "-c", LENGTHS_OF, str(Path(SD).resolve())]
    words = json.dumps([[*one, *(() if "_config" in one[0] else ("--resolution", "256"))] for one in DATA])
    environment = os.environ | {"PYTHONPATH": search}
    done = subprocess.run(program, input=words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("lengths ")[1]) == BATCHES_OF_DATA


def optimizers_of(package):
    """Returns a module with the classes of a package that is not here: they take what the table says."""
    module = types.ModuleType(package)
    module.optim = module

    def made(name):
        if name.startswith("__"):
            raise AttributeError(name)
        takes = (facts.built(name).arguments or ()) if package == "bitsandbytes" else ()

        class Optimizer(torch.optim.SGD):
            def __init__(self, params, lr=1e-3, **given):
                if takes and not {*given} <= {*takes}:
                    raise TypeError(f"unexpected {sorted({*given} - {*takes})}")
                super().__init__(params, lr)

        return Optimizer

    module.__getattr__ = made
    return module


def as_the_form_writes(preset, file):
    """Writes what Kohya_SS' lora_gui.py, `train_model`, writes of a preset; returns the words beside it."""
    get = preset.get
    percent, steps = (float(get(name) or 0) for name in ("lr_warmup", "lr_warmup_steps"))
    cycles = get("lr_scheduler_num_cycles")
    fields = {
        "optimizer_type": preset["optimizer"],
        "optimizer_args": str(get("optimizer_args", "")).replace('"', "").split(),
        "lr_scheduler": get("lr_scheduler", "constant"),
        "lr_scheduler_args": str(get("lr_scheduler_args", "")).replace('"', "").split(),
        "lr_scheduler_type": get("lr_scheduler_type") or None,
        "lr_scheduler_num_cycles": int(cycles) if cycles not in ("", None) else int(get("epoch", 1)),
        "lr_scheduler_power": get("lr_scheduler_power") or None,
        "lr_warmup_steps": int(steps) if steps > 0 else percent / 100 if percent else 0,
        "learning_rate": float(get("learning_rate") or 0.0),
        "max_train_steps": int(get("max_train_steps") or 0) or None,
        "gradient_accumulation_steps": int(get("gradient_accumulation_steps") or 1),
    }
    file.write_text(as_text(fields, ".toml"), encoding="utf-8")
    extra = get("additional_parameters", "").replace('"', "").split()
    known = facts.KINDS.keys() & {action.dest for action in parser()._actions}
    starts = [at for at, word in enumerate(extra) if word.startswith("--")] + [len(extra)]
    each = [extra[start:end] for start, end in itertools.pairwise(starts)]
    return ["--config_file", str(file), *(word for one in each if one[0][2:] in known for word in one)]


# Of 74 presets and configurations: what the plan raises, each read by eye.
RAISED = {
    "presets/finetune/adafactor.json": ["SF101"],  # Adafactor's own scheduler takes no warm-up, and stops
    "test/config/dreambooth-AdamW8bit.json": ["SF105"],  # a power that constant ignores
}
NO_RUNS = ("meta-1_lat.json",)  # captions


@needs_kohya
@needs_sd
def test_no_preset_of_kohya_ss_that_runs_is_said_to_stop(tmp_path, monkeypatch):
    root, found, wrong = Path(KOHYA), {}, []
    absent = ("bitsandbytes", "lion_pytorch", "dadaptation", "dadaptation.experimental", "prodigyopt")
    for package in [name for name in absent if importlib.util.find_spec(name.partition(".")[0]) is None]:
        monkeypatch.setitem(sys.modules, package, optimizers_of(package))
    presets = [*root.glob("presets/*/*.json"), *root.glob("test/config/*.json")]
    for path in [path for path in presets if path.name not in NO_RUNS]:
        plan, name = check(path), path.relative_to(root).as_posix()
        words = as_the_form_writes(json.loads(path.read_text(encoding="utf-8")), tmp_path / "form.toml")
        why = stops(words, monkeypatch)
        if bool(why) != bool({problem.code for problem in plan.errors} & STOPS):
            wrong.append(f"{name}: {why or 'runs'}, got {[str(problem) for problem in plan.problems]}")
        if plan.problems:
            found[name] = [problem.code for problem in plan.problems]
    assert not wrong, "\n".join(wrong)
    assert found == RAISED
    assert len(presets) > 60


def test_the_plan_knows_which_scripts_the_launcher_lets_save_x():
    launched = (
        "accelerate launch -m sftorch.trainers.sd_scripts {}.py --learning_rate 1e-3 --optimizer_type {}"
    )
    options = "--optimizer_args warmup_steps=80"
    for name, script in facts.SCRIPTS.items():
        ours = check(f"{launched.format(name, 'sftorch.AdamWScheduleFree')} {options}")
        theirs = check(f"{launched.format(name, 'AdamWScheduleFree')} {options}")
        assert script.mended == (name in launcher.SHIPPING)
        found = [bool(plan.problems) for plan in (ours, theirs)]
        assert found == [not script.evaluates and not script.mended, not script.evaluates or script.musubi]
    (problem,) = check(
        "fine_tune.py --learning_rate 1e-3 --optimizer_type sftorch.RAdamScheduleFree"
    ).problems
    assert (problem.code, problem.fix[:46]) == ("SF506", "start it with schedulefree launch sd-scripts a")


def signature(made):
    return [name for name in inspect.signature(made).parameters if name not in ("self", "params", "lr")]


def test_the_arguments_of_torchs_and_our_own_classes_are_those_of_the_table():
    for name in facts._TORCH:
        if hasattr(torch.optim, name):  # Muon is new
            takes = set(facts.built(f"torch.optim.{name}").arguments or ())
            assert takes == set(signature(getattr(torch.optim, name))), name
    for law in LAWS.values():
        if law.direction != "base":
            ours = facts.built(f"sftorch.{law.torch}").arguments
            assert set(ours or ()) == set(signature(getattr(sftorch, law.torch)))
            theirs = facts.built(law.torch).arguments
            assert set(theirs or ()) == set(signature(getattr(schedulefree, law.torch)))
    optimization = importlib.import_module("transformers.optimization")
    assert set(facts.built("Adafactor").arguments or ()) == set(signature(optimization.Adafactor))


def test_the_schedulers_of_torch_are_those_of_the_table():
    for name, schedule in facts.TORCH_SCHEDULERS.items():
        parameters = list(inspect.signature(getattr(torch.optim.lr_scheduler, name)).parameters.values())[1:]
        if schedule.usable:
            assert [one.name for one in parameters if one.default is one.empty] == list(schedule.needs), name
            assert {one.name for one in parameters} == set(schedule.takes), name
