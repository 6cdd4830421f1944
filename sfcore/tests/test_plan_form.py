"""What a form does, without a browser and without Gradio: fields follow the choices, values come back."""

import json
import random
import re

import pytest

from sfcore.plan import ConfigError, _form, _page, check

KOHYA = {
    "LoRA_type": "Standard",
    "optimizer": "AdamW8bit",
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "max_train_steps": 1600,
    "optimizer_args": "weight_decay=0.05 betas=(0.9,0.95)",
}
SD_TOML = """
[schedule]
optimizer_type = "AdamW"
learning_rate = 1e-4
lr_scheduler = "cosine"
lr_warmup_steps = 100
max_train_steps = 1000
"""
COMMAND = (
    "accelerate launch train_network.py --optimizer_type AdamW --learning_rate 1e-4 --lr_scheduler cosine "
    "--lr_warmup_steps 100 --max_train_steps 1000"
)
HF = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 100, "max_steps": 1000}
OWN = {"optimizer": "AdamW", "scheduler": "cosine", "scheduler_warmup_steps": 100, "total_steps": 1000}


def opened(config, **more):
    text = config if isinstance(config, str) else json.dumps(config)
    return _form.opened(text, **more)


def shown(form):
    return {row.label: row for row in _form.rows(form).values() if row.shown}


def chosen(form, **fields):
    for name, text in fields.items():
        form = _form.edited(form, name, text)
    return form


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (KOHYA, "lr_warmup", 10),
        (SD_TOML, "lr_warmup_steps", 100),
        (COMMAND, "--lr_warmup_steps", 100),
        (HF, "warmup_steps", 100),
        (OWN, "scheduler_warmup_steps", 100),
    ],
    ids=["kohya", "toml", "command", "hf", "own"],
)
def test_constant_disables_the_warm_up_and_cosine_gives_it_back(config, name, value):
    form = opened(config)
    assert shown(form)[name].value == value
    off = chosen(form, scheduler="constant")
    row = shown(off)[name]
    assert (row.enabled, row.value) == (False, 0)
    assert row.info == f"constant has no warm-up. {value} will come back."
    assert off.plan.errors == ()
    on = chosen(off, scheduler="cosine")
    assert (shown(on)[name].enabled, shown(on)[name].value) == (True, value)
    assert on.config.values == form.config.values


def test_schedule_free_disables_what_the_trainer_ignores_and_an_optimizer_with_a_schedule_gives_all_back():
    form = opened(KOHYA)
    for other in ("AdamWScheduleFree", "SGDScheduleFree", "sftorch.RAdamScheduleFree"):
        free = chosen(form, optimizer=other)
        rows = shown(free)
        assert (rows["lr_scheduler"].enabled, rows["lr_scheduler"].value) == (False, "constant")
        assert "Kohya_SS ignores it with" in rows["lr_warmup"].info
        assert [one for one in free.plan.errors if one.code.startswith("SF1")] == []
        back = chosen(free, optimizer="AdamW8bit")
        assert back.config.values == form.config.values, other


def test_decay_rates_get_the_name_that_each_class_has_for_them():
    form = opened(KOHYA)
    arguments = [
        chosen(form, optimizer=name).config.original["optimizer_args"]
        for name in ("SGDScheduleFree", "SGDNesterov", "Lion")
    ]
    assert arguments == [
        "weight_decay=0.05 momentum=0.9",
        "weight_decay=0.05 momentum=0.9",
        "weight_decay=0.05 betas=0.9,0.95",
    ]


def test_a_file_that_says_what_its_choice_forbids_is_shown_as_it_is_until_something_is_done():
    form = opened(KOHYA | {"lr_scheduler": "constant"})
    row = shown(form)["lr_warmup"]
    assert (row.value, row.enabled) == (10, False)
    assert row.info == "constant has no warm-up; the file says 10 all the same."
    assert [one.code for one in form.plan.errors] == ["SF101"]
    still = chosen(form, lr="2e-4")
    assert [one.code for one in still.plan.errors] == ["SF101"]
    fixed = _form.repaired(form)
    assert fixed.plan.problems == ()
    assert [(one.field, one.after) for one in fixed.changes] == [("lr_scheduler", "constant_with_warmup")]
    assert chosen(fixed, lr="2e-4").changes == ()


