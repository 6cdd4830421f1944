"""The fused step against its specification, the single-tensor path: equal bits, whatever the tensors."""

from __future__ import annotations

import copy
import re
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sftorch
from sfcore.checks import HyperparameterError
from sftorch.kernels import call
from sftorch.sgd import SGD
from sftorch.step import backends
from sftorch.step.backends import Move
from sftorch.tests.fused_runs import (
    CASES,
    SHAPES,
    Calls,
    assert_fused_is_single,
    everything,
    same,
    special_run,
)
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, copies, feed, same_bits, some_grads, some_params

TABLES = {"open": CLASSES, "closure": CLOSURES}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# No kernel takes the closure forms of 16-bit parameters.
KERNELS = [(t, d) for t in TABLES for d in DTYPES if (t, d) != ("closure", torch.bfloat16)]


@pytest.fixture
def calls(monkeypatch):
    """Counts the tensors that the kernel steps, and those that the other paths do."""
    return Calls(monkeypatch.setattr)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("table", "dtype"), KERNELS, ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_every_element_is_the_specifications(kind, options, dtype, maximize, table):
    params, grads = special_run(dtype, SHAPES)
    decay = 0.0 if maximize else 0.1
    make = TABLES[table][kind]
    assert_fused_is_single(make, params, grads, weight_decay=decay, maximize=maximize, **options)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("table", [CLASSES, CLOSURES], ids=["open", "closure"])
def test_both_ends_of_beta(beta, table):
    params = some_params(torch.float32)
    assert_fused_is_single(table["adamw"], params, some_grads(6, params), betas=(beta, 0.9))


def test_torchs_own_root_is_an_ulp_away():
    runs = []
    for fused in (True, False):
        params = some_params(torch.float32, [(10_000,)])
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, fused=fused, foreach=fused)
        feed(optimizer, params, some_grads(20, params))
        runs.append(params[0].detach())
    # Measured: 2.4e-7 after 20 steps of 0.05 on values below 5; an ulp of those is 2.4e-7 to 4.8e-7.
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("kind", CLASSES)
def test_dense_tensors_of_one_layout_are_walked_as_memory_and_others_left(kind, calls):
    plain = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    channels_last = torch.nn.Parameter(plain.clone(memory_format=torch.channels_last))
    transposed = torch.nn.Parameter(plain[0, 0].t().contiguous().t())
    misaligned = torch.nn.Parameter(torch.randn(12)[1:])
    strided = torch.nn.Parameter(torch.randn(12)[::2])
    contiguous = torch.nn.Parameter(plain.clone())
    params = [channels_last, transposed, misaligned, strided, contiguous]
    assert [p.is_contiguous() for p in params] == [False, False, True, False, True]

    def alike(p):  # deepcopy and clone keep strides of dense tensors only
        return torch.empty_strided(p.size(), p.stride()).copy_(torch.randn(p.shape))

    runs, fed = [], [[alike(p) for p in params] for _ in range(5)]
    for path in ({"fused": None}, {"fused": False, "foreach": False}):
        own = [torch.nn.Parameter(alike(p).copy_(p.detach())) for p in params]
        optimizer = CLASSES[kind](own, lr=STEP_SIZE, **path)
        for of_step in fed:
            for p, g in zip(own, of_step, strict=True):
                p.grad = g
            optimizer.step()
        runs.append(everything(optimizer, own))
        if path["fused"] is None:
            # z of the strided one is dense, so nothing about it is flat.
            assert (calls.kernel, calls.single) == (4 * 5, 1 * 5)
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_of_another_layout_or_sign_bit_are_copied(calls):
    params = some_params(torch.float32, [(3, 4)] * 3)
    others = copies(params)
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE, fused=True)
    grads = [
        torch.randn(4, 3).t(),
        torch.randn(1, 1).expand(3, 4),
        torch.randn(3, 4, dtype=torch.complex64).conj().imag,
    ]
    assert grads[2].is_neg()
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    held = copies(grads)
    optimizer.step()
    assert (calls.kernel, calls.single) == (3, 0)
    assert same_bits(grads, held)
    # The first step is one of plain SGD from y = z: c = 1, so y' = z + 0 + delta.
    for p, start, g in zip(params, others, grads, strict=True):
        torch.testing.assert_close(p.detach(), start - STEP_SIZE * g, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("exact_root")
def test_complex_parameters_are_pairs_of_reals(calls):
    params = some_params(torch.complex64, [(5, 3), (), (2000,)])
    grads = some_grads(4, params)
    runs = []
    for path in ({"fused": True}, {"fused": False, "foreach": False}):
        own = copy.deepcopy(params)
        optimizer = sftorch.AdamWScheduleFree(own, lr=STEP_SIZE, **path)
        feed(optimizer, own, grads)
        runs.append([torch.view_as_real(t) for t in everything(optimizer, own)])
    assert (calls.kernel, calls.single) == (12, 12)
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_state_that_does_not_match_never_reaches_the_kernel(calls):
    params = some_params(torch.float32, [(4,)])
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(1, params))
    optimizer.state[params[0]]["z"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="size"):
        feed(optimizer, params, some_grads(1, params))
    optimizer.state[params[0]]["z"] = torch.zeros(4, dtype=torch.float64)
    feed(optimizer, params, some_grads(1, params))
    assert calls.kernel == 1


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        made = found if isinstance(found, list | tuple) else [found]
        self.largest = max(self.largest, *(t.numel() for t in made if isinstance(t, torch.Tensor)), 0)
        return found


