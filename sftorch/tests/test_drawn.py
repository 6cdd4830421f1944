"""The native step of the forms that are rounded at random, against torch's operations: equal bits."""

import numpy as np
import pytest
import torch

import sftorch
from sftorch.kernels import drawn
from sftorch.law.parts import Place, indices
from sftorch.state import eight, forms
from sftorch.step import backends
from sftorch.tests.fused_runs import Calls, same
from sftorch.tests.plain import CLASSES, STEP_SIZE, copies, feed, same_bits, some_grads, some_params
from sftorch.tests.test_lean import everything

DTYPES = [torch.bfloat16, torch.float32]
# A row that is one element more than a block, short rows, one that is computed twice, and what is no row.
SHAPES = [(3, 1025), (5, 16), (2, 4100), (4, 3, 3, 3), (7,), (), (0, 20)]
OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "decay at z": {"weight_decay": 0.1, "decay_at": "z"},
    "maximize": {"maximize": True},
}
CASES = [(kind, options) for kind in CLASSES for options in OPTIONS.values()]
CASES += [("adamw", {"inner_momentum": 0.8, "weight_decay": 0.1})]


def stepped(fused, kind, dtype, precision, grads=None, shapes=SHAPES, steps=3, **options):
    params = some_params(dtype, shapes=shapes)
    optimizer = CLASSES[kind](
        params, lr=STEP_SIZE, precision=precision, seed=2, fused=fused, foreach=fused, **options
    )
    feed(optimizer, params, some_grads(steps, params) if grads is None else grads)
    return everything(optimizer, params)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("precision", ["8bit", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_the_bits_are_those_of_torchs_operations(kind, options, dtype, precision):
    one, other = (stepped(fused, kind, dtype, precision, **options) for fused in (True, False))
    assert same_bits(one, other)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("precision", ["8bit", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_numbers_that_are_not_finite_and_extreme_ones_too(kind, dtype, precision):
    grads = some_grads(4, some_params(dtype, shapes=SHAPES))
    strange = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-38, 1e-45, 0.0]
    for row, of_step in enumerate(grads[:3]):
        of_step[0][row, 7 : 7 + len(strange)] = torch.tensor(strange)
        of_step[2][row % 2, 4097] = strange[row]
    options = {"inner_momentum": 0.8} if kind == "adamw" else {}
    one, other = (
        stepped(f, kind, dtype, precision, grads, weight_decay=0.1, **options) for f in (True, False)
    )
    assert all(map(same, one, other))


@pytest.mark.usefixtures("exact_root")
def test_radam_grows_up_in_codes():
    one, other = (stepped(fused, "radam", torch.bfloat16, "8bit", steps=9) for fused in (True, False))
    assert same_bits(one, other)


@pytest.mark.parametrize("precision", ["8bit", "lean"])
def test_any_number_of_threads_gives_the_same_bits(precision):
    shapes = [(900, 300), (3, 70_000), (300_001,)]
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(stepped(True, "adamw", torch.bfloat16, precision, shapes=shapes, steps=2))
        finally:
            torch.set_num_threads(1)
    assert same_bits(*found)


@pytest.mark.parametrize("precision", ["8bit", "lean"])
def test_gradients_of_another_dtype_or_order_are_copied(precision, monkeypatch):
    calls = Calls(monkeypatch.setattr)
    params = some_params(torch.bfloat16, shapes=[(40, 30), (30, 40)])
    grads = some_grads(2, params)
    for fused in (True, False):
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = sftorch.SGDScheduleFree(twins, lr=STEP_SIZE, precision=precision, fused=fused)
        for of_step in grads:
            twins[0].grad = of_step[1].t()
            twins[1].grad = of_step[0].t().contiguous()
            optimizer.step()
        if fused:
            assert calls.taken() == (4, 0)
            wanted = everything(optimizer, twins)
    assert calls.taken() == (0, 0)
    assert same_bits(wanted, everything(optimizer, twins))


def fitting(dtype, precision):
    """Returns the tables of two parameters that the kernels take."""
    is_narrow, in_codes = dtype == torch.bfloat16, precision == "8bit"
    kinds = dict.fromkeys(("z", "v", "m"), torch.bfloat16)
    if in_codes:
        kinds = {"z": torch.int8 if is_narrow else torch.int16, "v": torch.uint8, "m": torch.int8}
    kinds |= {"rest": torch.int8 if in_codes else torch.int16} if is_narrow else {}
    shapes = [(40, 30), (3, 17)]
    tables = {name: [torch.ones(s).to(kind) for s in shapes] for name, kind in ({"y": dtype} | kinds).items()}
    scales = {"scale": [torch.zeros(s[0], 3, dtype=torch.int8) for s in shapes]} if in_codes else {}
    return tables | {"g": [torch.ones(s) for s in shapes]} | scales


class Other(torch.Tensor):
    """Another kind of tensor."""


SPOILT = {
    "a gradient of another order": ("g", lambda t: t.t().contiguous().t()),
    "gradients of two dtypes": ("g", lambda t: t.to(torch.bfloat16)),
    "a gradient with a pending sign": ("g", lambda t: torch._neg_view(t)),
    "a parameter that is no plain tensor": ("y", lambda t: t.as_subclass(Other)),
    "a gap of another dtype": ("z", lambda t: t.to(torch.float32)),
    "a moment of another shape": ("v", lambda t: t[:1].clone()),
    "state elsewhere": ("m", lambda t: t.to("meta")),
    "state of another order": ("m", lambda t: t.t().contiguous().t()),
}


@pytest.mark.parametrize("precision", ["8bit", "lean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_that_fits_is_known_at_once(dtype, precision):
    assert drawn.all_fit(fitting(dtype, precision), [None, None])
    assert not drawn.all_fit(fitting(dtype, precision), [None, Place((9, 17), (1, 0), (3, 17))])
    for name, (table, change) in SPOILT.items():
        tables = fitting(dtype, precision)
        tables[table][1] = change(tables[table][1])
        assert not drawn.all_fit(tables, ()), name
    doubles = fitting(dtype, precision)
    doubles["g"] = [g.double() for g in doubles["g"]]
    assert not drawn.all_fit(doubles, ())
    others = fitting(dtype, precision)
    others |= {"rest": [torch.zeros(y.shape, dtype=torch.float32) for y in others["y"]]}
    assert not drawn.all_fit(others, ())


def test_a_list_that_fits_is_not_asked_one_by_one(monkeypatch):
    monkeypatch.setattr(drawn, "why_left", lambda *row: pytest.fail("it was asked"))
    calls = Calls(monkeypatch.setattr)
    stepped(True, "adamw", torch.bfloat16, "8bit", shapes=[(40, 30), (3, 17)])
    assert calls.taken() == (6, 0)


@pytest.mark.usefixtures("exact_root")
@pytest.mark.parametrize("precision", ["8bit", "lean"])
def test_a_parameter_in_another_order_is_left_to_torchs_operations(precision, monkeypatch):
    calls = Calls(monkeypatch.setattr)

    def run(fused):
        params = some_params(torch.bfloat16, shapes=[(4, 3, 5, 5), (40, 30)])
        with torch.no_grad():
            params[0].data = params[0].data.to(memory_format=torch.channels_last)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, precision=precision, fused=fused)
        feed(optimizer, params, some_grads(3, params))
        return everything(optimizer, params)

    found = run(None)
    assert calls.taken() == (3, 0)
    assert same_bits(found, run(False))
    with pytest.raises(RuntimeError, match="must be contiguous, in 1 of 2 parameters, the first of shape"):
        run(True)


CUTS = [((2, 0), (3, 20)), ((0, 0), (6, 20)), ((0, 5), (6, 7)), ((2, 5), (1, 7)), ((1, 3), (4, 17))]


@pytest.mark.parametrize(("offsets", "sizes"), CUTS)
def test_a_part_is_drawn_for_as_of_the_whole(offsets, sizes):
    whole, at = some_params(torch.bfloat16, shapes=[(6, 20)])[0], Place((6, 20), offsets, sizes)
    grad = some_grads(1, [whole])[0][0]
    keys = backends.keys(3, [0], 1, 0)
    cut = tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))

    def step(place, backend):
        cut_out = cut if place else ()
        y = whole.detach()[cut_out].clone(memory_format=torch.contiguous_format)
        gap, rest = (torch.zeros_like(y, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
        move = backends.Move(
            sftorch.sgd.SGD, [y], [rest], [], [gap], [grad[cut_out].contiguous()], {}, False, True, False,
            keys, {}, places=[place] if place else (),
        )  # fmt: skip
        backend.run(move, (0.1, 0.01, 0.0, 0.3, 0.9))
        return [y, rest, gap]

    wanted = [tensor[cut] for tensor in step(None, backends.NATIVE)]
    assert same_bits(step(at, backends.NATIVE), wanted)
    assert same_bits(step(at, backends.LEAN), wanted)


PARTS = [(Place((6, 20), *cut), True) for cut in CUTS] + [
    (Place((3, 4, 5), (1, 0, 2), (2, 4, 2)), True),
    (Place((3, 4, 5), (0, 1, 0), (3, 2, 5)), True),
    (Place((3, 4, 5), (0, 1, 2), (3, 2, 2)), False),
    (Place((), (), ()), True),
]


@pytest.mark.parametrize(("at", "is_taken"), PARTS)
def test_where_a_part_lies_is_told_by_one_length_and_one_distance(at, is_taken):
    wanted = indices(at, torch.device("cpu")).flatten()
    found = drawn.place_of(at, len(wanted))
    assert (found is not None) == is_taken
    if found:
        first, run, step = found
        local = torch.arange(len(wanted))
        assert torch.equal(first + local // run * step + local % run, wanted)


def test_state_of_another_kind_is_left_and_named():
    params = some_params(torch.bfloat16, shapes=[(4, 20)])
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE, precision="8bit")
    feed(optimizer, params, some_grads(1, params))
    state = optimizer.state[params[0]]
    state["gap"] = forms.gap_of(state).to(torch.bfloat16)
    row = {"y": params[0].detach(), "rest": state["y_rest"], "z": state["gap"], "scale": state[eight.SCALE]}
    assert drawn.why_left(row, None) == "state must be of its parameter's kind"
    assert drawn.why_left(row | {"z": row["rest"][:2]}, None) == "state must be of its parameter's shape"
    elsewhere = row | {"z": row["rest"].to("meta")}
    assert drawn.why_left(elsewhere, None) == "state must be on the device of its parameter, cpu"


def test_a_step_makes_no_copies_of_what_is_there():
    params = some_params(torch.bfloat16, shapes=[(40, 30), (9,)])
    before = [p.data_ptr() for p in params]
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, precision="8bit", fused=True)
    grads = some_grads(3, params)
    feed(optimizer, params, grads[:1])
    held = [t for p in params for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    values, versions = copies(held), [p._version for p in params]
    feed(optimizer, params, grads[1:])
    assert [p.data_ptr() for p in params] == before
    again = [t for p in params for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert all(one is other for one, other in zip(held, again, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(values, held, strict=True))
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**64 + 5])
def test_the_words_of_all_are_those_of_each(seed):
    found = backends.keys(seed, [0, 3, 200], 2**33 + 1, 3)
    wanted = [[backends.key_of(seed, n, 2**33 + 1, b) for b in range(2)] for n in (0, 3, 200)]
    assert (found.dtype, found.tolist()) == (torch.int64, [[list(w) for w in row] for row in wanted])
    assert backends.keys(seed, [], 1, 2).shape == (0, 2, 2)
