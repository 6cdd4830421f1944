"""Gradients: read and never written, ascended on request, refused when the step cannot use them."""

from __future__ import annotations

import pytest
import schedulefree
import torch

import sftorch
from sftorch.state import forms
from sftorch.tests.plain import (
    CLASSES,
    CLOSURES,
    STEP_SIZE,
    assert_is,
    copies,
    feed,
    feed_truth,
    same_bits,
    some_grads,
    some_params,
    take_step,
    truth,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


def wrapped(params, maximize=False, **options):
    base = torch.optim.RMSprop(params, lr=STEP_SIZE, maximize=maximize)
    return sftorch.ScheduleFreeWrapper(base, weight_decay_at_y=options.get("weight_decay", 0.0))


EVERY = [*CLASSES.values(), *CLOSURES.values(), wrapped]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", EVERY)
def test_p_grad_is_never_written(make, dtype, maximize, foreach):
    params = some_params(dtype)
    options = {} if make is wrapped else {"lr": STEP_SIZE, "foreach": foreach}
    optimizer = make(params, maximize=maximize, weight_decay=0.1, **options)
    for of_step in some_grads(8, params):
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.clone()
        before = [(p.grad.data_ptr(), p.grad._version) for p in params]
        take_step(optimizer)
        assert same_bits([p.grad for p in params], of_step)
        assert [(p.grad.data_ptr(), p.grad._version) for p in params] == before


@pytest.mark.parametrize("make", [*CLASSES.values(), *CLOSURES.values()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_foreach_is_single(make, dtype):
    options = {"lr": STEP_SIZE, "weight_decay": 0.1}
    if make in (sftorch.AdamWScheduleFree, sftorch.AdamWScheduleFreeClosure):
        options["inner_momentum"] = 0.5
    runs = []
    for foreach in (True, False):
        params = some_params(dtype)
        optimizer = make(params, foreach=foreach, fused=False, **options)
        feed(optimizer, params, some_grads(50, params))
        held = [forms.joined(p.detach(), optimizer.state[p], optimizer._rest) for p in params]
        runs.append(held + [optimizer.state[p]["z"] for p in params])
    # Measured over 50 steps: 1.8 eps in float64 and float32 (the order of two products differs);
    # 16-bit parameters step in float32.
    slack = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=slack, atol=slack)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("table", [CLASSES, CLOSURES], ids=["open", "closure"])
@pytest.mark.parametrize("foreach", [True, False])
def test_maximize_ascends(kind, table, foreach):
    params, run = some_params(), truth(kind, some_params(), weight_decay=0.1)
    optimizer = table[kind](params, lr=STEP_SIZE, weight_decay=0.1, maximize=True, foreach=foreach)
    grads = some_grads(10, params)
    feed(optimizer, params, grads)
    feed_truth(run, [[-g for g in of_step] for of_step in grads])
    assert_is(params, run.y if table is CLASSES else run.x)


SGDS = [sftorch.SGDScheduleFree, sftorch.SGDScheduleFreeClosure]


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("make", SGDS)
def test_sgd_takes_sparse_gradients_as_if_they_were_dense(make, foreach):
    """As upstream's does; the closure forms too."""
    ends = []
    for build in (make, getattr(schedulefree, make.__name__)):
        for sparse in (True, False):
            torch.manual_seed(0)
            table, out = torch.nn.Embedding(5, 2, sparse=sparse), torch.nn.Linear(2, 2)
            params = [*table.parameters(), *out.parameters()]
            optimizer = build(params, lr=0.1, warmup_steps=2, foreach=foreach)
            getattr(optimizer, "train", bool)()

            def closure(table=table, out=out, optimizer=optimizer, sparse=sparse):
                optimizer.zero_grad()
                loss = out(table(torch.tensor([1, 3, 3]))).square().sum()
                loss.backward()
                assert table.weight.grad.is_sparse == sparse
                return loss

            for _ in range(6):
                optimizer.step(closure)
            ends.append(copies(params))
    assert same_bits(ends[0], ends[1])
    for ours, theirs in zip(ends[0], ends[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [make for make in EVERY if make not in SGDS])
def test_sparse_gradients_are_refused_before_anything_changes(make):
    dense, table = torch.nn.Linear(2, 2), torch.nn.Embedding(5, 2, sparse=True)
    params = [*dense.parameters(), *table.parameters()]
    optimizer = make(params)
    feed(optimizer, params, some_grads(2, params))

    def backward():
        optimizer.zero_grad()
        dense(table(torch.tensor([1, 3]))).sum().backward()

    held, state = copies(params), repr(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"gradients must be dense, got torch\.sparse_coo.*sparse=False"):
        optimizer.step(backward)
    assert same_bits(params, held)
    assert repr(optimizer.state_dict()) == state


@pytest.mark.parametrize("kind", CLASSES)
def test_a_nan_gradient_spreads_as_in_torch_optim_and_no_further(kind):
    params = some_params(torch.float32, shapes=[(3,), (4,)])
    optimizer = CLASSES[kind](params, **({"silent_sgd_phase": False} if kind == "radam" else {}))
    feed(optimizer, params, [[torch.tensor([1.0, float("nan"), 1.0]), torch.ones(4)]])
    assert params[0].isnan().tolist() == [False, True, False]
    assert params[1].isfinite().all()


@pytest.mark.parametrize("name", ["capturable", "differentiable"])
@pytest.mark.parametrize("make", [*CLASSES.values(), *CLOSURES.values()])
def test_what_cannot_be_honoured_is_refused(make, name):
    with pytest.raises(ValueError, match=f"{name} must be False, got True: "):
        make(some_params(), **{name: True})
    optimizer = make(some_params())
    with pytest.raises(ValueError, match=f"{name} must be False, got True: "):
        optimizer.add_param_group({"params": some_params(seed=5), name: True})
