"""Launches of sd-scripts, musubi-tuner and Kohya_SS: what their code makes of them, in the plan."""

import json

import numpy as np
import pytest

from sfcore.exchange import write_tensors
from sfcore.plan import check
from sfcore.plan._sd_scripts import SCRIPTS, resumed

SD = "accelerate launch {}.py --learning_rate 1e-3 --max_train_steps 1000"
FREE = "--optimizer_type sftorch.AdamWScheduleFree --optimizer_args warmup_steps=50"


def codes(config, **facts):
    return [problem.code for problem in check(config, **facts).problems]


def test_kohyas_additional_parameters_hold_the_optimizers_arguments_too():
    extra = (
        '--optimizer_type sftorch.AdamWScheduleFree --optimizer_args "weight_decay=0.01" "warmup_steps=100" '
        '"prior_steps=800" --network_weights old.safetensors'
    )
    preset = {"optimizer": "AdamW8bit", "LoRA_type": "Standard", "lr_warmup": 0, "learning_rate": 1e-3}
    preset |= {"max_train_steps": 2000, "additional_parameters": extra, "optimizer_args": "ignored=1"}
    plan = check(preset)
    assert plan.problems == ()
    assert (plan.optimizer, plan.warmup_steps) == ("sftorch.AdamWScheduleFree", 100)
    assert plan.c[0] < 0.01
    without = preset | {"additional_parameters": extra.replace('"prior_steps=800" ', "")}
    fixed = check(without, fix=True)
    assert [change.field for change in fixed.changes] == [
        "additional_parameters --optimizer_args prior_steps"
    ]
    assert "warmup_steps=100 prior_steps=800 --network_weights" in fixed.config["additional_parameters"]


def test_what_kohyas_additional_parameters_say_of_the_warm_up_wins():
    preset = {"optimizer": "AdamW", "lr_scheduler": "cosine", "lr_warmup": 10, "max_train_steps": 1000}
    plan = check(preset | {"additional_parameters": "--lr_warmup_steps 5 --full_bf16"})
    assert (plan.warmup_steps, plan.problems) == (5, ())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_never_calls_eval_ships_y(script):
    found = codes(f"{SD.format(script)} {FREE}")
    assert found == ([] if SCRIPTS[script].evaluates else ["SF506"])


def test_musubi_tuner_knows_schedule_free_by_a_dotted_name_alone():
    command = (
        SD.format("wan_train_network") + " --optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=9"
    )
    (problem,) = check(command).problems
    assert (problem.code, problem.fix) == ("SF003", "choose schedulefree.AdamWScheduleFree")
    assert check(command, fix=True).problems == ()


def test_our_own_options_are_known_from_the_rows():
    named = "precision='\"lean\"' seed=3 prior_steps=5 maximize=False betas=0.9,0.99"
    assert codes(f"{SD.format('train_network')} {FREE} {named} --full_bf16") == []
    assert codes(f"{SD.format('train_network')} {FREE} presicion='\"lean\"'") == ["SF001"]