def test_an_emptied_field_is_taken_away_and_a_number_stays_one():
    form = chosen(opened(KOHYA), scheduler_warmup_percent=" ", lr="3e-4", samples="200")
    assert form.config.original == {
        key: 3e-4 if key == "learning_rate" else value for key, value in KOHYA.items() if key != "lr_warmup"
    }
    assert form.config.facts == {"samples": 200}
    bad = chosen(form, lr="fast")
    assert [one.code for one in bad.plan.errors] == ["SF002"]


def test_only_fields_that_matter_are_shown_and_each_of_the_users_once():
    rows = [row.label for row in _form.rows(opened(HF)).values() if row.shown]
    assert len(rows) == len(set(rows))
    assert "lr_scheduler_num_cycles" not in shown(opened(KOHYA))
    assert "lr_scheduler_num_cycles" in shown(opened(KOHYA | {"lr_scheduler": "cosine_with_restarts"}))
    assert "prior_steps" not in shown(opened(KOHYA | {"optimizer": "AdamWScheduleFree"}))
    assert "prior_steps" in shown(opened(KOHYA | {"optimizer": "sftorch.AdamWScheduleFree"}))


def test_the_file_that_it_becomes_is_of_the_kind_that_it_was():
    for text, name in ((json.dumps(KOHYA), "run-checked.json"), (SD_TOML, "run-checked.toml")):
        form = chosen(opened(text), scheduler="linear")
        assert list(form.files) == [name]
        again = opened(form.files[name])
        assert again.config.values == form.config.values
    form = chosen(opened(COMMAND), scheduler="linear")
    assert form.files == {"run-checked.sh": COMMAND.replace("cosine", "linear") + "\n"}


