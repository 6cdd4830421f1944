"""Steps inside backward: the same trajectory, and gradients that live only until they are used."""

from __future__ import annotations

import copy

import pytest
import torch

import sftorch
from sftorch.checkpoint import Checkpoints
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, same_bits


def a_model(seed=0):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(6, 6) for _ in range(4)]
    return torch.nn.Sequential(*layers, layers[0], torch.nn.Linear(6, 1))  # the first layer is used twice


def train(model, optimizer, steps=12, each=lambda step: None):
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    for step in range(steps):
        each(step)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def everything(model, optimizer):
    """Returns all that two equal runs have in common: weights, state, books."""
    tensors = list(model.parameters())
    numbers = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    for p in model.parameters():
        tensors += [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        numbers.append({k: v for k, v in optimizer.state[p].items() if not isinstance(v, torch.Tensor)})
    return tensors, numbers


def assert_same_run(one, other):
    (tensors, numbers), (others, other_numbers) = one, other
    assert same_bits(tensors, others)
    assert numbers == other_numbers


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_trajectory_is_that_of_ordinary_steps_bit_for_bit(kind, fused):
    runs = []
    for in_backward in (True, False):
        model = a_model()
        options = {} if kind == "radam" else {"warmup_steps": 5}
        optimizer = CLASSES[kind](model.parameters(), lr=STEP_SIZE, weight_decay=0.1, fused=fused, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4)
        if in_backward:
            sftorch.step_in_backward(optimizer)
        for _ in range(3):
            train(model, optimizer, 3)
            scheduler.step()
        runs.append(everything(model, optimizer))
    assert_same_run(*runs)


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.5), (0.0, 0.0)])
def test_a_scheduled_beta_and_a_frozen_layer_take_the_same_path_too(betas):
    runs = []
    for in_backward in (True, False):
        model = a_model()
        model[2].requires_grad_(False)
        optimizer = sftorch.SGDScheduleFree(model.parameters(), lr=0.01, momentum=betas[0])
        if in_backward:
            sftorch.step_in_backward(optimizer)

        def each(step, model=model, optimizer=optimizer):
            if step == 4:
                model[2].requires_grad_(True)  # not hooked: its steps are ordinary
            if step == 7:
                optimizer.param_groups[0]["momentum"] = betas[1]

        train(model, optimizer, each=each)
        runs.append(everything(model, optimizer))
    assert_same_run(*runs)


@pytest.mark.parametrize("in_backward", [True, False])
def test_gradients_live_until_they_are_used(in_backward):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(5)))
    optimizer = sftorch.AdamWScheduleFree(model.parameters())
    if in_backward:
        sftorch.step_in_backward(optimizer)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad.nbytes for q in model.parameters() if q.grad is not None))
        )
    model(torch.ones(1, 6)).sum().backward()
    total = sum(p.nbytes for p in model.parameters())
    assert alive == ([0] * 5 if in_backward else [total * n // 5 for n in range(1, 6)])


def test_a_second_backward_before_the_step_raises_and_moves_nothing():
    model = a_model()
    optimizer = sftorch.AdamWScheduleFree(model.parameters())
    sftorch.step_in_backward(optimizer)
    train(model, optimizer, 2)
    model(torch.ones(1, 6)).sum().backward()
    held = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"one backward a step.*optimizer\.step\(\) after each"):
        model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert same_bits(model.parameters(), held)
    assert [optimizer.state[p]["step"] for p in model.parameters()] == [3] * 10


def test_in_eval_mode_backward_raises_and_moves_nothing():
    model = a_model()
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    sftorch.step_in_backward(optimizer)
    optimizer.eval()
    held = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="train mode"):
        model(torch.ones(1, 6)).sum().backward()
    assert same_bits(model.parameters(), held)


def test_remove_goes_back_to_ordinary_steps():
    model = a_model()
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    handle = sftorch.step_in_backward(optimizer)
    train(model, optimizer, 1)
    handle.remove()
    model(torch.ones(1, 6)).sum().backward()
    model(torch.ones(1, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert optimizer.metrics()[0]["step"] == 2
    optimizer.zero_grad()
    sftorch.step_in_backward(optimizer)


def a_started_run():
    model = a_model()
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE)
    sftorch.step_in_backward(optimizer)
    train(model, optimizer, 3)
    return model, optimizer


@pytest.mark.parametrize("through", ["state_dict", "checkpoint"])
def test_a_run_goes_back_in_the_middle_of_a_step(through, tmp_path):
    model, optimizer = a_started_run()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, 3)
        wanted = copy.deepcopy(everything(model, optimizer))
        model[0](torch.ones(1, 6)).sum().backward()  # and no step: something has failed
        if through == "checkpoint":
            checkpoints.restore(model, optimizer)
        else:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        train(model, optimizer, 3)
    assert_same_run(everything(model, optimizer), wanted)


def test_a_run_starts_from_weights_in_the_middle_of_a_step(tmp_path):
    model, optimizer = a_started_run()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        runs = []
        for interrupted in (False, True):
            if interrupted:
                model[0](torch.ones(1, 6)).sum().backward()
            checkpoints.restore(model, optimizer, resume=f"weights:{tmp_path}")
            train(model, optimizer, 3)
            runs.append(copy.deepcopy(everything(model, optimizer)))
    assert_same_run(*runs)


def test_it_works_after_loading_state():
    runs = []
    for in_backward in (True, False):
        model = a_model()
        optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE)
        if in_backward:
            sftorch.step_in_backward(optimizer)
        train(model, optimizer, 3)
        optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
        optimizer.param_groups[0]["lr"] = 2 * STEP_SIZE
        train(model, optimizer, 3)
        runs.append(everything(model, optimizer))
    assert_same_run(*runs)


@pytest.mark.parametrize("kind", CLOSURES)
def test_what_needs_all_gradients_at_once_is_refused(kind):
    (p,) = torch.nn.Linear(2, 1, bias=False).parameters()
    with pytest.raises(TypeError, match="all gradients at once"):
        sftorch.step_in_backward(CLOSURES[kind]([p]))
    with pytest.raises(TypeError, match="got ScheduleFreeWrapper"):
        sftorch.step_in_backward(sftorch.ScheduleFreeWrapper(torch.optim.SGD([p], lr=0.1)))


def test_twice_and_with_gradients_it_is_refused():
    model = a_model()
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    model(torch.ones(1, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradients must be None.*zero_grad"):
        sftorch.step_in_backward(optimizer)
    optimizer.zero_grad()
    sftorch.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"once, got it twice.*remove\(\)"):
        sftorch.step_in_backward(optimizer)
