"""The native kernel by itself: splitting, 16 bits, threads, forks, and machines without a compiler."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch

import sftorch
from sfcore.native import build
from sftorch.adamw import ADAMW
from sftorch.kernels import call
from sftorch.kernels.call import Element, Kind
from sftorch.step import backends
from sftorch.step.backends import Move
from sftorch.tests.plain import feed, same_bits, some_grads, some_params

CHUNK = 1 << 15  # as in step.c
NUMBERS = {"sign": 1.0, "lr_t": 0.05, "wd_y": 0.1, "k1": 0.25, "k2": 0.3}
MOMENTS = {"b2": 0.9, "eps": 1e-8, "m1": 0.8, "correction2": 0.3, "correction1": 0.4}


IN_ORDER = [(NUMBERS | MOMENTS).get(name, 0.0) for name in call.NUMBERS]


class Cursor(ctypes.Structure):
    _fields_ = (("tensor", ctypes.c_int64), ("start", ctypes.c_int64))


class Segment(ctypes.Structure):
    _fields_ = (("tensor", ctypes.c_int64), ("offset", ctypes.c_int64), ("length", ctypes.c_int64))


def segments(sizes, begin, end):
    """Returns (tensor, offset, length) of all that lies from begin to end, as a thread walks it."""
    split = build.find().sf_next
    split.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    table, at, found = (ctypes.c_int64 * len(sizes))(*sizes), Cursor(0, 0), []
    segment = Segment()
    while split(table, ctypes.byref(at), begin, end, ctypes.byref(segment)):
        found.append((segment.tensor, segment.offset, segment.length))
        begin += segment.length
    return found


def test_work_is_split_by_64_bit_numbers():
    sizes = [3 * 2**31 + 5, 0, 7, 2**33, 0]
    total = sum(sizes)
    assert segments(sizes, 0, total) == [(0, 0, sizes[0]), (2, 0, 7), (3, 0, 2**33)]
    at = 3 * 2**31
    assert segments(sizes, at, at + 20) == [(0, at, 5), (2, 0, 7), (3, 0, 8)]
    assert segments(sizes, total - 3, total) == [(3, 2**33 - 3, 3)]
    assert segments(sizes, total, total) == []


def test_every_element_is_in_one_chunk():
    sizes, seen = [5, 0, 1, 100_000, 32_768, 0, 3], []
    total = sum(sizes)
    for begin in range(0, total, CHUNK):
        found = segments(sizes, begin, min(begin + CHUNK, total))
        seen += [(tensor, offset + i) for tensor, offset, length in found for i in range(length)]
    assert seen == [(tensor, i) for tensor, size in enumerate(sizes) for i in range(size)]


def some_bits(n, seed=0):
    """Returns float32 numbers of every kind: NaN, infinities, denormals, ties of rounding and others."""
    bits = np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32)
    special = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F7FFFFF, 0x80000000, 0]
    ties = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00008000, 0x007FFFFF, 1, 0xBF808000]
    bits[: len(special + ties)] = special + ties
    return bits.view(np.float32)


def split(wide):
    """Returns the two halves of float32 numbers: the nearest bfloat16 (its bits) and what it lacks."""
    bits = np.where(np.isnan(wide), np.uint32(0x7FC00000), wide.view(np.uint32)).astype(np.int64)
    upper = (bits + 0x8000) >> 16
    return (upper & 0xFFFF).astype(np.uint16), (bits - (upper << 16)).astype(np.int16)


def join(upper, rest):
    """Returns the float32 numbers of two halves."""
    bits = (upper.astype(np.int64) << 16) + rest
    return (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def as_bfloat16(bits):
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def run_sgd(y, z, g, y_type, g_type, rest=None):
    tables = {"y": [y], "z": [z], "g": [g]} | ({} if rest is None else {"rest": [rest]})
    call.Job(Kind.SGD, y_type, g_type).run(tables, IN_ORDER)


@np.errstate(all="ignore")
def sgd(y, z, g):
    """S6 to S9* in float32 as the single-tensor path computes them."""
    of = {name: np.float32(value) for name, value in NUMBERS.items()}
    delta = -of["lr_t"] * (g + of["wd_y"] * y)
    return y + (of["k1"] * (z - y) + of["k2"] * delta), z + delta


def same(a, b):
    """Tells whether float32 numbers are equal bit for bit, but for what a NaN carries."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def test_halves_are_the_specifications():
    wide = some_bits(100_003)
    upper, rest = split(wide)
    assert same(join(upper, rest), wide)  # nothing is lost
    nearest = torch.from_numpy(wide.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    ties = (wide.view(np.uint32) & 0xFFFF) == 0x8000
    assert np.array_equal(upper[~ties & ~np.isnan(wide)], nearest[~ties & ~np.isnan(wide)])


@pytest.mark.parametrize("narrow_grad", [True, False])
def test_a_16_bit_parameter_with_its_rest_steps_like_float32(narrow_grad):
    wide, z = some_bits(100_003), some_bits(100_003, seed=1)
    g = np.random.default_rng(2).standard_normal(100_003).astype(np.float32)
    upper, rest = split(wide)
    y, low, of_z = as_bfloat16(upper), torch.from_numpy(rest.copy()), torch.from_numpy(z.copy())
    grad = torch.from_numpy(g)
    if narrow_grad:
        grad = grad.to(torch.bfloat16)
        g = grad.float().numpy()
    g_type = Element.BFLOAT16 if narrow_grad else Element.AS_Z
    run_sgd(y, of_z, grad, Element.BFLOAT16_REST, g_type, low)
    want_y, want_z = sgd(wide, z, g)
    assert same(of_z.numpy(), want_z)
    found = y.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found, split(want_y)[0])
    assert np.array_equal(low.numpy(), split(want_y)[1])


