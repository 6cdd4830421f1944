"""The plan of a step is kept while it is right, and only then: every run is that of plans made anew."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import sftorch
from sfcore.checks import HyperparameterError
from sftorch.tests.plain import (
    CLASSES,
    CLOSURES,
    STEP_SIZE,
    copies,
    feed,
    same_bits,
    some_grads,
    some_params,
    take_step,
)

SHAPES = [(4, 4), (3,), (), (2, 5)]
PATHS = {"native": {}, "foreach": {"fused": False}, "single": {"foreach": False}}
STEPS, AT = 8, 4  # steps of a run, and the one before which something happens


def make(kind="adamw", shapes=SHAPES, dtype=torch.float32, **options):
    params = some_params(dtype, shapes)
    return CLASSES[kind](params, lr=STEP_SIZE, **options), params


def group_of(optimizer):
    return optimizer.param_groups[0]


def everything(optimizer):
    """Returns all tensors and numbers that two equal runs have in common."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    tensors = [*params, *(v for s in states for v in s.values() if isinstance(v, torch.Tensor))]
    numbers = [{k: v for k, v in s.items() if not isinstance(v, torch.Tensor)} for s in states]
    books = [
        {k: v for k, v in g.items() if k != "params" and not isinstance(v, torch.Tensor)}
        for g in optimizer.param_groups
    ]
    return tensors, numbers + books


def assert_same_runs(one, other):
    (tensors, numbers), (others, other_numbers) = everything(one), everything(other)
    assert numbers == other_numbers
    assert same_bits(tensors, others)


def run(optimizer, params, happens, anew, after=lambda optimizer, params: None):
    """Takes the steps of a run; `anew` makes a plan for each step, `happens` returns who goes on."""
    kept = []
    for number, of_step in enumerate(some_grads(STEPS, params)):
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.to(p.dtype)
        if number == AT:
            optimizer, params = happens(optimizer, params) or (optimizer, params)
        elif number > AT:
            after(optimizer, params)
        before = optimizer._plan
        if anew:
            optimizer._plan = None
        take_step(optimizer)
        kept.append(before is not None and optimizer._plan is before)
    return optimizer, kept


def assert_is_that_of_new_plans(happens, after=lambda optimizer, params: None, **options):
    """Runs with and without plans that are kept; returns which steps used the plan of the one before."""
    ends = []
    for anew in (False, True):
        optimizer, params = make(**copy.deepcopy(options))
        ends.append(run(optimizer, params, happens, anew, after))
    (one, kept), (other, never) = ends
    assert not any(never)
    assert_same_runs(one, other)
    return kept


def nothing(optimizer, params):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_kept_from_the_second_step_on(kind, path, dtype):
    kept = assert_is_that_of_new_plans(nothing, kind=kind, dtype=dtype, **PATHS[path])
    # RAdam's direction changes where its second moment becomes usable.
    assert kept == [False] + [kind != "radam" or number != 4 for number in range(1, STEPS)]


@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_kept_in_the_lean_form(kind):
    kept = assert_is_that_of_new_plans(nothing, kind=kind, precision="lean", dtype=torch.bfloat16)
    assert all(kept[1:4])


def set_option(**values):
    def happens(optimizer, params):
        group_of(optimizer).update(values)

    return happens


def write_betas(optimizer, params):
    group_of(optimizer)["betas"][1] = 0.5


def fill_lr(optimizer, params):
    group_of(optimizer)["lr"].fill_(0.01)


