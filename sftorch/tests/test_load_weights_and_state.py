"""What a loaded state dict notices, puts right and refuses."""

import copy
import pickle

import pytest
import torch

import sftorch
from sftorch.tests.load_runs import PRINTS, advance, assert_close, build, clone, follow, run


def test_weights_of_the_other_mode_are_put_right_with_a_warning():
    weights, state, _, _ = run("adamw", torch.float32, "y", "x")
    model, optimizer = build("adamw", seed=1)
    model.load_state_dict(weights)
    with pytest.warns(UserWarning, match="the weights hold x in 4 of 4 parameters"):
        optimizer.load_state_dict(state)


def test_weights_of_the_saved_mode_are_put_right_without_a_warning():
    weights, state, _, later = run("adamw", torch.float32, "x", "x")
    model, optimizer = build("adamw", seed=1)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    advance(model, optimizer, 3, 9)
    assert_close(model, later, exact=True)


def test_weights_may_be_put_right_by_an_evaluation_in_inference_mode():
    weights, state, _, _ = run("adamw", torch.bfloat16, "y", "x")
    model, optimizer = build("adamw", torch.bfloat16, seed=1)
    state["param_groups"][0]["fused"] = (
        False  # torch's operations look at the mode, the native kernel does not
    )
    optimizer.load_state_dict(state)
    model.load_state_dict(weights)
    with torch.inference_mode(), pytest.warns(UserWarning, match="put right"), optimizer.evaluation():
        pass
    advance(model, optimizer, 3, 9)
    assert optimizer.param_groups[0]["k"] == 12


@pytest.mark.parametrize("call", ["train", "eval", "step", "eval_params"])
def test_weights_that_belong_to_another_state_are_refused(call):
    _, state, _, _ = run("adamw", torch.float32, "y", "y")
    model, optimizer = build("adamw", seed=1)
    before = clone(model.state_dict())
    optimizer.load_state_dict(state)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(
        RuntimeError, match="must be the x or the y of the loaded optimizer state, got others in 4 of 4"
    ):
        getattr(optimizer, call)()
    assert_close(model, before, exact=True)


def test_weights_loaded_after_the_state_had_settled_are_caught_at_the_first_step():
    weights, state, _, _ = run("sgd", torch.float32, "y", "y")
    model, optimizer = build("sgd", seed=1)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    model.load_state_dict({name: value + 1 for name, value in weights.items()})
    with pytest.raises(RuntimeError, match="got others"):
        advance(model, optimizer, 1, 9)


def test_a_compiled_step_is_checked_like_any_other():
    weights, state, _, _ = run("sgd", torch.float32, "y", "y")
    model, optimizer = build("sgd", seed=1)
    follow(("weights", "state"), model, optimizer, weights, state)
    model.load_state_dict({name: value + 1 for name, value in weights.items()})
    model(torch.ones(1, 3)).sum().backward()
    step = torch.compile(optimizer.step, backend="eager")
    with pytest.raises(RuntimeError, match="got others"):
        step()
    model.load_state_dict(weights)
    step()
    assert optimizer.metrics()[0]["step"] == 10


def test_after_the_first_step_the_weights_are_the_users_own():
    weights, state, _, _ = run("sgd", torch.float32, "y", "y")
    model, optimizer = build("sgd", seed=1)
    follow(("weights", "state"), model, optimizer, weights, state)
    advance(model, optimizer, 1, 9)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    advance(model, optimizer, 1, 10)
    assert optimizer.metrics()[0]["step"] == 11


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_rebase_accepts_any_weights_after_a_load(mode):
    _, state, _, _ = run("adamw", torch.float32, "x", "x")
    model, optimizer = build("adamw", seed=1)
    getattr(optimizer, mode)()
    optimizer.load_state_dict(state)
    before = clone(model.state_dict())
    optimizer.rebase()
    optimizer.train()
    assert_close(model, before, exact=True)
    optimizer.eval()
    assert_close(model, before, exact=True)


def test_equal_shapes_in_another_order_are_caught_by_the_prints():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    optimizer = sftorch.SGDScheduleFree([a, b])
    for p, value in ((a, 1.0), (b, 2.0)):
        p.grad = torch.full((3,), value)
    optimizer.step()
    state = optimizer.state_dict()
    swapped = sftorch.SGDScheduleFree([b, a])
    swapped.load_state_dict(state)
    with pytest.raises(RuntimeError, match="in the same order"):
        swapped.train()


def test_equal_shapes_in_another_order_are_caught_by_name():
    pairs = [(name, torch.nn.Parameter(torch.ones(3))) for name in ("a", "b")]
    state = sftorch.SGDScheduleFree(pairs).state_dict()
    with pytest.raises(ValueError, match=r"(?s)parameter 0 of group 0 must be 'b', got 'a'.*parameter 1"):
        sftorch.SGDScheduleFree(pairs[::-1]).load_state_dict(state)


