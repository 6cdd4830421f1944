"""Rules about sd-scripts and musubi-tuner: what their code stops at, leaves out or ships."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfcore.checks import nearest
from sfcore.plan import _sd_scripts
from sfcore.plan._config import Place
from sfcore.plan._course_rules import given_warmups, no_warmup
from sfcore.plan._model import Problem
from sfcore.plan._rules import RULES, Problems, full_name, package_fix, problem
from sfcore.plan._run import Run
from sfcore.plan._sd_scripts import ONLY_OURS, OURS
from sfcore.plan._tables import FIELDS
from sfcore.plan._trainers import options

_STEP_RULES = re.compile(r"([^:,]+:\s*\d+\s*,)*[^:,]+")


def malformed(run: Run) -> Problems:
    """SF004: an argument that is not name=literal, where it is looked at."""
    for key, name, text in run.config.malformed:
        if key == run.config.source.inner or not run.ignored:
            rule, place = RULES["SF004"], replace(run.config.at.get(key, Place(key)), item=name)
            fix = f"write it so: {name or 'name'}=0.1; text in quotation marks of its own"
            shown = run.config.shown(place)
            yield Problem("SF004", rule.severity, shown, text, rule.rule, rule.why, fix)


def literal_arguments(run: Run) -> Problems:
    """SF306, SF001, SF002: what sd-scripts hands to a class that does not take it."""
    config, takes = run.config, run.built.arguments

    def about(
        code: str, name: str, fix: str, changes: Mapping[str, Any] | None = None, **more: Any
    ) -> Problem:
        rule, place = RULES[code], replace(config.home("beta") or Place(""), item=name)
        of = {"found": config.arguments[name], "rule": rule.rule, "why": rule.why, "changes": changes or {}}
        return Problem(code, rule.severity, config.shown(place), fix=fix, **(of | more))

    for name, value in config.arguments.items():
        option = options().get(name, name)
        if name in ("lr", "params") or (
            name == "nesterov" and run.optimizer.lower().startswith("sgdnesterov")
        ):
            fix = f"take it away: sd-scripts gives it{' from learning_rate' if name == 'lr' else ''}"
            yield about("SF306", name, fix)
        elif name == "warmup_steps" and run.kind.rectified and value:
            continue  # SF206
        elif takes is not None and name not in takes:
            if name in ONLY_OURS and run.kind.schedule_free and name in run.kind.uses:
                fix, changes = package_fix(run)
                yield about(
                    "SF306", name, fix, changes, why=f"{RULES['SF306'].why} {run.optimizer} has none."
                )
            elif option in FIELDS or name in ("betas", *OURS):
                gone = {option: None} if option in config.values else None
                yield about("SF306", name, f"{run.optimizer} has {', '.join(takes)}: take it away", gone)
            else:
                near = nearest(name, takes)
                fix = f"did you mean {near}?" if near else "remove it, or look up its name"
                yield about("SF001", name, fix, found="an unknown name")
        elif name == "betas" and not (isinstance(value, list | tuple) and len(value) >= 2):
            rule = "a pair of numbers"
            yield about("SF002", name, "write (0.9,0.999)", rule=rule)
    if run.optimizer == "transformers.optimization.Adafactor" and config.arguments.get("relative_step", True):
        fix = "choose Adafactor, or add relative_step=False"
        yield problem(run, "SF306", "optimizer", fix, {"optimizer": "Adafactor"}, "A rate excludes it.")


def scheduler_class(run: Run) -> Problems:
    """SF101, SF104, SF106, SF108: a class of torch's schedulers."""
    config, musubi = run.config, bool(run.script and run.script.musubi)
    module, _, name = str(config.get("scheduler_class") or "").rpartition(".")
    if run.ignored or not name or module not in ("", "torch.optim.lr_scheduler"):
        return
    for warmup in given_warmups(run) if run.scheduler_warmup and not musubi else ():
        fix = f"set it to 0, or choose {config.name('scheduler')} = constant_with_warmup"
        yield problem(run, "SF101", warmup, fix, no_warmup(run))
    yield from _of_schedule(run, "scheduler_class", name, _sd_scripts.TORCH_SCHEDULERS)
    if _takes_adafactors(run):
        changes = {"scheduler_class": None, "scheduler_args": None} & config.values.keys()
        detail = "With relative_step there is no rate that it could change."
        yield problem(run, "SF108", "scheduler_class", "remove it", dict.fromkeys(changes), detail)