NUMBERS = {
    "lr": {"lr": 0.01},
    "b2": {"betas": (0.9, 0.5)},
    "weight_decay": {"weight_decay": 0.3},
    "eps": {"eps": 0.1},
    "warmup_steps": {"warmup_steps": 20},
    "r": {"r": 2.0},
    "weight_lr_power": {"weight_lr_power": 0.5},
    "inner_momentum, on": {"inner_momentum": 0.6},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_changed_number_keeps_it_and_counts(name):
    options = {"inner_momentum": 0.3} if "inner" in name else {}
    kept = assert_is_that_of_new_plans(set_option(**NUMBERS[name]), **options)
    assert all(kept[1:])
    plain = run(*make(**options), nothing, anew=False)[0]
    changed = run(*make(**options), set_option(**NUMBERS[name]), anew=False)[0]
    assert not same_bits(everything(plain)[0], everything(changed)[0])


def test_numbers_that_are_written_in_place_count():
    assert_is_that_of_new_plans(write_betas, betas=[0.9, 0.99])
    ends = []
    for fill in (False, True):
        params = some_params(torch.float32, SHAPES)
        optimizer = sftorch.AdamWScheduleFree(params, lr=torch.tensor(STEP_SIZE))
        ends.append(run(optimizer, params, fill_lr if fill else set_option(lr=0.01), anew=False)[0])
    assert same_bits(everything(ends[0])[0], everything(ends[1])[0])


OPTIONS = {
    "beta": {"betas": (0.5, 0.999)},
    "beta 0": {"betas": (0.0, 0.999)},
    "beta 1": {"betas": (1.0, 0.999)},
    "fused off": {"fused": False},
    "foreach off": {"foreach": False},
    "both off": {"foreach": False, "fused": False},
    "fused required": {"fused": True},
    "maximize": {"maximize": True},
    "inner_momentum from 0": {"inner_momentum": 0.5},
    "precision": {"precision": "lean"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_changes_more_than_numbers_makes_it_anew(name):
    kept = assert_is_that_of_new_plans(set_option(**OPTIONS[name]))
    assert not kept[AT]
    assert kept[AT + 1] == (name != "beta 0")


def test_an_option_out_of_range_is_refused_in_the_step_in_which_it_comes_and_nothing_moves():
    optimizer, params = make()
    feed(optimizer, params, some_grads(3, params))
    held = copies(everything(optimizer)[0])
    group_of(optimizer).update(lr=-1.0, weight_decay=-2.0)
    for _ in range(2):
        with pytest.raises(HyperparameterError) as caught:
            feed(optimizer, params, some_grads(1, params))
        assert len(caught.value.problems) == 2
        assert same_bits(everything(optimizer)[0], held)
    group_of(optimizer).update(lr=STEP_SIZE, weight_decay=True)
    with pytest.raises(HyperparameterError, match="weight_decay must be a finite number >= 0, got True"):
        feed(optimizer, params, some_grads(1, params))
    group_of(optimizer)["weight_decay"] = 0
    feed(optimizer, params, some_grads(1, params))
    assert optimizer.metrics()[0]["step"] == 4


def no_gradient(optimizer, params):
    params[1].grad = None


def test_gradients_that_are_missing_come_late_and_go():
    kept = assert_is_that_of_new_plans(no_gradient)
    assert kept[AT : AT + 3] == [False, False, True]  # with two clocks from then on
    assert_is_that_of_new_plans(no_gradient, after=no_gradient)
    ends = []
    for anew in (False, True):
        optimizer, params = make()
        for number, of_step in enumerate(some_grads(STEPS, params)):
            grads = [g if i or number > 3 else None for i, g in enumerate(of_step)]
            optimizer._plan = None if anew else optimizer._plan
            feed(optimizer, params, [grads])
        ends.append(optimizer)
        assert optimizer.state[params[0]]["step"] == STEPS - 4
    assert_same_runs(*ends)


def half_gradient(optimizer, params):
    params[0].grad.data = params[0].grad.half()


def all_in_bfloat16(optimizer, params):
    for p in params:
        p.grad.data = p.grad.bfloat16()


def all_in_float16(optimizer, params):
    for p in params:
        p.grad.data = p.grad.half()


def transposed_gradient(optimizer, params):
    params[0].grad = params[0].grad.t().contiguous().t()


def spread_gradient(optimizer, params):
    params[0].grad = torch.ones(1, 1).expand(4, 4)


def negative_gradient(optimizer, params):
    params[0].grad = torch._neg_view(params[0].grad)
    assert params[0].grad.is_contiguous()


def marked_gradient(optimizer, params):
    class Marked(torch.Tensor):
        pass

    params[0].grad = params[0].grad.as_subclass(Marked)


GRADIENTS = [
    half_gradient,
    all_in_bfloat16,
    all_in_float16,
    transposed_gradient,
    spread_gradient,
    negative_gradient,
    marked_gradient,
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("happens", GRADIENTS, ids=lambda one: one.__name__)
def test_gradients_of_another_kind_make_it_anew(happens, path):
    for after in (nothing, happens):
        kept = assert_is_that_of_new_plans(happens, after=after, shapes=[(4, 4), (3,)], **PATHS[path])
        assert not kept[AT]


def test_a_sparse_gradient_is_refused_when_it_comes_and_nothing_moves():
    optimizer, params = make(shapes=[(4, 4), (3,)])
    feed(optimizer, params, some_grads(3, params))
    held = copies(everything(optimizer)[0])
    params[0].grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match=r"gradients must be dense, got torch\.sparse_coo"):
        optimizer.step()
    assert same_bits(everything(optimizer)[0], held)


def as_dtype(dtype):
    def happens(optimizer, params):
        for p in params:
            grad, p.grad = p.grad, None
            p.data = p.data.to(dtype)
            p.grad = grad.to(dtype)

    return happens


def moved_parameter(optimizer, params):
    params[0].data = params[0].data.clone()


def transposed_parameter(optimizer, params):
    params[0].data = params[0].data.t()


def permuted_state(optimizer, params):
    optimizer.state[params[0]]["z"].data = optimizer.state[params[0]]["z"].data.t()


def new_z(optimizer, params):
    optimizer.state[params[0]]["z"] = torch.ones(4, 4)


def written_z(optimizer, params):
    optimizer.state[params[0]]["z"].fill_(2.0)


def z_elsewhere(optimizer, params):
    optimizer.state[params[0]]["z"].data = torch.full((4, 4), 3.0)


def wide_moments(optimizer, params):
    for p in params:
        optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].double()


def lost_moment(optimizer, params):
    del optimizer.state[params[1]]["exp_avg_sq"]


def copied_state(optimizer, params):
    optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[1]])


