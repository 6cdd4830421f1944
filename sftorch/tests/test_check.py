"""The Triton step is used only where a trial on scratch memory has found it right; faults leave no trace.

Most of this runs with a stand-in for the kernel, which goes wrong in every way; the kernel itself is tried in
Triton's interpreter.
"""

from __future__ import annotations

import logging
import math
import re

import pytest
import torch

import sftorch
from sftorch.adamw import ADAMW
from sftorch.kernels import call
from sftorch.radam import YOUNG
from sftorch.sgd import SGD
from sftorch.step import backends, check
from sftorch.tests.plain import STEP_SIZE, feed, same_bits, some_grads, some_params
from sftorch.tests.test_lean import everything

PRECISIONS = {"exact": "the lists", "lean": "torch's operations", "8bit": "torch's operations"}


def right(move, numbers):
    (backends.SINGLE if move.keys is None else backends.LEAN).run(move, numbers)


def one_wrong_bit(move, numbers):
    right(move, numbers)
    move.zs[-1].view(-1)[-1:].view(torch.uint8)[:1].bitwise_xor_(1)


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


def the_words_of_another_step(move, numbers):
    right(move._replace(keys=move.keys + 1), numbers)


def whole_where_it_is_a_part(move, numbers):
    right(move._replace(places=()), numbers)


def an_exponent_too_large(move, numbers):
    right(move, numbers)
    move.scales[0][:, 0].add_(1)


CASES = [(fault, precision) for fault in FAULTS for precision in PRECISIONS]
FAULTS |= {
    the_words_of_another_step: r"got others: .* in z",
    whole_where_it_is_a_part: r"got others: .* in z",
    an_exponent_too_large: r"got others: .* in scale$",
}
CASES += [
    (the_words_of_another_step, "lean"),
    (the_words_of_another_step, "8bit"),
    (whole_where_it_is_a_part, "lean"),
    (whole_where_it_is_a_part, "8bit"),
    (an_exponent_too_large, "8bit"),
]


@pytest.fixture
def kernel(monkeypatch):
    """Returns a function that puts a stand-in in Triton's place, for the CPU; counts its real moves."""
    moves = []

    def put(run):
        def counting(move, numbers):
            moves.extend([move] * (len(move.ys) != len(check.SHAPES)))
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


def made(**options):
    params = some_params(torch.float32, [(4, 20), (3, 3, 7)])  # rows of 16 at least, for "8bit"
    return params, sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, weight_decay=0.1, **options)


def run(**options):
    params, optimizer = made(**options)
    feed(optimizer, params, some_grads(3, params))
    return everything(optimizer, params)


