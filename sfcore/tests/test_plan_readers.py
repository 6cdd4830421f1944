"""The plan checker reads what each trainer writes, in its words, and says where a file is garbled."""

import json
import os
import shlex
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfcore.plan import ConfigError, check
from sfcore.plan._text import as_text

PRESETS = json.loads((Path(__file__).parent / "kohya_presets.json").read_text(encoding="utf-8"))
SD_TOML = """
[optimizer]
optimizer_type = "sftorch.AdamWScheduleFree"
optimizer_args = ["weight_decay=0.01", "betas=0.95,0.99", "warmup_steps=50"]
learning_rate = 1e-3

[training]
max_train_steps = 1000
gradient_accumulation_steps = 4
lr_scheduler = "constant"
network_dim = 32
"""


def preset(row):
    return {
        name: value for name, value in zip(PRESETS["columns"][2:], row[2:], strict=True) if value is not None
    }


@pytest.mark.parametrize("row", PRESETS["rows"], ids=lambda row: row[0])
def test_every_preset_that_kohya_ships_gets_a_report(row):
    plan = check(preset(row), samples=2000)
    assert plan.source == "Kohya_SS"
    # This one asks Adafactor's scheduler for a warm-up, which sd-scripts refuses after all is loaded.
    expected = ["SF101"] if row[0] == "finetune/adafactor" else []
    assert [problem.code for problem in plan.problems] == expected
    assert not check(preset(row), samples=2000, fix=True).problems


@pytest.mark.parametrize("row", PRESETS["rows"], ids=lambda row: row[0])
def test_every_preset_becomes_right_for_schedule_free(row):
    config = preset(row) | {"optimizer": "sftorch.AdamWScheduleFree", "unet_lr": 1e-3, "optimizer_args": ""}
    plan = check(config, samples=2000, fix=True)
    assert plan.problems == ()
    assert plan.warmup_owner == "optimizer"
    assert len(plan.lr) == len(plan.c) == plan.total_steps or plan.total_steps is None


