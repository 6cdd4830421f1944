"""What users of earlier versions and of other programs have on disk: it loads, and the run goes on."""

import copy
import re
from pathlib import Path

import pytest
import torch

import sftorch
from sfcore.checks import HyperparameterError
from sfcore.laws import LAWS
from sfcore.restart import WEIGHTS_ONLY
from sftorch.checkpoint import Checkpoints, import_state_dict
from sftorch.tests.checkpoint_runs import Case, build, digest

FROZEN = Path(__file__).parent / "frozen"
FILES = {path.stem: path for path in sorted(FROZEN.glob("*.pt"))}
# float32, 5 steps from the same state: two orders of the same sums, on another processor perhaps.
# Measured on one: 2.4e-7 on values below 3; the native step orders its sums in another way than the
# foreach step that the frozen runs of our own were made with.
ROUNDING = 1e-6


def load(name):
    return torch.load(FILES[name], weights_only=True)


def of(program):
    return [name for name in FILES if name.startswith(program)]


def parameters(values):
    return [torch.nn.Parameter(value.clone()) for value in values]


def make(name, params):
    """Returns an optimizer of ours configured as the frozen one was."""
    kind = next(kind for kind in ("adamw", "sgd", "radam", "wrapper") if kind in name)
    inner = {"inner_momentum": 0.5} if name == "sftorch-0.1-adamw-train" else {}
    return {
        "adamw": lambda: sftorch.AdamWScheduleFree(params, lr=0.01, weight_decay=0.1, **inner),
        "sgd": lambda: sftorch.SGDScheduleFree(params, lr=0.1, warmup_steps=9),
        "radam": lambda: sftorch.RAdamScheduleFree(params, lr=0.01, weight_decay=0.1),
        "wrapper": lambda: sftorch.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1, momentum=0.5)),
    }[kind]()


def go_on(optimizer, params, gradients):
    for of_step in gradients:
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def assert_continues(frozen, optimizer, params, tolerance):
    go_on(optimizer, params, frozen["gradients"])
    for wanted in ("y", "x"):
        for p, value in zip(params, frozen[wanted], strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=0, atol=tolerance)
        optimizer.eval()


def holds(frozen):
    return "y" if frozen["mode"] == "train" else "x"


@pytest.mark.parametrize("name", of("sftorch"))
@pytest.mark.parametrize("weights_first", [True, False])
def test_todays_state_dicts_load_and_the_run_goes_on(name, weights_first):
    frozen = load(name)
    params = parameters(frozen["weights"] if weights_first else [w + 1 for w in frozen["weights"]])
    optimizer = make(name, params)
    optimizer.load_state_dict(frozen["state"])
    with torch.no_grad():
        for p, value in zip(params, frozen["weights"], strict=True):
            p.copy_(p if weights_first else value)
    optimizer.train()
    assert_continues(frozen, optimizer, params, ROUNDING)


def test_todays_checkpoint_restores_every_bit():
    (folder,) = (path for path in (FROZEN / "sftorch-0.1-checkpoint").iterdir() if path.is_dir())
    model, optimizer = build(Case("adamw", "bfloat16", 4, 14, "eval"), seed=9)
    restored = Checkpoints(folder).restore(model, optimizer)
    assert restored.extra == {"note": (1, 2)}
    (group,) = optimizer.param_groups
    later = {"precision": "exact", "seed": 0}  # options that there were not, at their defaults
    rules = {"c_warmup", "refined_c", "window", "window_rule", "weight_lr", "decay_at", "decay_power"}
    rules |= {"beta_rule", "beta_max", "beta_anneal_steps", "beta_hold_steps", "rho"}
    later |= {name: value for name, value in LAWS["adamw"].defaults.items() if name in rules}
    assert {name: group.pop(name) for name in later} == later
    assert digest(model, optimizer) == (folder.parent / "digest.txt").read_text().strip()


@pytest.mark.parametrize("name", [n for n in of("schedulefree") if "wrapper" not in n])
def test_schedulefrees_state_dicts_load_without_an_importer(name):
    frozen = load(name)
    params = parameters(frozen["weights"])
    optimizer = make(name, params)
    optimizer.load_state_dict(frozen["state"])
    optimizer.train()
    assert_continues(frozen, optimizer, params, ROUNDING)


