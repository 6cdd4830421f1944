"""What a form is told: which fields are off, why, and what to give back."""

import pytest

from sfcore.plan import check, field_states
from sfcore.plan._tables import SCHEDULERS, SHAPE

FORM = {"optimizer": "AdamW8bit", "lr_scheduler": "cosine", "lr_warmup": 10, "max_train_steps": 1000}


def test_constant_disables_the_warm_up_and_another_choice_gives_it_back():
    first = field_states(FORM)
    assert first["lr_warmup"].enabled
    off = field_states(FORM | {"lr_scheduler": "constant"}, before=first)
    assert off["lr_warmup"] == type(off["lr_warmup"])(False, 0, "constant has no warm-up", 10)
    saved = FORM | {"lr_scheduler": "constant", "lr_warmup": off["lr_warmup"].value}
    assert check(saved).problems == ()
    still = field_states(saved, before=off)
    assert (still["lr_warmup"].enabled, still["lr_warmup"].restore) == (False, 10)
    on = field_states(saved | {"lr_scheduler": "cosine"}, before=still)
    assert (on["lr_warmup"].enabled, on["lr_warmup"].value, on["lr_warmup"].reason) == (True, 10, "")


def test_a_value_that_a_user_changed_meanwhile_wins_over_the_remembered_one():
    off = field_states(FORM | {"lr_scheduler": "constant"})
    assert field_states(FORM | {"lr_warmup": 3}, before=off)["lr_warmup"].value == 3


def test_schedule_free_disables_everything_that_the_trainer_ignores():
    states = field_states(FORM | {"optimizer": "AdamWScheduleFree", "lr_scheduler_num_cycles": 3})
    for field in ("lr_scheduler", "lr_warmup", "lr_warmup_steps", "lr_scheduler_num_cycles"):
        assert not states[field].enabled, field
        assert "needs no schedule" in states[field].reason
    assert (states["lr_scheduler"].value, states["lr_scheduler"].restore) == ("constant", "cosine")
    assert states["optimizer_args warmup_steps"].enabled


def test_radam_disables_the_optimizers_own_warm_up():
    states = field_states(optimizer="RAdamScheduleFree", warmup_steps=50)
    assert states["warmup_steps"] == type(states["warmup_steps"])(
        False, 0, "Schedule-Free RAdam has no warm-up of its own", 50
    )


def test_hfs_shared_warm_up_stays_on_for_schedule_free():
    config = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 100}
    assert field_states(config)["warmup_steps"].enabled
    assert not field_states(config | {"optim": "adamw_torch"})["warmup_steps"].enabled


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_states_of_a_schedulers_fields_are_those_of_the_table(name):
    states = field_states(optimizer="AdamW", scheduler=name)
    kind = SCHEDULERS[name]
    for field in SHAPE:
        assert states[field].enabled == (field in (*kind.needs, *kind.uses)), field
    assert states["scheduler_warmup_steps"].enabled == ("warmup" in kind.uses)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({"optimizer": "AdamWScheduleFree", "LoRA_type": "Standard"}, "optimizer_args "),
        ({"optimizer": "schedulefree.AdamWScheduleFree", "LoRA_type": "Standard"}, "optimizer_args "),
        ({"optim": "schedule_free_adamw"}, "optim_args "),
        ({"optimizer": "schedulefree.AdamWScheduleFree"}, ""),
    ],
)
def test_upstreams_class_is_offered_upstreams_arguments_alone(config, prefix):
    states = field_states(config)
    for name in ("prior_steps", "inner_momentum"):
        assert not states[prefix + name].enabled
        assert f"has no {name}" in states[prefix + name].reason
    assert states[prefix + "r"].enabled
    if "optimizer" in config:
        ours = field_states(config | {"optimizer": "sftorch.AdamWScheduleFree"})
        assert ours[prefix + "prior_steps"].enabled


def test_the_reason_says_which_class_has_the_argument():
    states = field_states({"optimizer": "AdamWScheduleFree", "LoRA_type": "Standard"})
    told = "AdamWScheduleFree has no prior_steps; sftorch.AdamWScheduleFree has"
    assert states["optimizer_args prior_steps"].reason == told


def test_a_class_of_the_trainer_is_offered_what_it_takes():
    states = field_states({"optimizer": "Lion", "LoRA_type": "Standard"})
    on = [name for name, state in states.items() if name.startswith("optimizer_args ") and state.enabled]
    assert on == ["optimizer_args beta", "optimizer_args weight_decay", "optimizer_args b2"]
    assert states["optimizer_args eps"].reason == "Lion has no eps"
