"""Every rule as data: code, severity, what must hold, why; and functions that look, but not at the course."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sfcore import checks, laws
from sfcore.plan._model import WARNING, Problem
from sfcore.plan._run import Run
from sfcore.plan._sd_scripts import ONLY_OURS
from sfcore.plan._tables import FIELDS, is_ours, misspelt, whole
from sfcore.restart import weights_only_policy


@dataclass(frozen=True)
class Rule:
    """One rule: its severity, what it says a field must be, and what happens otherwise."""

    severity: str
    rule: str
    why: str


# Code, severity, and what the field must be; below, what happens otherwise.
_RULES = """
SF001 error: a known field
    A misspelt field is ignored by some programs and stops others.
SF002 error: of the field's kind
    The trainer would stop at it.
SF003 error: a known optimizer
    The trainer would stop at it, after everything is loaded.
SF004 error: name=value, the value a Python literal
    sd-scripts splits it at its =, reads the value by ast.literal_eval, and stops at all else.
SF101 error: 0 with a scheduler that has no warm-up
    sd-scripts and Kohya_SS raise deep in the training script, after everything is loaded; others ignore
    the warm-up.
SF102 error: constant with a Schedule-Free optimizer
    The average already does what a decay is for; with one, the run needs a known end again, and late
    steps count as much in the average as early ones although they hardly move.
SF103 error: left at its default with a Schedule-Free optimizer
    sd-scripts and Kohya_SS install a dummy scheduler for an optimizer whose name ends in ScheduleFree,
    and ignore this without a word.
SF104 error: set for this scheduler
    The scheduler cannot be built without it, or not as meant.
SF105 warning: left at its default with this scheduler
    The scheduler ignores it.
SF106 error: a known scheduler
    The trainer would stop at it, after everything is loaded.
SF107 error: used with the optimizer Adafactor
    sd-scripts asserts it; others compute nonsense.
SF108 error: an argument that this scheduler has, and of use to it
    The trainer would stop at it, after everything is loaded.
SF201 error: the only warm-up
    The two ramps are multiplied: the lr rises as t^2.
SF202 error: a whole number of optimizer steps >= 0
    A fraction is taken for a number of steps: 0.03 makes the first step 33 times the lr, in HF Trainer
    too, which hands it on as it is.
SF203 error: the only statement of the warm-up
    Of steps and a share of the run only one is used.
SF204 error: shorter than the run
    The lr never reaches the one that is written down.
SF205 error: counted in optimizer steps
    A step is one update, not one micro-batch; counted so, it is as many times too large.
SF206 error: absent with RAdam
    RAdam rectifies its lr in place of a warm-up, and has none.
SF207 warning: about 5% of the run
    What has a warm-up, not a rectification, is better with it (README of facebookresearch/schedule_free).
SF208 warning: a fraction of the run on several devices
    accelerate counts one scheduler step for every process, so a number of steps ends that many times
    sooner; a fraction does not.
SF301 error: in its range
    The optimizer refuses it, or computes nonsense with it.
SF302 warning: near the useful range
    Far outside it nothing is learnt, or all is lost.
SF303 warning: of the size of SGD's step sizes
    This is the size of AdamW's; SGD's steps are not normalised, so it hardly moves.
SF304 warning: from 0.8 to 0.99
    beta is no momentum: it places y between z and x. At 0 upstream and optax divide by 0, small ones
    are unstable, and near 1 the gradient is taken at the average, which hardly moves.
SF305 warning: from 0.9 to 0.999, or to a horizon within the run
    v averages 1 / (1 - b2) steps: few are noise, and more than the run has never settle.
SF306 error: an argument that this optimizer has
    The optimizer raises when it is built, or ignores it.
SF307 warning: said
    sd-scripts takes 2e-6 where nothing is said, which suits few runs.
SF308 error: one or more with Muon
    A polar factor is of a matrix; with vectors and scalars alone the optimizer refuses to be built.
SF309 warning: 0 in schedulefree's AdamCScheduleFreePlusPaper
    It corrects the smoothed norm for its start in every step anew: with gradients of one size the norm at 0.9
    is 3,900 times too large after 20 steps, and the steps as much too small.
SF401 error: given together with prior_steps
    Its first step has c = 1 and throws the loaded weights away: on digits the validation loss rose to
    2.4 to 7.2 times with AdamW, most with accumulation, and to 1.1 times with RAdam (python -m
    benchmarks resume).
SF402 error: off where a run with accumulation is resumed
    train_network.py multiplies the steps that are done by the accumulation and then divides them by updates,
    so that it leaves out epochs that nobody has trained.
SF403 warning: a state from which as much is trained as is left
    What was trained before is trained again, or the run goes on beyond its end.
SF404 error: more than the state has done
    train_network.py asserts it, after everything is loaded.