def test_sd_scripts_toml_is_read_through_its_sections(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(SD_TOML)
    plan = check(path)
    assert (plan.source, plan.total_steps, plan.accumulation) == ("sd-scripts", 1000, 4)
    assert (plan.warmup_steps, plan.lr[0]) == (50, 1e-3 / 50)


def test_a_repair_of_sd_scripts_toml_stays_in_its_sections(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(SD_TOML.replace('"constant"', '"cosine"'))
    plan = check(str(path), fix=True)
    assert plan.config["training"]["lr_scheduler"] == "constant"
    path.write_text(as_text(plan.config, ".toml"))
    assert check(path).problems == ()
    assert check(path).config == plan.config


def test_a_command_line_is_read_as_text_and_as_words():
    words = [
        *(
            "accelerate",
            "launch",
            "--num_processes=2",
            "train_network.py",
            "--optimizer_type",
            "AdamWScheduleFree",
        ),
        *("--optimizer_args", "betas=(0.95, 0.99)", "warmup_steps=100", "--learning_rate", "2e-3"),
        *("--max_train_steps", "2000", "--cache_latents"),
    ]
    plan = check(words)
    assert (plan.devices, plan.total_steps, plan.warmup_steps, plan.lr[-1]) == (2, 2000, 100, 2e-3)
    text = (
        "accelerate launch train_network.py \\\n --optimizer_type AdamWScheduleFree \\\n --lr_warmup_steps 5%"
    )
    (warmup, none) = check(text, max_train_steps=5).problems[1], check(text).problems[0]
    assert (warmup.field, none.code) == ("--lr_warmup_steps", "SF103")


def test_a_repaired_command_line_keeps_all_other_words():
    command = (
        "accelerate launch --num_processes=1 --mixed_precision bf16 train_network.py --full_fp16 "
        r"--optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=50 --max_train_steps 900 "
        r'--network_weights D:\lora\a.safetensors --output_name "my lora" --learning_rate=1e-3'
    )
    before, after = shlex.split(command.replace("\\", "/")), check(command, fix=True).config
    changed = {"sftorch.AdamWScheduleFree", "prior_steps=800"}
    assert set(shlex.split(after.replace("\\", "/"))) ^ set(before) == changed | {
        "--full_fp16",
        "AdamWScheduleFree",
    }
    assert check(after).config == after
    assert check(after, batchnorm=True, fix=True).config == after


_RUN = "train_network.py --optimizer_type AdamWScheduleFree"


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (f"accelerate launch {_RUN} --config_file lora.toml", "lora.toml"),
        (f"accelerate launch {_RUN} --config_file=runs/lora --max_train_steps 9", "runs/lora.toml"),
        (f"accelerate launch --config_file box.yaml {_RUN} --config_file 'my lora'", "my lora.toml"),
        (f"python -m accelerate.commands.launch --config_file box.yaml {_RUN} --config_f lora", "lora.toml"),
        (f"python {_RUN} --conf lora", "lora.toml"),
        (f"{_RUN} --config_file old.toml --config_file new.toml", "new.toml"),
        ("--config_file lora.toml --max_train_steps 9", "lora.toml"),
        ("accelerate launch -m my.trainer --config_file lora.toml", "lora.toml"),
    ],
)
@pytest.mark.parametrize("form", [str, shlex.split])
def test_a_file_of_settings_is_read_from_where_the_trainer_would(tmp_path, monkeypatch, command, file, form):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^--config_file: {file} must be a readable file, got No such"):
        check(form(command))
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text('[a]\nlearning_rate = 0.125\n[b]\nmax_train_steps = 800\noptimizer_type = "AdamW"\n')
    plan = check(form(command))
    steps, name = (9, "AdamW") if "max_train_steps" in command else (800, "AdamW")
    name = "AdamWScheduleFree" if "AdamWScheduleFree" in command else name  # the command line wins
    assert (plan.optimizer, plan.total_steps) == (name, steps)
    assert plan.lr.max() == 0.125
    assert list(plan.files) == [file]


def test_a_file_of_settings_is_read_in_scripts_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.toml").write_text("max_train_steps = 77")
    script = tmp_path / "train.sh"
    script.write_text(
        f"#!/bin/sh\naccelerate launch --config_file box.yaml \\\n {_RUN} \\\n --config_file=lora\n"
    )
    assert check(script).total_steps == 77


def test_a_file_of_settings_among_the_additional_parameters_is_refused():
    with pytest.raises(ConfigError, match=r"must not have --config_file, got 'lora\.toml'"):
        check({"LoRA_type": "Standard", "additional_parameters": "--config_file lora.toml"})


def test_a_file_of_settings_that_names_one_ends_there_as_it_does_in_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text('config_file = "b"\nmax_train_steps = 7\nlearning_rate = 1e-4')
    (tmp_path / "b.toml").write_text('config_file = "a"\nmax_train_steps = 8')
    plan = check("train_network.py --config_file a")
    assert (plan.total_steps, list(plan.files)) == (7, ["a.toml"])


def test_links_are_followed_and_a_ring_of_them_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text("max_train_steps = 7\nlearning_rate = 1e-4")
    (tmp_path / "link.toml").symlink_to("a.toml")
    assert check("train_network.py --config_file link").total_steps == 7
    for name, target in (("ring.toml", "other.toml"), ("other.toml", "ring.toml")):
        (tmp_path / name).symlink_to(target)
    for config in ("train_network.py --config_file ring", "ring.toml"):
        with pytest.raises(ConfigError, match=r"ring\.toml must be a readable file, got Too many levels"):
            check(config)


def test_a_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "run.toml"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"run\.toml must be a readable file, got a pipe or a device"):
        check(path)


