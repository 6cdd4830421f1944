"""The twins held against each other: equation tags, names, defaults, metrics, and who imports whom."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfjax
import sftorch
from parity_tests import golden, reference
from parity_tests.cases import CASES, DEFAULTS
from parity_tests.drivers import DRIVERS
from parity_tests.drivers.jax_runs import precision
from parity_tests.reference import Reference
from sfcore import averaging, laws

PACKAGES = {"sfjax": Path(sfjax.__file__).parent, "sftorch": Path(sftorch.__file__).parent}
KINDS = list(laws.directed())
# What one framework's users expect and the other's have no use for.
JAX_ONLY = {"muon_mask", "state_dtype", "mask", "base_optimizer"}
TORCH_ONLY = {"params", "base", "foreach", "fused", "use_muon", "maximize", "capturable", "differentiable"}
# How state is kept, not what is computed: the equations and the reference know nothing of it.
STORAGE = {"precision", "seed"}


def tags(path: Path) -> list[str]:
    """Returns the equation tags of a file, in order: comments of S1 to S9* at the ends of lines."""
    found = re.findall(r"#((?: S\d\*?)+)$", path.read_text(), re.MULTILINE)
    return [tag for line in found for tag in line.split()]


def sources(package: Path) -> list[Path]:
    """Returns the files of a package without its tests."""
    return [path for path in package.glob("**/*.py") if "tests" not in path.parts]


def of(package: Path, name: str) -> Path:
    """Returns the file of the law's that has a name."""
    (found,) = (path for path in sources(package) if path.stem.lstrip("_") == name)
    return found


def test_the_reference_has_every_equation_once_and_in_order():
    assert list(dict.fromkeys(tags(Path(reference.__file__)))) == [f"S{n}" for n in range(1, 10)]


def test_the_scalars_are_written_once_and_both_twins_ask_there():
    once = ["S2", "S3", "S4", "S5"]
    assert [tag for tag in tags(Path(averaging.__file__)) if tag in once] == once
    for folder in PACKAGES.values():
        assert tags(of(folder, "scalars")) == ["S1"]
        source = "".join(path.read_text() for path in sources(folder))
        assert not re.search(r"expm1|rho_t [-=]|lr_max *\*\*", source)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_other_equation_is_tagged_in_both_twins(package: str):
    folder = PACKAGES[package]
    everywhere = {tag for path in sources(folder) for tag in tags(path)}
    assert everywhere >= {"S1", "S6", "S7", "S8", "S9*"}
    assert {"S7", "S8", "S9*"} <= set(tags(of(folder, "iterates")))
    assert all("S6" in tags(folder / f"{optimizer}.py") for optimizer in KINDS)


def test_the_same_modules_hold_the_same_things():
    shared = {"__init__", "schedule_free", "recalibrate", *KINDS}
    wings = {"law": {"scalars", "iterates"}, "state": {"arguments", "forms"}, "step": {"plan"}}
    for wing, names in {".": shared, **wings}.items():
        assert all(names <= {path.stem for path in (one / wing).glob("*.py")} for one in PACKAGES.values())


def test_every_public_optimizer_has_its_twin():
    jax_side = {name for name in sfjax.__all__ if name.startswith("schedule_free")} - {
        "schedule_free_eval_params"
    }
    torch_side = {name for name in sftorch.__all__ if name[0].isupper() and not name.endswith("Closure")}
    # Of one law, by the names that others gave them.
    jax_side, torch_side = (
        jax_side - {"schedule_free_plus"},
        torch_side - {"AdamCScheduleFreePlusPaper", "GPAAdamW"},
    )
    assert jax_side == {law.jax for law in laws.LAWS.values()}
    assert torch_side == {law.torch for law in laws.LAWS.values()}
    assert {f"{law.torch}Closure" for law in laws.directed().values()} <= set(sftorch.__all__)