def test_a_rest_that_leads_beyond_a_number_someone_wrote_is_dropped():
    y = torch.tensor([0.0, -0.0, torch.inf, -torch.inf], dtype=torch.bfloat16)
    rest, z = torch.tensor([-5, -5, 5, 5], dtype=torch.int16), torch.ones(4)
    run_sgd(y, z, torch.zeros(4), Element.BFLOAT16_REST, Element.AS_Z, rest)
    assert y[:2].tolist() == [0.25, 0.25]  # y + c (z - y)
    assert z.tolist() == [1.0, 1.0, -torch.inf, torch.inf]  # by its decay


@pytest.mark.parametrize("fused", [True, False])
def test_weights_in_16_bits_may_be_set_to_zero_between_steps(fused):
    (p,) = some_params(torch.bfloat16, [(1000,)])
    optimizer = sftorch.SGDScheduleFree([p], lr=0.01, fused=fused)
    feed(optimizer, [p], some_grads(5, [p]))
    with torch.no_grad():
        p.zero_()
    feed(optimizer, [p], some_grads(1, [p]))
    assert p.isfinite().all()
    assert p.any()


def test_a_move_with_rests_is_the_float32_move():
    random = torch.Generator().manual_seed(0)
    start, z, g = (torch.randn(n, 77, generator=random) for n in (3, 3, 3))
    v, m = torch.rand(3, 77, generator=random), torch.randn(3, 77, generator=random)
    upper, rest = split(start.numpy())
    numbers = (0.05, 0.1, 0.0, 0.25, 0.3, 0.99, 1e-8, 0.5, 0.3, 0.4)
    both = {}
    for name, ys, rests in (
        ("wide", list(start.clone()), []),
        ("halves", list(as_bfloat16(upper)), list(torch.from_numpy(rest))),
    ):
        buffers = {"exp_avg_sq": list(v.clone()), "exp_avg": list(m.clone())}
        move = Move(ADAMW, ys, rests, [], list(z.clone()), list(g), buffers, True, True, False, None, {})
        ((backend, both[name]),) = backends.assign(move)
        backend.run(both[name], numbers)
    wide, halves = both.values()
    assert same_bits(wide.zs, halves.zs)
    assert same_bits(wide.buffers["exp_avg"], halves.buffers["exp_avg"])
    for y, low, want in zip(halves.ys, halves.rests, wide.ys, strict=True):
        assert np.array_equal(join(y.view(torch.int16).numpy().view(np.uint16), low.numpy()), want.numpy())
    parts = backends.assign(halves._replace(xs=halves.ys, fused=None))
    assert [(backend.name, len(move.ys)) for backend, move in parts] == [("single", 3)]  # the closure forms


