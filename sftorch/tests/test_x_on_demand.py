"""x without touching the weights: eval_params, eval_state_dict, evaluation."""

from __future__ import annotations

import pytest
import torch

import sftorch
from sftorch.tests.plain import (
    CLASSES,
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


class Network(torch.nn.Module):
    """Nested, tied, normalised, partly frozen, with a buffer and extra state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inside = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        self.head = torch.nn.Linear(4, 4)
        self.head.weight = self.inside[0].weight
        self.frozen = torch.nn.Linear(4, 1).requires_grad_(False)
        self.register_buffer("table", torch.arange(3.0))
        self.notes = {"seen": [1]}

    def forward(self, inputs):
        return self.frozen(self.head(self.inside(inputs)))

    def get_extra_state(self):
        return self.notes

    def set_extra_state(self, state):
        self.notes = state


def trained(steps=6):
    model = Network()
    owned = [p for p in model.parameters() if p.requires_grad]
    optimizer = sftorch.AdamWScheduleFree(owned, lr=STEP_SIZE)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(4))
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", CLASSES)
def test_eval_params_is_x_and_touches_nothing(kind):
    params = some_params()
    optimizer, run = CLASSES[kind](params, lr=STEP_SIZE), truth(kind, params)
    grads = some_grads(9, params)
    feed(optimizer, params, grads)
    feed_truth(run, grads)
    y, state = copies(params), repr(optimizer.state_dict())
    x = optimizer.eval_params()
    assert list(x) == params
    assert_is(x.values(), run.x)
    assert same_bits(params, y)
    assert repr(optimizer.state_dict()) == state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.9, 1.0])
def test_eval_params_is_bit_for_bit_what_eval_puts_in(dtype, beta):
    params = some_params(dtype)
    optimizer = sftorch.AdamWScheduleFree(params, lr=STEP_SIZE, betas=(beta, 0.99))
    feed(optimizer, params, some_grads(9, params))
    x = optimizer.eval_params()
    optimizer.eval()
    assert same_bits(params, x.values())
    assert same_bits(params, optimizer.eval_params().values())  # and in eval mode it is the weights


def test_eval_params_before_the_first_step_is_a_copy_of_the_weights():
    (p,) = some_params(shapes=[(3,)])
    x = sftorch.SGDScheduleFree([p]).eval_params()[p]
    assert same_bits([x], [p])
    x.add_(1)
    assert not torch.equal(x, p)


def test_eval_state_dict_is_eval_then_state_dict():
    model, optimizer = trained()
    before, shipped = model.state_dict(), optimizer.eval_state_dict(model)
    held = copies(before[name] for name in before if name != "_extra_state")
    optimizer.eval()
    after = model.state_dict()
    assert list(shipped) == list(after)
    assert shipped._metadata == after._metadata
    names = [name for name in after if name != "_extra_state"]
    assert same_bits([shipped[n] for n in names], [after[n] for n in names])
    assert shipped["_extra_state"] == {"seen": [1]}
    optimizer.train()
    assert same_bits([model.state_dict()[n] for n in names], held)


def test_eval_state_dict_is_a_copy_throughout():
    model, optimizer = trained()
    shipped = optimizer.eval_state_dict(model)
    live = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    held = copies(live.values())
    for value in shipped.values():
        if isinstance(value, torch.Tensor):
            value.fill_(7)
    shipped["_extra_state"]["seen"].append(2)
    assert same_bits(live.values(), held)
    assert model.notes == {"seen": [1]}


def test_eval_state_dict_covers_tied_frozen_normalised_and_buffered():
    model, optimizer = trained()
    shipped, x = optimizer.eval_state_dict(model), optimizer.eval_params()
    assert shipped["head.weight"] is shipped["inside.0.weight"]
    assert torch.equal(shipped["head.weight"], x[model.head.weight])
    assert not torch.equal(shipped["head.weight"], model.head.weight)
    assert torch.equal(shipped["frozen.weight"], model.frozen.weight)
    assert torch.equal(shipped["inside.1.running_var"], model.inside[1].running_var)
    assert not torch.equal(model.inside[1].running_var, torch.ones(4))
    assert torch.equal(shipped["table"], torch.arange(3.0))


def test_eval_state_dict_loads_into_another_model_and_under_a_prefix():
    model, optimizer = trained()
    outer = torch.nn.ModuleDict({"net": model})
    shipped = optimizer.eval_state_dict(outer)
    assert all(name.startswith("net.") for name in shipped)
    other = torch.nn.ModuleDict({"net": Network()})
    other.load_state_dict(shipped)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    with optimizer.evaluation(), torch.no_grad():
        assert torch.equal(other.eval()["net"](inputs), outer.eval()["net"](inputs))


def test_evaluation_holds_x_inside_and_y_after():
    _, optimizer = trained()
    params = optimizer.param_groups[0]["params"]
    y, x = copies(params), copies(optimizer.eval_params().values())
    with optimizer.evaluation():
        assert same_bits(params, x)
        with optimizer.evaluation():
            assert same_bits(params, x)
        assert same_bits(params, x)
    assert same_bits(params, y)


def test_evaluation_gives_y_back_after_an_exception():
    _, optimizer = trained()
    params = optimizer.param_groups[0]["params"]
    y = copies(params)
    with pytest.raises(KeyboardInterrupt), optimizer.evaluation():
        raise KeyboardInterrupt
    assert same_bits(params, y)
    assert optimizer.param_groups[0]["train_mode"]


def test_evaluation_in_eval_mode_stays_there():
    _, optimizer = trained()
    params = optimizer.param_groups[0]["params"]
    optimizer.eval()
    x = copies(params)
    with optimizer.evaluation():
        assert same_bits(params, x)
    assert same_bits(params, x)
    assert not optimizer.param_groups[0]["train_mode"]
