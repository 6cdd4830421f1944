"""Whatever a configuration holds, a check reports and does not fall over, and a repair leads to an end."""

import json
import os
import random

import pytest

from sfcore.plan import ConfigError, check, field_states, text
from sfcore.plan._report import as_dict
from sfcore.plan._sd_scripts import KINDS
from sfcore.plan._tables import FIELDS, SCHEDULERS
from sfcore.plan._text import as_text, plain
from sfcore.plan._trainers import HF, KOHYA, SD_SCRIPTS

FIELDS_OF = {
    "own": [*FIELDS, "betas", "momentum", "learning_rate"],
    "sd-scripts": [*SD_SCRIPTS.fields.values(), "optimizer_args", "full_fp16", "unet_lr"],
    "kohya": [*KOHYA.fields.values(), "optimizer_args", "unet_lr", "epoch", "additional_parameters"],
    "hf": [*HF.fields.values(), "optim_args", "lr_scheduler_kwargs"],
}
OPTIMIZERS = ["AdamW", "AdamWScheduleFree", "sftorch.SGDScheduleFree", "schedulefree.RAdamScheduleFree"]
OPTIMIZERS += ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam", "Adafactor", "Prodigy"]
OPTIMIZERS += [
    "pytorch_optimizer.ScheduleFreeAdamW",
    "sftorch.ScheduleFreeWrapper",
    "ProdigyPlusScheduleFree",
]
USUAL = [0, 1, 2, 10, 100, 1000, 0.1, 0.01, 5e-3]
ODD = [
    -1,
    1e-9,
    1e9,
    float("nan"),
    float("inf"),
    "",
    "1e-4",
    "abc",
    None,
    True,
    "10%",
    [1, 2],
    (0.9, 0.99),
    {},
]
TEXTS = {
    "optimizer_args": [
        "",
        "warmup_steps=0.1 betas=0.9,0.99",
        ["warmup_steps=100", "prior_steps=800"],
        "foo=1",
    ],
    "additional_parameters": ["", "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=3"],
    "optim_args": ["r=1.0", "r=0,weight_lr_power=2", None],
    "lr_scheduler_kwargs": [{"num_cycles": 2}, {"min_lr": 1e-5}, {}, None, "x"],
    "save_strategy": ["no", "steps", "epoch", "best"],
    "eval_strategy": ["no", "steps", "epoch"],
} | dict.fromkeys(("optimizer", "optimizer_type", "optim"), OPTIMIZERS)
TEXTS |= {key: [*SCHEDULERS, "cosin", None] for key in ("scheduler", "lr_scheduler", "lr_scheduler_type")}


def configuration(rng, source):
    names = {source == "hf": "optim", source == "sd-scripts": "optimizer_type"}.get(True, "optimizer")
    fields = [names, *rng.sample(FIELDS_OF[source], rng.randint(1, 9))]
    pool = {field: TEXTS.get(field, USUAL if rng.random() < 0.7 else ODD) for field in fields}
    return {field: rng.choice(values) for field, values in pool.items()}


@pytest.mark.parametrize("source", FIELDS_OF)
def test_a_check_never_falls_over_and_a_repair_ends(source):
    rng = random.Random(0)
    found = 0
    for _ in range(150):
        config = configuration(rng, source)
        facts = rng.choice([{}, {"samples": 1000, "weights": "model.safetensors"}])
        plan = check(config, source=source, **facts)
        assert text(plan)
        assert as_dict(plan)
        assert all(isinstance(state.enabled, bool) for state in field_states(config, source=source).values())
        fixed = check(config, source=source, fix=True, **facts)
        assert [p for p in fixed.problems if p.changes] == [], config
        again = check(fixed.config, source=source, **fixed.facts)
        assert [p.code for p in again.problems] == [p.code for p in fixed.problems], config
        found += len(plan.problems) > len(fixed.problems)
    assert found > 50  # most of them were bad, and got better


