"""The rows: held to both twins' constructors, and what is refused of a new one."""

from __future__ import annotations

import importlib
import inspect
import pickle
from dataclasses import dataclass, fields, replace
from typing import Any

import optax
import pytest
import pytorch_optimizer
import schedulefree
import torch

import sfjax
import sftorch
from sfcore import averaging, checks, hyperparameters, laws
from sfcore.laws import LAWS, Buffer, Law
from sfcore.plan import check, field_states
from sfcore.plan._report import page

DIRECTED = list(laws.directed())
PROGRAMS = {
    "schedulefree": schedulefree,
    "pytorch_optimizer": pytorch_optimizer,
    "optax.contrib": optax.contrib,
}


@dataclass(frozen=True)
class ToyOptions(hyperparameters.Decayed):
    """One option more than any law has, and no warm-up."""

    power: float = hyperparameters.option(0.5, checks.NON_NEGATIVE, "of the sum")


TOY = Law(
    "toy",
    "Toy",
    ToyOptions,
    "ToyScheduleFree",
    "schedule_free_toy",
    {"beta": "momentum"},
    (Buffer("s", "sum", "sum", "sum of squares"), Buffer("e", "extra", "extra", "rest", when="power")),
    direction="sum",
    step_size="base",
)


def defaults_of(signature: inspect.Signature) -> dict[str, object]:
    return {name: p.default for name, p in signature.parameters.items()}


@pytest.mark.parametrize("name", LAWS)
def test_torch_has_the_options_of_a_row_with_their_defaults(name: str):
    law = LAWS[name]
    for form in ("", "Closure")[: 1 if name == "wrapper" else 2]:
        found = defaults_of(inspect.signature(getattr(sftorch, law.torch + form)))
        expected = law.to_torch(law.defaults)
        if name == "wrapper":
            del expected["lr"]  # the base's
        assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", LAWS)
def test_jax_has_the_options_of_a_row_with_their_defaults(name: str):
    law = LAWS[name]
    found = defaults_of(inspect.signature(getattr(sfjax, law.jax)))
    expected = law.to_jax(law.defaults)
    if name == "wrapper":  # lr has no default beside a base's, which decays by itself
        absent = ("learning_rate", "weight_decay", "decay_power")
        expected = {key: expected[key] for key in expected if key not in absent}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", LAWS)
def test_every_option_says_its_rule_its_meaning_and_what_a_resume_does(name: str):
    for option in fields(LAWS[name].options):
        assert option.metadata["rule"].holds(option.default)
        assert option.metadata["doc"]
        assert option.metadata["effect"] == laws.options()[option.name].metadata["effect"]


def test_the_order_of_options_stays():
    shared = ["lr", "beta", "r", "weight_lr_power", "prior_steps"]
    shared += ["c_warmup", "refined_c", "window", "window_rule", "weight_lr"]
    shared += ["beta_rule", "beta_max", "beta_anneal_steps", "beta_hold_steps", "rho"]
    decay = ["weight_decay", "decay_at", "decay_power"]
    assert [*hyperparameters.defaults(hyperparameters.SGD)] == [*shared, *decay, "warmup_steps"]
    moments = ["b2", "eps", *decay]
    assert [*LAWS["adamw"].defaults] == [*shared, *moments, "warmup_steps", "inner_momentum"]
    assert [*LAWS["radam"].defaults] == [*shared, *moments, "silent_sgd_phase"]
    own = ["mu", "ns_steps", "nesterov", "normalize", "b2_rows", "adjust_lr", "output_axis", "adam_lr_ratio"]
    assert [*LAWS["muon"].defaults] == [*shared, *moments, "warmup_steps", *own]
    assert [*LAWS["wrapper"].defaults] == [*shared, "weight_decay", "decay_power"]


@pytest.mark.parametrize("name", DIRECTED)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_torch_keeps_the_buffers_of_a_row(name: str, momentum: float):
    law = LAWS[name]
    given = {"inner_momentum": momentum} if "inner_momentum" in law.defaults else {}
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,))]
    optimizer = getattr(sftorch, law.torch)(params, **law.to_torch(given))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    values = law.of_torch_group(optimizer.param_groups[0])
    assert values == law.defaults | given
    for p, leaves in zip(params, ("matrices", "others"), strict=True):
        held = {key for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}
        assert held == {"z", *(one.torch for one in law.kept(values, leaves))}