SF501 error: float32 (autocast may be float16)
    y is rounded to it in every step, and gradients below 6e-8 are 0.
SF502 warning: float32 (autocast may be bfloat16)
    y is rounded to it in every step; steps below half an ulp are lost, and a run stalls.
SF503 error: on where the model has BatchNorm
    Running statistics belong to y, and x is evaluated: they must be averaged anew at x.
SF504 error: in an order with the Schedule-Free optimizer last
    What edits the updates after it moves y but not z, and corrupts x; nothing can notice it.
SF505 warning: off with Schedule-Free
    x is an average already, and an average of y or of weights that flip between x and y is neither.
SF506 error: what saves x
    The parameters hold y while training, which is not what to ship.
SF507 error: a name that ends in ScheduleFree
    sd-scripts knows Schedule-Free by that; otherwise it never switches to x, and ships y.
SF508 error: left out with this optimizer
    It changes the weights behind the optimizer's back, or the script refuses the two together.
"""


def _rules() -> dict[str, Rule]:
    found = {}
    for entry in re.split(r"\n(?=SF)", _RULES.strip()):
        head, *why = entry.splitlines()
        code, severity, rule = re.split(r":? ", head, maxsplit=2)
        found[code] = Rule(severity, rule, " ".join(map(str.strip, why)))
    return found


RULES = _rules()
Problems = Iterator[Problem]
_GIVEN = object()


def problem(
    run: Run,
    code: str,
    field: str,
    fix: str,
    changes: Mapping[str, Any] | None = None,
    detail: str = "",
    found: Any = _GIVEN,
    severity: str = "",
) -> Problem:
    """Returns the problem of a rule, in the words of the user's configuration.

    Args:
        field: neutral.
        fix: what to do, with the user's names.
        changes: the same as data; None where only the user can know.
        detail: what more there is to say about this run.
        found: what breaks the rule; by default what the configuration says.
        severity: where it is not the rule's usual one.
    """
    rule = RULES[code]
    found = run.config.get(field) if found is _GIVEN else found
    why = f"{rule.why} {detail}".strip()
    name, severity = run.config.name(field), severity or rule.severity
    return Problem(code, severity, name, found, rule.rule, why, fix, changes or {})


# Hyperparameters: SF003, SF301 to SF306.

_FAR = 10.0
_COUNT = checks.Rule(
    "a number >= 1", lambda value: whole(value) is not None, "leave it out if it is not known"
)
_COUNTS = ("total_steps", "samples", "batch_size", "accumulation", "devices")
_BY_HAND = "yourself and pass optimizers=(optimizer, None) to Trainer"


def optimizer_name(run: Run) -> Problems:
    """SF003: an optimizer that nobody knows, or that HF Trainer cannot build."""
    near = misspelt(run.optimizer)
    if run.config.source.dummy_scheduler:
        built = run.built
        if built.fix:
            instead = {"optimizer": built.instead} if built.instead else None
            yield problem(run, "SF003", "optimizer", built.fix, instead)
    elif near:
        yield problem(run, "SF003", "optimizer", f"did you mean {near}?", {"optimizer": near})
    elif run.config.source.shares_warmup and "." in run.optimizer:
        there = run.kind.law.elsewhere.get("transformers") if run.kind.law else None
        fix = f"build it {_BY_HAND}, or take one of its own names"
        yield problem(run, "SF003", "optimizer", fix, {"optimizer": there} if there else None)


def full_name(run: Run) -> str:
    """Returns this project's torch class of the same family; of an unknown one, the usual."""
    law = run.kind.law or laws.LAWS["adamw"]
    return f"sftorch.{law.torch}"


def package_fix(run: Run) -> tuple[str, dict[str, Any]]:
    """Returns how to come to a class that has this project's options, and the changes; none in HF Trainer."""
    if run.config.source.shares_warmup:
        return f"build {full_name(run)} {_BY_HAND}", {}
    if is_ours(run.optimizer, run.config.source.bare_is_ours):
        return "", {}
    fix = f"choose {run.config.name('optimizer')} = {full_name(run)}"
    if run.config.source.dummy_scheduler:
        fix += " (sd-scripts wants the package schedulefree installed beside it)"
    return fix, {"optimizer": full_name(run)}


def other_arguments(run: Run) -> Problems:
    """SF306: an argument of another optimizer, or of this project's own class."""
    source = run.config.source
    for field, value in run.config.values.items():
        if source.dummy_scheduler and run.config.places[field].item:
            continue  # `literal_arguments` looks at those
        of_trainer = source.shares_warmup and not run.config.places[field].item and field in source.fields
        # RAdam's warm-up is SF206.
        others = field in run.kind.forbids and not (field == "warmup_steps" and run.kind.rectified)
        if others and not of_trainer and value:
            yield problem(run, "SF306", field, f"{run.kind.name} has none: remove it", {field: None})
        elif field in ONLY_OURS and value and run.kind.uses:
            fix, changes = package_fix(run)
            if fix:
                yield problem(run, "SF306", field, fix, changes, f"{run.optimizer} has none.")