@pytest.mark.parametrize("name", of("schedulefree") + of("pytorch_optimizer"))
def test_their_state_is_imported_and_their_run_goes_on(name):
    frozen = load(name)
    params = parameters(frozen["weights"])
    optimizer = make(name, params)
    says = None if name != "schedulefree-1.4.1-wrapper-eval" else holds(frozen)
    notices = import_state_dict(optimizer, frozen["state"], weights_hold=says)
    assert notices == [f"{name.split('-')[0]}'s state is carried over"]
    assert_continues(frozen, optimizer, params, ROUNDING)


def test_the_importer_lets_the_configuration_hold_and_preserves_x():
    frozen = load("schedulefree-1.4.1-adamw-train")
    params = parameters(frozen["weights"])
    twin = make("adamw", params)
    import_state_dict(twin, frozen["state"])
    x = twin.eval_params()
    others = parameters(frozen["weights"])
    optimizer = sftorch.AdamWScheduleFree(others, lr=0.02, betas=(0.98, 0.999), weight_decay=0.1)
    notices = import_state_dict(optimizer, frozen["state"])
    assert [notice.split(":")[0] for notice in notices[1:]] == ["lr (group 0)", "beta (group 0)"]
    for p, q in zip(params, others, strict=True):
        assert torch.equal(optimizer.eval_params()[q], x[p])


def test_a_wrapper_that_does_not_say_what_its_weights_hold_is_asked():
    frozen = load("schedulefree-1.4.1-wrapper-eval")
    optimizer = make("wrapper", parameters(frozen["weights"]))
    with pytest.raises(HyperparameterError, match="weights_hold must be 'x' or 'y', got None"):
        import_state_dict(optimizer, frozen["state"])


class TestPlainAdamW:
    """Its second moment is kept; x, y and z start from the weights."""

    @pytest.fixture
    def imported(self):
        frozen = load("torch-2.13-adamw")
        params = parameters(frozen["weights"])
        optimizer = sftorch.AdamWScheduleFree(params, lr=0.01)
        return frozen, params, optimizer, import_state_dict(optimizer, frozen["state"])

    def test_v_is_kept_and_its_time(self, imported):
        frozen, params, optimizer, notices = imported
        for index, p in enumerate(params):
            assert torch.equal(
                optimizer.state[p]["exp_avg_sq"], frozen["state"]["state"][index]["exp_avg_sq"]
            )
            assert optimizer.state[p]["step"] == 6
            assert torch.equal(optimizer.state[p]["z"], frozen["weights"][index])
        assert "the first moment is dropped" in notices[1]

    def test_the_weights_are_protected_as_in_a_start_from_weights(self, imported):
        frozen, params, optimizer, notices = imported
        assert f"prior_steps is set to {WEIGHTS_ONLY['prior_steps']}" in notices[2]
        go_on(optimizer, params, frozen["gradients"][:1])
        assert optimizer.metrics()[0]["c"] == pytest.approx(1 / (WEIGHTS_ONLY["prior_steps"] + 1))

    def test_the_weights_are_protected_under_a_scheduler_that_begins_at_0(self):
        frozen = load("torch-2.13-adamw")
        params = parameters(frozen["weights"])
        optimizer = sftorch.AdamWScheduleFree(params, lr=0.01)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)
        import_state_dict(optimizer, frozen["state"])
        for p in params:
            assert optimizer.state[p]["weight_sum"] == WEIGHTS_ONLY["prior_steps"] * 0.01**2

    def test_the_first_step_is_that_of_a_mature_second_moment(self, imported):
        frozen, params, optimizer, _ = imported
        v = [frozen["state"]["state"][i]["exp_avg_sq"] for i in range(len(params))]
        go_on(optimizer, params, frozen["gradients"][:1])
        for i, p in enumerate(params):
            g = frozen["gradients"][0][i]
            root = ((0.999 * v[i] + 0.001 * g**2) / (1 - 0.999**7)).sqrt()
            wanted = frozen["weights"][i] - 0.01 * g / (root + 1e-8)
            torch.testing.assert_close(optimizer.state[p]["z"], wanted, rtol=0, atol=ROUNDING)

    def test_weights_loaded_afterwards_are_caught(self, imported):
        frozen, params, optimizer, _ = imported
        with torch.no_grad():
            params[0].add_(1)
        with pytest.raises(RuntimeError, match="got others in 1 of 2"):
            go_on(optimizer, params, frozen["gradients"][:1])

    def test_the_first_moment_is_kept_where_there_is_a_place_for_it(self):
        frozen = load("torch-2.13-adamw")
        params = parameters(frozen["weights"])
        optimizer = sftorch.AdamWScheduleFree(params, lr=0.01, inner_momentum=0.9)
        notices = import_state_dict(optimizer, frozen["state"])
        assert "the first moment is kept" in notices[1]
        assert torch.equal(optimizer.state[params[0]]["exp_avg"], frozen["state"]["state"][0]["exp_avg"])


