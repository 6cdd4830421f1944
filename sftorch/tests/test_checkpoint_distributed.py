"""torch.distributed.checkpoint in a single process: its helpers and its files."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from sftorch.tests.checkpoint_runs import LENGTH, Case, build, digest, train

CASES = [Case(kind, "float32", 1, 10, "train") for kind in ("sgd", "adamw", "radam", "wrapper")]
# It warns that no process group was made, which is what a single process is.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def until_saved(case):
    model, optimizer = build(case)
    train(model, optimizer, case, 0, case.saved_at)
    return model, optimizer


def finish(model, optimizer, case, generator):
    """Finishes a run with the random numbers that it had when it was saved."""
    optimizer.train()
    torch.set_rng_state(generator)
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = None
    for step in range(case.saved_at, LENGTH):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_goes_on_exactly_through_its_files(case, flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = until_saved(case)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    generator = torch.get_rng_state()
    expected = finish(model, optimizer, case, generator)
    model, optimizer = build(case, seed=9)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    found = finish(model, optimizer, case, generator)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_state_keeps_its_types_through_its_files(case, tmp_path):
    model, optimizer = until_saved(case)
    before = repr(optimizer.state_dict())
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
    model, optimizer = build(case, seed=9)
    _, state = get_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert repr(optimizer.state_dict()) == before


def test_a_state_of_the_wrong_weights_is_refused_through_its_files(tmp_path):
    case = CASES[1]
    model, optimizer = until_saved(case)
    _, state = get_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
    model, optimizer = build(case, seed=9)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    with pytest.raises(RuntimeError, match="must be the x or the y of the loaded optimizer state"):
        optimizer.train()


def test_weights_saved_as_x_are_recognised_through_the_helpers():
    case = CASES[1]
    model, optimizer = until_saved(case)
    optimizer.eval()
    weights, state = map(copy.deepcopy, get_state_dict(model, optimizer))
    expected = finish(model, optimizer, case, torch.get_rng_state())
    model, optimizer = build(case, seed=9)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert all(
        torch.equal(a, b)
        for a, b in zip(finish(model, optimizer, case, torch.get_rng_state()), expected, strict=True)
    )


def test_the_digest_sees_a_changed_bit():
    model, optimizer = until_saved(CASES[1])
    generator = torch.get_rng_state()
    before = digest(model, optimizer)
    torch.set_rng_state(generator)
    optimizer.state[model[0].weight]["z"].view(torch.int32)[0, 0] ^= 1
    assert digest(model, optimizer) != before
