"""`schedulefree plan`: the arguments, and what becomes of them."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfcore.plan import _markdown, _report
from sfcore.plan._check import check
from sfcore.plan._model import ConfigError, Plan
from sfcore.plan._read import SOURCES
from sfcore.plan._text import literal

DONE, FOUND, UNUSABLE = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `plan` takes to its parser."""
    parser.add_argument("config", nargs="?", help="TOML, JSON or .sh file, or a quoted command line")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="key=value", help="fields beside it"
    )
    parser.add_argument("--source", choices=SOURCES, help="what it is written for, if its fields do not tell")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="CODE", help="codes that are meant")
    parser.add_argument("--fix", action="store_true", help="repair it, and list the changes")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="with --fix: write the repaired configuration"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--strict", action="store_true", help="exit code 1 for warnings too")
    parser.add_argument("--preview", type=Path, metavar="PNG", help="draw lr and c over the run")
    parser.add_argument("--rules", type=Path, metavar="FILE", help="write the page of all rules, and stop")


def run(chosen: argparse.Namespace) -> tuple[str, int]:
    """Returns what to print and the exit code: 0 fine, 1 problems found, 2 unreadable."""
    if chosen.rules:
        chosen.rules.write_text(_markdown.page(), encoding="utf-8")
        return f"written: {chosen.rules}", DONE
    try:
        plan = check(
            chosen.config, fix=chosen.fix, source=chosen.source, ignore=chosen.ignore, **_facts(chosen.set)
        )
        notes = _write(plan, chosen)
    except (ConfigError, ValueError, OSError) as error:
        return f"error: {error}", UNUSABLE
    if chosen.json:
        # A value that JSON has not, such as NaN, becomes text.
        shown = json.dumps(_plain(_report.as_dict(plan)), indent=1)
    else:
        shown = "\n".join([_report.text(plan), *notes])
    return shown, FOUND if plan.errors or (chosen.strict and plan.warnings) else DONE


def _facts(items: list[str]) -> dict[str, Any]:
    pairs = [item.partition("=") for item in items]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise ConfigError(f"--set must be key=value, got {', '.join(wrong)}: write {wrong[0]}=VALUE")
    return {name: literal(text) for name, _, text in pairs}


def _write(plan: Plan, chosen: argparse.Namespace) -> list[str]:
    """Writes what was asked for; returns a note for each."""
    notes = []
    if chosen.preview:
        _report.preview(plan, chosen.preview)
        notes.append(f"written: {chosen.preview}")
    if chosen.out:
        chosen.out.write_text(as_text(plan.config, chosen.out.suffix), encoding="utf-8")
        notes.append(f"written: {chosen.out}")
    return notes


def as_text(config: Any, suffix: str) -> str:
    """Returns a configuration as TOML for the suffix ".toml", as JSON otherwise, as words if it is words."""
    if isinstance(config, str):
        return config + "\n"
    if isinstance(config, list | tuple):
        return shlex.join(map(str, config)) + "\n"
    return _toml(config) if suffix == ".toml" else json.dumps(_plain(config), indent=2) + "\n"


def _toml(config: Mapping[str, Any]) -> str:
    """Returns fields, then sections; TOML has no null, so that a field without a value is left out."""
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    lines = _items(plain)
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{_key(key)}]", *_items(value)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _items(fields: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in fields.items() if value is not None]


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _quoted(key)


def _quoted(text: str) -> str:
    # DEL is the one control character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_items(value))}}}"
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    # repr keeps a float a float, which sd-scripts' lr_warmup_steps needs.
    return repr(value) if isinstance(value, int | float) else _quoted(str(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite and isinstance(value, str | int | float | bool | None) else str(value)
