"""Steps of lists: Adam's by torch's fused operation, and every one in groups of bounded size."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import sftorch
from sftorch.checkpoint import Checkpoints
from sftorch.law import lists
from sftorch.tests.fused_runs import everything
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, feed, same_bits, some_grads, some_params

SHAPES = [(1003,), (3, 5), (0,), (), (2, 3, 4, 5)]
LISTS, SINGLE = {"fused": False}, {"fused": False, "foreach": False}


@pytest.fixture
def fused_calls(monkeypatch):
    """Notes how many tensors each call of the fused operation has."""
    seen, operation = [], torch._fused_adamw_

    def noting(*args, **options):
        seen.append(len(args[0]))
        return operation(*args, **options)

    lists._is_there("cpu")
    monkeypatch.setattr(torch, "_fused_adamw_", noting)
    return seen


def run(path, steps=30, dtype=torch.float64, kind="adamw", shapes=SHAPES, **options):
    """Returns all that a run ends with."""
    params = some_params(dtype, shapes)
    optimizer = CLASSES[kind](params, lr=STEP_SIZE, **path, **options)
    feed(optimizer, params, some_grads(steps, params))
    return everything(optimizer, params)


def off(found, wanted):
    """Returns the largest distance, relative to max(1, |wanted|)."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True) if a.numel()]
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs)


OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decay_at": "z"},
    {"maximize": True, "weight_decay": 0.1},
    {"betas": (1.0, 0.9)},
    {"betas": (0.3, 0.0), "weight_decay": 0.1},
    {"warmup_steps": 10, "r": 2.0},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adamw_is_the_single_tensor_path_to_rounding(options, dtype, fused_calls):
    assert off(run(LISTS, dtype=dtype, **options), run(SINGLE, dtype=dtype, **options)) < 1e-12
    assert len(fused_calls) == 29  # all but the first, whose c is 1


def test_radam_is_it_too_once_its_second_moment_is_usable(fused_calls):
    options = {"kind": "radam", "weight_decay": 0.1, "silent_sgd_phase": False}
    assert off(run(LISTS, **options), run(SINGLE, **options)) < 1e-12
    assert len(fused_calls) == 26  # from the fifth on


def error(make, steps=300):
    """Returns how far z of a float32 run is from a float64 one, in the root of the mean of squares."""
    found = []
    for dtype in (torch.float32, torch.float64):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in some_params(torch.float32, [(4000,)])]
        optimizer = make(params)
        random = torch.Generator().manual_seed(0)
        for _ in range(steps):
            params[0].grad = torch.randn(4000, generator=random).to(dtype)
            optimizer.step()
        found.append(optimizer.state[params[0]].get("z", params[0].detach()).double())
    return (found[0] - found[1]).square().mean().sqrt().item()


def test_float32_is_as_near_to_float64_as_the_single_tensor_path(fused_calls):
    """Measured: 1.0 times."""
    lists_, single = (
        error(lambda p, path=path: sftorch.AdamWScheduleFree(p, 1e-3, **path)) for path in (LISTS, SINGLE)
    )
    assert 0 < lists_ < 1.2 * single
    assert len(fused_calls) == 2 * 299


def test_a_decay_is_rounded_as_torchs_own(fused_calls):
    """Measured: 1.2 times its error, which is 19 times that of the single-tensor path."""
    options = {"lr": 1e-4, "weight_decay": 0.01}
    ours = error(lambda p: sftorch.AdamWScheduleFree(p, **options, **LISTS))
    theirs = error(lambda p: torch.optim.AdamW(p, betas=(0.0, 0.999), foreach=True, **options))
    assert ours < 1.5 * theirs
    assert len(fused_calls) == 2 * 299


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_take_the_plain_operations(dtype, fused_calls):
    run(LISTS, dtype=dtype)
    assert fused_calls == []


