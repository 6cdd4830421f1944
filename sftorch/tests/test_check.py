"""The Triton step is used only where a trial on scratch memory has found it right; faults leave no trace.

Most of this runs with a stand-in for the kernel, which goes wrong in every way; the kernel itself is tried in
Triton's interpreter.
"""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch

import sftorch
from sftorch.adamw import ADAMW
from sftorch.kernels import call
from sftorch.radam import YOUNG
from sftorch.sgd import SGD
from sftorch.step import backends, check
from sftorch.tests.fused_runs import everything
from sftorch.tests.plain import STEP_SIZE, feed, same_bits, some_grads, some_params

KERNEL = "sftorch.kernels.triton_step"


def right(move, numbers):
    backends.SINGLE.run(move, numbers)


def one_wrong_bit(move, numbers):
    right(move, numbers)
    move.zs[-1].view(torch.int32)[-1:].bitwise_xor_(1)


def beyond_the_end(move, numbers):
    right(move, numbers)
    y = move.ys[0]
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).add_(1)


def before_the_start(move, numbers):
    right(move, numbers)
    v = move.zs[0]
    v.as_strided((1,), (1,), v.storage_offset() - 1).zero_()


def a_written_gradient(move, numbers):
    right(move, numbers)
    move.grads[2].mul_(2)


def no_decay_at_z(move, numbers):
    lr_t, wd_y, _, *others = numbers
    right(move, (lr_t, wd_y, 0.0, *others))


def never_ascending(move, numbers):
    right(move._replace(maximize=False), numbers)


def no_compilation(move, numbers):
    raise SyntaxError("at 7:11: unsupported operation")


def no_launch(move, numbers):
    right(move, numbers)
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


FAULTS = {
    one_wrong_bit: r"it must have the bits of the single-tensor path, got others: ",
    beyond_the_end: r"got others: 1 of .* in y",
    before_the_start: r"got others: 1 of .* in z",
    a_written_gradient: r"in g",
    no_decay_at_z: r"got others: .* in y, .* in z",
    never_ascending: r"got others: .* in z",
    no_compilation: r"it must run, got SyntaxError: at 7:11: unsupported operation",
    no_launch: r"it must run, got RuntimeError: Triton Error \[CUDA\]",
}


@pytest.fixture
def kernel(monkeypatch):
    """Returns a function that puts a stand-in in Triton's place, for the CPU; counts its real moves."""
    moves = []

    def put(run):
        def counting(move, numbers):
            moves.extend([move] * (len(move.ys) != len(check.SIZES)))
            run(move, numbers)

        backends._tried.cache_clear()
        taking = backends._kernel(
            "triton",
            "cpu",
            backends._CUDA_DTYPES,
            lambda move: None,
            counting,
            lambda move: backends.why_not_triton(move),
        )
        monkeypatch.setattr(backends, "TRITON", taking)
        monkeypatch.setattr(backends, "BACKENDS", [taking, *backends.BACKENDS[-3:]])
        return moves

    yield put
    backends._tried.cache_clear()


def run(**options):
    params = some_params(torch.float32)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, weight_decay=0.1, **options)
    feed(optimizer, params, some_grads(3, params))
    return everything(optimizer, params)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_means_lists_with_a_line_and_the_state_untouched(fault, kernel, monkeypatch, caplog):
    moves = kernel(fault)
    monkeypatch.setenv(check.VARIABLE, "1")
    with caplog.at_level(logging.WARNING, "sftorch"):
        found = run()
    assert same_bits(found, run(fused=False))
    assert moves == []
    (line,) = caplog.messages
    assert line.startswith("the Triton step is not used on cpu, and steps take the lists: it must ")
    params = some_params(torch.float32)
    held = [p.detach().clone() for p in params]
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, weight_decay=0.1, fused=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"fused must be None or False here.*" + FAULTS[fault]):
            feed(optimizer, params, some_grads(1, params))
    assert same_bits(params, held)
    assert not optimizer.state
    assert moves == []
    assert caplog.messages == [line]
    optimizer.param_groups[0]["fused"] = None
    feed(optimizer, params, some_grads(1, params))


