"""16-bit parameters: the run is the one that float32 parameters would make of the same gradients."""

import copy

import pytest
import torch

import sftorch
from sfcore import convert, inspection, store
from sftorch.checkpoint import Checkpoints, import_state_dict
from sftorch.state import forms
from sftorch.tests.load_runs import ORDERS, between, build, follow
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, copies, feed, same_bits, some_grads, some_params

NARROW = [torch.bfloat16, torch.float16]
# The widest is float16's half ulp beside bfloat16's.
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def wrapped(params, lr=STEP_SIZE, momentum=0.9, weight_decay=0.0):
    base = torch.optim.RMSprop(params, lr=lr)
    return sftorch.ScheduleFreeWrapper(base, momentum=momentum, weight_decay_at_y=weight_decay)


MAKERS = [*CLASSES.values(), *CLOSURES.values(), wrapped]


def pair(dtype):
    """Returns 16-bit parameters, float32 ones that start from the same numbers, and gradients for both."""
    narrow = some_params(dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    return narrow, wide, some_grads(200, narrow)


def held(optimizer, params):
    """Returns in full what the parameters hold."""
    return [forms.joined(p.detach(), optimizer.state[p], optimizer._rest) for p in params]


def z(optimizer, params):
    return [optimizer.state[p]["z"] for p in params]


def assert_close(found, wanted):
    # 200 steps in float32, with one more rounding in the wrapper; measured 3 eps of the numbers moved.
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("make", MAKERS)
def test_the_run_is_that_of_float32(make, dtype, foreach):
    narrow, wide, grads = pair(dtype)
    options = {"lr": 1e-4, "weight_decay": 0.1} | ({} if make is wrapped else {"foreach": foreach})
    ours, reference = make(narrow, **options), make(wide, **options)
    feed(ours, narrow, grads)
    feed(reference, wide, [[g.float() for g in of_step] for of_step in grads])
    assert_close(held(ours, narrow), wide)
    assert_close(z(ours, narrow), z(reference, wide))
    for p, y in zip(narrow, held(ours, narrow), strict=True):
        assert ((p.detach().float() - y).abs() <= y.abs() * HALF_ULP[dtype] + 1e-7).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_every_beta_is_right(dtype, beta):
    narrow, wide, grads = pair(dtype)
    ours, reference = (sftorch.SGDScheduleFree(ps, lr=1e-4, momentum=beta) for ps in (narrow, wide))
    feed(ours, narrow, grads)
    feed(reference, wide, [[g.float() for g in of_step] for of_step in grads])
    assert_close(held(ours, narrow), wide)
    x = [ours._x(p, ours.param_groups[0]) for p in narrow]
    assert_close(x, list(reference.eval_params().values()))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("make", [*CLASSES.values(), wrapped])
def test_eval_and_train_give_back_both_halves(make, dtype):
    params, _, grads = pair(dtype)
    optimizer = make(params, lr=STEP_SIZE)
    feed(optimizer, params, grads[:9])
    y, x = held(optimizer, params), [p.to(dtype) for p in optimizer.eval_params().values()]
    for _ in range(3):
        optimizer.eval()
        assert same_bits(params, x)
        assert same_bits([forms.y_of(p, optimizer.state[p]) for p in params], y)
        optimizer.train()
        assert same_bits(held(optimizer, params), y)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_changed_beta_keeps_x(dtype):
    params, _, grads = pair(dtype)
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, grads[:20])
    group = optimizer.param_groups[0]
    x = copies(optimizer._x(p, group) for p in params)
    group["momentum"] = 0.5
    with torch.no_grad():
        optimizer._settle_beta(group)
    assert_close([optimizer._x(p, group) for p in params], x)


def test_rebase_forgets_the_rest():
    params, _, grads = pair(torch.bfloat16)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, grads[:5])
    assert any(optimizer.state[p]["y_rest"].count_nonzero() for p in params)
    optimizer.rebase()
    assert not any(optimizer.state[p]["y_rest"].count_nonzero() for p in params)
    assert same_bits([p.float() for p in params], z(optimizer, params))


def test_weights_set_to_zero_in_training_stay_near_zero():
    params, _, grads = pair(torch.bfloat16)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, grads[:5])
    for p in params:
        p.data.zero_()
    assert all((y.abs() < 1e-37).all() for y in held(optimizer, params))


@pytest.mark.parametrize("make", [sftorch.AdamWScheduleFree, sftorch.SGDScheduleFreeClosure, wrapped])
def test_a_model_may_change_its_dtype_in_training(make):
    params, _, grads = pair(torch.bfloat16)
    optimizer = make(params, lr=STEP_SIZE)
    feed(optimizer, params, grads[:3])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for p in params:
            p.data = p.data.to(dtype)
        feed(optimizer, params, [[g.to(dtype) for g in of_step] for of_step in grads[3:5]])
        kept = {optimizer.state[p][optimizer._rest].dtype for p in params if dtype != torch.float32}
        assert kept == {torch.float16: {torch.float32}, torch.bfloat16: {torch.int16}}.get(dtype, set())
    assert all(p.isfinite().all() for p in params)