def ranges(run: Run) -> Problems:
    """SF301: values that no optimizer takes, one by one, then between them."""
    values = run.config.values
    known = {field.name: field for field in fields(run.kind.rules)} if run.kind.rules else {}

    def outside(name: str, rule: str, fix: str) -> Problem:
        changes = {name: known[name].default if name in known else None}
        return Problem(**{**vars(problem(run, "SF301", name, fix, changes)), "rule": rule})

    adam = run.config.source.dummy_scheduler and "betas" in (run.built.arguments or ())
    for field, value in values.items():
        rule = _COUNT if field in _COUNTS else checks.FINITE if field == "f_star" else checks.NON_NEGATIVE
        rule = checks.DECAY_RATE if adam and field in ("beta", "b2") else rule
        if FIELDS[field].kind == "number" and field not in known and not rule.holds(value):
            yield outside(field, rule.text, rule.fix)
    if run.kind.rules is None:
        return
    given = {name: values[name] for name in known if name in values}
    given.setdefault("lr", run.lr)
    bad = False
    for name, value in given.items():
        rule = known[name].metadata["rule"]
        # SF202 says more.
        fraction = name == "warmup_steps" and isinstance(value, float) and 0 < value < math.inf
        if not rule.holds(value) and not fraction:
            bad = True
            yield outside(name, rule.text, rule.fix)
    full = {name: given.get(name, known[name].default) for name in known}
    for sentence in [] if bad else run.kind.rules.joint_problems(full, {name: name for name in known}):
        text, fix = re.split(r", got [^:]*: ", sentence.split(" must be ", 1)[1], maxsplit=1)
        yield outside(sentence.split(" ", 1)[0], text, fix)


def rate(run: Run) -> Problems:
    """SF302 and SF303: a step size of another optimizer, or of none."""
    law = run.kind.law
    if law is None or law.lr_range is None or run.lr == 0:
        return
    (low, high), usual = law.lr_range, law.defaults["lr"]
    text, changes = f"{low:g} to {high:g} is useful ({law.lr_source})", {"lr": usual}
    if law.direction == "gradient" and run.lr < low / 5:
        yield problem(run, "SF303", "lr", f"start from {usual:g}; {text}", changes, found=run.lr)
    elif not low / _FAR <= run.lr <= high * _FAR:
        yield problem(run, "SF302", "lr", f"{text}; start from {usual:g}", changes, found=run.lr)


def beta(run: Run) -> Problems:
    """SF304: beta taken for a momentum."""
    value = run.config.get("beta", 0.9)
    if run.kind.law is laws.MEMBERS["gpa"]:  # 0.7 is usual there
        return
    if not 0.8 <= value <= 0.99:
        fix = "0.9 suits most runs, 0.95 to 0.98 very long ones"
        yield problem(run, "SF304", "beta", fix, {"beta": 0.9}, found=value)


def second_moment(run: Run) -> Problems:
    """SF305: a horizon of a few steps, or of more than the run has."""
    value = run.config.get("b2", 0.999)
    if "b2" not in run.kind.uses or not isinstance(value, int | float):
        return
    longer = value > 0.999 and run.total_steps is not None and 1 / (1 - value) > run.total_steps
    if value < 0.9 or longer:
        detail = f"Here it averages {1 / (1 - value):.0f} steps."
        yield problem(run, "SF305", "b2", "0.999 is the usual value", {"b2": 0.999}, detail, value)


def no_matrix(run: Run) -> Problems:
    """SF308: Muon over vectors and scalars only."""
    law = run.kind.law
    if law is not None and law.direction == "polar" and run.config.get("matrices", 1) == 0:
        usual = laws.LAWS["adamw"]
        instead = run.optimizer.replace(law.torch, usual.torch).replace(law.jax, usual.jax)
        changes = {"optimizer": instead, "matrices": None}
        yield problem(run, "SF308", "matrices", "use AdamW, or name the matrices", changes)


def corrected_twice(run: Run) -> Problems:
    """SF309: a smoothed norm in upstream's ScheduleFree+."""
    theirs = run.optimizer.endswith("AdamCScheduleFreePlusPaper") and not is_ours(run.optimizer, False)
    if theirs and run.config.get("polyak_beta", 0):
        fix = "leave it out, or take sftorch.AdamCScheduleFreePlusPaper, which corrects it once"
        yield problem(run, "SF309", "polyak_beta", fix, {"polyak_beta": None})