def fresh_start_of_one(optimizer, params):
    del optimizer.state[params[1]]


def fresh_start(optimizer, params):
    optimizer.state.clear()


def another_clock(optimizer, params):
    optimizer.state[params[1]]["step"] = 100


def another_sum(optimizer, params):
    for p in params:
        optimizer.state[p]["weight_sum"] = 7.0


def another_group_clock(optimizer, params):
    group_of(optimizer).update(k=100, lr_max=3.0)


def another_beta_that_built_y(optimizer, params):
    group_of(optimizer)["y_beta"] = 0.5  # as a restore in place may say


def another_order(optimizer, params):
    group_of(optimizer)["params"].reverse()


def another_parameter(optimizer, params):
    new = torch.nn.Parameter(torch.ones(3))
    new.grad = torch.full((3,), 0.5)
    group_of(optimizer)["params"][1] = new


def another_parameter_with_the_state_of_the_old_one(optimizer, params):
    new = torch.nn.Parameter(torch.ones(3))
    new.grad = torch.full((3,), 0.5)
    optimizer.state[new] = optimizer.state.pop(params[1])
    group_of(optimizer)["params"][1] = new


def one_parameter_less(optimizer, params):
    group_of(optimizer)["params"].pop()


def another_group(optimizer, params):
    new = torch.nn.Parameter(torch.ones(3))
    new.grad = torch.full((3,), 0.5)
    optimizer.add_param_group({"params": [new], "lr": 0.2})


def another_dict_of_the_group(optimizer, params):
    optimizer.param_groups[0] = dict(group_of(optimizer), lr=0.2)


def flips(optimizer, params):
    optimizer.eval()
    optimizer.train()


def rebased(optimizer, params):
    with torch.no_grad():
        params[0].fill_(1.0)
    optimizer.rebase()


