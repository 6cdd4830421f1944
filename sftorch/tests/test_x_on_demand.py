"""x without touching the weights: eval_params, eval_state_dict, evaluation."""

from __future__ import annotations

import copy

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


def pair(make=lambda: torch.nn.Linear(4, 4)):
    """Returns two models of the same shapes, and one optimizer that has stepped all of their parameters."""
    torch.manual_seed(6)
    models = [make(), make()]
    params = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(4, params))
    return models, optimizer


def assert_x(shipped, model, optimizer):
    x = optimizer.eval_params()
    assert shipped.keys() == model.state_dict().keys()
    for name, p in model.named_parameters():
        assert torch.equal(shipped[name], x.get(p, p))


def with_a_copied_head(model):
    model.head = copy.deepcopy(model.head)
    return model


FOREIGN = {
    "a copy": (
        copy.deepcopy,
        r"0 of them among its 12 tensors, the first other 'inside\.0\.weight' of shape \(4, 4\)",
    ),
    "a frozen copy": (
        lambda model: copy.deepcopy(model).requires_grad_(False),
        "0 of them among its 12 tensors",
    ),
    "a copy in half precision": (lambda model: copy.deepcopy(model).half(), "0 of them among its 12 tensors"),
    "another model": (
        lambda _: torch.nn.Linear(7, 1),
        r"0 of them among its 2 tensors, .* 'weight' of shape \(1, 7\)",
    ),
    "no weights": (lambda _: torch.nn.ReLU(), "0 of them among its 0 tensors: pass"),
    # Its weight is the tied one, and still there under another name.
    "a copy in part": (
        with_a_copied_head,
        r"4 of them among its 12 tensors, .* 'head\.bias' of shape \(4,\)",
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", FOREIGN)
def test_eval_state_dict_refuses_weights_whose_x_it_does_not_know(what, mode):
    model, optimizer = trained()
    getattr(optimizer, mode)()
    make, message = FOREIGN[what]
    with pytest.raises(
        ValueError, match=rf"model must be the one .*, got one with {message}.*eval_state_dict"
    ):
        optimizer.eval_state_dict(make(model))


def test_eval_state_dict_takes_what_it_holds_in_part_and_in_wrappers():
    (a, b), optimizer = pair()
    assert_x(optimizer.eval_state_dict(a), a, optimizer)
    both = torch.nn.ModuleDict({"a": a, "b": b})
    assert_x(optimizer.eval_state_dict(both), both, optimizer)
    shown = torch.compile(a, backend="eager")
    assert_x(optimizer.eval_state_dict(shown), shown, optimizer)
    a.requires_grad_(False)  # frozen later, it is still the optimizer's
    assert_x(optimizer.eval_state_dict(a), a, optimizer)


def test_eval_state_dict_takes_an_adapter_on_frozen_weights_of_a_held_shape():
    def with_adapter():
        layers = torch.nn.ModuleDict({"base": torch.nn.Linear(4, 4), "adapter": torch.nn.Linear(4, 4)})
        layers["base"].requires_grad_(False)
        return layers

    (a, _), optimizer = pair(with_adapter)  # the other's adapter has the shapes of this one's frozen weights
    assert_x(optimizer.eval_state_dict(a), a, optimizer)
    assert_x(optimizer.eval_state_dict(a["adapter"]), a["adapter"], optimizer)


def test_eval_state_dict_takes_a_model_that_another_optimizer_trains_too():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    params = list(model[0].parameters())
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    assert_x(optimizer.eval_state_dict(model), model, optimizer)


def test_eval_state_dict_takes_parametrized_weights():
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    params = list(model.parameters())
    optimizer = sftorch.SGDScheduleFree(params, lr=STEP_SIZE)
    feed(optimizer, params, some_grads(3, params))
    assert_x(optimizer.eval_state_dict(model), model, optimizer)


def test_eval_state_dict_of_a_model_and_an_optimizer_that_were_copied_together():
    model, optimizer = trained()
    other, own = copy.deepcopy((model, optimizer))
    shipped = own.eval_state_dict(other)
    assert_x(shipped, other, own)
    assert not torch.equal(shipped["head.weight"], other.head.weight)
    assert_x(shipped, model, optimizer)


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
