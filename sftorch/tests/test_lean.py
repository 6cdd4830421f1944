"""The lean form: 8 bytes a bfloat16 parameter, unbiased, the same bits from the same seed."""

import copy

import pytest
import torch

import sftorch
from sfcore import inspection, store
from sfcore.checks import HyperparameterError
from sftorch.checkpoint import CheckpointError, Checkpoints, import_state_dict
from sftorch.state import forms
from sftorch.step.backends import draws, key_of, rounded
from sftorch.tests.plain import CLASSES, CLOSURES, STEP_SIZE, copies, feed, same_bits, some_grads, some_params

SHAPE = [(40, 30)]


def lean(make, dtype=torch.bfloat16, seed=0, shapes=SHAPE, **options):
    params = some_params(dtype, shapes=shapes)
    return make(params, lr=options.pop("lr", STEP_SIZE), precision="lean", seed=seed, **options), params


def everything(optimizer, params):
    """Returns every tensor that a run is made of."""
    found = copies(params)
    for p in params:
        found += [v.clone() for _, v in sorted(optimizer.state[p].items()) if isinstance(v, torch.Tensor)]
    return found


def drawn_for(shape, *keys):
    return draws(torch.Size(shape), keys, torch.device("cpu"))


class TestDraws:
    @pytest.mark.parametrize("n", range(4))
    def test_each_is_even(self, n):
        drawn = drawn_for([1 << 20], key_of(1), key_of(2))[n]
        counts = torch.bincount(drawn >> 8, minlength=256).double()
        # A sum of squares over 256 bins has mean 255 and deviation 22.6; measured 255 to 290 over ten keys.
        assert ((counts - 4096).square() / 4096).sum() < 350
        assert drawn.min() >= 0
        assert drawn.max() < 1 << 16

    @pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
    def test_those_of_other_keys_and_of_the_same_are_unlike(self, other):
        found = torch.stack(drawn_for([1 << 18], key_of(1, 0, 0), key_of(*other))).double()
        # Of 2^18 pairs the correlation deviates by 0.002; measured 0.004 at most.
        assert (torch.corrcoef(found) - torch.eye(4)).abs().max() < 0.01

    @pytest.mark.parametrize("n", range(2))
    def test_neighbours_are_unlike(self, n):
        drawn = drawn_for([1 << 18], key_of(1))[n].double()
        assert torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1].abs() < 0.01

    def test_rounding_is_right_on_average_and_exact_where_it_can_be(self):
        value = torch.linspace(-3, 3, 1000).repeat(4000, 1)
        draw, _ = drawn_for(value.shape, key_of(7))
        found = rounded(value, draw).double()
        # The mean of 4000 has 1/63 of the deviation of one, which is half a gap at most; 3.4 of these here.
        gap = value.double().abs() * 2.0**-7
        assert ((found.mean(0) - value[0].double()).abs() <= 6 * gap[0] / 2 / 4000**0.5 + 1e-9).all()
        assert ((found - value.double()).abs() < gap + 1e-30).all()
        exact = value.to(torch.bfloat16)
        assert same_bits([rounded(exact.float(), draw)], [exact])

    def test_infinities_nan_and_zeros_stay(self):
        value = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0, float("nan")])
        found = rounded(value, drawn_for(value.shape, key_of(3))[1])
        assert same_bits([found[:4]], [value[:4].to(torch.bfloat16)])
        assert found[4].isnan()

    def test_a_layout_changes_nothing(self):
        value = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        turned = value.t().contiguous().t()
        draw, _ = drawn_for(value.shape, (1, 2))
        assert same_bits([rounded(turned, draw)], [rounded(value, draw)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_run_stays_near_the_exact_one(kind, dtype):
    optimizer, params = lean(CLASSES[kind], dtype, lr=1e-3)
    exact = [torch.nn.Parameter(p.float()) for p in copies(params)]
    reference = CLASSES[kind](exact, lr=1e-3)
    grads = some_grads(300, params)
    start = copies(exact)
    feed(optimizer, params, grads)
    feed(reference, exact, [[g.float() for g in of_step] for of_step in grads])
    moved = (exact[0] - start[0]).norm()
    off = (forms.joined(params[0].detach(), optimizer.state[params[0]]) - exact[0]).norm()
    assert off < 0.03 * moved  # SGD 0.1%, AdamW and RAdam 1.2%, for v is off by some percent
    x = optimizer._x(params[0], optimizer.param_groups[0])
    assert (x - reference.eval_params()[exact[0]]).norm() < 0.03 * moved


def test_a_bfloat16_parameter_takes_eight_bytes():
    optimizer, params = lean(sftorch.AdamWScheduleFree)
    feed(optimizer, params, some_grads(2, params))
    state = optimizer.state[params[0]]
    tensors = [params[0], *(v for v in state.values() if isinstance(v, torch.Tensor))]
    assert sum(t.element_size() for t in tensors) == 8
    assert set(state) == {"gap", "y_rest", "exp_avg_sq", "step", "lr_max", "weight_sum"}


@pytest.mark.parametrize("options", [{}, {"inner_momentum": 0.5, "weight_decay": 0.1, "maximize": True}])
def test_the_same_seed_gives_the_same_bits_and_another_gives_others(options):
    runs = []
    for seed in (5, 5, 6):
        optimizer, params = lean(sftorch.AdamWScheduleFree, seed=seed, **options)
        feed(optimizer, params, some_grads(20, params))
        runs.append(everything(optimizer, params))
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])