def test_all_wrong_shapes_are_reported_and_nothing_changes():
    state = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]).state_dict()
    optimizer = sftorch.SGDScheduleFree([torch.nn.Parameter(torch.ones(n)) for n in (2, 4, 3)], lr=0.3)
    with pytest.raises(ValueError, match=r"(?s)parameter 1 .* shape \(4,\), got \(3,\).*parameter 2"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_state_of_another_optimizer_is_refused_with_the_way_out():
    parameter = torch.nn.Parameter(torch.ones(2))
    for other in (torch.optim.AdamW([parameter]), sftorch.SGDScheduleFree([parameter])):
        with pytest.raises(ValueError, match=r"use sftorch\.checkpoint"):
            sftorch.AdamWScheduleFree([parameter]).load_state_dict(other.state_dict())


def test_options_added_since_the_save_get_their_defaults():
    weights, state, _, later = run("adamw", torch.float32, "y", "y")
    for group in state["param_groups"]:
        for name in ("inner_momentum", "prior_steps", "maximize", "prior_weight", "y_beta", "c", "shapes"):
            del group[name]
    model, optimizer = build("adamw", seed=1)
    follow(("weights", "state"), model, optimizer, weights, state)
    advance(model, optimizer, 3, 9)
    assert_close(model, later, exact=True)


@pytest.mark.parametrize("saved_mode", ["y", "x"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "radam"])
def test_bf16_parameters_resume_exactly_and_their_state_stays_fp32(kind, saved_mode):
    weights, state, _, later = run(kind, torch.bfloat16, saved_mode, saved_mode)
    model, optimizer = build(kind, torch.bfloat16, seed=1)
    follow(("weights", "state"), model, optimizer, weights, state)
    assert {optimizer.state[p]["z"].dtype for p in model.parameters()} == {torch.float32}
    advance(model, optimizer, 3, 9)
    assert_close(model, later, exact=True)


def test_an_evaluation_before_the_first_step_keeps_a_y_whose_16_bits_are_those_of_x():
    weights, state, _, _ = run("primal", torch.bfloat16, "y", "y")  # at beta = 1, y is x
    model, optimizer = build("primal", torch.bfloat16, seed=1)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    before = clone(optimizer.state_dict()["state"])
    optimizer.eval()
    optimizer.train()
    for index, values in optimizer.state_dict()["state"].items():
        assert torch.equal(values["y_rest"], before[index]["y_rest"])


def test_a_loaded_state_is_a_copy():
    weights, state, _, _ = run("adamw", torch.float32, "x", "x")
    kept = clone(state)
    model, optimizer = build("adamw", seed=1)
    follow(("weights", "state"), model, optimizer, weights, state)
    advance(model, optimizer, 2, 9)
    for index, entry in kept["state"].items():
        assert torch.equal(entry["z"], state["state"][index]["z"])
        assert torch.equal(entry["y"], state["state"][index]["y"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_an_unsettled_optimizer_settles_later(copied):
    weights, state, _, later = run("adamw", torch.float32, "x", "x")
    model, optimizer = build("adamw", seed=1)
    optimizer.load_state_dict(state)
    model, optimizer = copied((model, optimizer))
    model.load_state_dict(weights)
    optimizer.train()
    advance(model, optimizer, 3, 9)
    assert_close(model, later, exact=True)


def test_state_saved_again_before_its_weights_came_still_loads():
    weights, state, _, later = run("adamw", torch.float32, "x", "x")
    _, first = build("adamw", seed=1)
    first.load_state_dict(state)
    model, optimizer = build("adamw", seed=2)
    follow(("state", "weights", "train"), model, optimizer, weights, clone(first.state_dict()))
    advance(model, optimizer, 3, 9)
    assert_close(model, later, exact=True)


def test_a_state_dict_has_prints_and_the_live_state_has_not():
    model, optimizer = build("adamw")
    advance(model, optimizer, 2, 0)
    assert all(name in entry for entry in optimizer.state_dict()["state"].values() for name in PRINTS)
    assert not any(name in entry for entry in optimizer.state.values() for name in PRINTS)
    assert "shapes" not in optimizer.param_groups[0]


def test_parameters_that_have_not_started_are_taken_as_they_are():
    _, optimizer = build("adamw")
    model, other = build("adamw", seed=1)
    other.load_state_dict(optimizer.state_dict())
    advance(model, other, 1, 0)
    assert other.metrics()[0]["step"] == 1


class TestClosureForms:
    """Their parameters hold x, whatever the state was saved beside."""

    def step(self, model, optimizer, step):
        def closure():
            optimizer.zero_grad()
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    @pytest.mark.parametrize("order", [("weights", "state"), ("state", "weights")])
    def test_they_resume_exactly(self, order):
        model, _ = build("adamw")
        optimizer = sftorch.AdamWScheduleFreeClosure(model.parameters(), lr=0.01)
        for step in range(5):
            self.step(model, optimizer, step)
        weights, state = clone(model.state_dict()), clone(optimizer.state_dict())
        self.step(model, optimizer, 5)
        other, _ = build("adamw", seed=1)
        resumed = sftorch.AdamWScheduleFreeClosure(other.parameters(), lr=0.01)
        follow(order, other, resumed, weights, state)
        self.step(other, resumed, 5)
        assert_close(other, model.state_dict(), exact=True)

    def test_they_take_over_from_the_usual_form(self):
        weights, state, x, _ = run("adamw", torch.float32, "y", "y")
        model, _ = build("adamw", seed=1)
        optimizer = sftorch.AdamWScheduleFreeClosure(model.parameters())
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert_close(model, x, exact=True)