@pytest.mark.parametrize(
    ("fault", "precision"), CASES, ids=lambda one: one if isinstance(one, str) else one.__name__
)
def test_a_fault_means_torchs_operations_with_a_line_and_the_state_untouched(
    fault, precision, kernel, monkeypatch, caplog
):
    moves = kernel(fault)
    monkeypatch.setenv(check.VARIABLE, "1")
    with caplog.at_level(logging.WARNING, "sftorch"):
        found = run(precision=precision)
    assert same_bits(found, run(fused=False, precision=precision))
    assert moves == []
    (line,) = caplog.messages
    taken = PRECISIONS[precision]
    assert line.startswith(
        f"the Triton step of precision='{precision}' is not used on cpu, and steps take {taken}: it must "
    )
    params, optimizer = made(fused=True, precision=precision)
    held = [p.detach().clone() for p in params]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"fused must be None or False here.*" + FAULTS[fault]):
            feed(optimizer, params, some_grads(1, params))
    assert same_bits(params, held)
    assert not optimizer.state
    assert moves == []
    assert caplog.messages == [line]
    optimizer.param_groups[0]["fused"] = None
    feed(optimizer, params, some_grads(1, params))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_kernel_that_is_right_is_used_with_fused_true_and_by_default_where_it_is_wanted(
    precision, kernel, monkeypatch, caplog
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
        run(precision=precision, **options)
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
    for precision in ("lean", "8bit"):
        run(precision=precision)
    assert backends._tried.cache_info().misses == 4


def test_the_variable_forbids_and_must_be_known(kernel, monkeypatch):
    kernel(right)
    monkeypatch.setenv(check.VARIABLE, "0")
    with pytest.raises(RuntimeError, match=r"got True: SFTORCH_TRITON must not be 0"):
        run(fused=True)
    monkeypatch.setenv(check.VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"SFTORCH_TRITON must be 1 .*, 0 .* or unset, got 'yes'"):
        run()


@pytest.mark.parametrize(
    "dtypes",
    [{"y": torch.float32}, {"y": torch.bfloat16, "z": torch.int8, "v": torch.uint8, "scale": torch.int8}],
)
def test_the_scratch_memory_has_every_kind_of_tensor(dtypes):
    shapes = {name: check._shapes(name, dtypes) for name in dtypes}
    for name, of_all in shapes.items():
        flat = check._numbers(name, dtypes, of_all).zero_()
        tensors = check._tensors(flat, of_all)
        assert [t.shape for t in tensors] == list(of_all)
        aligned = [t.storage_offset() * t.element_size() % 16 == 0 for t in tensors]
        assert aligned == [True, False, True, False, True, False, True]
        for t in tensors:
            t += 1
        assert flat.to(torch.int64).sum() == sum(t.numel() for t in tensors)  # none overlaps another
        assert flat[: check.GAP].sum() == flat[-check.GAP :].sum() == 0
    if "scale" in dtypes:
        assert [t[1] for t in shapes["scale"]] == [2] * len(check.ROWS)
        assert {rows for rows, _ in shapes["scale"]} >= {0, 1}
        assert all(place.sizes == t for t, place in zip(shapes["y"], check.ROW_PLACES, strict=True) if place)
        lengths = [length for _, length in shapes["y"][::2]]  # of rows whose loads may be wide
        assert {(length % 16 == 0, length > call.BLOCK) for length in lengths} == {
            (True, True),
            (True, False),
            (False, False),
        }
    else:
        sizes = [size for (size,) in shapes["y"]]
        parts = [(size, place) for size, place in zip(sizes, check.PLACES, strict=True) if place]
        assert [math.prod(place.sizes) for _, place in parts] == [size for size, _ in parts] != []


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
    assert backends._tried(direction, "exact", tuple(dtypes.items()), torch.device("cpu")) == ""
    backends._tried.cache_clear()


def rounded_dtypes(form, of_y, of_g, buffers=()):
    """Returns the dtypes of the tables of a step that rounds at random."""
    is_narrow = of_y == torch.bfloat16
    if form == "lean":
        kinds = {"rest": torch.int16} | dict.fromkeys(("z", "v", "m"), torch.bfloat16)
    else:
        kinds = {"rest": torch.int8, "z": torch.int8 if is_narrow else torch.int16}
        kinds |= {"v": torch.uint8, "m": torch.int8, "scale": torch.int8}
    names = [*(["rest"] if is_narrow else []), "z", *buffers, *(["scale"] if form == "8bit" else [])]
    return {"y": of_y} | {name: kinds[name] for name in names} | {"g": of_g}


@pytest.mark.usefixtures("exact_root", "interpreted")
@pytest.mark.parametrize("of_g", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_y", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["lean", "8bit"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_that_round_at_random_pass_in_the_interpreter(variant, form, of_y, of_g):
    direction, buffers = VARIANTS[variant]
    dtypes = rounded_dtypes(form, of_y, of_g, buffers)
    backends._tried.cache_clear()
    assert backends._tried(direction, form, tuple(dtypes.items()), torch.device("cpu")) == ""
    backends._tried.cache_clear()


class Failing:
    def __getitem__(self, grid):
        raise RuntimeError("out of resource: shared memory")


class OnePart:
    """Leaves out the last program."""

    def __init__(self, step):
        self.step = step

    def __getitem__(self, grid):
        return self.step[(grid[0] - 1,)]


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize(
    ("form", "step"), [("exact", "step"), ("lean", "step_lean"), ("8bit", "step_eight")], ids=str
)
def test_a_launch_that_fails_or_is_not_whole_is_found_in_the_interpreter(
    form, step, interpreted, monkeypatch
):
    types = dict.fromkeys(("y", "z", "g"), torch.float32)
    if form != "exact":
        types = rounded_dtypes(form, torch.float32, torch.float32)
    whole = getattr(interpreted, step)
    for fault, why in (
        (Failing(), "out of resource: shared memory"),
        (OnePart(whole), "got others: .* in y"),
    ):
        monkeypatch.setattr(interpreted, step, fault)
        backends._tried.cache_clear()
        assert re.search(why, backends._tried(SGD, form, tuple(types.items()), torch.device("cpu")))
    backends._tried.cache_clear()
