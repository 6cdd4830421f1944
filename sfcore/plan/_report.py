"""A plan as text, as JSON, and as a picture, and the page of all rules, made from their own tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sfcore.laws import MEMBERS
from sfcore.plan._model import Plan
from sfcore.plan._rules import RULES
from sfcore.plan._tables import FIELDS, SCHEDULERS, optimizer_kind, optimizers
from sfcore.plan._trainers import ALIASES, HF, KOHYA, SD_SCRIPTS


def text(plan: Plan) -> str:
    """Returns a plan as a table for people, its problems below.

    Example:
        >>> from sfcore.plan import check, text
        >>> print(text(check(lr=0.01, warmup_steps=50, total_steps=1000)).splitlines()[0])
        optimizer     AdamWScheduleFree
    """
    lines = [f"{name:<13} {value}" for name, value in facts(plan)]
    lines += [f"changed       {change}" for change in plan.changes]
    lines += [f"{problem.severity:<13} {problem}" for problem in plan.problems]
    return "\n".join(lines)


def facts(plan: Plan) -> list[tuple[str, str]]:
    """Returns what the run will do: name and value, for people."""
    rows = [("optimizer", plan.optimizer), ("scheduler", _scheduler(plan))]
    rows.append(("steps", _steps(plan)))
    rows.append(("warm-up", _warmup(plan)))
    for name, values in (("lr", plan.lr), ("c", plan.c)):
        if len(values):
            rows.append((f"{name} at step", ", ".join(f"{i + 1}: {values[i]:.3g}" for i in _places(plan))))
    if len(plan.lr) and optimizer_kind(plan.optimizer).law is MEMBERS["plus"]:
        rows.append(("Polyak steps", "lr multiplies them; c, which they weigh, is that of equal ones"))
    if plan.resumed:
        ran, left = plan.resumed
        rows.append(("resume", f"{ran} micro-batches will be trained on, {left} are left"))
    return rows


def _scheduler(plan: Plan) -> str:
    name = plan.scheduler or "none"
    return f"{name}, which is ignored" if plan.scheduler_ignored else name


def _warmup(plan: Plan) -> str:
    if plan.warmup_owner == "nobody":
        return "none"
    if not math.isfinite(plan.warmup_steps):
        return f"a part of a run of unknown length, by {plan.warmup_owner}"
    return f"{plan.warmup_steps:g} optimizer steps, by {plan.warmup_owner}"


def _steps(plan: Plan) -> str:
    total = "unknown" if plan.total_steps is None else str(plan.total_steps)
    parts = [f"{total} optimizer steps", f"accumulation {plan.accumulation}", f"devices {plan.devices}"]
    return ", ".join(parts + ([f"epochs {plan.epochs:g}"] if plan.epochs else []))


def _places(plan: Plan) -> list[int]:
    """Returns the steps worth showing: first, end of the warm-up, middle, last."""
    last = len(plan.lr) - 1
    warmup = int(plan.warmup_steps) - 1 if math.isfinite(plan.warmup_steps) else 0
    return sorted({0, min(max(warmup, 0), last), last // 2, last})


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as what JSON can hold; lr and c at the steps that the table shows."""
    problems = [
        {key: getattr(p, key) for key in ("code", "severity", "field", "found", "rule", "why", "fix")}
        for p in plan.problems
    ]
    shown = _places(plan) if len(plan.lr) else []
    finite = plan.warmup_steps if math.isfinite(plan.warmup_steps) else None
    return {
        "source": plan.source,
        "optimizer": plan.optimizer,
        "scheduler": plan.scheduler,
        "scheduler_ignored": plan.scheduler_ignored,
        "warmup_steps": finite,
        "warmup_owner": plan.warmup_owner,
        "total_steps": plan.total_steps,
        "epochs": plan.epochs,
        "devices": plan.devices,
        "accumulation": plan.accumulation,
        "resumed": plan.resumed and dict(zip(("trained_on", "left"), plan.resumed, strict=True)),
        "files": dict(plan.files),
        "lr": {str(i + 1): float(plan.lr[i]) for i in shown},
        "c": {str(i + 1): float(plan.c[i]) for i in shown if len(plan.c)},
        "changes": [vars(change) for change in plan.changes],
        "problems": problems,
    }


