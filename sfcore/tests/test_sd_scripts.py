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
        if "schedulefree" in law.elsewhere and law.direction != "base":
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