def test_gradients_are_not_written_to_and_autograd_is_not_told_so(fused_calls):
    params = some_params(torch.float32, SHAPES)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, maximize=True, **LISTS)
    for grads in some_grads(3, params):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        versions = [p.grad._version for p in params], [p._version for p in params]
        optimizer.step()
        assert same_bits([p.grad for p in params], grads)
        assert [p.grad._version for p in params] == versions[0]
        assert all(p._version > old for p, old in zip(params, versions[1], strict=True))
    assert fused_calls


def test_where_nothing_moves_no_bit_does():
    params = some_params(torch.float32, [(1003,)])
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, weight_decay=0.1, **LISTS)
    feed(optimizer, params, some_grads(3, params))
    held = [p.detach().clone() for p in (*params, optimizer.state[params[0]]["z"])]
    optimizer.param_groups[0].update(lr=0.0, weight_lr="current")
    feed(optimizer, params, some_grads(3, params))
    assert same_bits([*params, optimizer.state[params[0]]["z"]], held)


PLAIN = {
    "y is z": {"betas": (0.0, 0.9)},
    "y is nearly z": {"betas": (0.001, 0.9)},
    "b2 is nearer to 1 than float32 can tell": {"betas": (0.9, 0.9999999)},
    "eps is nearer to 0": {"eps": 1e-40},
    "there is a first moment": {"inner_momentum": 0.5},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_what_the_fused_operation_cannot_do_takes_the_plain_ones(options, fused_calls):
    found, wanted = (run(path, 5, torch.float32, **options) for path in (LISTS, SINGLE))
    assert fused_calls == []
    assert off(found, wanted) < 1e-5


def test_a_torch_without_the_operation_takes_the_plain_ones(monkeypatch):
    usual = run(LISTS)
    lists._is_there.cache_clear()
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_fused_adamw_")
        assert off(run(LISTS), usual) < 1e-12
    lists._is_there.cache_clear()

    def refusing(*args, **options):
        raise NotImplementedError("no kernel for the CPU")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_fused_adamw_", refusing)
        assert off(run(LISTS), usual) < 1e-12
    lists._is_there.cache_clear()


def test_only_the_elements_of_a_parameter_are_walked(fused_calls):
    """One with gaps, one in another order than its gradient, one in channels_last: as contiguous ones."""
    runs = []
    for contiguous in (False, True):
        random = torch.Generator().manual_seed(0)
        memory = [torch.randn(40, 50, generator=random) for _ in range(3)]
        image = torch.randn(4, 3, 5, 5, generator=random)
        params = [memory[0][:, ::2], memory[1].t(), image.contiguous(memory_format=torch.channels_last)]
        params = [torch.nn.Parameter(p.contiguous() if contiguous else p) for p in params]
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, weight_decay=0.1, **LISTS)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random)
            if not contiguous:
                params[2].grad = params[2].grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
        runs.append([p.detach().clone() for p in params])
        if not contiguous:
            fresh = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
            assert same_bits([memory[0][:, 1::2]], [fresh[:, 1::2]])
    assert off(*runs) < 1e-5
    assert fused_calls == [3] * 3  # of the contiguous run


def test_a_second_moment_is_a_mean_of_squares():
    """With b2 as it is, rounded apart from 1 - b2 by the operation, the mean is off by 1.3e-5 in the end."""
    b2, size = 0.999, 500
    random, steps = torch.Generator().manual_seed(0), 4000
    y, z, v = (torch.zeros(size) for _ in range(3))
    exact = torch.zeros(size, dtype=torch.float64)
    memory = lists.memory_for([[z]])
    for t in range(1, steps + 1):
        g = torch.randn(size, generator=random)
        k2 = 1 - 0.9 * (1 - 1 / (t + 1))
        numbers = (1e-3, 0.0, 0.0, 1 / (t + 1), k2, b2, 1e-8, 0.0, -math.expm1(t * math.log(b2)), 1.0)
        of = lists.numbers_of(numbers, torch.float32)
        assert of is not None
        lists.step_([y], [z], [v], [g], of, lists.moments_in(memory, [z]), memory.time, False)
        exact.mul_(b2).addcmul_(g.double(), g.double(), value=1 - b2)
        if t in (1, 10, 100, 1000, steps):
            mean = v.double() / -math.expm1(t * math.log(of.b2)) / (exact / -math.expm1(t * math.log(b2)))
            assert abs(mean.mean().item() - 1) < 1e-6


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_groups_of_any_size_have_the_same_numbers(kind, dtype, monkeypatch):
    whole = run(LISTS, 4, dtype, kind, weight_decay=0.1)
    for limit in (7, 100):
        monkeypatch.setitem(lists.GROUP, "cpu", limit)
        cut = lists.groups_of([some_params(torch.float32, SHAPES)])
        assert max(sum(end - begin for _, begin, end in group if end) for group in cut) <= limit
        found = run(LISTS, 4, dtype, kind, weight_decay=0.1)
        assert off(found, whole) < 1e-12 if dtype is torch.float64 else same_bits(found, whole)