@pytest.mark.parametrize("kind", CLASSES)
def test_a_fused_step_makes_no_temporaries(kind):
    sizes = {}
    for fused in (True, False):
        params = some_params(torch.float32, [(1000,)])
        optimizer = CLASSES[kind](params, weight_decay=0.1, fused=fused)
        feed(optimizer, params, some_grads(2, params))
        with Sizes() as seen:
            optimizer.step()
        sizes[fused] = seen.largest
    assert sizes[True] < 20  # the scalars
    assert sizes[False] == 1000


def test_fused_is_what_is_picked_unless_one_says_otherwise(calls):
    params = some_params(torch.float32, [(4,)])
    for options in ({}, {"fused": True}, {"fused": True, "foreach": False}, {"foreach": None}):
        before = calls.kernel
        feed(sftorch.SGDScheduleFree(params, **options), params, some_grads(1, params))
        assert calls.kernel == before + 1, options
    for options in ({"fused": False}, {"foreach": False}):
        feed(sftorch.SGDScheduleFree(params, **options), params, some_grads(1, params))
        assert calls.kernel == 4, options


def test_fused_true_says_why_it_cannot():
    half = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    meta = torch.nn.Parameter(torch.ones(2, device="meta"))
    for p, why in (
        (half, "float32, float64, bfloat16, complex64, complex128, got torch.float16"),
        (meta, "CUDA device, got meta"),
    ):
        optimizer = sftorch.SGDScheduleFree([p], fused=True)
        p.grad = torch.ones_like(p)
        with pytest.raises(
            RuntimeError, match=f"fused must be None or False here, got True: .*{re.escape(why)}"
        ):
            optimizer.step()
        assert optimizer.metrics()[0]["step"] == 0
        optimizer.param_groups[0]["fused"] = None
        optimizer.step()
    with pytest.raises(HyperparameterError, match="fused must be None, True or False, got 'yes'"):
        sftorch.SGDScheduleFree([half], fused="yes")


class Marked(torch.nn.Parameter):
    """A subclass that may mean something by its operations."""


def strided():
    return torch.nn.Parameter(torch.ones(8)[::2])


def of_wide_state(optimizer, p):
    optimizer.state[p]["z"] = optimizer.state[p]["z"].double()