def canonical_defaults(callable_: Any) -> dict[str, Any]:
    """Returns canonical option -> default of a signature."""
    parameters = inspect.signature(callable_).parameters.items()
    found = {name: p.default for name, p in parameters if name not in JAX_ONLY | TORCH_ONLY | STORAGE}
    if "betas" in found:
        found["beta"], found["b2"] = found.pop("betas")
    back = {there: name for name, there in laws.JAX_NAMES.items()} | {"momentum": "beta"}
    return {back.get(name, name): value for name, value in found.items()}


@pytest.mark.parametrize("optimizer", KINDS)
def test_defaults_of_both_twins_are_sfcores_and_the_cases(optimizer: str):
    law = laws.LAWS[optimizer]
    assert DEFAULTS[optimizer] == law.defaults
    assert canonical_defaults(getattr(sfjax, law.jax)) == law.defaults
    for form in ("", "Closure"):
        assert canonical_defaults(getattr(sftorch, law.torch + form)) == law.defaults


@pytest.mark.parametrize("optimizer", KINDS)
def test_both_twins_keep_their_state_in_the_same_forms(optimizer: str):
    law = laws.LAWS[optimizer]
    twins = (getattr(sfjax, law.jax), getattr(sftorch, law.torch))
    ours, theirs = (
        {name: inspect.signature(one).parameters[name].default for name in STORAGE} for one in twins
    )
    assert ours == theirs == {"precision": "exact", "seed": 0}


def test_defaults_of_the_wrappers_agree():
    ours = canonical_defaults(sfjax.schedule_free)
    theirs = canonical_defaults(sftorch.ScheduleFreeWrapper)
    assert ours.pop("lr") is inspect.Parameter.empty  # torch's base has it
    # In JAX the base has the rate, and is told the point; in torch it decays z by its own.
    assert ours.pop("decay_at") == "y"
    assert [theirs.pop(name) for name in ("weight_decay_at_y", "decay_power")] == [0, 1]
    assert ours == theirs


@pytest.mark.parametrize(
    "case", ["sgd-warmup-power-1-r-2", "adamw-warmup-prior", "radam-everything", "radam-falling"]
)
def test_metrics_have_the_same_keys_and_are_the_references_numbers(case: str):
    chosen = CASES[case]
    recorded = golden.load_record(chosen.problem)
    truth = Reference(chosen.optimizer, recorded.params, chosen.options)
    runs = {
        name: DRIVERS[name].start(chosen, recorded.params, "float64") for name in ("sfjax", "sftorch foreach")
    }
    for step, lr in enumerate(chosen.lrs[:15]):
        for run in (truth, *runs.values()):
            run.update(recorded.step(step), lr)
        want = {"step": truth.step, "lr_max": truth.lr_max, "c": truth.c, "weight_sum": truth.weight_sum}
        with precision("float64"):
            state = runs["sfjax"].state  # type: ignore[attr-defined]
            params = runs["sfjax"].params  # type: ignore[attr-defined]
            ours = {k: float(np.asarray(v)) for k, v in sfjax.metrics(state, params).items()}
            assert sfjax.metrics(state).keys() | {"x_z_distance"} == ours.keys()
        (theirs,) = runs["sftorch foreach"].optimizer.metrics(distance=True)  # type: ignore[attr-defined]
        gaps = [np.linalg.norm(truth.x[name] - truth.z[name]) for name in truth.x]
        want["x_z_distance"] = float(np.linalg.norm(gaps))
        assert set(ours) == set(theirs) == {*want, "lr", "effective_lr"}
        # RAdam's rho_t is a difference of numbers near 2000, so its rect is right to 1e-12 only.
        assert {k: ours[k] for k in want} == pytest.approx(want, rel=1e-11)
        assert theirs == pytest.approx(ours, rel=1e-11)
        assert theirs["effective_lr"] == theirs["lr"] * (1 - chosen.options["beta"] * (1 - theirs["c"]))


@pytest.mark.parametrize(
    ("package", "other"), [("sfjax", "torch"), ("sftorch", "jax"), ("sfcore", "jax"), ("sfcore", "torch")]
)
def test_importing_one_twin_never_imports_the_others_framework(package: str, other: str):
    code = f"import sys, {package}; sys.exit({other!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGES["sfjax"].parent, check=False)
    assert done.returncode == 0