def preview(plan: Plan, path: Path) -> None:
    """Draws lr and c over the run into a PNG; matplotlib is imported only here.

    Raises:
        ValueError: as `curves` does; without matplotlib.
    """
    drawn = curves(plan)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a preview needs the package matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(7, 2.2 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (name, values, is_log) in enumerate(drawn, start=1):
        axes, every = figure.add_subplot(len(drawn), 1, number), max(1, len(values) // 5000)
        axes.plot(range(1, len(values) + 1, every), values[::every])
        axes.set_ylabel(name)
        axes.set_yscale("log" if is_log else "linear")
    axes.set_xlabel("optimizer step")
    figure.suptitle(title(plan))
    figure.savefig(path, dpi=110)


def title(plan: Plan) -> str:
    """Returns what the curves of a plan are those of."""
    scheduler = "no scheduler" if plan.scheduler is None else f"scheduler {_scheduler(plan)}"
    return f"{plan.optimizer}, {scheduler}\n{len(plan.lr)} optimizer steps, warm-up {_warmup(plan)}"


def curves(plan: Plan) -> list[tuple[str, np.ndarray, bool]]:
    """Returns what there is to draw: what it is, float64 of shape (steps,), whether on a logarithmic axis.

    Raises:
        ValueError: if the steps of the run are unknown, or the scheduler's course.
    """
    if not len(plan.lr):
        found, fix = f"the scheduler {plan.scheduler!r}, whose course is not known", "leave the preview out"
        if plan.total_steps is None:
            found, fix = "a run of unknown length", "say total_steps"
        elif plan.errors:
            found, fix = f"{len(plan.errors)} error(s), of {plan.errors[0].field} first", "mend them first"
        raise ValueError(f"lr at every step must be known for a preview, got {found}: {fix}")
    drawn = [("lr, step size of the update", plan.lr, False)]
    return drawn + [("c, share of the newest z in x", plan.c, True)] * bool(len(plan.c))


_HEAD = """# Rules of the plan checker

Made by `python -m sfcore plan --rules docs/rules.md` from the tables in `sfcore/plan`; a test keeps it equal.

`error`: the run fails, or is not the one that is written down. `warning`: it may be meant. What is meant can
be ignored: `check(config, ignore=["SF102"])`, `python -m sfcore plan FILE --ignore SF102`.
"""


def page() -> str:
    """Returns the page of all rules as Markdown.

    Example:
        >>> from sfcore.plan._report import page
        >>> "| SF101 | error |" in page()
        True
    """
    rules = [[code, rule.severity, rule.rule, rule.why] for code, rule in RULES.items()]
    schedulers = [
        [f"`{name}`", *map(_words, (kind.needs, kind.uses, kind.ignores(), kind.forbids))]
        for name, kind in SCHEDULERS.items()
    ]
    kinds = []
    for kind in optimizers():
        schedule = "a constant one, or none" if kind.shuns_schedules else "any"
        low, high = (kind.law and kind.law.lr_range) or (0, 0)
        lr = f"{low:g} to {high:g}: {kind.law.lr_source}" if kind.law and high else "·"
        kinds.append([kind.name, schedule, _words(kind.uses), _words(kind.forbids), lr])
    theirs = [{**source.fields, **source.nested} for source in (SD_SCRIPTS, KOHYA, HF)]
    fields = []
    for name, field in FIELDS.items():
        ours = [name, *(alias for alias, of in ALIASES.items() if of == name)]
        named = [f"`{names[name]}`" if name in names else "·" for names in theirs]
        fields.append([", ".join(f"`{one}`" for one in ours), *named, field.doc])
    parts = [
        _HEAD,
        _table("Rules", ["code", "severity", "the field must be", "why"], rules),
        _table("Schedulers", ["scheduler", "needs", "uses", "ignores", "forbids"], schedulers),
        _table("Optimizers", ["optimizer", "scheduler", "uses", "forbids", "useful lr"], kinds),
        _table("Fields", ["field", "sd-scripts", "Kohya_SS", "HF", "meaning"], fields),
    ]
    return "\n".join(parts)


def _table(title: str, head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"## {title}\n\n{text}\n"


def _words(names: Iterable[str]) -> str:
    return ", ".join(name.removeprefix("scheduler_") for name in names) or "·"
