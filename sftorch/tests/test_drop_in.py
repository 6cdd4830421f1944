"""`import sftorch as schedulefree` is the whole migration: names, positions and defaults of 1.4.1."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
import schedulefree
import torch

import sftorch
from sftorch.tests.plain import CLASSES, some_params

OWN = (
    "AdamCScheduleFreePlusPaper",
    "GPAAdamW",
    "MuonScheduleFree",
    "MuonScheduleFreeClosure",
    "ScheduleFreeWrapper",
    "ship_x",
    "step_in_backward",
)
SHARED = [name for name in sftorch.__all__ if name not in OWN]


@pytest.mark.parametrize("name", SHARED)
def test_arguments_have_upstreams_names_positions_and_defaults(name):
    ours = list(inspect.signature(getattr(sftorch, name)).parameters.values())
    theirs = list(inspect.signature(getattr(schedulefree, name)).parameters.values())
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [p.name for p in theirs]
    assert [p.default for p in positional] == [p.default for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(positional) :])


def test_the_wrapper_takes_upstreams_names():
    ours = inspect.signature(sftorch.ScheduleFreeWrapper).parameters
    theirs = inspect.signature(schedulefree.ScheduleFreeWrapper).parameters
    assert set(theirs) <= set(ours)
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_groups_have_upstreams_keys():
    for name in SHARED:
        (p,) = some_params(shapes=[(2,)])
        (q,) = some_params(shapes=[(2,)])
        ours, theirs = getattr(sftorch, name)([p]), getattr(schedulefree, name)([q])
        assert set(theirs.param_groups[0]) <= set(ours.param_groups[0])


@pytest.mark.parametrize("ninth", [0.9, 0, True, None])
def test_the_ninth_place_is_inner_momentum_for_a_number_and_foreach_else(ninth):
    """1.4.1 has foreach there; upstream's main branch inner_momentum, and foreach after it."""
    args = (0.0025, (0.9, 0.999), 1e-8, 0, 0, 0.0, 2.0)
    group = sftorch.AdamWScheduleFree(some_params(), *args, ninth).param_groups[0]
    is_number = not isinstance(ninth, bool) and ninth is not None
    assert group["inner_momentum"] == (ninth if is_number else 0.0)
    assert group["foreach"] is (True if is_number else ninth)
    if is_number:
        group = sftorch.AdamWScheduleFree(some_params(), *args, ninth, False).param_groups[0]
        assert (group["inner_momentum"], group["foreach"]) == (ninth, False)
        with pytest.raises(TypeError, match="inner_momentum"):
            sftorch.AdamWScheduleFree(some_params(), *args, ninth, inner_momentum=0.5)
    with pytest.raises(ValueError, match=r"foreach must be .* got 0\.9"):
        sftorch.AdamWScheduleFree(some_params(), foreach=0.9)


SUBMODULES = sorted(
    one.name
    for one in pkgutil.iter_modules(schedulefree.__path__)
    if one.name.endswith(("_schedulefree", "_closure"))
)


@pytest.mark.parametrize("name", [name for name in SUBMODULES if not name.startswith("test")])
def test_upstreams_submodules_are_there_under_their_paths(name):
    theirs = importlib.import_module(f"schedulefree.{name}")
    ours = importlib.import_module(f"sftorch.{name}")
    assert getattr(sftorch, name) is ours
    classes = [one for one in vars(theirs) if "ScheduleFree" in one]
    assert classes
    assert all(getattr(ours, one) is getattr(sftorch, one) for one in classes)


def test_what_upstream_has_for_its_own_tests_is_not_here():
    """docs/migration.md says so."""
    theirs = {one for one in vars(schedulefree) if "ScheduleFree" in one}
    missing = {one for one in theirs if not hasattr(sftorch, one)}
    assert missing == {one for one in theirs if one.endswith(("Reference", "Paper"))}
    assert len(missing) == 4


@pytest.mark.parametrize("kind", CLASSES)
def test_it_runs_on_tensors_without_values(kind):
    """As upstream's does, in torch's FakeTensorMode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for package in (schedulefree, sftorch):
        with FakeTensorMode():
            model = torch.nn.Linear(3, 2)
            optimizer = getattr(package, CLASSES[kind].__name__)(model.parameters(), lr=0.1)
            optimizer.train()
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(4, 3)).square().sum().backward()
                optimizer.step()
            optimizer.eval()
            optimizer.train()
        assert optimizer.param_groups[0]["k"] == 3


def test_a_step_compiles_but_not_as_one_whole_graph():
    """docs/migration.md says so; upstream's SGD and AdamW do, as their counters are numbers in the graph."""
    (p,) = some_params(torch.float32, shapes=[(3,)])
    optimizer = sftorch.SGDScheduleFree([p], lr=0.1)
    for whole in (True, False):
        torch._dynamo.reset()
        p.grad = torch.ones(3)
        step = torch.compile(optimizer.step, backend="eager", fullgraph=whole)
        if whole:
            with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable"):
                step()
        else:
            step()
        assert optimizer.param_groups[0]["k"] == (not whole)


def test_importing_it_imports_no_jax():
    code = "import sys, sftorch; sys.exit(bool({'jax', 'sfjax', 'optax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
