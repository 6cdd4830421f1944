"""The effective values of a plan: steps, warm-up, and lr and c at every step."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfcore.plan import check, text
from sfcore.plan._report import as_dict, preview
from sfcore.plan._run import COURSES
from sfcore.plan._tables import DATA_DRIVEN, SCHEDULERS


def scheduled(name, **more):
    return check(optimizer="AdamW", lr=2.0, scheduler=name, total_steps=100, **more).lr


def test_steps_are_counted_after_accumulation_on_all_devices():
    plan = check(optimizer="AdamW", samples=1000, batch_size=4, devices=2, accumulation=8, epochs=3)
    assert plan.total_steps == 3 * math.ceil(math.ceil(1000 / 8) / 8)
    assert plan.epochs == pytest.approx(48 * 8 / 125)
    assert check(optimizer="AdamW", samples=1000, batch_size=10, total_steps=250).epochs == 2.5
    assert check(optimizer="AdamW", epochs=3).total_steps is None
    assert check(optimizer="AdamW", samples=1000, epochs=1e308).total_steps is None  # too many for a float


def test_a_warm_up_without_end_is_reported_and_not_handed_on():
    fields = {"optimizer_type": "AdamWScheduleFree", "lr_warmup_steps": 1e308}
    plan = check(fields | {"additional_parameters": "constant_with_warmup"})
    (ignored,) = (problem for problem in plan.problems if problem.code == "SF103")
    assert "warmup_steps" not in ignored.changes


def test_lr_and_c_follow_s2_to_s5():
    plan = check(optimizer="AdamWScheduleFree", lr=0.01, warmup_steps=4, total_steps=50, r=1.0, prior_steps=7)
    lr_max, weight_sum = 0.0, sum(i * 0.01**2 for i in range(1, 8))
    for step in range(50):
        t = step + 1  # S1
        lr_t = 0.01 * min(1, t / 4)  # S2
        lr_max = max(lr_max, lr_t)  # S3
        weight = (t + 7) * lr_max**2  # S4
        weight_sum += weight
        assert plan.lr[step] == pytest.approx(lr_t, rel=1e-15)
        assert plan.c[step] == pytest.approx(weight / weight_sum, rel=1e-12)  # S5, summed in another order


def test_radam_stands_still_first_and_has_c_0_there():
    plan = check(optimizer="RAdamScheduleFree", lr=0.01, total_steps=1000)
    moving = np.flatnonzero(plan.lr)
    assert moving[0] == 4
    assert (plan.c[:4] == 0).all()
    assert plan.c[4] == 1
    assert (np.diff(plan.lr[4:]) > 0).all()


def test_a_fraction_as_steps_shows_its_first_step():
    config = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    plan = check(config, warmup_steps=0.03, total_steps=100)
    assert plan.lr[0] == pytest.approx(1e-3 / 0.03)
    assert plan.lr[1] == 1e-3


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"adafactor", "piecewise_constant"}))
def test_every_scheduler_ramps_from_0_and_reaches_the_full_lr(name):
    needed = {"scheduler_min_lr_ratio": 0.1, "scheduler_decay_steps": 30}
    lr = scheduled(name, **({} if name == "constant" else {"scheduler_warmup_steps": 10}), **needed)
    assert lr.shape == (100,)
    assert lr.max() == 2.0
    first = {"constant": 2.0, "cosine_warmup_with_min_lr": 0.2}
    assert lr[0] == first.get(name, 0.0)
    assert (lr[-1] < 2.0) == SCHEDULERS[name].decays


_KWARGS: dict[str, list[dict[str, float]]] = {
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "polynomial": [{"lr_end": 0.0}, {"power": 2.0, "lr_end": 0.0}],
    "inverse_sqrt": [{}, {"timescale": 25}],
    "cosine_with_min_lr": [{"min_lr_rate": 0.1}, {"min_lr": 0.5, "num_cycles": 1.5}],
    "cosine_warmup_with_min_lr": [
        {"min_lr": 0.5},
        {"min_lr_rate": 0.1, "num_cycles": 1.5, "warmup_lr_rate": 0.25},
    ],
    "warmup_stable_decay": [{"num_decay_steps": 20}, {"num_decay_steps": 30, "num_cycles": 1.5}],
}


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize(
    ("name", "given"), [(name, given) for name in COURSES for given in _KWARGS.get(name, [{}])]
)
def test_every_course_is_what_transformers_computes(name, given, warmup_steps):
    warmup_steps = 0 if name == "constant" else warmup_steps
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    theirs = importlib.import_module("transformers.optimization").get_scheduler(
        name, optimizer, warmup_steps, 100, dict(given)
    )
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    config = {"optim": "adamw_torch", "learning_rate": 2.0, "max_steps": 100, "warmup_steps": warmup_steps}
    plan = check(config | {"lr_scheduler_type": name, "lr_scheduler_kwargs": given}, adapter=True)
    assert not plan.problems, text(plan)
    assert plan.lr == pytest.approx(np.array(expected), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["rex", "piecewise_constant", "adafactor", *DATA_DRIVEN])
@pytest.mark.parametrize("fix", [False, True])
def test_a_scheduler_whose_course_is_not_known_is_not_drawn_as_another(name, fix):
    given = {"scheduler_args": ["1:10"]} if name == "piecewise_constant" else {}
    plan = check(optimizer="Adafactor", scheduler=name, total_steps=100, fix=fix, **given)
    assert plan.scheduler == name
    assert len(plan.lr) == 0
    with pytest.raises(
        ValueError, match=r"errors?\(s\)" if name == "rex" else f"the scheduler '{name}', whose"
    ):
        preview(plan, Path("never.png"))


def test_the_least_lr_of_a_warmed_up_cosine_is_asked_for():
    config = {"optim": "adamw_torch", "max_steps": 100, "lr_scheduler_type": "cosine_warmup_with_min_lr"}
    (found,) = check(config, adapter=True).problems
    assert (found.code, found.field) == ("SF104", "lr_scheduler_kwargs min_lr_rate")
    for given in ({"min_lr": 1e-6}, {"min_lr_rate": 0.1}):
        assert check(config | {"lr_scheduler_kwargs": given}, adapter=True).problems == ()


def test_schedulers_are_where_transformers_has_them():
    assert scheduled("linear")[50] == 1.0
    assert scheduled("polynomial", scheduler_power=2)[50] == 0.5
    assert scheduled("cosine")[50] == pytest.approx(1.0)
    assert scheduled("cosine_with_restarts", scheduler_cycles=2)[50] == 2.0
    assert scheduled("cosine_with_min_lr", scheduler_min_lr_ratio=0.1)[50] == pytest.approx(1.1)
    assert scheduled("inverse_sqrt", scheduler_timescale=25)[75] == 1.0
    assert scheduled("warmup_stable_decay", scheduler_decay_steps=20)[[79, 90]] == pytest.approx([2.0, 1.0])


def test_an_unknown_length_has_lr_where_none_is_needed():
    assert len(check(optimizer="AdamWScheduleFree", warmup_steps=10).lr) == 1000
    assert len(check(optimizer="AdamW", scheduler="cosine").lr) == 0
    assert len(check({"optimizer": "AdamW", "lr_warmup": 0, "lr_scheduler": "cosine"}).lr) == 0


def test_sd_scripts_defaults_to_1600_steps_and_lets_epochs_win():
    assert check("train.py --optimizer_type AdamW").total_steps == 1600
    command = "train.py --optimizer_type AdamW --max_train_steps 500 --max_train_epochs 2"
    assert check(command).total_steps is None
    assert check(command, samples=100).total_steps == 200


def test_nonsense_is_reported_and_nothing_is_computed_with_it():
    for nonsense in ({"lr": float("nan")}, {"r": -1.0}, {"b2": 2.0}, {"prior_steps": 10**30, "lr": "x"}):
        plan = check({"optimizer": "RAdamScheduleFree", "total_steps": 10} | nonsense)
        assert plan.errors
        assert len(plan.lr) == len(plan.c) == 0
        assert plan.optimizer in text(plan)
        assert as_dict(plan)["problems"]


def test_a_number_beyond_every_float_is_reported_like_any_other_nonsense():
    for name in ("lr", "warmup_steps", "total_steps", "devices"):
        (found,) = check(
            {"optimizer": "SGDScheduleFree", "lr": 1.0, name: 10**400}, ignore=["SF207"]
        ).problems
        assert (found.code, found.field, found.rule) == ("SF002", name, "a number")
    plan = check(warmup_steps=float("inf"), total_steps=10, scheduler="linear", scheduler_warmup_steps=1)
    assert [(p.code, p.field) for p in plan.problems] == [("SF301", "warmup_steps")]


def test_more_scheduler_steps_than_a_float_has_are_endless():
    run = {
        "optimizer_type": "AdamW",
        "lr_scheduler": "cosine",
        "learning_rate": 0.1,
        "max_train_steps": 10**10,
    }
    plan = check(run, source="sd-scripts", devices=10**300)
    assert plan.lr[0] == plan.lr[-1] == 0.1


def test_a_huge_run_is_computed_to_its_first_ten_million_steps():
    plan = check(optimizer="AdamW", total_steps=10**9)
    assert plan.total_steps == 10**9
    assert len(plan.lr) == 10**7