class TestStateDict:
    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    @pytest.mark.parametrize("kind", ["sgd", "adamw", "polyak", "wrapper"])
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_weights_and_state_come_back_in_full_in_every_order(self, kind, dtype, mode):
        model, optimizer = build(kind, dtype)
        params = list(model.parameters())
        grads = some_grads(12, params)
        feed(optimizer, params, grads[:9])
        getattr(optimizer, mode)()
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.train()
        at_load = held(optimizer, params)
        feed(optimizer, params, grads[9:])
        for order in (order for order in ORDERS if not between(order)):
            other_model, other = build(kind, dtype, seed=1)
            others = list(other_model.parameters())
            follow(order, other_model, other, weights, state)
            other.train()
            assert same_bits(held(other, others), at_load), order
            feed(other, others, grads[9:])
            assert same_bits(held(other, others), held(optimizer, params)), order
            assert same_bits(z(other, others), z(optimizer, params)), order

    def test_the_rest_is_an_integer_and_stays_one(self):
        params, _, grads = pair(torch.bfloat16)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
        feed(optimizer, params, grads[:5])
        other = sftorch.AdamWScheduleFree(copies(params))
        other.load_state_dict(optimizer.state_dict())
        rests = [other.state[p]["y_rest"] for p in other.param_groups[0]["params"]]
        assert {rest.dtype for rest in rests} == {torch.int16}
        assert same_bits(rests, [optimizer.state[p]["y_rest"] for p in params])

    def test_state_without_a_rest_loads_and_goes_on_from_the_rounded_y(self):
        params, _, grads = pair(torch.bfloat16)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
        feed(optimizer, params, grads[:5])
        state = copy.deepcopy(optimizer.state_dict())
        for values in state["state"].values():
            del values["y_rest"]
        others = [torch.nn.Parameter(p) for p in copies(params)]
        other = sftorch.AdamWScheduleFree(others, lr=STEP_SIZE)
        other.load_state_dict(state)
        assert same_bits(held(other, others), params)
        feed(other, others, grads[5:6])
        assert all(other.state[p]["y_rest"].dtype == torch.int16 for p in others)

    def test_the_rest_of_another_dtype_is_left_out(self):
        params, wide, grads = pair(torch.bfloat16)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
        feed(optimizer, params, grads[:5])
        other = sftorch.AdamWScheduleFree(wide)
        other.load_state_dict(optimizer.state_dict())
        assert not any("y_rest" in other.state[p] for p in wide)

    def test_weights_of_the_other_mode_in_between_do_no_harm(self):
        model, optimizer = build("adamw", torch.bfloat16)
        params = list(model.parameters())
        feed(optimizer, params, some_grads(9, params))
        y, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        with optimizer.evaluation():
            x = copy.deepcopy(model.state_dict())
        other_model, other = build("adamw", torch.bfloat16, seed=1)
        others = list(other_model.parameters())
        other_model.load_state_dict(x)
        with pytest.warns(UserWarning, match="the weights hold x"):
            other.load_state_dict(state)  # y is now made of x and z
        assert not same_bits(held(other, others), held(optimizer, params))
        other_model.load_state_dict(y)
        feed(other, others, some_grads(1, others, seed=5))
        feed(optimizer, params, some_grads(1, params, seed=5))
        assert same_bits(held(other, others), held(optimizer, params))

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_closure_forms_take_over_x_in_full_and_give_it_back(self, mode):
        params, _, grads = pair(torch.bfloat16)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
        feed(optimizer, params, grads[:9])
        x = copies(optimizer._x(p, optimizer.param_groups[0]) for p in params)
        y = held(optimizer, params)
        getattr(optimizer, mode)()
        weights = [torch.nn.Parameter(p) for p in copies(params)]
        closed = sftorch.AdamWScheduleFreeClosure(weights)
        import_state_dict(closed, copy.deepcopy(optimizer.state_dict()))
        assert same_bits(held(closed, weights), x)
        assert not any("y_rest" in closed.state[p] for p in weights)
        back = sftorch.AdamWScheduleFree([torch.nn.Parameter(p) for p in copies(weights)])
        import_state_dict(back, copy.deepcopy(closed.state_dict()))
        assert_close(held(back, back.param_groups[0]["params"]), y)