def test_the_number_of_threads_changes_nothing():
    runs, threads = [], torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        optimizer, params = lean(sftorch.AdamWScheduleFree, shapes=[(300, 301)])
        feed(optimizer, params, some_grads(4, params))
        runs.append(everything(optimizer, params))
    torch.set_num_threads(threads)
    assert same_bits(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_step_gives_the_same_bits_and_is_compiled_once(dtype):
    runs = []
    for compiling in (True, False):
        optimizer, params = lean(sftorch.AdamWScheduleFree, dtype, shapes=[(3, 2), (5,)], fused=False)
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="aot_eager") if compiling else optimizer.step
        with torch._dynamo.config.patch(error_on_recompile=compiling):
            for of_step in some_grads(6, params):
                for p, g in zip(params, of_step, strict=True):
                    p.grad = g.clone()
                step()
        runs.append(params + [optimizer.state[p]["gap"] for p in params])
    # The scalars are float64 tensors in one and numbers in the other; measured the same bits.
    assert same_bits(*runs)


def test_equal_parameters_are_rounded_apart():
    (p,) = some_params(torch.bfloat16, shapes=SHAPE)
    params = [p, torch.nn.Parameter(p.detach().clone())]
    optimizer = sftorch.AdamWScheduleFree(params, precision="lean")
    feed(optimizer, params, [[g[0], g[0]] for g in some_grads(5, params)])
    assert not same_bits([optimizer.state[params[0]]["gap"]], [optimizer.state[params[1]]["gap"]])


@pytest.mark.parametrize("kind", CLASSES)
def test_eval_and_train_give_back_the_same_bits(kind):
    optimizer, params = lean(CLASSES[kind])
    feed(optimizer, params, some_grads(9, params))
    before, x = everything(optimizer, params), list(optimizer.eval_params().values())
    optimizer.eval()
    assert same_bits(params, x)
    assert optimizer._holds_x(params[0], optimizer.param_groups[0])
    optimizer.train()
    assert same_bits(everything(optimizer, params), before)


def test_writes_in_eval_mode_are_noticed_and_rebase_accepts_them():
    optimizer, params = lean(sftorch.AdamWScheduleFree)
    feed(optimizer, params, some_grads(9, params))
    optimizer.eval()
    params[0].data.add_(1)
    with pytest.raises(RuntimeError, match="weights must stay x"):
        optimizer.train()
    optimizer.rebase()
    optimizer.train()
    state = optimizer.state[params[0]]
    assert not state["gap"].any()
    assert not state["y_rest"].any()


def test_a_changed_beta_keeps_x_and_z():
    optimizer, params = lean(sftorch.SGDScheduleFree)
    feed(optimizer, params, some_grads(20, params))
    group, (p,) = optimizer.param_groups[0], params

    def x_and_z():
        y = forms.joined(p.detach(), optimizer.state[p])
        return optimizer._x(p, group), forms.z_of(y, optimizer.state[p])

    x, z = x_and_z()
    gap = optimizer.state[p]["gap"].float().abs().max()
    group["momentum"] = 0.5
    with torch.no_grad():
        optimizer._settle_beta(group)
    for found, wanted in zip(x_and_z(), (x, z), strict=True):
        assert (found - wanted).abs().max() <= gap * 2.0**-7  # the new gap is rounded once