def test_a_kernel_that_is_right_is_used_with_fused_true_and_by_default_where_it_is_wanted(
    kernel, monkeypatch, caplog
):
    moves = kernel(right)
    for variable, options, used in (
        (None, {}, 0),
        (None, {"fused": True}, 3),
        ("", {}, 0),
        ("1", {}, 3),
        ("1", {"fused": True}, 3),
        ("1", {"fused": False}, 0),
        ("1", {"foreach": False}, 0),
        ("0", {}, 0),
    ):
        moves.clear()
        monkeypatch.delenv(check.VARIABLE, raising=False)
        if variable is not None:
            monkeypatch.setenv(check.VARIABLE, variable)
        run(**options)
        assert len(moves) == used, (variable, options)
    assert caplog.messages == []


def test_without_a_wish_nothing_is_tried(kernel, monkeypatch):
    kernel(no_compilation)
    monkeypatch.delenv(check.VARIABLE, raising=False)
    run()
    assert backends._tried.cache_info().misses == 0


def test_each_variant_is_tried_once(kernel, monkeypatch):
    kernel(right)
    monkeypatch.setenv(check.VARIABLE, "1")
    run()
    run(maximize=True)
    assert backends._tried.cache_info().misses == 1
    run(inner_momentum=0.5)
    assert backends._tried.cache_info().misses == 2


def test_the_variable_forbids_and_must_be_known(kernel, monkeypatch):
    kernel(right)
    monkeypatch.setenv(check.VARIABLE, "0")
    with pytest.raises(RuntimeError, match=r"got True: SFTORCH_TRITON must not be 0"):
        run(fused=True)
    monkeypatch.setenv(check.VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"SFTORCH_TRITON must be 1 .*, 0 .* or unset, got 'yes'"):
        run()


def test_the_scratch_memory_has_every_kind_of_tensor():
    flat = torch.zeros(check._length())
    tensors = check._tensors(flat)
    assert [t.numel() for t in tensors] == list(check.SIZES)
    aligned = [t.data_ptr() % 16 == 0 for t in tensors if t.numel()]
    assert aligned == [True, True, False, True, False, True]
    for t in tensors:
        t += 1
    assert flat.sum() == sum(check.SIZES)  # none overlaps another
    assert flat[: check.GAP].sum() == flat[-check.GAP :].sum() == 0


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel in Triton's interpreter, for the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(KERNEL, None)
    call.find_triton.cache_clear()
    with np.errstate(all="ignore"):
        yield call.find_triton()
    sys.modules.pop(KERNEL, None)
    call.find_triton.cache_clear()


VARIANTS = {
    "sgd": (SGD, ()),
    "young": (YOUNG, ("v",)),
    "adamw": (ADAMW, ("v",)),
    "momentum": (ADAMW, ("v", "m")),
}


@pytest.mark.usefixtures("exact_root", "interpreted")
@pytest.mark.parametrize("of_g", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["y", "x", "rest"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_passes_in_the_interpreter(variant, form, of_g):
    direction, buffers = VARIANTS[variant]
    dtypes = {"y": torch.bfloat16 if form == "rest" else torch.float32}
    dtypes |= {"rest": torch.int16} if form == "rest" else {}
    dtypes |= {"x": torch.float32} if form == "x" else {}
    dtypes |= dict.fromkeys(("z", *buffers), torch.float32) | {"g": of_g}
    backends._tried.cache_clear()
    assert backends._tried(direction, tuple(dtypes.items()), torch.device("cpu")) == ""
    backends._tried.cache_clear()


def test_a_launch_that_fails_is_found_in_the_interpreter(interpreted, monkeypatch):
    class Failing:
        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(interpreted, "step", Failing())
    backends._tried.cache_clear()
    types = tuple(dict.fromkeys(("y", "z", "g"), torch.float32).items())
    assert "out of resource: shared memory" in backends._tried(SGD, types, torch.device("cpu"))
    backends._tried.cache_clear()
