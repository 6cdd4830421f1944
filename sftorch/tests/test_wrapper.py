"""ScheduleFreeWrapper around any optimizer: S1-S9, with whatever the base does to z as delta."""

from __future__ import annotations

import pytest
import torch

import sftorch
from sftorch.tests.bases import BASES, Prodigal, matrices, plain_run
from sftorch.tests.plain import (
    STEP_SIZE,
    assert_is,
    copies,
    feed,
    feed_truth,
    same_bits,
    some_grads,
    some_params,
    truth,
)

# z is put into p for the base and read back, exactly; measured 7e-16 over 15 steps.
TOLERANCE = 1e-13


def as_wanted(tensors):
    return {str(i): tensor.numpy() for i, tensor in enumerate(tensors)}


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.0}, {"beta": 1.0}, {"decay": 0.2, "r": 1.0, "power": 1.0, "prior": 3}]
)
@pytest.mark.parametrize("base", BASES)
def test_the_trajectory_is_s1_to_s9_with_the_base_on_z(base, options):
    params, grads = matrices(), some_grads(15, matrices())
    names = {
        "beta": "momentum",
        "decay": "weight_decay_at_y",
        "power": "weight_lr_power",
        "prior": "prior_steps",
    }
    given = {names.get(key, key): value for key, value in options.items()}
    optimizer = sftorch.ScheduleFreeWrapper(BASES[base](params), **given)
    x, y, z = plain_run(BASES[base], params, grads, **options)
    feed(optimizer, params, grads)
    assert_is(params, as_wanted(y), TOLERANCE)
    assert_is([optimizer.state[p]["z"] for p in params], as_wanted(z), TOLERANCE)
    assert_is(optimizer.eval_params().values(), as_wanted(x), TOLERANCE)
    optimizer.eval()
    assert_is(params, as_wanted(x), TOLERANCE)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "r": 1.0}, {"beta": 0.0}, {"beta": 1.0}, {"prior_steps": 5}]
)
def test_around_sgd_it_is_schedule_free_sgd(options):
    params, run = some_params(), truth("sgd", some_params(), **options)
    names = {"beta": "momentum", "weight_decay": "weight_decay_at_y"}
    given = {names.get(key, key): value for key, value in options.items()}
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=STEP_SIZE), **given)
    grads = some_grads(20, params)
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    assert_is(params, run.y)
    assert_is(optimizer.eval_params().values(), run.x)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_around_adamw_it_is_schedule_free_adamw(momentum):
    params, run = some_params(), truth("adamw", some_params(), weight_decay=0.1, inner_momentum=momentum)
    base = torch.optim.AdamW(params, lr=STEP_SIZE, betas=(momentum, 0.999), eps=1e-8, weight_decay=0.0)
    optimizer = sftorch.ScheduleFreeWrapper(base, weight_decay_at_y=0.1)
    grads = some_grads(20, params)
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    assert_is(params, run.y, tolerance=1e-12)  # torch's own 1 - 0.999^t cancels: measured 1e-15 over 20 steps