def wired(framework: str):  # type: ignore[no-untyped-def]
    """Returns a constructor and a factory, wired as the twins' are."""
    law = LAWS["adamw"]
    known = checks.with_known_options(
        lambda given: law.problems(framework, given), lambda: law.words(framework)
    )
    if framework == "jax":

        @known
        def schedule_free_adamw(learning_rate=0.0025, warmup_steps=0, b1=0.9, *, r=0.0):  # type: ignore[no-untyped-def]
            return learning_rate, warmup_steps, b1, r

        return schedule_free_adamw

    class Base:
        @known
        def __init__(self, params, lr=0.0025, betas=(0.9, 0.999), warmup_steps=0, *, r=0.0):  # type: ignore[no-untyped-def]
            self.given = params, lr, betas, warmup_steps, r

    class AdamWScheduleFree(Base):
        pass

    return AdamWScheduleFree


@pytest.mark.parametrize(
    ("framework", "args", "kwargs", "lines"),
    [
        (
            "torch",
            ([],),
            {"lr": -1, "warm_up": 5},
            ["AdamWScheduleFree has no option 'warm_up', got 5: did you mean 'warmup_steps'?", "lr must be"],
        ),
        (
            "torch",
            ([], 0.1, (2.0, 0.5)),
            {"weigth": 0.1, "b1": 0.5, "learning_rate": 0.5},
            [
                "has no option 'weigth', got 0.1: it has params, lr, betas, warmup_steps, r",
                "has no option 'b1', got 0.5: it is called 'betas' here",
                "has no option 'learning_rate', got 0.5: it is called 'lr' here",
                "betas[0] must be a number in [0, 1], got 2.0",
            ],
        ),
        (
            "jax",
            (-1.0,),
            {"lr": 0.1, "warmup": 5},
            [
                "schedule_free_adamw has no option 'lr', got 0.1: it is called 'learning_rate' here",
                "has no option 'warmup', got 5: did you mean 'warmup_steps'?",
                "learning_rate must be a finite number >= 0, got -1.0",
            ],
        ),
    ],
)
def test_a_misspelt_keyword_is_named_with_all_else_that_is_wrong(framework, args, kwargs, lines):
    with pytest.raises(checks.UnknownOptionError) as caught:
        wired(framework)(*args, **kwargs)
    assert len(caught.value.problems) == len(lines)
    assert all(line in problem for line, problem in zip(lines, caught.value.problems, strict=True))
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert repr(pickle.loads(pickle.dumps(caught.value))) == repr(caught.value)


def test_what_is_well_spelt_is_called_as_it_is():
    assert wired("torch")([1], r=2.0).given == ([1], 0.0025, (0.9, 0.999), 0, 2.0)
    assert wired("jax")(0.5, r=1.0) == (0.5, 0, 0.9, 1.0)
    assert list(inspect.signature(wired("torch")).parameters) == [
        "params",
        "lr",
        "betas",
        "warmup_steps",
        "r",
    ]


def test_options_go_to_torch_and_back():
    law = LAWS["adamw"]
    values = law.defaults | {"b2": 0.5, "r": 1.0}
    assert law.of_torch_group(law.to_torch(values)) == values
    assert law.to_torch({"b2": 0.5}) == {"betas": (0.9, 0.5)}
    assert law.of_torch_group({"betas": 0.9, "lr": 1.0}) == {"lr": 1.0}
    assert LAWS["sgd"].to_torch({"beta": 0.5}) == {"momentum": 0.5}
    assert law.to_jax({"beta": 0.5, "lr": 1.0}) == {"b1": 0.5, "learning_rate": 1.0}