@pytest.mark.parametrize(
    ("words", "code", "fix"),
    [
        ("--optimizer_type CAME", "SF003", "write it with its module"),
        ("--optimizer_type adamax", "SF003", "did you mean Adamax?"),
        ("--optimizer_type AdEMAMix8bit", "SF003", "choose bitsandbytes.optim.AdEMAMix8bit"),
        ("--optimizer_type sftorch.AdamWSchedulefree", "SF003", "did you mean sftorch.AdamWScheduleFree?"),
        ("--optimizer_type AdamW --optimizer_args lr=1e-4", "SF306", "take it away"),
        ("--optimizer_type Adafactor --optimizer_args betas=0.9,0.99", "SF306", "Adafactor has eps"),
        ("--optimizer_type AdamW --optimizer_args betas=0.9", "SF002", "write (0.9,0.999)"),
        ("--optimizer_type AdamW --optimizer_args fused", "SF004", "write it so: name=0.1"),
        ("--optimizer_type AdamW --lr_warmup_steps 100.0", "SF002", "write a whole number of steps"),
        ("--lr_scheduler_type CosineAnnealingLR", "SF104", "add T_max=... to --lr_scheduler_args"),
        (
            "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=9 --lr_warmup_steps 9",
            "SF101",
            "set",
        ),
        ("--lr_scheduler_type ReduceLROnPlateau", "SF106", "choose one of ConstantLR"),
        ("--lr_scheduler Cosine", "SF106", "did you mean cosine?"),
        ("--lr_sch cosine", "SF001", "write it out: --lr_scheduler"),
    ],
)
def test_what_the_trainer_stops_at_is_said_with_what_to_do(words, code, fix):
    (problem,) = check(f"{SD.format('train_network')} {words}").errors
    assert problem.code == code
    assert problem.fix.startswith(fix)


def test_a_rate_that_nobody_has_said_is_a_warning_and_one_of_a_shell_is_none():
    (problem,) = check("train_network.py --optimizer_type AdamW").problems
    assert (problem.code, problem.severity, problem.field) == ("SF307", "warning", "--learning_rate")
    assert codes("train_network.py --optimizer_type AdamW --unet_lr 1e-4") == []
    assert codes("train_network.py --optimizer_type AdamW --learning_rate $LR") == []


def test_a_resume_says_how_many_micro_batches_will_run(tmp_path):
    """24 micro-batches an epoch, 12 of 24 updates done, accumulation 2: what is left is not trained on."""
    state = tmp_path / "a-state"
    state.mkdir()
    (state / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": 12}))
    command = ["train_network.py", "--learning_rate", "1e-3", "--max_train_steps", "24"]
    command += ["--gradient_accumulation_steps", "2", "--resume", str(state)]
    plan = check(command, samples=24)
    assert (plan.resumed, plan.problems) == ((24, 24), ())
    plan = check([*command, "--skip_until_initial_step"], samples=24)
    assert plan.resumed == (0, 24)
    (problem,) = plan.problems
    assert problem.code == "SF402"
    assert problem.why.endswith("Here it trains on 0 micro-batches, and 24 are left.")
    assert "resume        0 micro-batches will be trained on, 24 are left" in text_of(plan)
    (problem,) = check([*command, "--initial_step", "6"], samples=24).problems
    assert (problem.code, check([*command, "--initial_step", "24"]).errors[0].code) == ("SF403", "SF404")


def text_of(plan):
    from sfcore.plan import text

    return text(plan)


def test_the_count_of_a_resume_is_that_of_the_uninterrupted_run_at_the_ends_of_epochs():
    for accumulation in (1, 2, 3, 4):
        an_epoch = -(-24 // accumulation)
        for epochs in (1, 2):
            assert resumed(24, accumulation, epochs * an_epoch, 3 * an_epoch, skip=False) == (3 - epochs) * 24


def test_how_long_a_lora_was_trained_is_read_from_its_file(tmp_path):
    command = f"{SD.format('train_network')} {FREE} --network_weights {{}}"
    for steps, severity in ((24, "warning"), (5000, "error")):
        path = tmp_path / f"{steps}.safetensors"
        write_tensors(path, {"w": np.ones(2, np.float32)}, {"ss_steps": str(steps)})
        (problem,) = check(command.format(path)).problems
        assert (problem.code, problem.severity) == ("SF401", severity)
        assert f"set prior_steps={steps} in --optimizer_args" in problem.fix
    (problem,) = check(command.format("none.safetensors")).problems
    assert (problem.severity, problem.changes["prior_steps"]) == ("error", 800)
    radam = "--optimizer_type sftorch.RAdamScheduleFree --network_weights none.safetensors"
    (problem,) = check(f"{SD.format('train_network')} {radam}").problems
    assert (problem.code, problem.severity) == ("SF401", "warning")
