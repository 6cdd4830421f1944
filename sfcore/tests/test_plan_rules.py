"""Every rule fires on its bad configurations and on no good one, and its repair leaves none."""

from pathlib import Path

import pytest

from sfcore.plan import check, text
from sfcore.plan._report import page
from sfcore.plan._rules import RULES
from sfcore.tests.plan_cases import BAD, GOOD

ROOT = Path(__file__).parents[2]
CASES = [(code, case) for code, cases in BAD.items() for case in cases]
# What only the user can know: a number for a word, a file's field, how a trainer is to be built.
NOT_REPAIRED = ("SF001", "SF002", "SF004", "SF307", "SF402", "SF403", "SF404")
GUESSED = ("SF106", BAD["SF106"][1])  # a scheduler that is like no other


def codes(plan):
    return [problem.code for problem in plan.problems]


def test_every_rule_has_a_bad_configuration():
    assert list(BAD) == list(RULES)


@pytest.mark.parametrize(("code", "config"), CASES)
def test_a_rule_fires_on_a_minimal_bad_configuration(code, config):
    assert code in codes(check(config))


@pytest.mark.parametrize("config", GOOD)
def test_no_rule_fires_on_a_good_configuration(config):
    plan = check(config)
    assert plan.problems == (), text(plan)
    plan.raise_for_errors()


@pytest.mark.parametrize(
    ("code", "config"), [one for one in CASES if one[0] not in NOT_REPAIRED and one != GUESSED]
)
def test_a_repair_leaves_nothing_wrong_and_lists_itself(code, config):
    repaired = check(config, fix=True)
    assert repaired.problems == (), text(repaired)
    assert repaired.changes
    again = check(repaired.config, **repaired.facts)
    assert again.problems == (), text(again)


def test_an_unknown_scheduler_is_not_replaced_by_a_guess():
    repaired = check(GUESSED[1], fix=True)
    assert codes(repaired) == ["SF106"]
    assert repaired.changes == ()
    assert "choose one of constant" in repaired.problems[0].fix


@pytest.mark.parametrize(("code", "config"), CASES)
def test_a_check_changes_nothing(code, config):
    before = repr(config)
    plan = check(config)
    assert plan.changes == ()
    assert plan.config == config
    check(config, fix=True)
    assert repr(config) == before


@pytest.mark.parametrize("code", RULES)
def test_a_meant_code_is_ignored(code):
    assert code not in codes(check(BAD[code][0], ignore=[code]))


def test_all_problems_come_at_once_with_field_value_rule_and_fix():
    plan = check(
        optimizer="SGDScheduleFree", lr=1e-3, scheduler="cosine", warmup_steps=0.1, total_steps=500, beta=0.5
    )
    assert codes(plan) == ["SF102", "SF202", "SF303", "SF304"]
    for problem in plan.problems:
        assert all((problem.field, problem.rule, problem.fix, problem.why))
        assert f"{problem.field} must be {problem.rule}, got {problem.found!r}: {problem.fix}" in str(problem)
    with pytest.raises(ValueError, match="SF102 scheduler must be") as caught:
        plan.raise_for_errors()
    assert len(caught.value.problems) == 2


def test_constant_with_warmup_steps_names_both_ways_out():
    """The story of kohya_ss issue 2291 and pull request 2292."""
    (problem,) = check({"optimizer": "AdamW8bit", "lr_scheduler": "constant", "lr_warmup": 10}).errors
    assert (problem.code, problem.field, problem.found) == ("SF101", "lr_warmup", 10)
    assert problem.fix == "choose lr_scheduler = constant_with_warmup, or set this to 0"
    assert "raise deep in the training script" in problem.why


def test_a_restart_from_a_lora_with_accumulation_gets_prior_steps_in_the_optimizers_arguments():
    """The story of schedule_free issue 39."""
    plan = check(BAD["SF401"][1], fix=True)
    assert plan.config.split("--optimizer_type ")[1].startswith(
        "sftorch.AdamWScheduleFree --optimizer_args warmup_steps=50 prior_steps=800 --network_weights"
    )
    assert plan.c[0] < 1e-3
    assert check(BAD["SF401"][1]).c[0] == 1


def test_a_weights_only_restart_in_hf_trainer_says_how_to_build_the_optimizer():
    config = {
        "optim": "schedule_free_adamw",
        "lr_scheduler_type": "constant",
        "warmup_steps": 50,
        "max_steps": 500,
    }
    plan = check(config, fix=True, weights="model.safetensors", adapter=True)
    (problem,) = plan.problems
    assert problem.code == "SF401"
    assert "optimizers=(optimizer, None)" in problem.fix


def test_a_fraction_of_a_run_of_unknown_length_is_left_to_its_owner():
    config = {"optim": "schedule_free_adamw", "learning_rate": 1e-3, "warmup_steps": 0.03}
    plan = check(config, fix=True, adapter=True)
    assert codes(plan) == ["SF202"]
    assert plan.config == config | {"lr_scheduler_type": "constant"}
    assert check(config, fix=True, adapter=True, samples=8000).config["warmup_steps"] == 90


def test_the_page_of_rules_is_made_from_the_tables():
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == page(), (
        "python -m sfcore plan --rules docs/rules.md"
    )