def test_a_command_line_brings_its_file_of_settings_where_this_disk_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(SD_TOML)
    command = "accelerate launch train_network.py --config_file c.toml"
    form = chosen(opened(command), scheduler="constant")
    assert list(form.files) == ["run-checked.sh", "run-checked.toml"]
    assert 'lr_scheduler = "constant"\nlr_warmup_steps = 0' in form.files["run-checked.toml"]
    assert "--config_file run-checked.toml" in form.files["run-checked.sh"]
    assert (tmp_path / "c.toml").read_text() == SD_TOML
    for abbreviated in (command, command.replace("--config_file", "--config_f")):
        with pytest.raises(ConfigError, match="the text must be whole, got --config_file: open the file"):
            opened(abbreviated, reads_files=False)


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ('{"optimizer": }', "", "the text must be JSON, got Expecting value at line 1, column 15"),
        ("a = 1\nb = = 2", "", "the text must be TOML, got .* at line 2, column 5"),
        ('"a" = --1', "", "the text must be TOML, got .* at line 1, column 7"),
        ("[1]", ".json", r"run\.json must be a JSON object of fields, got a list"),
        ("a: 1", ".yaml", r"run\.yaml must be one of \.json, \.toml, \.sh, \.txt, got \.yaml"),
        ("hello", ".sh", r"run\.sh must be one of .*, got no command line"),
        ("x" * 2**20 + "y", "", "the text must be at most 1 MiB, got 1.0 MiB"),
        ("--a 'b", "", "the command line must be well quoted, got .* at line 1, column 5"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(text, suffix, message):
    with pytest.raises(ConfigError, match=message):
        _form.opened(text, suffix)


def test_a_preset_of_ten_thousand_lines_is_checked_and_its_problems_are_cut():
    fields = {f"learning_rate_{number}": number for number in range(10_000)}
    form = opened(KOHYA | {"lr_scheduler": "constant"} | fields)
    assert form.plan.errors[0].code == "SF001"
    told = _page.problems(form.plan)
    assert told.count("<li") == 100
    assert re.search(r"and [\d]+ more", told)
    assert len(told) < 100_000


EVIL = '<img src=x onerror="alert(1)">'


def test_html_in_values_and_names_is_text():
    config = KOHYA | {"optimizer": EVIL, "lr_scheduler": EVIL, "learning_rate": EVIL, "lr_schedule": EVIL}
    form = opened(config | {"optimizer_args": f"{EVIL}=1"}, name=EVIL)
    form = _form.repaired(form)
    told = [
        _page.problems(form.plan),
        _page.summary(form.plan),
        _page.changes(form.changes),
        _page.pictures(form.plan),
        _page.files(form.files),
        _page.refused(EVIL),
    ]
    assert any("&lt;img" in one for one in told)
    assert [one for one in told if "<img" in one] == []


def test_a_long_value_is_cut():
    assert _page.shown("x" * 5000) == "x" * 300 + "… (5000 characters)"


def test_the_curves_are_drawn_or_the_reason_why_not_is_given():
    free = check(optimizer="AdamWScheduleFree", lr=0.01, warmup_steps=50, total_steps=1000)
    told = _page.pictures(free)
    assert told.count("<svg") == 2
    first, second = re.findall(r'points="([^"]+)"', told)
    lr = [float(point.split(",")[1]) for point in first.split()]
    c = [float(point.split(",")[1]) for point in second.split()]
    assert lr[0] > lr[-1] == min(lr)  # a higher value stands further up, where y is smaller
    assert c[0] == min(c)
    assert "say total_steps" in _page.pictures(check(optimizer="AdamW", scheduler="cosine"))


ARGUED = [
    json.dumps(KOHYA | {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}),
    json.dumps(
        {
            "LoRA_type": "Standard",
            "optimizer": "sftorch.AdamWScheduleFree",
            "optimizer_args": "prior_steps=800 warmup_steps=50 r=1 betas=(0.9,0.95)",
        }
    ),
    SD_TOML + 'optimizer_args = ["weight_decay=0.1", "betas=0.9,0.95"]\n',
    f"{COMMAND} --optimizer_args eps=1e-6 betas=0.9,0.95",
    json.dumps(HF | {"adam_beta1": 0.8, "adam_beta2": 0.95}),
    json.dumps(OWN | {"betas": [0.9, 0.95]}),
    json.dumps({"optimizer": "AdamWScheduleFree", "warmup_steps": 50, "beta": 0.95, "b2": 0.99, "r": 1}),
]


@pytest.mark.parametrize("text", ARGUED, ids=["kohya", "free", "toml", "command", "hf", "own", "own free"])
@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_every_choice_can_be_undone(text, name):
    form = opened(text)
    others = _form.optimizers(form.config) if name == "optimizer" else _form.schedulers()
    before = form.config.values
    for other in others if _form.rows(form)[name].enabled else ():
        again = chosen(chosen(form, **{name: other}), **{name: form.config.get(name, "")})
        assert {**again.config.values, name: None} == {**before, name: None}, other


TYPED = [
    "",
    "0",
    "1",
    "0.1",
    "1e-4",
    "-3",
    "nan",
    "1e999",
    "abc",
    "5%",
    "[1,2]",
    "{'a':1}",
    "9" * 400,
    "\0",
    "é",
]
TYPED += ["0.9,0.99", "a=1 b=2", "--lr_warmup_steps 3", "'", '"', "$LR", EVIL]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_typed_the_form_stands_and_its_file_can_be_read_again(seed):
    draw = random.Random(seed)
    for _ in range(40):
        form = opened(draw.choice([*ARGUED, "{}", ""]))
        for _ in range(4):
            name = draw.choice(_form.fields())
            offered = {"optimizer": _form.optimizers(form.config), "scheduler": _form.schedulers()}
            form = chosen(form, **{name: draw.choice([*TYPED, *offered.get(name, [])])})
            if draw.random() < 0.1:
                form = _form.repaired(form)
            told = _page.problems(form.plan) + _page.summary(form.plan) + _page.pictures(form.plan)
            assert "<img" not in told
            (main, *_) = form.files.values()
            assert opened(main, suffix=form.suffix).config.raw.keys() == form.config.raw.keys()
