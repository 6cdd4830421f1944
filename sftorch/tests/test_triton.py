"""The CUDA kernels in Triton's interpreter, on CPU tensors: equal bits with torch's operations, one by one.

No tolerance is needed: the interpreter rounds as IEEE 754 says, as does what is compiled. Nothing here has
run on a GPU. Triton is not among the requirements: `pip install triton` for these tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import sftorch
from sfcore import codes
from sftorch.adamw import ADAMW
from sftorch.kernels import call
from sftorch.kernels.call import Element, Kind
from sftorch.law.parts import Place
from sftorch.radam import YOUNG
from sftorch.sgd import SGD
from sftorch.step import backends
from sftorch.step.backends import Move
from sftorch.tests.fused_runs import CASES, assert_fused_is_single, same, special_run
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, feed, same_bits, some_grads, some_params
from sftorch.tests.test_drawn import CASES as ROUNDED
from sftorch.tests.test_drawn import CUTS, DTYPES, stepped

triton = pytest.importorskip("triton")
SHAPES = [(1003,), (3, 5), (0,), (), (call.BLOCK,), (3 * call.BLOCK,), (2 * call.BLOCK + 1,)]


@pytest.fixture(scope="module", autouse=True)
def taken_for_the_cpu(interpreted):
    """Has the interpreted kernels run where those in C do."""
    with pytest.MonkeyPatch.context() as patch:
        taking = backends.NATIVE._replace(run=backends.TRITON.run)
        patch.setattr(backends, "BACKENDS", [taking, *backends.BACKENDS[1:]])
        yield


@pytest.fixture
def launches(monkeypatch):
    """Notes how many programs each launch has."""
    seen, kernel = [], call.find_triton()

    class Counting:
        def __init__(self, step):
            self.step = step

        def __getitem__(self, grid):
            seen.append(grid)
            return self.step[grid]

    for name in ("step", "step_lean", "step_eight"):
        monkeypatch.setattr(kernel, name, Counting(getattr(kernel, name)))
    return seen


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_every_element_is_the_specifications(kind, options, dtype, maximize, launches):
    params, grads = special_run(dtype, SHAPES)
    decay = 0.0 if maximize else 0.1
    assert_fused_is_single(CLASSES[kind], params, grads, weight_decay=decay, maximize=maximize, **options)
    assert len(launches) == len(grads)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_closure_forms_end_at_x(kind, options, launches):
    params, grads = special_run(torch.float32, SHAPES)
    assert_fused_is_single(CLOSURES[kind], params, grads, weight_decay=0.1, **options)
    assert len(launches) == len(grads)


def some_move(direction, buffers, of_y, of_g, n=2077):
    """Returns a move of two parameters, with a rest for those in bfloat16."""
    random = torch.Generator().manual_seed(0)

    def some(dtype=torch.float32):
        return [torch.randn(size, generator=random).to(dtype) for size in (n, 5)]

    ys = some(of_y)
    rests = [torch.randint(-(2**15), 2**15, y.shape, generator=random).to(torch.int16) for y in ys]
    return Move(
        direction=direction,
        ys=ys,
        rests=rests if of_y == torch.bfloat16 else [],
        xs=[],
        zs=some(),
        grads=some(of_g),
        buffers={name: [t.abs() for t in some()] for name in buffers},
        foreach=False,
        fused=True,
        maximize=False,
        keys=None,
        kept={},
    )


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("of_g", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_y", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("direction", "buffers"),
    [
        (SGD, ()),
        (YOUNG, ("exp_avg_sq",)),
        (ADAMW, ("exp_avg_sq",)),
        (ADAMW, ("exp_avg_sq", "exp_avg")),
    ],
    ids=["sgd", "young", "adamw", "momentum"],
)
def test_gradients_of_either_width(direction, buffers, of_y, of_g, launches):
    moves = [some_move(direction, buffers, of_y, of_g) for _ in range(2)]
    own = {SGD: 0, YOUNG: 1}.get(direction, 5)
    numbers = (0.05, 0.1, 0.0, 0.25, 0.3, *(0.99, 1e-8, 0.5, 0.3, 0.4)[:own])
    # A NaN whose last bit must not carry, and halves that no number has, as after someone wrote to y.
    for move in moves:
        move.grads[0][3:4] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
        if move.rests:
            move.ys[0][:3] = torch.tensor([torch.inf, -torch.inf, 0.0])
            move.rests[0][:3] = torch.tensor([5, 5, -5])
    for move, chosen in zip(moves, (backends.BACKENDS[0], backends.SINGLE), strict=True):
        chosen.run(move, numbers)
    assert len(launches) == 1
    tensors = [[*m.ys, *m.rests, *m.zs, *(t for ts in m.buffers.values() for t in ts)] for m in moves]
    assert len(tensors[0]) == len(tensors[1]) >= 4
    assert all(same(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.usefixtures("exact_root")
def test_a_gpt_like_list_is_one_launch_a_step(launches):
    sizes = [(7 * i * i) % 1500 for i in range(148)]
    params = some_params(torch.float32, [(size,) for size in sizes])
    assert_fused_is_single(CLASSES["adamw"], params, some_grads(2, params))
    assert launches == [(sum(-(-size // call.BLOCK) for size in sizes),)] * 2


def test_a_list_of_nothing_is_no_launch(launches):
    params = some_params(torch.float32, [(0,), (3, 0)])
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE, fused=True)
    feed(optimizer, params, some_grads(2, params))
    assert launches == []
    assert optimizer.metrics()[0]["step"] == 2


@pytest.mark.usefixtures("exact_root")
def test_misaligned_tensors_and_other_layouts(launches):
    runs = []
    for path in ({"fused": True}, {"fused": False, "foreach": False}):
        random = torch.Generator().manual_seed(0)
        memory = torch.randn(4000, generator=random)
        params = [memory[1:2501], memory[2501:2505], torch.randn(40, 50, generator=random).t()]
        params = [torch.nn.Parameter(p) for p in params]
        assert [p.data_ptr() % 16 == 0 for p in params] == [False, False, True]
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, **path)
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_strided(p.size(), p.stride()).copy_(
                    torch.randn(p.shape, generator=random)
                )
            optimizer.step()
        runs.append([*params, *(optimizer.state[p]["z"] for p in params)])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    assert launches == [(6,)] * 3


# Rows of a block and one element, short ones, one that is longer than two blocks, and what is no row.
RAGGED = [(2, 1025), (3, 16), (1, 2064), (3, 3, 3, 3), (7,), (), (0, 20)]


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("precision", ["8bit", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), ROUNDED, ids=str)
def test_what_is_rounded_at_random_is_torchs(kind, options, dtype, precision, launches):
    one, other = (
        stepped(fused, kind, dtype, precision, shapes=RAGGED, steps=2, **options) for fused in (True, False)
    )
    assert same_bits(one, other)
    # Rows whose loads can be wide, others, and vectors, which are lean there.
    assert len(launches) == (6 if precision == "8bit" else 2)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("precision", ["8bit", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_rows_with_numbers_that_are_not_finite(kind, dtype, precision):
    grads = some_grads(3, some_params(dtype, RAGGED))
    strange = torch.tensor([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-38, 1e-45, 0.0])
    grads[0][0][0, 7 : 7 + len(strange)] = strange
    grads[1][1][1, :2] = strange[3:5]
    grads[1][2][0, 1020 : 1020 + len(strange)] = strange
    if dtype == torch.float32:  # a NaN whose last bit must not carry
        grads[0][4][1:2] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    options = {"inner_momentum": 0.8} if kind == "adamw" else {}
    one, other = (
        stepped(fused, kind, dtype, precision, grads, RAGGED, weight_decay=0.1, **options)
        for fused in (True, False)
    )
    assert all(map(same, one, other))
    if precision == "8bit":
        scales = [t for t in one if t.dtype == torch.int8 and t.ndim == 2 and t.shape[1] <= 3]
        assert any((t == codes.BROKEN).any() and (t != codes.BROKEN).any() for t in scales)


@pytest.mark.usefixtures("exact_root")
def test_what_is_beyond_the_end_of_a_row_has_no_part_in_it():
    one, other = (
        stepped(fused, "adamw", torch.float32, "8bit", shapes=[(3, 17)], steps=2, eps=1e-60)
        for fused in (True, False)
    )
    assert same_bits(one, other)
    assert all(t.isfinite().all() for t in one)


def test_halves_of_a_part_are_rounded_to_even():
    """Of two draws that are a part apart, the rounding decides which way a code goes."""
    keys = backends.keys(3, range(8), 1, 0)
    ys = [torch.zeros(1, 4096) for _ in range(8)]
    draws = [backends.draws(y.shape, words.tolist(), y.device)[0] for y, words in zip(ys, keys, strict=True)]
    # Times 1 - 2^-17 a code k of less than 128 is k 65,536 - k / 2 parts, and the draw ends at or beside k.
    gaps = [torch.where(draw < 64, 2 * draw + 1, 0).to(torch.int16) for draw in draws]
    for gap in gaps:
        gap[0, -1] = 1 << 14  # so that the row keeps its exponent
    runs = []
    for backend in (backends.TRITON, backends.LEAN):
        own = [gap.clone() for gap in gaps]
        scales = [torch.zeros(1, 1, dtype=torch.int8) for _ in own]
        grads = [torch.zeros_like(y) for y in ys]
        move = Move(SGD, ys, [], [], own, grads, {}, False, True, False, keys, {}, scales=scales)
        backend.run(move, (0.0, 0.0, 0.0, 2.0**-17, 0.9))
        runs.append(own)
        assert all(scale == 0 for scale in scales)
    assert same_bits(*runs)
    chosen = torch.cat([draw[draw < 64] for draw in draws])
    down = torch.cat(
        [(found < gap)[draw < 64] for found, gap, draw in zip(runs[0], gaps, draws, strict=True)]
    )
    assert torch.equal(down, chosen % 2 == 1)
    assert len(set(down.tolist())) == 2


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("precision", ["8bit", "lean"])
def test_radam_grows_up_in_the_kernels_too(precision, launches):
    shapes = [(2, 40), (1, 1030)]
    one, other = (
        stepped(fused, "radam", torch.bfloat16, precision, shapes=shapes, steps=8) for fused in (True, False)
    )
    assert same_bits(one, other)
    assert len(launches) == 8


def moved(form, shape, cut=None, offset=0):
    """Returns what the kernel makes of a tensor, or of the part of it that a Place cuts out."""
    random = torch.Generator().manual_seed(0)
    is_lean = form == "lean"
    y, grad = (torch.randn(shape, generator=random).to(torch.bfloat16) for _ in range(2))
    rest = torch.randint(-(2**15), 2**15, shape, generator=random).to(torch.int16 if is_lean else torch.int8)
    gap = torch.randint(-99, 99, shape, generator=random).to(torch.bfloat16 if is_lean else torch.int8)
    scale = torch.randint(-3, 2, (shape[0], 1), generator=random).to(torch.int8)
    tensors = [y, grad, rest, gap] + ([] if is_lean else [scale])
    if cut:
        slices = [slice(at, at + size) for at, size in zip(cut.offsets, cut.sizes, strict=True)]
        tensors = [t[slices[0]] if t is scale else t[tuple(slices)] for t in tensors]
    y, grad, rest, gap, *scales = (t.clone(memory_format=torch.contiguous_format) for t in tensors)
    keys = backends.keys(3, [0], 1, 0)
    places = [cut] if cut else ()
    move = Move(
        SGD, [y], [rest], [], [gap], [grad], {}, False, True, False, keys, {}, places=places, scales=scales
    )
    backends.TRITON.run(move, (0.1, 0.01, 0.0, 0.3, 0.9))
    return [y, rest, gap, *scales]


@pytest.mark.parametrize("form", ["lean", "8bit"])
@pytest.mark.parametrize(("offsets", "sizes"), CUTS)
def test_a_part_is_drawn_for_as_of_the_whole(offsets, sizes, form):
    place = Place((6, 20), offsets, sizes)
    if form == "8bit":
        place = Place((6, 20), (offsets[0], 0), (sizes[0], 20))  # its rows are whole
    rows, columns = (slice(at, at + size) for at, size in zip(place.offsets, place.sizes, strict=True))
    wanted = [t[rows] if t.shape[1] == 1 else t[rows, columns] for t in moved(form, (6, 20))]
    assert same_bits(moved(form, (6, 20), place), wanted)


@pytest.mark.parametrize("shape", [(2, 1024), (3, 1031)])
@pytest.mark.parametrize("form", ["lean", "8bit"])
def test_offsets_of_all_forms_are_64_bits_wide(form, shape, monkeypatch):
    """Programs of a tensor that is said to begin 2^34 rows before this memory, which is no other place."""
    wanted, real = moved(form, shape), call._table
    by_rows, before = form == "8bit", shape[1] * 2**34
    columns = call.find_triton().COLUMNS

    def far(*facts):
        table = real(*facts).clone()
        table[:, columns.index("size")] += before
        table[:, columns.index("run")] += before
        table[:, columns.index("first")] -= 2**34 if by_rows else before // call.BLOCK
        for name, size in {"y": 2, "g": 2, "rest": 1 if by_rows else 2, "z": 1 if by_rows else 2}.items():
            table[:, columns.index(name)] -= size * before
        if by_rows:
            table[:, columns.index("scale")] -= 2**34
        return table

    monkeypatch.setattr(call, "_table", far)
    assert same_bits(moved(form, shape), wanted)


@pytest.mark.parametrize("precision", ["exact", "lean", "8bit"])
def test_tables_are_kept_while_addresses_stay(precision):
    params = some_params(torch.float32, [(2, 32), (3, 16)] if precision == "8bit" else SHAPES)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, fused=True, precision=precision)
    feed(optimizer, params, some_grads(1, params))
    before = call._table.cache_info()
    optimizer.step()
    assert call._table.cache_info().misses == before.misses
    kept = [p.grad for p in params]
    feed(optimizer, params, some_grads(1, params))  # with gradients elsewhere
    assert len(kept) == len(params)
    after = call._table.cache_info()
    assert (after.misses, after.hits) == (before.misses + 1, before.hits + 1)


@pytest.mark.parametrize("aligned", [0, 1])
def test_offsets_are_64_bits_wide(aligned):
    """A program of a tensor that is said to begin 2^33 elements before this memory."""
    kernel, begin, n = call.find_triton(), 2**33, call.BLOCK
    n -= 0 if aligned else 7
    y, z, g = (torch.full((n + 9,), value) for value in (1.0, 2.0, 3.0))
    row = dict.fromkeys(kernel.COLUMNS, 0)
    row |= {"first": -(begin // call.BLOCK), "size": begin + n, "aligned": aligned}
    row |= {name: t.data_ptr() - 4 * begin for name, t in (("y", y), ("z", z), ("g", g))}
    numbers = dict.fromkeys(("wd_y", "wd_z", "share2", "eps", "share1", "per2", "per1"), 0.0)
    flags = dict.fromkeys(("HAS_V", "HAS_M", "SCALED", "AT_Z", "TO_X", "HALVES", "NARROW_G"), False)
    numbers |= {"sign": 1.0, "lr_t": 0.5, "k1": 0.5, "k2": 0.25}
    table, owners = torch.tensor([list(row.values())]), torch.zeros(1, dtype=torch.int32)
    kernel.step[(1,)](table, owners, **numbers, **flags, BLOCK=call.BLOCK)
    # delta = -1.5; z' = z + delta; y' = y + (z - y) / 2 + delta / 4
    assert z.tolist() == [0.5] * n + [2.0] * 9
    assert y.tolist() == [1.125] * n + [1.0] * 9
    assert g.tolist() == [3.0] * (n + 9)


def test_what_is_no_step_is_refused():
    one = {"y": [torch.ones(1)]}
    with pytest.raises(ValueError, match=r"kind and y_type must be those of a step, got .*RECOVER"):
        call.launch(Kind.RECOVER, Element.AS_Z, Element.AS_Z, one, ())
    with pytest.raises(ValueError, match=r"got .*BFLOAT16"):
        call.launch(Kind.SGD, Element.BFLOAT16, Element.AS_Z, one, ())


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sftorch.kernels import call, triton_step as kernel
step, are_narrow = getattr(kernel, sys.argv[1]), sys.argv[2] == "bfloat16"
constants = dict.fromkeys(("HAS_M", "AT_Z", "TO_X"), False) | dict.fromkeys(("HAS_V", "SCALED"), True)
constants |= {"HALVES": are_narrow, "NARROW_G": are_narrow, "HASHES": 1, "WIDE": True, "BLOCK": call.BLOCK}
types = {"table": "*i64", "owners": "*i32", "keys": "*i32"} | dict.fromkeys(constants, "constexpr")
signature = {name: types.get(name, "fp32") for name in step.arg_names}
given = {(place,): constants[name] for place, name in enumerate(step.arg_names) if name in constants}
source = ASTSource(step, signature, given)
options = {"num_warps": call.WARPS, "enable_fp_fusion": False}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7),
    reason="Triton 3.2 compiles by other arguments, and its divisions take denormals for 0",
)
@pytest.mark.parametrize(
    ("step", "dtype", "loads", "stores"),
    [
        ("step", "float32", {"v4.b32": 4}, {"v4.b32": 3}),  # y, z, v, g
        ("step_lean", "float32", {"v4.b32": 2, "v2.b32": 2}, {"v4.b32": 1, "v2.b32": 2}),
        ("step_lean", "bfloat16", {"v2.b32": 5}, {"v2.b32": 4}),
        # Three times: a row's first block, and the others twice. The four codes of a thread are one word.
        ("step_eight", "float32", {"v4.b32": 6, "v2.b32": 3}, {"v4.b32": 2, "v2.b32": 2}),
        ("step_eight", "bfloat16", {"v2.b32": 6}, {"v2.b32": 2}),
    ],
)
def test_compiled_for_an_h100_it_moves_four_elements_at_once_and_rounds_as_ieee_754_says(
    step, dtype, loads, stores, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, step, dtype], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for operation, wanted in (("ld", loads), ("st", stores)):
        found = Counter(re.findall(rf"\b{operation}\.global\.(v\S+)", done.stdout))
        assert found == wanted
    assert {"div.rn.f32", "sqrt.rn.f32"} <= set(re.findall(r"(?:div|sqrt)\.\S+", done.stdout))
    # What is rounded down there is no denormal: it is 0, or has been multiplied by 2^23 at least.
    assert set(re.findall(r"\S*ftz\S*", done.stdout)) <= {"cvt.rmi.ftz.f32.f32"}
    assert not re.findall(r"fma|\.local", done.stdout)