@pytest.mark.parametrize("make", CLOSURES.values())
def test_closure_forms_refuse_it(make):
    with pytest.raises((HyperparameterError, TypeError), match=r"precision"):
        make(some_params(), precision="lean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "low"}, "precision must be 'exact', 'lean' or '8bit', got 'low'"),
        ({"precision": "lean", "momentum": 0.0}, "precision must be 'exact' at beta = 0"),
        ({"precision": "lean", "seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"seed": 1.5}, "seed must be a whole number >= 0, got 1.5"),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    with pytest.raises(HyperparameterError, match=message):
        sftorch.SGDScheduleFree(some_params(torch.bfloat16), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_wide_parameters_are_refused(dtype):
    with pytest.raises(HyperparameterError, match=f"precision must be 'exact' for {dtype} parameters"):
        sftorch.SGDScheduleFree(some_params(dtype), precision="lean")


class TestStateDict:
    @pytest.mark.parametrize("kind", CLASSES)
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_a_run_goes_on_with_the_same_bits(self, kind, mode):
        optimizer, params = lean(CLASSES[kind], seed=3)
        grads = some_grads(12, params)
        feed(optimizer, params, grads[:6])
        getattr(optimizer, mode)()
        state, weights = copy.deepcopy(optimizer.state_dict()), copies(params)
        optimizer.train()
        feed(optimizer, params, grads[6:])
        others = [torch.nn.Parameter(p) for p in weights]
        other = CLASSES[kind](others)
        other.load_state_dict(state)
        other.train()
        assert other.state[others[0]]["gap"].dtype == torch.bfloat16
        feed(other, others, grads[6:])
        assert same_bits(everything(other, others), everything(optimizer, params))

    def test_a_group_that_turns_lean_or_exact_goes_on_from_where_it_is(self):
        optimizer, params = lean(sftorch.AdamWScheduleFree, lr=1e-3)
        grads = some_grads(90, params)
        exact = [torch.nn.Parameter(p) for p in copies(params)]
        reference = sftorch.AdamWScheduleFree(exact, lr=1e-3)
        start = copies(exact)[0].float()
        feed(reference, exact, grads)
        for precision, first in (("lean", 0), ("exact", 30), ("lean", 60)):
            optimizer.param_groups[0]["precision"] = precision
            feed(optimizer, params, grads[first : first + 30])
            state = optimizer.state[params[0]]
            assert ("gap" in state) == (precision == "lean")
            assert state["exp_avg_sq"].dtype == (torch.bfloat16 if precision == "lean" else torch.float32)
        x, wanted = (o._x(p, o.param_groups[0]) for o, (p,) in ((optimizer, params), (reference, exact)))
        assert (x - wanted).norm() < 0.01 * (wanted - start).norm()  # measured 0.4%

    def test_closure_forms_and_the_wrapper_refuse_its_state(self):
        optimizer, params = lean(sftorch.AdamWScheduleFree)
        feed(optimizer, params, some_grads(3, params))
        closed = sftorch.AdamWScheduleFreeClosure([torch.nn.Parameter(p) for p in copies(params)])
        for load in (closed.load_state_dict, lambda state: import_state_dict(closed, state)):
            with pytest.raises(ValueError, match="must have the state 'z'"):
                load(copy.deepcopy(optimizer.state_dict()))

    def test_state_of_before_there_was_a_lean_form_is_converted(self):
        params = some_params(torch.bfloat16, shapes=SHAPE)
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE)
        feed(optimizer, params, some_grads(3, params))
        state = copy.deepcopy(optimizer.state_dict())
        del state["param_groups"][0]["precision"], state["param_groups"][0]["seed"]
        others = [torch.nn.Parameter(p) for p in copies(params)]
        other = sftorch.AdamWScheduleFree(others, precision="lean")
        other.load_state_dict(state)
        feed(other, others, some_grads(1, others))
        assert other.state[others[0]]["gap"].dtype == torch.bfloat16


class TestCheckpoints:
    def saved(self, folder, mode="train"):
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 10).to(torch.bfloat16)
        params = list(model.parameters())
        optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, precision="lean", seed=2)
        feed(optimizer, params, some_grads(6, params))
        getattr(optimizer, mode)()
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(model, optimizer)
            path = checkpoints.wait()
        optimizer.train()
        return model, optimizer, path

    def resumed(self, model, folder, **options):
        other = copy.deepcopy(model)
        optimizer = sftorch.AdamWScheduleFree(list(other.parameters()), lr=STEP_SIZE, **options)
        return list(other.parameters()), optimizer, Checkpoints(folder).restore(other, optimizer)

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_a_run_resumes_with_the_same_bits(self, tmp_path, mode):
        model, optimizer, _ = self.saved(tmp_path, mode)
        params, other, restored = self.resumed(model, tmp_path, precision="lean", seed=2)
        assert restored.notices == []
        grads = some_grads(5, params, seed=9)
        feed(optimizer, list(model.parameters()), grads)
        feed(other, params, grads)
        assert same_bits(everything(other, params), everything(optimizer, list(model.parameters())))

    def test_the_file_is_as_small_as_the_state_and_readers_get_z(self, tmp_path):
        model, optimizer, path = self.saved(tmp_path)
        _, state = store.read(path)
        assert {leaf.partition("/")[0] for leaf in state} == {"y", "gap", "v", "rng"}
        assert {state[f"{role}/weight"].dtype.name for role in ("gap", "v")} == {"bfloat16"}
        ys = [forms.joined(p.detach(), optimizer.state[p]) for p in model.parameters()]
        zs = [forms.z_of(y, optimizer.state[p]) for p, y in zip(model.parameters(), ys, strict=True)]
        norm = torch.cat([z.flatten() for z in zs]).norm().item()
        assert inspection.inspect(path)["norms"]["z"] == pytest.approx(norm, rel=1e-6)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
        assert inspection.inspect(tmp_path / "run.pt")["norms"]["z"] == pytest.approx(norm, rel=1e-6)

    def test_another_precision_is_converted_and_named(self, tmp_path):
        model, optimizer, _ = self.saved(tmp_path / "lean")
        params, exact, restored = self.resumed(model, tmp_path / "lean")
        assert [n.partition(":")[0] for n in restored.notices] == ["precision (group 0)", "seed (group 0)"]
        for p, q in zip(model.parameters(), params, strict=True):
            state = optimizer.state[p]
            y = forms.joined(p.detach(), state)
            assert same_bits([forms.joined(q.detach(), exact.state[q])], [y])
            assert same_bits([exact.state[q]["z"]], [forms.z_of(y, state)])
            assert same_bits([exact.state[q]["exp_avg_sq"]], [state["exp_avg_sq"].float()])
        again = torch.nn.Linear(20, 10).to(torch.bfloat16)
        again.load_state_dict(dict(zip(("weight", "bias"), params, strict=True)))
        with Checkpoints(tmp_path / "exact") as checkpoints:
            source = copy.deepcopy(model)
            other = sftorch.AdamWScheduleFree(list(source.parameters()), lr=STEP_SIZE)
            Checkpoints(tmp_path / "lean").restore(source, other)
            checkpoints.save(source, other)
        params, back, _ = self.resumed(model, tmp_path / "exact", precision="lean", seed=2)
        # z = y + gap was rounded to float32 on the way.
        for p, q in zip(model.parameters(), params, strict=True):
            gap = optimizer.state[p]["gap"].float()
            assert ((back.state[q]["gap"].float() - gap).abs() <= gap.abs() * 2.0**-7 + 1e-7).all()

    def test_closure_forms_take_over_through_a_checkpoint(self, tmp_path):
        model, optimizer, _ = self.saved(tmp_path)
        x = [optimizer._x(p, optimizer.param_groups[0]) for p in model.parameters()]
        other = copy.deepcopy(model)
        closed = sftorch.AdamWScheduleFreeClosure(list(other.parameters()))
        Checkpoints(tmp_path).restore(other, closed)
        held = [forms.joined(p.detach(), closed.state[p], "x_rest") for p in other.parameters()]
        # x comes from z = y + gap here, and from the gap there; measured 1.2e-7.
        for a, b in zip(held, x, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    def test_strict_refuses_another_precision(self, tmp_path):
        model, _, _ = self.saved(tmp_path)
        optimizer = sftorch.AdamWScheduleFree(list(model.parameters()), lr=STEP_SIZE, seed=2)
        with pytest.raises(CheckpointError, match="precision"):
            Checkpoints(tmp_path).restore(model, optimizer, strict=True)