# What nobody means: no number, no text, no path, no literal.
BROKEN = [
    *(0, -1, 3.5, float("nan"), float("inf"), 10**400, 5e-324, 1e308, True, None, complex(1, 2), object()),
    *(
        "",
        "=",
        "a=b=c",
        "betas=0.9",
        "x=" + "-" * 20_000 + "1",
        "x=" + "(" * 3000,
        "nan%",
        "0x10",
        "`x`",
        "$LR",
    ),
    *(
        "\0",
        "\ud800",
        "a" * 5000,
        "'",
        "--",
        "/dev/null",
        "/etc",
        [None],
        [[]],
        (0.9,),
        {"a": {"b": 1}},
        b"bytes",
    ),
    *(["betas=()"], ["warmup_steps=None"], ["prior_steps=1e30"], ["lr=1"], ["foreach={}"], ["eps=(1,2)"]),
]
WORDS = [
    *(
        "accelerate",
        "launch",
        "train_network.py",
        "sdxl_train.py",
        "wan_train_network.py",
        ">",
        "|",
        "2>&1",
        "\n",
    ),
    *("--num_processes", "--lr_sch", "--config_file", "c", "none", "state", "AdamW", "AdamWScheduleFree"),
    *(
        "Adafactor",
        "cosine",
        "constant",
        "CosineAnnealingLR",
        "T_max=0",
        "OneCycleLR",
        "max_lr=1",
        "0.1",
        "10%",
    ),
    *(
        "weight_decay=0.1",
        "betas=0.9,0.99",
        "warmup_steps=nan",
        "prior_steps=1e9",
        "a=b=c",
        "=",
        "1e400",
        "-1",
    ),
    *(f"--{name}" for name in [*KINDS, *KINDS]),
]
TOML = ["1", "0.5", "true", "[]", "[1]", "{a = 1}", '"a"', "nan", "inf", "-1", "[[1]]", "1979-05-27"]
FILES = {
    "bin.toml": bytes(range(256)),
    "deep.json": b"[" * 100_000,
    "deep.toml": b"a = " + b"[" * 20_000,
    "long.toml": b"a = " + b"9" * 6000,
    "long.json": b'{"lr": ' + b"9" * 6000 + b"}",
    "big.json": b" " * (17 * 2**20),
}
PATHS = [
    *FILES,
    "fifo",
    "fifo.toml",
    "\0",
    "\ud800.toml",
    ".",
    "state",
    "c.toml",
    "x" * 300 + ".toml",
    "--",
    b"x",
    3,
]


def broken(rng):
    """Returns a configuration with what nobody means in it, and the source that it is said to be for."""
    kind = rng.random()
    if kind < 0.45:
        fields = [
            *FIELDS,
            *KINDS,
            "optimizer",
            "optim",
            "lr_warmup",
            "additional_parameters",
            "betas",
            "optim_args",
        ]
        names = rng.sample(fields, rng.randint(0, 8))
        return {name: rng.choice(BROKEN) for name in names}, rng.choice([None, *FIELDS_OF])
    if kind < 0.9:
        words = rng.choices(WORDS, k=rng.randint(1, 14))
        return rng.choice([words, " ".join(words)]), None
    path = rng.choice(PATHS)
    return rng.choice([path, ["train_network.py", "--config_file", path], ["a.py", "--resume", path]]), None


def test_whatever_is_broken_is_reported_in_our_own_words(tmp_path, monkeypatch):
    rng = random.Random(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    for name in ("fifo", "fifo.toml"):
        os.mkfifo(name)
    refused = []
    for _ in range(800):
        lines = [f"{name} = {rng.choice(TOML)}" for name in rng.sample(list(KINDS), rng.randint(0, 4))]
        (tmp_path / "c.toml").write_text("\n".join(lines))
        (tmp_path / "state" / "train_state.json").write_text(
            rng.choice(
                ["{}", "[]", "x", '{"current_step": 5}', '{"current_step": "a"}', '{"current_step": 1e400}']
            )
        )
        config, source = broken(rng)
        facts = rng.choice([{}, {"samples": rng.choice([100, 0, "a", 10**400])}])
        try:
            for fix in (False, True):
                plan = check(config, source=source, fix=fix, **facts)
                assert text(plan)
                json.dumps(plain(as_dict(plan)), allow_nan=False)
                for suffix in (".toml", ".json"):
                    as_text(plan.config, suffix)
            field_states(config, source=source, **facts)
        except ConfigError as error:
            refused.append(str(error))
    assert all("must" in message for message in refused)
    assert 20 < len(refused) < 400


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({None: 1}, "the names of fields must be text, got None: put it in quotes"),
        ({"optimizer": {1: 2}}, "the names of fields must be text, got 1 in optimizer: put it in quotes"),
        ({"lr": 10**5000}, "lr must be a number that can be written, got one of 16610 bits"),
        (
            {"optimizer": {"lr": -(10**5000)}},
            "lr must be a number that can be written, got one of 16610 bits",
        ),
    ],
)
def test_what_no_file_could_hold_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        check(config)