def _takes_adafactors(run: Run) -> bool:
    """Returns whether sd-scripts replaces the scheduler by Adafactor's, with the rate in its name."""
    given = run.config.arguments
    own = given.get("relative_step", True) or given.get("warmup_init")
    return run.optimizer.lower() == "adafactor" and bool(own)


def scheduler_name(run: Run) -> Problems:
    """SF104, SF106, SF108: a name of --lr_scheduler, which must be spelt to the letter."""
    config, musubi, name = run.config, bool(run.script and run.script.musubi), run.scheduler_name
    name = "" if config.raw.get("lr_scheduler") == "" and not _takes_adafactors(run) else name
    if run.ignored or config.get("scheduler_class") or name is None or (musubi and name.lower() == "rex"):
        return
    if name != "adafactor":
        yield from _of_schedule(run, "scheduler", name, _sd_scripts.SCHEDULERS)
    elif ":" not in str(config.get("scheduler")) and not _takes_adafactors(run):
        fix = f"choose {config.name('scheduler')} = constant_with_warmup, or leave relative_step out"
        changes = {"scheduler": "constant_with_warmup" if run.scheduler_warmup else "constant"}
        yield problem(run, "SF106", "scheduler", fix, changes, found=name)


def _of_schedule(run: Run, field: str, name: str, known: Mapping[str, _sd_scripts.Schedule]) -> Problems:
    given, schedule = run.config.schedule_arguments, known.get(name)
    if schedule is None or not schedule.usable:
        usable = {one.lower(): one for one, kind in known.items() if kind.usable}
        near = usable.get(nearest(name.lower(), usable) or "") if schedule is None else None
        fix = f"did you mean {near}?" if near else f"choose one of {', '.join(usable.values())}"
        yield problem(run, "SF106", field, fix, {field: near} if near else None, found=name)
        return
    constant: dict[str, Any] = {"scheduler": "constant", "scheduler_class": None, "scheduler_args": None}
    constant = {key: value for key, value in constant.items() if key in run.config.values} | no_warmup(run)
    detail = f"It is {name}."
    needs = [one for one in schedule.needs if one not in given]
    if name == "OneCycleLR" and "total_steps" not in given and not {"epochs", "steps_per_epoch"} <= {*given}:
        needs.append("total_steps")
    if needs:
        words, instead = " ".join(f"{one}=..." for one in needs), run.config.name("scheduler")
        fix = f"add {words} to {run.config.name('scheduler_args')}, or choose {instead} = constant"
        yield problem(run, "SF104", "scheduler_args", fix, constant, detail)
    for one in given:
        if one not in schedule.takes:
            fix = f"{name} has {', '.join(schedule.takes)}: take it away"
            yield problem(run, "SF108", "scheduler_args", fix, constant, detail, one)
    wrong = "" if needs else _wrong_value(run, name)
    if wrong:
        yield problem(run, "SF108", "scheduler_args", wrong, constant, detail)


def _wrong_value(run: Run, name: str) -> str:
    """Returns what to do about values with which a scheduler of sd-scripts is not built; "" if it is."""
    given, get = run.config.schedule_arguments, run.config.get
    if name == "polynomial" and isinstance(given.get("lr_end", 1e-7), int | float):
        return "" if run.lr > given.get("lr_end", 1e-7) else f"set lr_end below the rate {run.lr:g}"
    takes = run.built.arguments
    if name in ("OneCycleLR", "CyclicLR") and given.get("cycle_momentum", True):
        if get("beta_rule", "constant") != "constant":
            return "add cycle_momentum=False, because beta_rule moves beta"
        return "" if takes is None or {"betas", "momentum"} & {*takes} else "add cycle_momentum=False"
    if name == "cosine_with_min_lr" and "min_lr" in given and get("scheduler_min_lr_ratio") is not None:
        return f"keep one of min_lr and {run.config.name('scheduler_min_lr_ratio')}"
    if name == "piecewise_constant" and not _STEP_RULES.fullmatch(str(given.get("step_rules"))):
        return "write step_rules='1:10,0.1:20,0.01', with its quotation marks"
    return ""


