"""Whatever a configuration holds, a check reports and does not fall over, and a repair leads to an end."""

import random

import pytest

from sfcore.plan import check, field_states, text
from sfcore.plan._report import as_dict
from sfcore.plan._tables import FIELDS, SCHEDULERS
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