def test_it_is_a_torch_optimizer_that_shares_the_bases_groups():
    base = BASES["RMSprop"](matrices())
    optimizer = sftorch.ScheduleFreeWrapper(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.defaults is base.defaults
    optimizer.param_groups[0]["lr"] = 0.7
    assert base.param_groups[0]["lr"] == 0.7


def test_the_bases_own_books_are_left_alone():
    params = matrices()
    optimizer = sftorch.ScheduleFreeWrapper(Prodigal(params, lr=1.0))
    feed(optimizer, params, some_grads(4, params))
    group = optimizer.param_groups[0]
    assert (group["k"], group["weight_sum"], group["train_mode"]) == (4, 5.0, "mine")
    assert group["d"] == pytest.approx(1e-3 * 1.5**4)
    assert optimizer.metrics()[0]["lr"] == group["d"]
    assert set(group) == {"params", "lr", "k", "d", "weight_sum", "train_mode", "schedule_free"}


@pytest.mark.parametrize("base", BASES)
def test_lr_0_stays_put_and_what_follows_is_finite(base):
    params = matrices()
    optimizer, start = sftorch.ScheduleFreeWrapper(BASES[base](params)), copies(params)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    grads = some_grads(4, params)
    feed(optimizer, params, grads[:2])
    if base != "Adafactor":  # it has a smallest step size of its own
        assert same_bits(params, start)
    optimizer.param_groups[0]["lr"] = lr
    feed(optimizer, params, grads[2:])
    assert all(p.isfinite().all() for p in params)
    if base != "Prodigal":  # whose step size grows
        assert optimizer.metrics()[0]["c"] == 0.5  # the second step of that size


def test_a_group_added_later_is_the_bases_too_and_in_the_current_mode():
    first, second = some_params(shapes=[(3,)]), some_params(shapes=[(4,)], seed=5)
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.SGD(first, lr=STEP_SIZE), prior_steps=2)
    feed(optimizer, first, some_grads(3, first))
    optimizer.eval()
    optimizer.add_param_group({"params": second, "lr": 0.01})
    assert optimizer.base.param_groups[1]["params"] == second
    assert optimizer.base.param_groups[1]["momentum"] == 0
    assert not optimizer.param_groups[1]["schedule_free"]["train_mode"]
    optimizer.train()
    run, grads = truth("sgd", second, lr=0.01, prior_steps=2), some_grads(5, first + second)
    feed(optimizer, first + second, grads)
    feed_truth(run, [g[1:] for g in grads], lr=0.01)
    assert_is(second, run.y)


def test_a_copied_group_starts_anew():
    first, second = some_params(shapes=[(3,)]), some_params(shapes=[(4,)], seed=5)
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.SGD(first, lr=STEP_SIZE))
    feed(optimizer, first, some_grads(3, first))
    optimizer.add_param_group(optimizer.param_groups[0] | {"params": second})
    assert [m["step"] for m in optimizer.metrics()] == [3, 0]
    assert optimizer.base.param_groups[1]["params"] == second


class Boom(torch.optim.SGD):
    """Fails in its third step, with half of the parameters moved."""

    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise ArithmeticError("boom")
        return super().step(closure)


def test_an_exception_in_the_base_gives_y_back():
    params, run = some_params(), truth("sgd", some_params())
    optimizer, grads = sftorch.ScheduleFreeWrapper(Boom(params, lr=STEP_SIZE)), some_grads(4, some_params())
    feed(optimizer, params, grads[:2])
    y = copies(params)
    with pytest.raises(ArithmeticError, match="boom"):
        feed(optimizer, params, [grads[2]])
    assert same_bits(params, y)
    assert optimizer.metrics()[0]["step"] == 2
    feed(optimizer, params, grads[3:])
    feed_truth(run, [*grads[:2], grads[3]])
    assert_is(params, run.y)


def test_late_parameters_have_their_own_average_here_too():
    params = some_params(shapes=[(3,), (4,)])
    optimizer, run = (
        sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=STEP_SIZE)),
        truth("sgd", params[1:]),
    )
    grads = some_grads(12, params)
    feed(optimizer, params, [[g[0], None] for g in grads[:5]])
    feed(optimizer, params, grads[5:])
    feed_truth(run, [g[1:] for g in grads[5:]])
    assert_is(params[1:], run.y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_keep_z_in_float32(dtype):
    params = some_params(dtype, shapes=[(6,)])
    optimizer, run = sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=1.0)), truth("sgd", params)
    grads = some_grads(5, params)
    feed(optimizer, params, grads)
    feed_truth(run, grads, lr=1.0)
    assert optimizer.state[params[0]]["z"].dtype == torch.float32
    # Five steps of float32; measured 0.6 eps of it.
    assert_is([optimizer.state[params[0]]["z"]], run.z, tolerance=4 * torch.finfo(torch.float32).eps)


def test_options_of_the_base_are_the_bases_business():
    class Adan(torch.optim.SGD):
        """Has options under names that ours have too, with other rules."""

        def __init__(self, params):
            super().__init__(params, lr=STEP_SIZE)
            self.param_groups[0].update(betas=(0.9, 0.9, 0.99), capturable=True, warmup_steps=0.5, r=-1)
            self.param_groups[0].update(precision="high", seed=None)

    params, run = some_params(), truth("sgd", some_params())
    optimizer, grads = sftorch.ScheduleFreeWrapper(Adan(params)), some_grads(5, some_params())
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    assert_is(params, run.y)