def test_options_without_a_counterpart_are_said():
    frozen = load("pytorch_optimizer-4.1.0-adamw-train")
    state = copy.deepcopy(frozen["state"])
    state["param_groups"][0] |= {"ams_bound": True, "decoupling_c": 200}
    notices = import_state_dict(make("adamw", parameters(frozen["weights"])), state)
    assert any(re.match(r"ams_bound \(group 0\): the running maximum", notice) for notice in notices)
    assert any(notice.startswith("refined_c (group 0): saved 200.0, configured 0.0") for notice in notices), (
        notices
    )
    refined = sftorch.AdamWScheduleFree(parameters(frozen["weights"]), refined_c=200.0)
    assert not any("refined_c" in notice for notice in import_state_dict(refined, state))


@pytest.mark.parametrize(
    ("state", "finding"),
    [
        ({"model": {}}, r"got the keys \['model'\]"),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]).state_dict(), "start from the weights with"),
    ],
)
def test_state_of_an_unknown_program_is_refused(state, finding):
    optimizer = make("adamw", parameters([torch.ones(2)]))
    with pytest.raises(ValueError, match=finding):
        import_state_dict(optimizer, state)
    assert not optimizer.state


def test_state_of_another_model_is_refused_and_changes_nothing():
    frozen = load("schedulefree-1.4.1-adamw-train")
    optimizer = make("adamw", parameters([torch.ones(2, 3), torch.ones(2)]))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 must have shape \(2, 3\), got \(3, 2\)"):
        import_state_dict(optimizer, frozen["state"])
    assert not optimizer.state


def test_state_of_another_model_does_not_touch_a_wrappers_books():
    frozen = load("schedulefree-1.4.1-wrapper-eval")
    optimizer = make("wrapper", parameters([torch.ones(2, 3), torch.ones(2)]))
    before = copy.deepcopy(optimizer.param_groups[0]["schedule_free"])
    with pytest.raises(ValueError, match="nothing has changed"):
        import_state_dict(optimizer, frozen["state"], weights_hold="y")
    assert optimizer.param_groups[0]["schedule_free"] == before


def test_the_frozen_files_are_small():
    assert max(path.stat().st_size for path in FROZEN.rglob("*") if path.is_file()) < 50_000


def test_a_state_that_no_row_names_is_refused_by_name():
    optimizer = make("sgd", parameters([torch.ones(2)]))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["sum"] = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"known law \(sgd, adamw, radam, muon\), got the state sum, which none"
    ):
        import_state_dict(make("adamw", parameters([torch.ones(2)])), state)


ODD = {
    "k": (float("nan"), "group 0 must have a finite step >= 0, got nan"),
    "weight_sum": (float("inf"), "group 0 must have a finite weight_sum >= 0, got inf"),
    "lr_max": ("x", "must have the entries that its program saves"),
    "params": (7, "must have the entries that its program saves"),
    "z": (torch.zeros(2, 3).to_sparse(), "parameter 0 of group 0 must have a dense tensor as z"),
    "exp_avg_sq": (torch.zeros(7), r"group 0 must have shape \(3, 2\) in exp_avg_sq, got \(7,\)"),
}


@pytest.mark.parametrize("name", ODD)
def test_state_with_an_odd_entry_is_refused_and_changes_nothing(name):
    state = load("schedulefree-1.4.1-adamw-train")["state"]
    odd, finding = ODD[name]
    place = state["state"][0] if name in state["state"][0] else state["param_groups"][0]
    assert name in place
    place[name] = odd
    optimizer = make("adamw", parameters([torch.ones(3, 2), torch.ones(2)]))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=finding):
        import_state_dict(optimizer, state)
    assert repr(optimizer.state_dict()) == repr(before)


@pytest.mark.parametrize("state_dict", [None, 5, [], {"param_groups": 3, "state": {}}, torch.ones(2)])
def test_what_is_no_state_dict_is_refused(state_dict):
    kind = ValueError if isinstance(state_dict, dict) else TypeError
    with pytest.raises(kind, match="state_dict must"):
        import_state_dict(make("adamw", parameters([torch.ones(2)])), state_dict)