def test_an_exception_in_a_closure_gives_back_both_halves_of_x():
    params, _, grads = pair(torch.bfloat16)
    optimizer = sftorch.SGDScheduleFreeClosure(params, lr=STEP_SIZE)
    feed(optimizer, params, grads[:5])
    x = copies([*params, *(optimizer.state[p]["x_rest"] for p in params)])

    def closure():
        raise ArithmeticError("boom")

    with pytest.raises(ArithmeticError, match="boom"):
        optimizer.step(closure)
    assert same_bits([*params, *(optimizer.state[p]["x_rest"] for p in params)], x)


def test_the_base_of_a_wrapper_keeps_its_buffers_in_float32_through_a_state_dict():
    params, _, grads = pair(torch.bfloat16)
    optimizer = wrapped(params)
    feed(optimizer, params, grads[:5])
    others = [torch.nn.Parameter(p) for p in copies(params)]
    other = wrapped(others)
    other.load_state_dict(optimizer.state_dict())
    squares = [optimizer.base.state[p]["square_avg"] for p in params]
    assert {v.dtype for v in squares} == {torch.float32}
    assert same_bits([other.base.state[p]["square_avg"] for p in others], squares)
    assert other.base.param_groups[0]["params"][0] is others[0]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_base_that_makes_its_state_at_once_steps_as_in_float32(dtype):
    params, others, grads = pair(dtype)
    optimizer, other = (
        sftorch.ScheduleFreeWrapper(torch.optim.Adagrad(ps, lr=STEP_SIZE)) for ps in (params, others)
    )
    feed(optimizer, params, grads)
    feed(other, others, [[g.float() for g in row] for row in grads])
    assert same_bits(z(optimizer, params), z(other, others))


class TestCheckpoints:
    def saved(self, folder, make, mode, dtype=torch.bfloat16):
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)).to(dtype)
        optimizer = make(list(model.parameters()), lr=STEP_SIZE)
        params = list(model.parameters())
        feed(optimizer, params, some_grads(9, params))
        if mode:
            getattr(optimizer, mode)()
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(model, optimizer, metrics={"loss": 1.0})
            path = checkpoints.wait()
        if mode:
            optimizer.train()
        return model, optimizer, path

    @pytest.mark.parametrize("dtype", NARROW, ids=str)
    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("make", [sftorch.AdamWScheduleFree, wrapped])
    def test_the_file_has_y_in_full_and_x_as_it_is_shipped(self, tmp_path, make, mode, dtype):
        model, optimizer, path = self.saved(tmp_path, make, mode, dtype)
        meta, state = store.read(path)
        _, inference = store.read(path, store.INFERENCE)
        x = optimizer.eval_state_dict(model)
        assert not any(leaf.startswith("rest/") for leaf in state)
        assert meta.precision == str(dtype).removeprefix("torch.")
        for name, p in model.named_parameters():
            y = forms.joined(p.detach(), optimizer.state[p])
            assert torch.equal(torch.from_numpy(state[f"y/{name}"]), y)
            assert inference[name].dtype.name == meta.precision
            assert torch.equal(torch.from_numpy(inference[name].astype("float32")), x[name].float())

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_closure_forms_resume_exactly_and_may_take_over(self, tmp_path, mode):
        model, optimizer, _ = self.saved(tmp_path, sftorch.SGDScheduleFreeClosure, None)
        for make in (sftorch.SGDScheduleFreeClosure, sftorch.SGDScheduleFree):
            other_model = copy.deepcopy(model)
            others = list(other_model.parameters())
            other = make(others, lr=STEP_SIZE)
            if hasattr(other, mode):
                getattr(other, mode)()
            Checkpoints(tmp_path).restore(other_model, other)
            if hasattr(other, mode):
                other.train()
                x = [other._x(p, other.param_groups[0]) for p in others]
                assert_close(x, held(optimizer, model.parameters()))
            else:
                assert same_bits(held(other, others), held(optimizer, model.parameters()))

    def test_what_reads_the_file_sees_the_parameters_dtype_and_the_full_y(self, tmp_path):
        model, optimizer, path = self.saved(tmp_path / "run", sftorch.AdamWScheduleFree, "train")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
        found, of_torch = inspection.inspect(path), inspection.inspect(tmp_path / "run.pt")
        assert found["norms"] == pytest.approx(of_torch["norms"], rel=1e-6)
        y = torch.cat([forms.joined(p.detach(), optimizer.state[p]).flatten() for p in model.parameters()])
        assert found["norms"]["y"] == pytest.approx(y.norm().item(), rel=1e-6)
        target, _ = convert.convert(tmp_path / "run.pt", tmp_path / "x.safetensors", "inference")
        x, _, _ = sftorch.checkpoint._weights.read(target)
        assert {value.dtype for value in x.values()} == {torch.bfloat16}
        assert all(torch.equal(x[k], v) for k, v in optimizer.eval_state_dict(model).items())