def loaded(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def an_earlier_state(optimizer, params):
    saved = copy.deepcopy(optimizer.state_dict())
    take_step(optimizer)
    take_step(optimizer)
    optimizer.load_state_dict(saved)
    optimizer.rebase()


def copied(optimizer, params):
    pairs = copy.deepcopy((optimizer, params))
    for p, other in zip(params, pairs[1], strict=True):
        other.grad = p.grad.clone()
    return pairs


def pickled(optimizer, params):
    pair = pickle.loads(pickle.dumps((optimizer, params)))
    for p, other in zip(params, pair[1], strict=True):
        other.grad = p.grad.clone()
    return pair


KEPT = [written_z, flips, rebased, another_group_clock]
ANEW = [moved_parameter, transposed_parameter, permuted_state, new_z, z_elsewhere, wide_moments, lost_moment]
ANEW += [copied_state, fresh_start_of_one, fresh_start, another_clock, another_sum, another_order]
ANEW += [another_beta_that_built_y]
ANEW += [
    another_parameter,
    another_parameter_with_the_state_of_the_old_one,
    one_parameter_less,
    another_group,
]
ANEW += [another_dict_of_the_group, loaded, an_earlier_state, copied, pickled]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("happens", KEPT + ANEW, ids=lambda one: one.__name__)
def test_whatever_happens_between_steps_the_run_is_that_of_new_plans(happens, path):
    kept = assert_is_that_of_new_plans(happens, **PATHS[path])
    assert kept[AT] == (happens in KEPT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_parameters_of_another_dtype_make_it_anew(path, dtype):
    kept = assert_is_that_of_new_plans(as_dtype(dtype), **PATHS[path])
    assert not kept[AT]
    back = assert_is_that_of_new_plans(as_dtype(torch.float32), dtype=dtype, **PATHS[path])
    assert not back[AT]


def test_parameters_of_another_dtype_in_the_same_place_make_it_anew():
    """With gradients in float32 all the time, so that nothing else tells."""
    ends = []
    for anew in (False, True):
        optimizer, params = make(dtype=torch.float16)
        for number, of_step in enumerate(some_grads(STEPS, params)):
            for p, g in zip(params, of_step, strict=True):
                p.grad = None
                if number == AT:
                    wanted, place = p.data.to(torch.bfloat16), p.data.view(torch.bfloat16)
                    p.data = place.copy_(wanted)
                p.grad = torch.zeros_like(p)
                p.grad.data = g.float()
            if anew:
                optimizer._plan = None
            optimizer.step()
        ends.append(optimizer)
    assert params[0].dtype == torch.bfloat16
    assert_same_runs(*ends)


@pytest.mark.parametrize("kind", CLOSURES)
def test_the_closure_forms_keep_it_too(kind):
    ends = []
    for anew in (False, True):
        params = some_params(torch.float32, SHAPES)
        optimizer = CLOSURES[kind](params, lr=STEP_SIZE)
        end, kept = run(optimizer, params, set_option(lr=0.01), anew)
        ends.append(end)
        assert any(kept) != anew
    assert_same_runs(*ends)


def test_groups_and_dtypes_apart_keep_theirs():
    ends = []
    for anew in (False, True):
        wide, narrow = some_params(torch.float32, SHAPES), some_params(torch.bfloat16, SHAPES, seed=2)
        groups = [{"params": [*wide[:2], *narrow[:2]]}, {"params": [*wide[2:], *narrow[2:]], "lr": 0.2}]
        optimizer = sftorch.AdamWScheduleFree(groups, lr=STEP_SIZE)
        params = [p for group in groups for p in group["params"]]
        end, kept = run(optimizer, params, nothing, anew)
        ends.append(end)
        assert kept == [not anew and number > 0 for number in range(STEPS)]
    assert_same_runs(*ends)


@pytest.mark.parametrize("path", PATHS)
def test_tensors_of_odd_layouts_have_a_new_one_in_each_step(path):
    ends = []
    for anew in (False, True):
        params = [
            torch.nn.Parameter(torch.arange(24.0).view(4, 6)[:, ::2]),
            *some_params(torch.float32, [(3,)]),
        ]
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, **PATHS[path])
        end, kept = run(optimizer, params, nothing, anew)
        ends.append(end)
        assert any(kept) == (not anew and path != "native")  # what a kernel leaves is sorted out each time
    assert_same_runs(*ends)


@pytest.mark.parametrize("path", PATHS)
def test_dense_tensors_in_another_order_keep_theirs(path):
    ends = []
    for anew in (False, True):
        start = torch.arange(120.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        params = [torch.nn.Parameter(start)]
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, **PATHS[path])
        for number in range(STEPS):
            layout = torch.contiguous_format if number == AT else torch.channels_last
            params[0].grad = torch.full_like(start, number + 1.0, memory_format=layout)
            params[0].grad[0] = -2.0
            before = optimizer._plan
            if anew:
                optimizer._plan = None
            optimizer.step()
            if number not in (0, AT, AT + 1):
                assert (optimizer._plan is before) != anew
        ends.append(optimizer)
    assert_same_runs(*ends)


def test_elsewhere_than_on_the_cpu_nothing_is_held_between_steps():
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = sftorch.AdamWScheduleFree([p])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer._plan is None


def test_no_gradient_is_kept_alive_by_it():
    optimizer, params = make()
    feed(optimizer, params, some_grads(2, params))
    assert optimizer._plan is not None
    seen = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert [one() for one in seen] == [None] * len(params)


def test_neither_state_that_was_loaded_over_nor_an_optimizer_that_is_gone_is_kept_alive_by_it():
    optimizer, params = make()
    feed(optimizer, params, some_grads(2, params))
    z = weakref.ref(optimizer.state[params[0]]["z"])
    optimizer.load_state_dict(optimizer.state_dict())
    assert z() is None
    feed(optimizer, params, some_grads(2, params))
    z = weakref.ref(optimizer.state[params[0]]["z"])
    gc.disable()  # what is left must not wait for it
    try:
        del optimizer
        assert z() is None
    finally:
        gc.enable()


def test_a_step_inside_backward_keeps_the_plan_of_each_parameter():
    ends = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=STEP_SIZE)
        handle = sftorch.step_in_backward(optimizer) if in_backward else None
        for number in range(STEPS):
            if number == AT:
                group_of(optimizer).update(betas=(0.8, 0.99), weight_decay=0.1)
                optimizer.state[model[0].weight]["z"] = torch.ones(4, 3)
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        ends.append(optimizer)
        if handle is not None:
            handle.remove()
    assert_same_runs(*ends)