@pytest.mark.parametrize("narrow_grad", [True, False])
def test_a_16_bit_parameter_alone_is_rounded_half_to_even(narrow_grad):
    y = torch.from_numpy(some_bits(5003)).to(torch.bfloat16)
    z, grad = torch.from_numpy(some_bits(5003, seed=1).copy()), torch.randn(5003)
    grad = grad.to(torch.bfloat16) if narrow_grad else grad
    want_y, want_z = sgd(y.float().numpy(), z.numpy(), grad.float().numpy())
    run_sgd(y, z, grad, Element.BFLOAT16, Element.BFLOAT16 if narrow_grad else Element.AS_Z)
    assert same(z.numpy(), want_z)
    torch.testing.assert_close(y, torch.from_numpy(want_y).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("kind", [Kind.SGD, Kind.YOUNG, Kind.ADAMW, Kind.ADAMW_MOMENTUM])
def test_the_number_of_threads_changes_no_bit(kind, flush):
    names = {Kind.SGD: "yzg", Kind.ADAMW_MOMENTUM: "yzgvm"}.get(kind, "yzgv")
    sizes = [25 * CHUNK + 17, 1, 0, 3 * CHUNK - 1, 999]  # enough for seven threads
    runs = []
    assert torch.set_flush_denormal(flush)
    try:
        for threads in (1, 2, 3, 7):
            random = torch.Generator().manual_seed(0)
            tables = {n: [torch.randn(s, generator=random) for s in sizes] for n in names}
            for tensors in tables.values():
                tensors[0][::3] *= 1e-38  # denormal, or soon so
            tables["v"] = [v.abs() for v in tables["v"]] if "v" in tables else []
            call.Job(kind).run({n: t for n, t in tables.items() if t}, IN_ORDER, threads)
            runs.append([tensor for tensors in tables.values() for tensor in tensors])
    finally:
        torch.set_flush_denormal(False)
    assert all(same_bits(runs[0], other) for other in runs[1:])


# torch's own threads do not survive a fork, so its operations get one; the kernel gets two.
FORK = """
import os, torch, sftorch
from sftorch.kernels import call
torch.set_num_threads(1)
run = call.Job.run
call.Job.run = lambda *args: run(*args, threads=2)
p = torch.nn.Parameter(torch.ones(200_000))
optimizer = sftorch.SGDScheduleFree([p], fused=True)
def step():
    p.grad = torch.ones_like(p)
    optimizer.step()
step()
child = os.fork()
step()
if not child:
    os._exit(0 if optimizer.metrics()[0]["step"] == 2 else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def test_a_fork_can_step():
    options = ["-W", "ignore::DeprecationWarning"]  # Python's about forks beside threads
    assert subprocess.run([sys.executable, *options, "-c", FORK], timeout=120, check=False).returncode == 0


def test_without_a_compiler_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find.__wrapped__() == (
        "a C compiler must be in PATH or in CC, got none: install gcc or clang"
    )
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "No such file" in build.find.__wrapped__()


def test_without_a_kernel_steps_are_foreach_with_one_notice(monkeypatch, caplog):
    monkeypatch.setattr(build, "find", lambda *_: "there is no compiler")
    call.give_notice.cache_clear()
    runs = []
    with caplog.at_level(logging.WARNING, logger="sftorch"):
        for fused in (None, False):
            params = some_params()
            optimizer = sftorch.AdamWScheduleFree(params, fused=fused)
            feed(optimizer, params, some_grads(4, params))
            optimizer.eval()
            runs.append(params)
    assert same_bits(*runs)
    assert [record.getMessage() for record in caplog.records] == [
        "the fused CPU step is not available, and steps take the foreach path: there is no compiler"
    ]
    with pytest.raises(
        RuntimeError, match="fused must be None or False here, got True: there is no compiler"
    ):
        feed(sftorch.AdamWScheduleFree(params, fused=True), params, some_grads(1, params))
    with pytest.raises(build.Unavailable, match="no compiler"):
        call.Job(Kind.FLOOR_SGD).run({"y": params, "z": params, "g": params}, ())


def test_the_floor_reads_and_writes_what_a_step_does():
    y, z, g, v = ([torch.full((3,), float(n))] for n in range(4))
    call.Job(Kind.FLOOR_ADAMW).run({"y": y, "z": z, "g": g, "v": v}, ())
    assert [t[0].tolist()[0] for t in (y, z, g, v)] == [2, 3, 2, 5]
    call.Job(Kind.FLOOR_SGD).run({"y": y, "z": z, "g": g}, ())
    assert [t[0].tolist()[0] for t in (y, z, g, v)] == [4, 5, 2, 5]