@pytest.mark.parametrize(("name", "program"), [(n, p) for n in LAWS for p in LAWS[n].elsewhere])
def test_other_programs_have_what_a_row_says(name: str, program: str):
    there = LAWS[name].elsewhere[program]
    if program == "transformers":
        names = importlib.import_module("transformers.training_args").OptimizerNames
        assert there in {str(one.value) for one in names}
    else:
        assert callable(getattr(PROGRAMS[program], there))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        (name, package)
        for name in DIRECTED
        for package in (sftorch, schedulefree, pytorch_optimizer)
        if package is sftorch or package.__name__ in LAWS[name].elsewhere
    ],
)
def test_a_torch_group_tells_its_law(name: str, package: Any):
    names = LAWS[name].elsewhere | {"sftorch": LAWS[name].torch}
    make = getattr(package, names[package.__name__])
    group = make([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]
    assert laws.recognise(None, group) == name


def test_a_state_alone_tells_as_much_as_it_can():
    assert laws.recognise([]) == "sgd"
    assert laws.recognise(["v"]) == "adamw or radam"
    assert laws.recognise(["v", "m"]) == "adamw"
    assert laws.recognise(["momentum"]) == laws.recognise(["momentum", "v", "u"]) == "muon"
    with pytest.raises(
        ValueError, match=r"known law \(sgd, adamw, radam, muon, wrapper\), got the buffers \['s'\]"
    ):
        laws.recognise(["s"])
    assert [law.name for law in laws.candidates("adamw or radam")] == ["adamw", "radam"]
    with pytest.raises(ValueError, match="got 'radamm'; did you mean 'radam'"):
        laws.law_of("radamm")


def test_a_registered_law_is_seen_and_goes_again():
    with laws.register(TOY):
        assert laws.law_of("toy") is TOY
        assert laws.recognise(["s"]) == laws.recognise(None, ["momentum", "power"]) == "toy"
        assert list(laws.roles()) == ["v", "m", "momentum", "u", "s", "e"]
        assert laws.options()["power"].metadata["effect"] == hyperparameters.NEXT
        assert [one.role for one in TOY.kept({"power": 0.0})] == ["s"]
    assert "toy" not in LAWS
    assert list(laws.roles()) == ["v", "m", "momentum", "u"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sgd"}, "name must be its own, got 'sgd'"),
        ({"torch": "SGDScheduleFree"}, "torch must be its own"),
        ({"jax": "schedule_free"}, "jax must be its own"),
        ({"step_size": "polyak"}, "step_size must be in ramp, rectified, base, got 'polyak'"),
        ({"averaging": "window"}, "averaging must be in weights, got 'window'"),
        ({"torch_names": {"b2": "betas[1]"}}, "'b2' must be an option"),
        ({"buffers": (Buffer("s", "sum", "sum", "", when="momentum"),)}, "'momentum' must be an option"),
        ({"buffers": (Buffer("z", "sum", "sum", ""),)}, "buffer 'z' must have names of its own"),
        ({"buffers": (Buffer("s", "y_rest", "sum", ""),)}, "buffer 's' must have names of its own"),
        (
            {"buffers": (Buffer("v", "sum", "nu", ""),)},
            "or all of those of 'v' (exp_avg_sq, nu), got sum, nu",
        ),
        (
            {"buffers": (Buffer("s", "exp_avg_sq", "sum", ""),)},
            "buffer 's' must have names of its own, or all",
        ),
        ({"step_size": "rectified"}, "step_size 'rectified' needs the options b2, silent_sgd_phase: add"),
    ],
)
def test_a_wrong_row_is_refused(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=r"law '.*': ") as caught:
        laws.register(replace(TOY, **change))
    assert message in str(caught.value)
    assert "toy" not in LAWS


def test_all_that_is_wrong_with_a_row_is_said_at_once():
    with pytest.raises(ValueError, match="averaging") as caught:
        laws.register(replace(TOY, averaging="window", step_size="polyak"))
    assert len(str(caught.value).splitlines()) == 2


def test_every_rule_that_a_row_may_name_is_there():
    for law in LAWS.values():
        assert law.step_size in averaging.STEP_SIZES
        assert law.averaging in averaging.AVERAGES
        assert law.defaults["beta_rule"] in averaging.BETAS


def test_a_registered_law_has_a_plan_with_its_own_options():
    with laws.register(TOY):
        plan = check(optimizer="sftorch.ToyScheduleFree", lr=0.1, power=-1.0, momentum=0.95, total_steps=10)
        assert [(p.code, p.field, p.rule) for p in plan.problems] == [
            ("SF301", "power", "a finite number >= 0")
        ]
        (others,) = check(optimizer="sftorch.SGDScheduleFree", power=1.0, warmup_steps=9).problems
        assert (others.code, others.field, others.fix) == (
            "SF306",
            "power",
            "Schedule-Free SGD has none: remove it",
        )
        states = field_states(optimizer="schedule_free_toy", warmup_steps=5)
        assert states["power"].enabled
        assert states["b2"].reason == "Schedule-Free Toy has no b2"
        assert states["warmup_steps"].reason == "Schedule-Free Toy has no warm-up of its own"
        assert len(check(optimizer="ToyScheduleFree", lr=0.1, total_steps=10).c) == 10
        assert "| Schedule-Free Toy |" in page()
        assert [p.code for p in check(optimizer="ToyShceduleFree").problems] == ["SF003"]
    assert [
        p.code for p in check(optimizer="sftorch.SGDScheduleFree", warmup_steps=9, power=1.0).problems
    ] == ["SF001"]
