"""A law of one file goes everywhere a law goes: the next optimizer is a row and a direction."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sfjax
import sftorch
from parity_tests import cases, coverage, golden, toy_law
from parity_tests.compare import assert_same
from parity_tests.drivers import DRIVERS
from parity_tests.mistakes import reference_driver
from parity_tests.tolerances import TOLERANCES
from parity_tests.toy_law import AdagradScheduleFree, Options, schedule_free_adagrad
from sfcore import inspection, laws, plan
from sfcore.checks import HyperparameterError
from sfcore.exchange import CheckpointError
from sfcore.names import between
from sfjax.checkpoint import Checkpoints as JaxCheckpoints
from sfjax.checkpoint import export_exchange, import_exchange
from sftorch.checkpoint import Checkpoints, import_state_dict

# No kernel knows it, so that those that ask for one do not run it.
TWINS = ["sfjax", "sftorch foreach", "sftorch single", "sftorch closure"]
LR, OPTIONS = 0.05, {"warmup_steps": 3, "weight_decay": 0.1}
SHAPES = {"weight": (3, 2), "bias": (3,)}


@pytest.fixture(autouse=True)
def law():
    with toy_law.joined():
        yield


def gradients(steps: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{name: rng.standard_normal(shape) for name, shape in SHAPES.items()} for _ in range(steps)]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(2, 3, dtype=torch.float64)


def optimizer_of(model: torch.nn.Module) -> AdagradScheduleFree:
    return AdagradScheduleFree(model.parameters(), LR, **OPTIONS)


def steps(model: torch.nn.Module, optimizer: AdagradScheduleFree, first: int, last: int) -> None:
    for grads in gradients(last)[first:]:
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(grads[name])
        optimizer.step()


def saved(folder: Path, last: int) -> tuple[torch.nn.Module, AdagradScheduleFree, Path]:
    """Returns a run that has been saved, and where."""
    model = network()
    optimizer = optimizer_of(model)
    steps(model, optimizer, 0, last)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    assert path is not None
    return model, optimizer, path


def jax_steps(tx, params, state, first: int, last: int):
    for grads in gradients(last)[first:]:
        mine = {name: jnp.asarray(grads[name]) for name in params}
        updates, state = tx.update(mine, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def everything(optimizer: AdagradScheduleFree) -> list[bytes]:
    tensors = [p.detach() for p in optimizer.eval_params()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [tensor.numpy().tobytes() for tensor in tensors]


def test_the_suite_lacks_nothing_of_it():
    assert coverage.find_gaps() == []


@pytest.mark.parametrize("case", ["ramp", "eps", "defaults", "decay", "beta-0", "zeros", "scales", "r-1"])
@pytest.mark.parametrize("driver", TWINS)
def test_every_twin_and_backend_takes_the_path_of_the_reference(driver, case):
    case = cases.CASES[f"adagrad-{case}"]
    assert DRIVERS[driver].supports(case)
    recorded = golden.load_record(case.problem)
    truth = reference_driver("adagrad").run(case, recorded)
    assert_same(driver, DRIVERS[driver].run(case, recorded), truth, TOLERANCES["float64", "golden"])


def test_where_no_kernel_knows_it_the_next_backend_runs_and_fused_true_says_why():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = AdagradScheduleFree([p], fused=True)
    with pytest.raises(RuntimeError, match=r"fused must be None or False here, got True: .*direction"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]
    assert not optimizer.state[p]


def test_a_checkpoint_and_a_state_dict_resume_it_in_the_same_bits(tmp_path):
    model, optimizer, _ = saved(tmp_path, 5)
    kept, weights = optimizer.state_dict(), model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    for way in ("checkpoint", "state dict"):
        again = network()
        other = optimizer_of(again)
        if way == "checkpoint":
            with Checkpoints(tmp_path) as checkpoints:
                assert checkpoints.restore(again, other, strict=True).notices == []
        else:
            again.load_state_dict(weights)
            other.load_state_dict(kept)
        steps(again, other, 5, 9)
        unbroken = network()
        whole = optimizer_of(unbroken)
        steps(unbroken, whole, 0, 9)
        assert everything(other) == everything(whole), way


def test_jax_resumes_it_in_the_same_bits(tmp_path):
    tx = schedule_free_adagrad(LR, **OPTIONS)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    with jax.numpy_dtype_promotion("standard"):
        params, state = jax_steps(tx, params, tx.init(params), 0, 5)
        hyperparameters = Options(lr=LR, **OPTIONS)
        with JaxCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(5, params, state, hyperparameters=hyperparameters)
        with JaxCheckpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(params, tx.init(params), hyperparameters=hyperparameters, strict=True)
        assert found.meta.optimizer == "adagrad"
        unbroken = jax_steps(tx, params, state, 5, 9)
        resumed = jax_steps(tx, found.params, found.opt_state, 5, 9)
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(unbroken), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_it_crosses_to_jax_and_back(tmp_path):
    with jax.enable_x64(True):
        model, optimizer, _ = saved(tmp_path / "torch", 5)
        tx = schedule_free_adagrad(LR, **OPTIONS)
        params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
        same = between(SHAPES, SHAPES)
        there = import_exchange(
            tmp_path / "torch", params, tx.init(params), names=same, hyperparameters=Options(lr=LR, **OPTIONS)
        )
        params, state = jax_steps(tx, there.params, there.opt_state, 5, 9)
        export_exchange(
            tmp_path / "jax", params, state, step=9, hyperparameters=Options(lr=LR, **OPTIONS), names=same
        )
        back = network()
        other = optimizer_of(back)
        with Checkpoints(tmp_path / "jax") as checkpoints:
            checkpoints.restore(back, other)
        steps(model, optimizer, 5, 12)
        steps(back, other, 9, 12)
    for ours, theirs in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_programs_that_speak_of_optimizers_know_it(tmp_path):
    _, optimizer, path = saved(tmp_path, 2)
    assert inspection.inspect(path)["optimizer"] == "adagrad"
    told = plan.check({"optimizer": "sftorch.AdagradScheduleFree", "lr": 0.05, "inner_momentum": 0.9})
    assert any(problem.code == "SF306" for problem in told.problems)  # of an option that it has not
    assert "Adagrad" in optimizer.describe()
    told = sfjax.describe(schedule_free_adagrad, 0.05, warmup_steps=5, total_steps=100)
    assert "5 optimizer steps, by optimizer" in told  # nobody has one in an unknown law


def test_it_has_no_lean_form_and_says_so_in_both_twins():
    with pytest.raises(HyperparameterError, match=r"precision must be 'exact' .*Adagrad.*total"):
        schedule_free_adagrad(precision="lean")
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(HyperparameterError, match="precision must be 'exact'"):
        AdagradScheduleFree([p], precision="lean")


def test_state_that_no_row_names_is_never_saved_or_taken_for_another_laws(tmp_path, monkeypatch):
    model, optimizer, path = saved(tmp_path, 2)
    tx = schedule_free_adagrad(LR, eps=1e-6)
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state = tx.init(params)
    monkeypatch.delitem(laws.LAWS, "adagrad")
    with Checkpoints(tmp_path / "other") as checkpoints, pytest.raises(CheckpointError, match="got sum"):
        checkpoints.save(model, optimizer)
    strange = pytest.raises(CheckpointError, match=r"must be of a known law .*, got adagrad")
    with Checkpoints(path.parent) as checkpoints, strange:
        checkpoints.restore(model, sftorch.AdamWScheduleFree(model.parameters()))
    with pytest.raises(ValueError, match="got the state sum"):
        import_state_dict(sftorch.AdamWScheduleFree(model.parameters()), optimizer.state_dict())
    with JaxCheckpoints(tmp_path / "jax") as theirs, pytest.raises(CheckpointError, match="got total"):
        theirs.save(1, params, state)