# What surrounds a Schedule-Free optimizer: SF401, SF501 to SF507.

_NARROW = {"float16": "SF501", "fp16": "SF501", "half": "SF501", "bfloat16": "SF502", "bf16": "SF502"}


# After so few steps of training, plain Schedule-Free soon ended below a start with prior_steps: `python -m
# benchmarks resume --problem digits --trained 200`, 12 seeds, and 10 to 400 in its place.
_LITTLE = 400


def weights_alone(run: Run) -> Problems:
    """SF401: weights without a state, taken for nothing; a warning where that matters little."""
    get, source = run.config.get, run.config.source
    if not get("weights") or get("resume") or get("prior_steps") or not run.kind.uses:
        return
    trained = run.trained_steps
    prior = weights_only_policy({}, trained_steps=trained)["prior_steps"]
    how, changes = package_fix(run)
    where = f" in {source.prefix}{source.inner}" if source.inner else ""
    fix = f"set prior_steps={prior}{where}"
    fix += ", or as many as the weights were trained for" if trained is None else ""
    changes = {} if how and not changes else changes | {"prior_steps": prior}
    fix += f", and {how}" if how else ""
    detail, severity = f"Accumulation is {run.accumulation}.", ""
    if run.kind.rectified:
        severity = WARNING
    elif trained is not None and trained < _LITTLE:
        severity = WARNING
        detail += f" Weights of {trained} steps are worth little: it rose at first, and soon ended lower."
    yield problem(run, "SF401", "weights", fix, changes, detail, severity=severity)


def narrow_parameters(run: Run) -> Problems:
    """SF501 and SF502: 16-bit parameters, not autocast."""
    dtype = str(run.config.get("param_dtype", "")).lower().removeprefix("torch.").removeprefix("jnp.")
    # Ours keep what bfloat16 cannot hold of y in their state.
    ours = dtype in ("bfloat16", "bf16") and is_ours(run.optimizer, run.config.source.bare_is_ours)
    if dtype in _NARROW and not ours:
        place = run.config.places["param_dtype"].key
        trainer = place.startswith("full_")
        fix = f"switch {place} off and keep mixed_precision" if trainer else "keep parameters in float32"
        changes = {"param_dtype": None if trainer else "float32"}
        yield problem(run, _NARROW[dtype], "param_dtype", fix, changes, found=dtype)


def batchnorm(run: Run) -> Problems:
    """SF503: running statistics of y beside weights x."""
    calibrated = bool(run.config.get("recalibrate"))
    if run.config.get("batchnorm") and not calibrated:
        fix = "call recalibrate(model, batches) at x before every evaluation and before you ship"
        yield problem(run, "SF503", "recalibrate", fix, {"recalibrate": True}, found=calibrated)


def order(run: Run) -> Problems:
    """SF504: something after the optimizer in a chain."""
    chain = [str(link) for link in run.config.get("chain", ())]
    ours = [i for i, link in enumerate(chain) if "schedulefree" in link.lower().replace("_", "")]
    if ours and ours[-1] < len(chain) - 1:
        moved = [*chain[: ours[-1]], *chain[ours[-1] + 1 :], chain[ours[-1]]]
        fix = f"put it before: {', '.join(moved)}"
        yield problem(run, "SF504", "chain", fix, {"chain": moved}, found=chain)


def averages_twice(run: Run) -> Problems:
    """SF505: an average of the average."""
    if run.config.get("ema"):
        yield problem(run, "SF505", "ema", "switch it off and ship x", {"ema": False})


def ships_y(run: Run) -> Problems:
    """SF506: a save hook that writes what trains."""
    get = run.config.get
    if get("saves") == "y":
        fix = "save optimizer.eval_state_dict(model), or inside of optimizer.evaluation()"
        yield problem(run, "SF506", "saves", fix, {"saves": "x"})
    strategy = get("save_strategy", "no")
    if strategy == "no" or get("adapter"):
        return
    at_every_save = strategy == "epoch" or get("eval_steps") == get("save_steps")
    if get("eval_strategy") != strategy or not at_every_save:
        changes = {"eval_strategy": strategy if strategy in ("steps", "epoch") else "epoch"}
        changes |= {"eval_steps": get("save_steps")} if strategy == "steps" else {}
        changes = {"adapter": True} if strategy == "best" else changes
        fix = "evaluate just before every save, or use an adapter that puts x there and say adapter=True"
        detail = "HF Trainer saves x only where an evaluation came just before."
        yield problem(run, "SF506", "save_strategy", fix, changes, detail)


VALUES = (optimizer_name, other_arguments, ranges, no_matrix)
SUGGESTIONS = (rate, beta, second_moment, corrected_twice)
SURROUNDINGS = (weights_alone, narrow_parameters, batchnorm, order, averages_twice, ships_y)