def test_what_is_too_large_for_settings_is_not_read(tmp_path):
    path = tmp_path / "model.toml"
    with path.open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(ConfigError, match=r"model\.toml must be a file of settings, got 17 MiB"):
        check(path)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("é = 1".encode("latin-1"), (1, 1)),
        (b"a = 1\nb = '\xff'", (2, 6)),
        ("a = 1".encode("utf-16-le"), (1, 2)),
        ("a = 1".encode("utf-32"), (1, 1)),
        (b"a = 1\nb = '\x00'", (2, 6)),
    ],
)
def test_another_encoding_gets_its_line_and_column(tmp_path, text, place):
    path = tmp_path / "run.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as raised:
        check(path)
    assert (raised.value.line, raised.value.column) == place


@pytest.mark.parametrize("end", ["--config_file", "--config_file --max_train_steps 9"])
def test_config_file_without_a_file_is_refused(end):
    with pytest.raises(
        ConfigError, match="--config_file must be followed by the path of a TOML file, got none"
    ):
        check(f"{_RUN} {end}")


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ('lr_warmup_steps = "100"', "SF002", "lr_warmup_steps in c.toml"),  # argparse does not look at it
        ('learning_rate = "1e-4"', "SF002", "learning_rate in c.toml"),
        ('optimizer_args = "weight_decay=0.1"', "SF002", "optimizer_args in c.toml"),
        ('optimizer_args = ["weight_decay"]', "SF004", "optimizer_args in c.toml"),
        ('optimizer_args = ["warmup=3"]', "SF001", "optimizer_args warmup in c.toml"),
        ("lr_warmup_steps = 100.0", "SF204", "lr_warmup_steps in c.toml"),  # a hundred times the run
        ("lr_warm_steps = 1", "SF001", "lr_warm_steps in c.toml"),
    ],
)
def test_a_value_of_a_file_of_settings_is_taken_as_the_trainer_takes_it(
    tmp_path, monkeypatch, text, code, field
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(f"[section]\n{text}\n")
    command = "train_network.py --config_file c.toml --optimizer_type AdamW --lr_scheduler cosine"
    found = check(command, ignore=["SF307"]).problems
    assert (code, field) in [(problem.code, problem.field) for problem in found]


def test_a_broken_file_of_settings_gets_its_line_and_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text("lr_scheduler = 'constant'\nlr_warmup_steps = = 3\n")
    with pytest.raises(ConfigError, match=r"^--config_file: c\.toml must be TOML, .* at line 2, column 19"):
        check("train_network.py --config_file c")
    (tmp_path / "c.toml").write_bytes("optimizer_type = 'AdamW'".encode("utf-16"))
    with pytest.raises(ConfigError, match="must be text in UTF-8, got another byte at line 1, column 1"):
        check("train_network.py --config_file c")
    (tmp_path / "c.toml").unlink()
    (tmp_path / "c.toml").mkdir()
    with pytest.raises(ConfigError, match="must be a readable file, got Is a directory"):
        check("train_network.py --config_file c")


@pytest.mark.parametrize(
    "command",
    [
        f"accelerate launch --config_file box.yaml {_RUN}",
        f"accelerate launch --config_file=box.yaml --num_processes 2 {_RUN}",
        f"python -m accelerate.commands.launch --config_file box.yaml {_RUN}",
        "accelerate launch --config_file box.yaml -m my.trainer --optimizer_type AdamWScheduleFree",
        f"{_RUN} --config_file=",  # sd-scripts reads no file then
        f"{_RUN} --config_file lora.toml --output_config",  # it writes that file
        f"{_RUN} --console_log_level INFO --conv_dim 4",
    ],
)
def test_a_file_of_the_launcher_is_none_of_the_scripts(command):
    assert check(f"{command} --max_train_steps 900").total_steps == 900


def test_a_shells_words_around_a_command_are_none_of_its_options():
    text = (
        "source venv/bin/activate\nexport RATE=1e-3\nCUDA_VISIBLE_DEVICES=0 accelerate launch "
        "--num_processes=2 train_network.py --optimizer_type sftorch.AdamWScheduleFree\n"
        "  --learning_rate $RATE --lr_warmup_steps 10 --optimizer_args 'betas=(0.9, 0.99)' > log 2>&1\n"
        "echo --done"
    )
    plan = check(text, fix=True)
    assert (plan.devices, [change.code for change in plan.changes]) == (2, ["SF103", "SF103"])
    assert plan.config.splitlines()[0] == "source venv/bin/activate"
    assert plan.config.splitlines()[-2].endswith("'betas=(0.9, 0.99)' warmup_steps=5 > log 2>&1")
    assert check(plan.config).problems == ()


def test_settings_that_hf_hands_on_to_others_are_not_read():
    arguments = {"optim": "adamw_torch", "max_steps": 10, "deepspeed": {"optim": "x", "max_steps": 99}}
    plan = check(arguments)
    assert (plan.optimizer, plan.total_steps, plan.problems) == ("adamw_torch", 10, ())


def test_sd_scripts_takes_a_whole_warm_up_for_steps_and_a_float_for_a_part():
    base = {"optimizer_type": "AdamW", "lr_scheduler": "cosine", "max_train_steps": 1000}
    assert check(base | {"lr_warmup_steps": 20}).warmup_steps == 20
    assert check(base | {"lr_warmup_steps": 0.1}).warmup_steps == 100
    assert check(base | {"lr_warmup_steps": 20, "num_processes": 4}).warmup_steps == 5


class Names(Enum):
    FREE = "schedule_free_adamw"
    LINEAR = "linear"


def test_hf_arguments_are_read_as_an_object_too():
    arguments = SimpleNamespace(
        optim=Names.FREE,
        optim_args="r=1.0,weight_lr_power=2.0",
        lr_scheduler_type=Names.LINEAR,
        warmup_steps=100,
        max_steps=1000,
        num_train_epochs=3.0,
        learning_rate=1e-3,
        adam_beta1=0.9,
        _n_gpu=1,
    )
    plan = check(arguments, adapter=True)
    assert [problem.code for problem in plan.problems] == ["SF102", "SF201"]
    assert (plan.warmup_owner, plan.total_steps) == ("both", 1000)
    fixed = check(arguments, adapter=True, fix=True)
    assert fixed.config["lr_scheduler_type"] == "constant"
    assert fixed.config["warmup_steps"] == 100
    assert (fixed.warmup_owner, fixed.warmup_steps) == ("optimizer", 100)


def test_kohyas_additional_parameters_win_and_are_repaired_where_they_stand():
    extra = '--lr_scheduler_type "CosineAnnealingLR" --lr_scheduler_args "T_max=30" --foo'
    config = {"optimizer": "AdamWScheduleFree", "lr_warmup": 0, "additional_parameters": extra}
    (problem,) = check(config, ignore=["SF207"]).problems
    assert (problem.code, problem.field) == ("SF103", "additional_parameters --lr_scheduler_type")
    fixed = check(config, fix=True, ignore=["SF207"])
    assert fixed.config["additional_parameters"] == "--foo"
    assert fixed.problems == ()


@pytest.mark.parametrize(
    ("name", "text", "line", "column"),
    [
        ("a.json", '{"optimizer": "AdamW",\n "lr_warmup": ', 2, 15),
        ("a.json", '{"optimizer": "AdamW"\n "lr_warmup": 0}', 2, 2),
        ("a.json", "", 1, 1),
        ("a.json", "[1, 2]", 1, 1),
        ("a.toml", 'lr = 0.1\nscheduler = "cos', 2, 17),
        ("a.toml", "lr = 0.1\nscheduler constant\n", 2, 11),
        ("a.toml", "lr = 0.1\nchain = [1,\n", 3, 1),
    ],
)
def test_a_garbled_file_gets_line_and_column(tmp_path, name, text, line, column):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{name} must be .* at line {line}, column {column}") as caught:
        check(path)
    assert (caught.value.line, caught.value.column) == (line, column)


def test_a_byte_that_is_no_text_gets_line_and_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"lr":\n 0.1\xff}')
    with pytest.raises(ConfigError, match="line 2, column 5"):
        check(path)


