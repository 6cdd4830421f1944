"""With nothing on, a state dict in train mode warns once and names the call; what is right is not."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import sftorch
from sftorch.checkpoint import Checkpoints
from sftorch.state import unshipped

pytestmark = pytest.mark.filterwarnings("error:the state dict of a .* is one of y")
SAID = (
    r"the state dict of a Linear is one of y, as its SGDScheduleFree is in train mode.*sftorch\.ship_x\(model"
)


def started(steps=3, make=sftorch.SGDScheduleFree):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = make(model.parameters(), lr=0.1)
    go(model, optimizer, steps)
    return model, optimizer


def go(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).square().mean().backward()
        optimizer.step()


def test_it_is_said_once_where_the_state_dict_is_asked_for():
    model, _optimizer = started()
    with pytest.warns(UserWarning, match=SAID) as caught:
        torch.save(model.state_dict(), io.BytesIO())
    assert [one.filename for one in caught] == [__file__]
    model.state_dict()


def test_each_optimizer_says_it():
    first, one = started()
    second, other = started()
    both = nn.Sequential(first, second)
    with pytest.warns(UserWarning, match="as its SGDScheduleFree") as caught:
        both.state_dict()
    assert len(caught) == 2
    assert one is not other


@pytest.mark.parametrize("wrap", ["compile", "outer", "part"])
def test_it_is_said_of_what_holds_the_parameters(wrap):
    model, _optimizer = started()
    whole = {
        "compile": lambda: torch.compile(model, backend="eager"),
        "outer": lambda: nn.ModuleDict({"net": model}),
        "part": lambda: model,
    }[wrap]()
    with pytest.warns(UserWarning, match="is one of y"):
        whole.state_dict()


def test_a_copy_of_both_says_it_of_itself_and_a_copy_of_the_model_says_nothing():
    model, optimizer = started()
    lone = copy.deepcopy(model)
    lone.state_dict()
    twin, _its = copy.deepcopy((model, optimizer))
    with pytest.warns(UserWarning, match=SAID):
        twin.state_dict()
    with pytest.warns(UserWarning, match=SAID):
        model.state_dict()


def test_what_is_right_is_not_warned_about(tmp_path):
    model, optimizer = started(0)
    model.state_dict()  # x, y and z are one
    go(model, optimizer, 3)
    optimizer.eval_state_dict(model)
    model.state_dict(keep_vars=True)
    nn.Linear(2, 1).state_dict()
    with optimizer.evaluation():
        x = model.state_dict()
    model.load_state_dict(x)
    optimizer.rebase()
    with sftorch.ship_x(model, optimizer):
        model.state_dict()
    checkpoints = Checkpoints(tmp_path / "runs")
    checkpoints.save(model, optimizer)
    go(model, optimizer, 1)
    checkpoints.restore(model, optimizer)
    torch.save(x, tmp_path / "weights.pt")
    checkpoints.restore(model, optimizer, resume=f"weights:{tmp_path / 'weights.pt'}", prior_steps=5)
    go(model, optimizer, 1)
    optimizer.eval()
    model.state_dict()


def test_the_closure_forms_hold_x():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = sftorch.SGDScheduleFreeClosure(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    model.state_dict()


def test_a_compiled_function_may_ask_for_a_state_dict():
    model, _optimizer = started()

    @torch.compile(backend="eager", fullgraph=True)
    def forward(batch):
        return torch.func.functional_call(model, model.state_dict(), (batch,))

    assert torch.equal(forward(torch.ones(1, 2)), model(torch.ones(1, 2)))


LEAVES_NOTHING = """
import sftorch, torch
from torch import nn

torchs = nn.Module.state_dict
assert "_dynamo" not in dir(torch)

def optimizer():
    return sftorch.SGDScheduleFree(model.parameters(), lr=0.1)

model = nn.Linear(2, 1)
first, second = optimizer(), optimizer()
assert nn.Module.state_dict is not torchs
del first
assert nn.Module.state_dict is not torchs
del second
assert nn.Module.state_dict is torchs

third = optimizer()
others = nn.Module.state_dict

def around(self, *args, **kwargs):
    return others(self, *args, **kwargs)

nn.Module.state_dict = around
del third
assert nn.Module.state_dict is around
model.state_dict()
"""


def test_it_goes_with_the_last_optimizer_and_leaves_alone_what_others_put_around_it():
    subprocess.run([sys.executable, "-c", LEAVES_NOTHING], check=True)


def test_it_goes_when_all_is_said():
    model, optimizer = started()
    reference = next(one for one in unshipped._watched if one() is optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.state_dict()
    assert reference not in unshipped._watched