UNFIT = {
    "gaps in memory": (strided, None, r"fill their memory in one order, got the strides y \(2,\), z \(1,\)"),
    "a subclass": (lambda: Marked(torch.ones(4)), None, "parameters must be plain tensors, got Marked"),
    "wide state": (
        lambda: torch.nn.Parameter(torch.ones(4)),
        of_wide_state,
        "got y float32 .*, z float64 of",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
@pytest.mark.parametrize("kind", CLASSES)
def test_fused_true_raises_where_a_parameter_would_be_left_and_none_has_moved(kind, what, calls):
    make, spoil, message = UNFIT[what]
    fit, unfit = some_params(torch.float32, [(3,)])[0], make()
    params = [fit, unfit]
    optimizer = CLASSES[kind](params, lr=STEP_SIZE, fused=None)
    feed(optimizer, params, some_grads(2, params))
    if spoil is not None:
        spoil(optimizer, unfit)
    optimizer.param_groups[0]["fused"] = True
    held, state, before = copies(params), repr(optimizer.state_dict()), calls.kernel
    why = rf"fused must be None or False here, got True: .*{message}.*, in 1 of 2 .* of shape \(4,\)"
    with pytest.raises(RuntimeError, match=why):
        feed(optimizer, params, some_grads(1, params))
    assert same_bits(params, held)
    assert repr(optimizer.state_dict()) == state
    assert calls.kernel == before
    optimizer.param_groups[0]["fused"] = None
    feed(optimizer, params, some_grads(1, params))
    assert optimizer.metrics()[0]["step"] == 3


@pytest.mark.parametrize("kind", CLOSURES)
def test_fused_true_raises_in_the_closure_forms_of_16_bit_parameters(kind):
    params = some_params(torch.bfloat16)
    optimizer = CLOSURES[kind](params, lr=STEP_SIZE, fused=True)
    held = copies(params)
    with pytest.raises(
        RuntimeError, match="got True: 16-bit parameters must be in a class without 'Closure'"
    ):
        feed(optimizer, params, some_grads(1, params))
    assert same_bits(params, held)
    assert optimizer.metrics()[0]["step"] == 0
    optimizer.param_groups[0]["fused"] = None
    feed(optimizer, params, some_grads(1, params))
    assert optimizer.metrics()[0]["step"] == 1


def on_cuda(fused, dtype=torch.float32):
    """Returns what a choice needs to know of a move on a CUDA device."""
    p = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
    return Move(SGD, [p], [], [], [p], [p], {}, True, fused, False, None, {})


def test_on_a_cuda_device_fused_must_be_asked_for(monkeypatch):
    monkeypatch.setattr(call, "find_triton", lambda: types.ModuleType("kernel"))
    monkeypatch.setattr(backends, "why_not_triton", lambda move: "")
    assert backends.TRITON.takes(on_cuda(None)) == "fused must be True, got None"
    assert backends.TRITON.takes(on_cuda(False)) == "fused must be True, got False"
    assert backends.TRITON.takes(on_cuda(True)) is None
    assert backends.TRITON.takes(on_cuda(True, torch.bfloat16)) is None
    rounded = on_cuda(True, torch.bfloat16)._replace(keys=torch.zeros(1, 1, 2, dtype=torch.int64))
    assert backends.TRITON.takes(rounded) is None
    for shape, why in (((2, 20), None), ((1, 2, 1 << 30), "rows must have less than 2^31 elements")):
        rounded.ys[0].shape = shape
        found = backends.TRITON.takes(rounded._replace(scales=[rounded.zs[0]]))
        assert found == why or found.startswith(why)
    with pytest.raises(RuntimeError, match=r"on cuda:0 must be of one of float32, .*, got torch.float64"):
        backends.assign(on_cuda(True, torch.float64))


def test_without_triton_there_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sftorch.kernels.triton_step", raising=False)
    monkeypatch.setattr(call, "find_triton", call.find_triton.__wrapped__)
    with pytest.raises(
        RuntimeError, match=r"got True: triton must be importable, got .*: install the version"
    ):
        backends.assign(on_cuda(True))


def test_a_step_on_the_cpu_never_looks_for_triton(monkeypatch):
    monkeypatch.setattr(call, "find_triton", lambda: pytest.fail("it was looked for"))
    params = some_params(torch.float32, [(4,)])
    optimizer = sftorch.SGDScheduleFree(params, fused=True)
    feed(optimizer, params, some_grads(1, params))
    assert optimizer.metrics()[0]["step"] == 1


def test_state_dicts_without_the_option_get_the_default():
    params = some_params()
    optimizer = sftorch.AdamWScheduleFree(params, fused=False)
    feed(optimizer, params, some_grads(2, params))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["fused"]
    fresh = sftorch.AdamWScheduleFree(params)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["fused"] is None
    feed(fresh, params, some_grads(1, params))


def test_autograd_notices_that_weights_moved_under_a_graph():
    (w,) = some_params(torch.float32, [(4,)])
    optimizer = sftorch.SGDScheduleFree([w], lr=STEP_SIZE, fused=True)
    loss = w.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_x_on_demand_has_the_same_bits_on_both_paths(dtype):
    runs = []
    for options in ({"fused": True}, {"fused": False}):
        params = some_params(dtype, [(1003,), (), (0,), (40_000,)])
        optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE, fused=True)
        feed(optimizer, params, some_grads(4, params))
        optimizer.param_groups[0].update(options)
        held = copies(params)
        asked = list(optimizer.eval_params().values())
        optimizer.eval()
        assert same_bits(asked, params)
        runs.append(copies(params))
        optimizer.train()
        assert same_bits(held, params)
    assert same_bits(*runs)


def test_one_changed_bit_in_eval_mode_is_seen_by_the_fast_check_and_judged_by_the_slow_one():
    params = some_params(torch.float32, [(40_000,), (3,)])
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(4, params))
    optimizer.eval()
    with torch.no_grad():
        params[0].view(torch.int32)[39_999] += 1  # rounding that another device may do: allowed
        optimizer.train()
        optimizer.eval()
        params[0][39_999] += 1.0
    with pytest.raises(RuntimeError, match="1 parameter"):
        optimizer.train()


@pytest.mark.parametrize(
    "path", [{"fused": True}, {"fused": False}, {"fused": False, "foreach": False}], ids=str
)
def test_moments_are_averaged_by_one_rounded_share(path):
    p = torch.nn.Parameter(torch.zeros(1000))
    optimizer = sftorch.AdamWScheduleFree([p], inner_momentum=0.999, **path)
    gradient, steps = torch.linspace(0.5, 2.0, 1000), 3000
    for _ in range(steps):
        p.grad = gradient
        optimizer.step()
    gathered = 1.0 - 0.999**steps
    for name, limit in (("exp_avg_sq", gradient.double().square()), ("exp_avg", gradient.double())):
        error = optimizer.state[p][name].double() / (gathered * limit) - 1.0
        # Measured: 1.2e-7 to 1.7e-7; with 0.999 and 0.001 each rounded to float32 it is 1.1e-5 here.
        assert abs(error.mean()) < 3e-6, name