def test_a_script_is_read_and_repaired_by_its_text(tmp_path):
    command = "train.py --optimizer_type sftorch.AdamWScheduleFree --lr_scheduler cosine"
    script = tmp_path / "train.sh"
    script.write_text(command, encoding="utf-8-sig")
    for config in (script, str(script)):
        assert check(config, fix=True).config == check(command, fix=True).config
    script.write_bytes(b"train.py --lr 1\n\xff")
    with pytest.raises(ConfigError, match="line 2, column 1"):
        check(script)


def test_comments_of_a_script_are_not_read():
    command = "train.py --optimizer_type AdamW \\\n --learning_rate 1e-4"
    plan = check(f"#!/bin/bash\n# don't: --lr_scheduler cosine\n{command}\n  # --max_train_steps 5\n")
    assert (plan.problems, plan.scheduler, plan.total_steps) == ((), "constant", 1600)


def test_a_long_command_line_may_end_like_the_name_of_a_script():
    tail = "".join(f" --network_args a{i}=1" for i in range(30)) + " --sample_prompts=prompts.txt"
    assert check("train.py --optimizer_type AdamW" + tail).optimizer == "AdamW"


def test_an_argument_that_is_no_literal_is_refused():
    (found,) = check(
        "train.py --optimizer_type AdamWScheduleFree --optimizer_args weight_decay={[]:1}"
    ).errors
    assert (found.code, found.found) == ("SF004", "weight_decay={[]:1}")


