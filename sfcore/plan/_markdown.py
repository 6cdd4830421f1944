"""The page of all rules, made from the tables that the rules use."""

from __future__ import annotations

from collections.abc import Iterable

from sfcore.plan._fields import FIELDS
from sfcore.plan._rules import RULES
from sfcore.plan._sources import ALIASES, HF, KOHYA, SD_SCRIPTS
from sfcore.plan._tables import SCHEDULERS, optimizers

_HEAD = """# Rules of the plan checker

Made by `python -m sfcore plan --rules docs/rules.md` from the tables in `sfcore/plan`; a test keeps it equal.

`error`: the run fails, or is not the one that is written down. `warning`: it may be meant. What is meant can
be ignored: `check(config, ignore=["SF102"])`, `python -m sfcore plan FILE --ignore SF102`.
"""


def page() -> str:
    """Returns the page as Markdown.

    Example:
        >>> from sfcore.plan._markdown import page
        >>> "| SF101 | error |" in page()
        True
    """
    parts = [_HEAD, "## Rules\n", _rules(), "\n## Schedulers\n", _schedulers()]
    parts += ["\n## Optimizers\n", _optimizers(), "\n## Fields\n", _fields()]
    return "\n".join(parts)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _rules() -> str:
    rows = [[code, rule.severity, rule.rule, rule.why] for code, rule in RULES.items()]
    return _table(["code", "severity", "the field must be", "why"], rows)


def _words(names: Iterable[str]) -> str:
    return ", ".join(name.removeprefix("scheduler_") for name in names) or "·"


def _schedulers() -> str:
    rows = [
        [f"`{name}`", *map(_words, (kind.needs, kind.uses, kind.ignores(), kind.forbids))]
        for name, kind in SCHEDULERS.items()
    ]
    return _table(["scheduler", "needs", "uses", "ignores", "forbids"], rows)


def _optimizers() -> str:
    rows = []
    for kind in optimizers():
        schedule = "a constant one, or none" if kind.schedule_free else "any"
        low, high = (kind.law and kind.law.lr_range) or (0, 0)
        lr = f"{low:g} to {high:g}: {kind.law.lr_source}" if kind.law and high else "·"
        rows.append([kind.name, schedule, _words(kind.uses), _words(kind.forbids), lr])
    return _table(["optimizer", "scheduler", "uses", "forbids", "useful lr"], rows)


def _fields() -> str:
    other = {name: [alias for alias, of in ALIASES.items() if of == name] for name in FIELDS}
    rows = []
    for name, field in FIELDS.items():
        named = [{**source.fields, **source.nested} for source in (SD_SCRIPTS, KOHYA, HF)]
        theirs = [f"`{names[name]}`" if name in names else "·" for names in named]
        aliases = "".join(f", `{alias}`" for alias in other[name])
        rows.append([f"`{name}`{aliases}", *theirs, field.doc])
    return _table(["field", "sd-scripts", "Kohya_SS", "HF", "meaning"], rows)
