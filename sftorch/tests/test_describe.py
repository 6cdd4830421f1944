"""optimizer.describe() says what the optimizer then does."""

import pytest
import torch

import sftorch
from sfcore.plan import check

KINDS = {
    "SGDScheduleFree": {"lr": 0.5, "warmup_steps": 7, "r": 1.0},
    "AdamWScheduleFree": {"lr": 0.01, "warmup_steps": 7, "prior_steps": 20, "weight_lr_power": 1.0},
    "RAdamScheduleFree": {"lr": 0.01, "betas": (0.9, 0.99)},
}


def parameters(dtype=torch.float32):
    return [torch.nn.Parameter(torch.ones(2, dtype=dtype))]


@pytest.mark.parametrize("name", KINDS)
def test_the_planned_lr_and_c_are_those_of_the_run(name):
    optimizer = getattr(sftorch, name)(parameters(), **KINDS[name])
    plan = check({"optimizer": f"sftorch.{name}", "total_steps": 40} | KINDS[name])
    for step in range(40):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()
        (metrics,) = optimizer.metrics()
        # Sums in another order: up to 40 roundings of float64.
        assert metrics["lr"] == pytest.approx(plan.lr[step], rel=1e-12)
        assert metrics["c"] == pytest.approx(plan.c[step], rel=1e-12)


def test_every_class_describes_itself():
    for name in (name for name in sftorch.__all__ if "ScheduleFree" in name):
        kind = getattr(sftorch, name)
        base = (
            torch.optim.SGD(parameters(), lr=0.1)
            if name == "ScheduleFreeWrapper"
            else [torch.nn.Parameter(torch.ones(2, 2))]
        )
        told = kind(base).describe(total_steps=100)
        assert f"optimizer     sftorch.{name.removesuffix('Closure')}" in told
        assert "error" not in told, told


def test_schedulefree_plus_is_told_by_its_name_and_its_lr_is_no_learning_rate_of_adamw():
    options = {"weight_decay": 20.0, "sf_beta1_anneal_steps": 50}
    told = sftorch.AdamCScheduleFreePlusPaper(parameters(), **options).describe(total_steps=1000)
    assert "optimizer     sftorch.AdamCScheduleFreePlusPaper" in told
    assert "Polyak steps" in told
    assert "warning" not in told, told  # neither SF302 of its lr 1 nor SF207 of a warm-up that it has not
    gpa = sftorch.GPAAdamW(parameters(), 0.01).describe(total_steps=1000)
    assert "optimizer     sftorch.GPAAdamW" in gpa
    assert "warning" not in gpa, gpa
    assert "SF302" in sftorch.GPAAdamW(parameters()).describe()  # Meta's default of 1 is too much


def test_groups_modes_and_problems_are_told():
    groups = [{"params": parameters()}, {"params": parameters(torch.float16), "lr": 0.5}]
    optimizer = sftorch.AdamWScheduleFree(groups, warmup_steps=200)
    optimizer.eval()
    told = optimizer.describe(total_steps=100, accumulation=4, batchnorm=True)
    assert "group 0: 1 parameters (float32) hold x, to evaluate" in told
    assert "group 1: 1 parameters (float16) hold x, to evaluate" in told
    first, second = told.split("group 1")
    assert "SF205 warmup_steps" in first
    assert "SF503 recalibrate" in first
    assert ("SF501" in first, "SF501" in second, "SF302" in second) == (False, True, True)


def test_nothing_is_printed_and_nothing_changes(capsys):
    optimizer = sftorch.SGDScheduleFree(parameters(), lr=1.0)
    before = repr(optimizer.state_dict())
    optimizer.describe()
    assert repr(optimizer.state_dict()) == before
    assert capsys.readouterr() == ("", "")
