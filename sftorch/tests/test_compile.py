"""torch.compile of the step and of the model: right values, and nothing compiled anew in later steps."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.utils import counters

import sftorch
from sftorch.tests.plain import (
    CLASSES,
    CLOSURES,
    STEP_SIZE,
    assert_is,
    feed,
    feed_truth,
    some_grads,
    some_params,
    truth,
)

# torch says of its own profiler, once a process, that it is left out of the graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*record function.*")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled(optimizer, how, backend="aot_eager"):
    if how == "function":
        return torch.compile(lambda: optimizer.step(), backend=backend)
    return torch.compile(optimizer.step, backend=backend)


@pytest.mark.parametrize("how", ["function", "method"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_compiled_step_is_right_and_is_compiled_once(kind, how):
    # RAdam has two programs: one while its second moment is young, one after.
    options, programs = {"weight_decay": 0.1}, 2 if kind == "radam" else 1
    if kind != "radam":
        options["warmup_steps"] = 4
    params, run = some_params(), truth(kind, some_params(), **options)
    optimizer = CLASSES[kind](params, lr=STEP_SIZE, **options)
    step = compiled(optimizer, how)
    for n, of_step in enumerate(some_grads(14, params)):
        lr = STEP_SIZE * (1 + 0.1 * n)
        optimizer.param_groups[0]["lr"] = lr
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.clone()
        step()
        feed_truth(run, [of_step], lr=lr)
        if n == 7:
            assert graphs() == programs
    assert graphs() == programs
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)


def test_schedulers_of_beta_and_decay_compile_nothing_anew():
    params = some_params()
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
    eager = some_params()
    other = sftorch.AdamWScheduleFree(eager, lr=STEP_SIZE)
    step = compiled(optimizer, "method")
    for n, of_step in enumerate(some_grads(10, params)):
        for group in (optimizer.param_groups[0], other.param_groups[0]):
            group.update(betas=(0.9 - 0.01 * n, 0.99), weight_decay=0.01 * n, eps=1e-8 * (n + 1))
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.clone()
        step()
        feed(other, eager, [of_step])
    assert graphs() == 1
    assert_is(params, {str(i): p.detach().numpy() for i, p in enumerate(eager)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_step_agrees_in_narrow_dtypes(dtype):
    runs = []
    for backend in ("aot_eager", None):
        params = some_params(dtype)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, inner_momentum=0.5)
        step = compiled(optimizer, "method", backend) if backend else optimizer.step
        for of_step in some_grads(10, params):
            for p, g in zip(params, of_step, strict=True):
                p.grad = g.clone()
            step()
        runs.append(params + [optimizer.state[p]["z"] for p in params])
    # Scalars are float64 in both; measured: 1.3 eps of float32, none of bfloat16.
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(a.dtype).eps, atol=8 * torch.finfo(a.dtype).eps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch about itself
@pytest.mark.parametrize("kind", CLASSES)
def test_inductor_agrees(kind):
    params, run, grads = some_params(), truth(kind, some_params()), some_grads(12, some_params())
    optimizer = CLASSES[kind](params, lr=STEP_SIZE)
    step = compiled(optimizer, "method", "inductor")
    for of_step in grads:
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.clone()
        step()
    feed_truth(run, grads)
    assert_is(params, run.y)


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_compiled_closure_step_is_right_and_is_compiled_once(kind):
    params, run = some_params(), truth(kind, some_params())
    optimizer = CLOSURES[kind](params, lr=STEP_SIZE)
    step = torch.compile(functools.partial(optimizer.step, lambda: 0.0), backend="aot_eager")
    for n, of_step in enumerate(some_grads(12, params)):
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.clone()
        step()
        if n == 8:
            early = graphs()
    feed_truth(run, some_grads(12, params))
    assert_is(params, run.x)
    assert graphs() == early == (2 if kind == "radam" else 1)


def test_a_compiled_wrapper_step_is_right_and_compiles_no_numbers():
    runs = []
    for compiling in (True, False):
        params = some_params()
        optimizer = sftorch.ScheduleFreeWrapper(torch.optim.RMSprop(params, lr=STEP_SIZE))
        step = compiled(optimizer, "method") if compiling else optimizer.step
        for of_step in some_grads(8, params):
            for p, g in zip(params, of_step, strict=True):
                p.grad = g.clone()
            step()
        runs.append(params)
    assert graphs() == 0  # it runs as it is
    assert_is(runs[0], {str(i): p.detach().numpy() for i, p in enumerate(runs[1])})


def test_a_compiled_model_trains_and_ships_the_same():
    runs = []
    for compiling in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
        shown = torch.compile(model, backend="aot_eager") if compiling else model
        optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE)
        inputs = torch.randn(8, 3, dtype=torch.float64)
        for _ in range(6):
            optimizer.zero_grad()
            shown(inputs).square().mean().backward()
            optimizer.step()
        early = graphs()
        with optimizer.evaluation(), torch.no_grad():
            runs.append(shown(inputs))
        optimizer.zero_grad()
        shown(inputs).square().mean().backward()
        assert graphs() <= early + 1  # without gradients it is another program, once
        runs[-1] = [runs[-1], *optimizer.eval_state_dict(shown).values()]
    assert_is(runs[0], {str(i): value.numpy() for i, value in enumerate(runs[1])})