def unsaid_rate(run: Run) -> Problems:
    """SF307: a rate that sd-scripts chooses."""
    source = run.config.source
    said = {"lr", "learning_rate", "unet_lr"} & {*run.config.values, *run.config.unread}
    if "total_steps" in source.defaults and not said:  # Kohya_SS always says one
        usual = run.kind.law.defaults["lr"] if run.kind.law else 1.0 if "own lr" in run.kind.name else 1e-4
        fix = f"say it: {usual:g} is usual"
        yield problem(run, "SF307", "lr", fix, None, "", f"nothing, which is {run.lr:g}")


def script_ships_y(run: Run) -> Problems:
    """SF506: a script that never switches to x."""
    if run.script is None or run.script.evaluates or not run.ignored:
        return
    if not (run.config.get("launched") and run.script.mended and run.optimizer.startswith("sftorch.")):
        mended = "start it with schedulefree launch sd-scripts and an optimizer of sftorch"
        other = "train with a script that calls optimizer.eval()"
        fix = f"{mended if run.script.mended else other}, or turn its file into x from a saved state"
        detail = f"{run.config.get('script')}.py never calls optimizer.eval()."
        yield problem(run, "SF506", "script", fix, None, detail)


def shunned_options(run: Run) -> Problems:
    """SF508: what some scripts do beside or inside of the step."""
    get, name = run.config.get, run.config.name
    if not run.config.source.dummy_scheduler:
        return
    if get("norm_limit") and run.kind.schedule_free and (run.script is None or run.script.resumes):
        detail = "y is scaled after the step, z is not, and x is neither's average any more."
        yield problem(run, "SF508", "norm_limit", "remove it", {"norm_limit": None}, detail)
    if get("blockwise") and run.ignored and (run.script is None or run.script.blockwise):
        detail = "The scripts that have it raise ValueError for an optimizer whose name ends in ScheduleFree."
        yield problem(run, "SF508", "blockwise", "remove it", {"blockwise": None}, detail)
    if get("fused_backward"):
        detail = "sd-scripts asserts that it is Adafactor, without accumulation."
        if run.optimizer.lower() != "adafactor":
            yield problem(run, "SF508", "fused_backward", "remove it", {"fused_backward": None}, detail)
        elif run.accumulation > 1:
            fix = f"set {name('accumulation')} to 1"
            yield problem(run, "SF508", "fused_backward", fix, {"accumulation": 1}, detail)


def resume(run: Run) -> Problems:
    """SF402 to SF404: what a run that goes on from a state trains on."""
    if not run.is_resumed:
        return
    anew = run.script is not None and not run.script.resumes
    skips = bool(run.config.get("skip_done")) and not anew
    if not anew and run.steps_done and run.total_steps and run.steps_done >= run.total_steps:
        fix = f"set it above {run.steps_done}, which the state has done"
        yield problem(run, "SF404", "total_steps", fix, found=run.total_steps)
        return
    if run.resumes_exactly and not anew:
        return
    ran, left = run.resumed or (None, None)
    count = f"Here it trains on {ran} micro-batches, and {left} are left."
    if ran is None or left is None:
        count = "Say samples=, and initial_step= if the state is not here, to see how many."
    ends = "resume from a state of the end of an epoch"
    launcher = "start it with schedulefree launch sd-scripts"
    if skips and (ran is None or left is None or ran < left):
        if ran is not None or run.accumulation > 1:
            fix = f"{launcher}, or remove it, and {ends}"
            yield problem(run, "SF402", "skip_done", fix, None, count)
    elif ran is None or ran != left:
        fix = f"{launcher}, or {ends}"
        fix = f"set {run.config.name('total_steps')} to the steps that are left" if anew else fix
        where = "counts from 0 again" if anew else "counts from the start of an epoch"
        detail = f"{run.config.get('script', 'train_network')}.py {where}. {count}"
        yield problem(run, "SF403", "resume", fix, None, detail)


def unrecognised(run: Run) -> Problems:
    """SF507: a Schedule-Free optimizer that sd-scripts takes for another."""
    if not run.config.source.dummy_scheduler or run.ignored:
        return
    if run.kind.law is not None and run.kind.law.direction != "base":
        fix = f"choose {run.config.name('optimizer')} = {full_name(run)}"
        yield problem(run, "SF507", "optimizer", fix, {"optimizer": full_name(run)})
    else:
        yield problem(run, "SF507", "optimizer", "take a class of such a name")


VALUES = (malformed, literal_arguments)
COURSE = (scheduler_class, scheduler_name, unsaid_rate, shunned_options, resume)
SURROUNDINGS = (script_ships_y, unrecognised)
