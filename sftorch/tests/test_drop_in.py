"""`import sftorch as schedulefree` is the whole migration: names, positions and defaults of 1.4.1."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import schedulefree

import sftorch
from sftorch.tests.plain import some_params

OWN = ("ScheduleFreeWrapper", "ship_x", "step_in_backward")
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


def test_importing_it_imports_no_jax():
    code = "import sys, sftorch; sys.exit(bool({'jax', 'sfjax', 'optax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