def test_a_quotation_that_does_not_end_gets_line_and_column():
    with pytest.raises(ConfigError, match="line 2, column 19"):
        check('train.py --optimizer_type AdamW \\\n --optimizer_args "betas=0.9,0.99')


def test_what_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must be a readable file, got No such file"):
        check(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"must be a mapping, a path, .* got int"):
        check(3)
    with pytest.raises(ConfigError, match="source must be one of"):
        check({"lr": 1.0}, source="keras")


@pytest.mark.parametrize(
    ("config", "field", "near"),
    [
        ({"optimizer": "AdamW", "weigth_decay": 0.1}, "weigth_decay", "weight_decay"),
        ({"lr_warmup": 0, "lr_shceduler": "cosine"}, "lr_shceduler", "lr_scheduler"),
        ({"optim": "adamw_torch", "warmup_step": 10}, "warmup_step", "warmup_steps"),
        ("train.py --optimizer_tpye AdamW", "--optimizer_tpye", "optimizer_type"),
        (
            "train.py --optimizer_type AdamWScheduleFree --optimizer_args warm_up_steps=5",
            "--optimizer_args warm_up_steps",
            "warmup_steps",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(config, field, near):
    problem = check(config).problems[0]
    assert (problem.code, problem.field, problem.fix) == ("SF001", field, f"did you mean {near}?")


def test_an_unknown_fact_is_refused_like_an_unknown_key():
    (problem,) = check({"optimizer": "AdamW"}, sampels=100).problems
    assert (problem.code, problem.field, problem.fix) == ("SF001", "sampels", "did you mean samples?")


def test_a_trainers_other_fields_are_none_of_our_business():
    sd = ["train_data_dir", "learning_rate_te1", "text_encoder_lr", "vae_batch_size", "save_every_n_steps"]
    assert check({"optimizer_type": "AdamW", "learning_rate": 1e-4} | dict.fromkeys(sd, 1)).problems == ()
    hf = ["logging_steps", "per_device_eval_batch_size", "save_total_limit", "gradient_checkpointing"]
    assert check({"optim": "adamw_torch"} | dict.fromkeys(hf, 1)).problems == ()