def test_a_step_of_large_tensors_makes_little_for_a_moment():
    """The plain form made 8 bytes a parameter."""
    params = some_params(torch.float32, [(1_000_000,)])
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, weight_decay=0.1, **LISTS)
    feed(optimizer, params, some_grads(1, params))
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    made = sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.nbytes() > 0)
    assert made <= 4 * lists.GROUP["cpu"] + 4096


def cut_at(monkeypatch, number):
    """Lets the call of this number raise an interrupt."""
    calls, operation = [], torch._foreach_lerp_

    def cut(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return operation(*args)

    monkeypatch.setattr(torch, "_foreach_lerp_", cut)


MIDWAY = r"must be of one step, got those of a step that an interrupt or an error ended midway: restore"


@pytest.mark.parametrize("number", [1, 2])
def test_a_step_that_is_interrupted_says_so_until_something_whole_is_there(number, monkeypatch, tmp_path):
    model = torch.nn.Linear(5, 3)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE, **LISTS)
    grads = some_grads(3, model.parameters())
    feed(optimizer, list(model.parameters()), grads[:2])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        wanted = [t.clone() for t in everything(optimizer, list(model.parameters()))]
        with monkeypatch.context() as patch:
            cut_at(patch, number)
            with pytest.raises(KeyboardInterrupt):
                feed(optimizer, list(model.parameters()), grads[2:])
        held = [p.detach().clone() for p in model.parameters()]
        for call in (
            optimizer.step,
            optimizer.eval,
            optimizer.train,
            optimizer.state_dict,
            optimizer.eval_params,
        ):
            with pytest.raises(RuntimeError, match=MIDWAY):
                call()
        with pytest.raises(RuntimeError, match=MIDWAY):
            checkpoints.save(model, optimizer)
        assert same_bits(model.parameters(), held)
        checkpoints.restore(model, optimizer)
    assert same_bits(everything(optimizer, list(model.parameters())), wanted)
    feed(optimizer, list(model.parameters()), grads[2:])
    with monkeypatch.context() as patch:
        cut_at(patch, number)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert same_bits(everything(optimizer, list(model.parameters())), wanted)
    with monkeypatch.context() as patch:
        cut_at(patch, number)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.rebase()
    optimizer.step()


def test_a_closure_form_that_is_interrupted_says_so_too(monkeypatch):
    params = some_params(torch.float32, [(5,)])
    optimizer = CLOSURES["adamw"](params, lr=STEP_SIZE, **LISTS)
    feed(optimizer, params, some_grads(1, params))
    with monkeypatch.context() as patch:
        cut_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(lambda: 0.0)
    with pytest.raises(RuntimeError, match=MIDWAY + r".* saved last$"):
        optimizer.step(lambda: 0.0)


def test_a_step_in_backward_that_is_interrupted_says_so_too(monkeypatch):
    model = torch.nn.Linear(2, 1)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE, **LISTS)
    sftorch.step_in_backward(optimizer)
    with monkeypatch.context() as patch:
        cut_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match=MIDWAY):
        optimizer.step()