class TestDTensors:
    """A plan of parameters in parts, with new gradients in every step."""

    @pytest.fixture
    def mesh(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    def divided(self, mesh, tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    def run(self, mesh, happens, gradient, anew=False):
        """Returns an optimizer after a run, and which of its steps used the plan of the one before."""
        whole = some_params(torch.float32, [(4, 4), (3,)])
        params = [torch.nn.Parameter(self.divided(mesh, p.detach())) for p in whole]
        optimizer, kept = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE), []
        for number, of_step in enumerate(some_grads(STEPS, whole)):
            for p, g in zip(params, of_step, strict=True):
                p.grad = gradient(g)
            if number == AT:
                happens(optimizer, params)
            before = optimizer._plan
            if anew:
                optimizer._plan = None
            optimizer.step()
            kept.append(before is not None and optimizer._plan is before)
        tensors, numbers = everything(optimizer)
        return [t.to_local() for t in tensors], numbers, kept

    def assert_is_that_of_new_plans(self, mesh, happens, gradient):
        tensors, numbers, kept = self.run(mesh, happens, gradient)
        others, other_numbers, never = self.run(mesh, happens, gradient, anew=True)
        assert not any(never)
        assert numbers == other_numbers
        assert same_bits(tensors, others)
        return kept

    def test_it_is_kept_from_the_second_step_on(self, mesh):
        kept = self.assert_is_that_of_new_plans(mesh, nothing, lambda g: self.divided(mesh, g))
        assert kept == [False] + [True] * (STEPS - 1)

    def test_it_is_kept_with_gradients_that_are_redistributed(self, mesh):
        kept = self.assert_is_that_of_new_plans(
            mesh, nothing, lambda g: DTensor.from_local(g, mesh, [Partial()], run_check=False)
        )
        assert kept == [False] + [True] * (STEPS - 1)

    @pytest.mark.parametrize("what", ["p", "z"])
    def test_a_part_that_lies_elsewhere_makes_it_anew(self, mesh, what):
        def moved(optimizer, params):
            tensor = params[0] if what == "p" else optimizer.state[params[0]]["z"]
            tensor._local_tensor = tensor._local_tensor.clone()

        kept = self.assert_is_that_of_new_plans(mesh, moved, lambda g: self.divided(mesh, g))
        assert kept == [False] + [number != AT for number in range(1, STEPS)]
