"""eval() and train() on every path: the same bits, and nothing changes where train() raises."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import sftorch
from sfcore.native import build
from sfcore.native.kinds import MARKED
from sftorch.kernels import call
from sftorch.law import lists
from sftorch.state import flips
from sftorch.tests.plain import STEP_SIZE, copies, feed, same_bits, some_grads, some_params

SHAPES = [(1003,), (3, 5), (0,), (), (2, 3, 4)]
PATHS = {"lists": {"fused": False}, "single": {"fused": False, "foreach": False}, "native": {}}


def started(path, dtype=torch.float32, shapes=SHAPES):
    params = some_params(dtype, shapes)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, **PATHS[path])
    feed(optimizer, params, some_grads(5, params))
    return params, optimizer


@pytest.fixture(params=[7, 1 << 18])
def group(request, monkeypatch):
    monkeypatch.setitem(lists.GROUP, "cpu", request.param)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
def test_every_path_has_the_same_x_and_gives_back_y(dtype):
    found = {}
    for path in PATHS:
        params, optimizer = started("single", dtype)
        optimizer.param_groups[0].update({"fused": None, "foreach": True} | PATHS[path])
        y = copies(params)
        beside = list(optimizer.eval_params().values())
        for _ in range(2):
            optimizer.eval()
            found[path] = copies(params)
            assert same_bits(found[path], beside)
            optimizer.train()
            assert same_bits(params, y)
    assert same_bits(found["lists"], found["single"])
    assert same_bits(found["native"], found["single"])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", [0, 1, 4])
def test_weights_that_someone_wrote_to_are_left_with_all_others_as_they_are(which, path):
    """The first ones are back at y by then, and become x again in the bits that they had."""
    params, optimizer = started(path)
    y = copies(params)
    optimizer.eval()
    x = copies(params)
    params[which].data.view(-1)[-1] += 1
    held = copies(params)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"weights must stay x while in eval mode, got other values in 1 "
        ):
            optimizer.train()
        assert same_bits(params, held)
    params[which].data.copy_(x[which])
    optimizer.train()
    assert same_bits(params, y)


def test_an_interrupted_train_can_be_called_again(monkeypatch):
    monkeypatch.setitem(lists.GROUP, "cpu", 100)
    params, optimizer = started("lists")
    y = copies(params)
    optimizer.eval()
    x, own, calls = copies(params), torch._foreach_copy_, []

    def cut(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", cut)
        with pytest.raises(KeyboardInterrupt):
            optimizer.train()
    assert same_bits(params, x)
    optimizer.train()
    assert same_bits(params, y)


@contextmanager
def interrupted(kind, moment, monkeypatch):
    """Lets a job of this kind be interrupted, before or after it is done."""
    run = call.Job.run

    def cut(job, *args):
        if job.kind != kind:
            return run(job, *args)
        if moment == "after":
            run(job, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call.Job, "run", cut)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_the_kernel_of_eval_leaves_y(moment, monkeypatch):
    params, optimizer = started("native")
    optimizer.eval()
    optimizer.train()
    feed(optimizer, params, some_grads(1, params))  # so that what is kept is an older y
    y = copies(params)
    with interrupted(call.Kind.PUT_ASIDE, moment, monkeypatch):
        optimizer.eval()
    assert same_bits(params, y)
    assert not any("y" in optimizer.state[p] for p in params)
    optimizer.eval()
    optimizer.train()
    assert same_bits(params, y)


@pytest.mark.parametrize("name", ["copy_", "sub_", "mul_", "add_"])
def test_an_interrupted_eval_of_lists_leaves_y(name, monkeypatch):
    monkeypatch.setitem(lists.GROUP, "cpu", 100)
    params, optimizer = started("lists")
    y, own, calls = copies(params), getattr(torch, f"_foreach_{name}"), []

    def cut(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, f"_foreach_{name}", cut)
        with pytest.raises(KeyboardInterrupt):
            optimizer.eval()
    assert same_bits(params, y)
    optimizer.eval()
    optimizer.train()
    assert same_bits(params, y)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_the_kernel_leaves_what_was_there(moment, written, monkeypatch):
    params, optimizer = started("native")
    y = copies(params)
    optimizer.eval()
    x = copies(params)
    if written:
        params[0].data[0] += 1
    held = copies(params)
    with interrupted(call.Kind.PUT_BACK, moment, monkeypatch):
        optimizer.train()
    assert same_bits(params, held)
    params[0].data.copy_(x[0])
    optimizer.train()
    assert same_bits(params, y)


# Several chunks of the kernel, which do not begin where tensors do.
LARGE = [(1003,), (70001,), (0,), (40000,), (7,)]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernel_has_the_bits_of_a_single_tensor_in_every_chunk(dtype):
    params, optimizer = started("native", dtype, LARGE)
    y = copies(params)
    optimizer.param_groups[0]["foreach"] = False
    x = list(optimizer.eval_params().values())
    optimizer.param_groups[0]["foreach"] = True
    for _ in range(2):
        optimizer.eval()
        assert same_bits(params, x)
        assert same_bits([optimizer.state[p]["y"] for p in params], y)
        optimizer.train()
        assert same_bits(params, y)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("at", [(0, 0), (1, 35000), (1, 70000), (4, 6)])
def test_one_number_that_someone_wrote_keeps_the_kernel_from_all_others(at):
    """Also from where y was written back in eval mode: that is no x."""
    params, optimizer = started("native", shapes=LARGE)
    y = copies(params)
    optimizer.eval()
    params[3].data.copy_(y[3])
    params[at[0]].data.view(-1)[at[1]] = float("nan")
    held = copies(params)
    tables = {"y": params, "z": [optimizer.state[p]["z"] for p in params]}
    tables["x"] = [optimizer.state[p]["y"] for p in params]
    numbers = (*call.ZEROS[: call.NUMBERS.index("k1")], 1 / 0.9 - 1)
    assert call.Job(call.Kind.PUT_BACK).run(tables, numbers)
    assert same_bits(params, held)
    with pytest.raises(RuntimeError, match=r"got other values in 2 parameter"):
        optimizer.train()
    assert same_bits(params, held)


def test_on_a_device_equality_is_asked_once_for_a_list():
    """`_equal` is for CUDA tensors; a NaN is equal to nothing, and such a tensor is looked at by itself."""
    one = [
        torch.ones(3),
        torch.ones(2),
        torch.tensor([float("nan")]),
        torch.tensor([float("inf")]),
        torch.ones(0),
    ]
    other = copies(one)
    other[1][1] += 1e-6
    assert flips._equal(one, other) == [True, False, False, True, True]


def marked_job(ys, zs, aside):
    """Returns a job that has put ys aside and left marks of x, and is to put them back, and its numbers."""
    job, numbers = call.Job(call.Kind.PUT_ASIDE), (*call.ZEROS[: call.NUMBERS.index("k1")], 1 / 0.9 - 1)
    marks = job.arrays["marks"] = np.zeros(sum(y.numel() for y in ys) // MARKED + 1, dtype=np.uint64)
    job.marks = marks.ctypes.data
    job.run({"y": ys, "z": zs, "x": aside}, numbers)
    job.kind = call.Kind.PUT_BACK
    return job, numbers


def marks_of(words, marked=MARKED):
    """Returns what step.c says of 32-bit words in a row, of which it marks so many at a time."""
    state, keys, found = 1, [], []
    for _ in range(marked):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        keys.append(state >> 32)
    for begin in range(0, len(words), marked):
        keyed = [(int(w) + k) % 2**32 for w, k in zip(words[begin : begin + marked], keys, strict=False)]
        keyed += [keys[len(keyed)]] if len(keyed) % 2 else []
        pairs = zip(keyed[::2], keyed[1::2], strict=True)
        found.append(sum(a * b + a + (b << 32) for a, b in pairs) % 2**64)
    return found


# Elsewhere the kernel leaves and asks no marks, and looks at z.
with_marks = pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="marks are made with AVX2 alone"
)


def test_python_makes_room_for_as_many_marks_as_c_leaves():
    assert re.findall(r"\bMARKED = (\d+)", (build.HERE / "job.h").read_text()) == [str(MARKED)]


@with_marks
@pytest.mark.parametrize("n", [1, 2, 15, 16, 33, 511, 512, 513, 2000])
def test_marks_are_those_of_a_plain_program_whatever_the_machine_takes_at_once(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    job, _ = marked_job([x], [x.clone()], [x.clone()])  # x = y = z
    assert list(job.arrays["marks"][: -(-n // MARKED)]) == marks_of(x.numpy().view(np.uint32))


@with_marks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_part_that_several_tensors_share_has_keys_of_the_place_in_it(dtype):
    xs = copies(some_params(dtype, shapes=[(6,), (20,), (0,), (700,)]))
    job, _ = marked_job(xs, copies(xs), copies(xs))  # even sizes, so no pair is cut
    words = torch.cat(xs).numpy().view(np.uint32)
    assert list(job.arrays["marks"]) == marks_of(words, MARKED * len(words) // 726)


def edits(x, generator):
    """Yields what someone may do to the weights, as functions of flat ones."""
    n = x.numel()
    for _ in range(400):
        at, bit = (
            int(torch.randint(n, (), generator=generator)),
            int(torch.randint(32, (), generator=generator)),
        )
        yield (
            f"bit {bit} of {at}",
            lambda x, at=at, bit=bit: x.view(torch.int32)[at].bitwise_xor_(
                torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            ),
        )
    for _ in range(400):
        i, j = torch.randint(n, (2,), generator=generator).tolist()
        yield f"{i} and {j} exchanged", lambda x, i=i, j=j: x.__setitem__([i, j], x[[j, i]])
    for count in range(2, n, max(n // 60, 1)):
        yield f"{count} negated", lambda x, count=count: x[:count].neg_()
        yield f"{count} put to 0", lambda x, count=count: x[-count:].zero_()
        yield f"rolled by {count}", lambda x, count=count: x.copy_(x.roll(count))
    for factor in (-1.0, 0.0, 0.5, 2.0, 1 + 2**-23, 1 - 2**-24, 1e-30, float("inf"), float("nan")):
        yield f"scaled by {factor}", lambda x, factor=factor: x.mul_(factor)
    for number in (0.0, -0.0, 1.0, -1.0, 2**-20, 1e30):
        yield f"all {number}", lambda x, number=number: x.fill_(number)
        yield f"{number} more", lambda x, number=number: x.add_(number)
    yield "turned round", lambda x: x.copy_(x.flip(0))
    yield "one ulp up", lambda x: x.copy_(x.nextafter(torch.tensor(float("inf"))))
    yield "others", lambda x: x.copy_(torch.randn(n, generator=generator))
    yield "in 16 bits", lambda x: x.copy_(x.bfloat16())
    yield "signs off", lambda x: x.abs_()


@with_marks
@pytest.mark.parametrize("kind", ["random", "16 bits", "constant", "0"])
@pytest.mark.parametrize("n", [2, 40, 1500])
def test_no_edit_of_the_weights_leaves_their_marks(n, kind):
    """Some 1,100 edits of each kind of weights; what leaves all numbers equal (0 is -0) is no edit."""
    generator = torch.Generator().manual_seed(n)
    y = torch.randn(n, generator=generator)
    y = {"random": y, "16 bits": y.bfloat16().float(), "constant": y * 0 + 0.5, "0": y * 0}[kind]
    held, aside = y.clone(), y.clone()
    z = held + (0.01 if kind == "random" else 0.0)
    job, numbers = marked_job([y], [z], [aside])
    x, marked = y.clone(), job.marks
    assert not job.run({}, numbers)
    assert same_bits([y], [held])
    noticed = 0
    for name, edit in edits(x, generator):
        y.copy_(x)
        edit(y)
        changed, wrote = not torch.equal(y, x), y.clone()
        job.marks = marked
        assert job.run({}, numbers) == changed, name
        assert same_bits([y], [wrote if changed else held]), name
        noticed += changed
    assert noticed > (400 if kind in ("random", "16 bits") else 200)
    y.copy_(x)
    z.add_(1)  # which is not read where there are marks
    assert not job.run({}, numbers)
    assert same_bits([y], [held])


@pytest.mark.parametrize("name", ["z", "y"])
def test_state_that_was_written_to_while_weights_were_not_is_refused_as_torch_sees_it(name):
    params, optimizer = started("native")
    optimizer.eval()
    held = copies(params)
    optimizer.state[params[1]][name].add_(0.5)
    with pytest.raises(RuntimeError, match=r"got other values in 1 parameter"):
        optimizer.train()
    assert same_bits(params, held)


@with_marks
def test_a_z_that_was_written_to_past_torch_leaves_y_as_it_was():
    params, optimizer = started("native")
    y = copies(params)
    optimizer.eval()
    optimizer.state[params[1]]["z"].data.add_(0.5)
    optimizer.train()
    assert same_bits(params, y)


def other_memory(params, optimizer):
    for p in params:
        p.data = p.data.clone()


def other_state(params, optimizer):
    for p in params:
        optimizer.state[p] = copy.deepcopy(optimizer.state[p])


def from_its_own_state_dict(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def turned(params, optimizer):
    """In the same memory, which the kernel could not tell."""
    params[1].data, optimizer.state[params[1]]["z"] = params[1].data.t(), optimizer.state[params[1]]["z"].t()
    optimizer.state[params[1]]["y"] = optimizer.state[params[1]]["y"].t()


@pytest.mark.parametrize("change", [other_memory, other_state, from_its_own_state_dict, turned])
def test_what_the_last_flip_walked_does_not_outlive_its_tensors(change):
    params, optimizer = started("native")
    y = copies(params)
    for _ in range(2):
        optimizer.eval()
        change(params, optimizer)
        optimizer.train()
        if change is turned:
            turned_back, params[1].data = params[1].data, params[1].data.t()
            optimizer.state[params[1]]["z"] = optimizer.state[params[1]]["z"].t()
            assert turned_back.shape == (5, 3)
        assert same_bits(params, y)
    optimizer.eval()
    change(params, optimizer)
    params[0].data[1002] += 1
    held = copies(params)
    with pytest.raises(RuntimeError, match=r"weights must|got other values"):
        optimizer.train()
    assert same_bits(params, held)


def test_0_is_still_minus_0_and_nan_still_nan():
    params = [torch.nn.Parameter(torch.tensor([0.0, 1.0])), torch.nn.Parameter(torch.ones(3))]
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, [[torch.zeros(2), torch.ones(3)]])
    params[1].data[0] = float("nan")
    y = copies(params)
    optimizer.eval()
    params[0].data[0] = -0.0
    optimizer.train()
    assert same_bits(params, y)


@pytest.mark.parametrize("at", [(0, 0), (1, 70000), (4, 6)])
def test_a_nan_that_is_back_goes_again_where_another_weight_was_written(at):
    """In the same group, which the kernel undoes, and in a later one."""
    params = [torch.nn.Parameter(p.detach()) for p in some_params(torch.float32, LARGE)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = sftorch.AdamWScheduleFree(groups, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    for p in (params[0], params[3]):
        p.data[5:7] = torch.tensor([0xFFC01234, 0x7F800001]).to(torch.int32).view(torch.float32)
    optimizer.eval()
    params[at[0]].data[at[1]] += 1
    held = copies(params)
    with pytest.raises(RuntimeError, match=r"got other values in 1 parameter"):
        optimizer.train()
    assert same_bits(params, held)
