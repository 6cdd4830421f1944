"""sftorch against schedulefree 1.4.1: names, arguments, state, and trajectories on the whole grid."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import pytest
import schedulefree
import torch

import sftorch
from parity_tests import golden
from parity_tests.cases import LRS, Case
from parity_tests.compare import assert_same
from parity_tests.drivers import Driver, Run, torch_runs
from parity_tests.problems import Record
from parity_tests.tolerances import TOLERANCES
from parity_tests.trajectory import Trajectory
from sfcore import laws

_SMOOTH = golden.load_record("smooth")
# Two leaves, so that a group has several; the goldens have all shapes.
RECORD = Record(*({k: a[k] for k in ("kernel", "bias")} for a in (_SMOOTH.params, _SMOOTH.grads)))
THEIRS = {
    name: law.elsewhere["schedulefree"]
    for name, law in laws.directed().items()
    if "schedulefree" in law.elsewhere
}
CLASSES = [name + form for name in THEIRS.values() for form in ("", "Closure")]
PATHS = {"foreach": {"foreach": True}, "single": {"foreach": False}, "fused": {"fused": True}}
NOTED = (0, 1, 2, 5, 6, 7, 10, 20)  # planted mistakes show by step 10


def _grid() -> list[Case]:
    """Returns every combination of every optimizer's options."""
    shared: dict[str, tuple[Any, ...]] = {
        "beta": (0.5, 0.9, 0.98),
        "weight_decay": (0.0, 0.1),
        "r": (0.0, 1.0),
        "weight_lr_power": (0.0, 1.0, 2.0),
    }
    moments: dict[str, tuple[Any, ...]] = {"b2": (0.9, 0.999)}
    own = {
        "sgd": {"warmup_steps": (0, 1, 7)},
        "adamw": {"warmup_steps": (0, 7), "eps": (1e-8, 1e-2)} | moments,
        "radam": {"silent_sgd_phase": (True, False)} | moments,
    }
    cases = []
    for optimizer, options in own.items():
        axes = shared | options
        for values in itertools.product(*axes.values()):
            changed = dict(zip(axes, values, strict=True)) | {"lr": LRS[optimizer]}
            id = "-".join([optimizer, *(f"{name}={value}" for name, value in changed.items())])
            schedule = "sawtooth" if changed["r"] else "constant"
            cases.append(
                Case(id, "one point of the grid", "grid", optimizer, changed, schedule, steps=NOTED[-1])
            )
    return cases


@pytest.mark.parametrize(
    ("path", "closure"),
    [
        *(pytest.param(path, False, marks=[pytest.mark.slow] * (path == "single")) for path in PATHS),
        # The closure forms share each path with the others.
        *(pytest.param(path, True, marks=pytest.mark.slow) for path in PATHS),
    ],
)
@pytest.mark.parametrize("optimizer", THEIRS)
def test_the_whole_grid_follows_upstream(optimizer: str, closure: bool, path: str):
    suffix = "Closure" if closure else ""
    tolerance = TOLERANCES["float64", "upstream"]
    runs = _upstreams(optimizer, suffix)
    for case, theirs in runs:
        ours = _driver("ours", suffix, **PATHS[path]).run(case, RECORD, noted=NOTED)
        assert_same(f"sftorch against schedulefree 1.4.1, {case.id}", ours, theirs, tolerance)
    assert len(runs) >= 72


@functools.cache
def _upstreams(optimizer: str, suffix: str) -> list[tuple[Case, Trajectory]]:
    """Returns upstream's runs of the grid, once for all paths of ours."""
    driver = _driver("upstream", suffix, foreach=True)
    cases = [case for case in _grid() if case.optimizer == optimizer]
    return [(case, driver.run(case, RECORD, noted=NOTED)) for case in cases]


def _driver(make: str, suffix: str, **path: bool) -> Driver:
    run = {
        ("ours", ""): torch_runs.OurRun,
        ("ours", "Closure"): torch_runs.OurClosureRun,
        ("upstream", ""): torch_runs.TorchRun,
        ("upstream", "Closure"): torch_runs.ClosureRun,
    }[make, suffix]

    def start(case: Case, params: Any, dtype: str) -> Run:
        def made(case: Case, leaves: list[torch.Tensor]) -> Any:
            return getattr(torch_runs, make)(case, leaves, suffix, **path)

        return run(made, case, params, dtype)

    return Driver(make, start, LRS)


def _parameters(module: Any, name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(module, name)).parameters)


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_their_order_and_defaults_are_upstreams(name: str):
    ours, theirs = _parameters(sftorch, name), _parameters(schedulefree, name)
    positional = [k for k, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == list(theirs)
    assert {k: ours[k].default for k in theirs} == {k: p.default for k, p in theirs.items()}


def _stepped(module: Any, name: str) -> Any:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = getattr(module, name)([p], lr=0.5)
    if not name.endswith("Closure"):
        optimizer.train()
    for _ in range(7):
        p.grad = torch.full_like(p, 0.25)
        optimizer.step(lambda: 0.0)
    return optimizer


@pytest.mark.parametrize("name", CLASSES)
def test_state_and_group_keys_of_upstream_are_kept(name: str):
    ours, theirs = _stepped(sftorch, name), _stepped(schedulefree, name)
    mine, upstreams = (next(iter(optimizer.state.values())) for optimizer in (ours, theirs))
    assert set(upstreams) <= set(mine)
    for key, value in upstreams.items():
        assert torch.allclose(mine[key], value, rtol=1e-13, atol=0)
    group, other = ours.param_groups[0], theirs.param_groups[0]
    assert set(other) <= set(group)
    numbers = [key for key in other if isinstance(other[key], float | int)]
    assert {"scheduled_lr", "weight_sum", "lr_max", "k"} <= set(numbers)
    # Both add up the same seven doubles; rect is another formula's rounding.
    assert {key: group[key] for key in numbers} == pytest.approx(
        {key: other[key] for key in numbers}, rel=1e-10
    )


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith("Closure")])
def test_a_state_dict_of_upstream_continues_here(name: str):
    theirs = _stepped(schedulefree, name)
    weights = [p.detach().clone() for group in theirs.param_groups for p in group["params"]]
    p = torch.nn.Parameter(weights[0].clone())
    ours = getattr(sftorch, name)([p], lr=0.5)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch's own would share the tensors
    for optimizer in (ours, theirs):
        (leaf,) = optimizer.param_groups[0]["params"]
        leaf.grad = torch.full_like(leaf, -1.0)
        optimizer.step()
        optimizer.eval()
    assert torch.allclose(p, theirs.param_groups[0]["params"][0], rtol=1e-12, atol=0)
    assert not torch.equal(p, weights[0])
