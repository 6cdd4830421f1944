"""The program `schedulefree`, also `python -m sfcore`: plan, inspect, convert, launch, completion."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from sfcore import __version__, convert, inspection, plan
from sfcore.exchange import CheckpointError
from sfcore.plan import _report
from sfcore.plan._config import SOURCES
from sfcore.plan._text import literal, plain
from sfcore.plan._written import rendered

FINE, FOUND, UNUSABLE = 0, 1, 2
# Whoever has a launcher registers `main(words) -> exit code` under the trainer's name.
LAUNCHERS = "schedulefree_twin.launchers"
_ABOUT = "Checks a run before it starts, looks at files to resume from, and turns one kind into another."
_EXIT_CODES = """\
exit codes:
  0  fine
  1  problems found: a plan with errors, or with --strict with warnings; a file that is
     unknown, damaged or not enough for what was asked
  2  nothing could be looked at: a wrong command line, a file that is missing or cannot be
     read, a package that is not installed

problems are printed on standard output, what could not be done on standard error
"""
_OF_A_TABLE = ("fix", "out", "json", "strict", "preview")
_PATHS = ("config", "dst", "map", "out", "path", "preview", "rules", "src")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser, and the parser of each command."""
    shape: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "epilog": _EXIT_CODES,
    }
    parser = argparse.ArgumentParser(prog="schedulefree", description=_ABOUT, **shape)
    parser.add_argument("--version", action="version", version=f"schedulefree-twin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    ahead = commands.add_parser("plan", help="what a run will do, and what is wrong with it", **shape)
    ahead.add_argument("config", nargs="?", help="TOML, JSON or .sh file, or a quoted command line")
    ahead.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="key=value", help="fields beside it"
    )
    ahead.add_argument("--source", choices=SOURCES, help="what it is written for, if its fields do not tell")
    ahead.add_argument("--ignore", nargs="+", default=[], metavar="CODE", help="codes that are meant")
    ahead.add_argument("--fix", action="store_true", help="repair it, and list the changes")
    ahead.add_argument(
        "--out", type=Path, metavar="FILE", help="with --fix: write the repaired configuration"
    )
    ahead.add_argument("--json", action="store_true", help="print JSON instead of a table")
    ahead.add_argument("--strict", action="store_true", help="exit code 1 for warnings too")
    ahead.add_argument("--preview", type=Path, metavar="PNG", help="draw lr and c over the run")
    ahead.add_argument("--rules", type=Path, metavar="FILE", help="write the page of all rules, and stop")
    ahead.add_argument("--ui", action="store_true", help="open it in a page of this machine's browser")
    ahead.add_argument(
        "--host", metavar="ADDRESS", help="with --ui: where to listen, if not at 127.0.0.1 alone"
    )
    ahead.add_argument("--port", type=int, help="with --ui: default the first free one from 7860")
    look = commands.add_parser("inspect", help="what it is, where it stands, what a resume would do", **shape)
    look.add_argument(
        "path", help="checkpoint, folder of checkpoints, safetensors, torch file, or Orbax folder"
    )
    look.add_argument("--json", action="store_true", help="print JSON instead of tables")
    turn = commands.add_parser("convert", help="write it in another form", **shape)
    turn.add_argument("src", help="whatever inspect takes")
    turn.add_argument("dst", help="a folder for a checkpoint; for --to inference a new safetensors file")
    turn.add_argument("--to", required=True, choices=convert.TARGETS, help="names and layouts, or x alone")
    turn.add_argument("--map", metavar="FILE", help='JSON between names, such as {"Dense_0": "fc1"}')
    begin = commands.add_parser(
        "launch", help="run a trainer's own script, with what it gets wrong made right"
    )
    begin.add_argument("trainer", choices=["sd-scripts"], help="whose script it is")
    begin.add_argument("words", nargs=argparse.REMAINDER, metavar="-- SCRIPT ...", help="it, and its options")
    complete = commands.add_parser("completion", help="print what a shell needs to complete it", **shape)
    complete.add_argument("shell", choices=["bash", "zsh", "fish"], help="for this shell")
    return parser, commands.choices


def _plan(chosen: argparse.Namespace) -> int:
    if chosen.rules:
        chosen.rules.write_text(_report.page(), encoding="utf-8")
        print(f"written: {chosen.rules}")
        return FINE
    pairs = [item.partition("=") for item in chosen.set]
    try:
        if wrong := [name for name, equals, _ in pairs if not equals]:
            given = ", ".join(wrong)
            raise plan.ConfigError(f"--set must be key=value, got {given}: write {wrong[0]}=VALUE")
        facts = {name: literal(text) for name, _, text in pairs}
        if chosen.ui or chosen.host or chosen.port:
            return _serve(chosen, facts)
        found = plan.check(chosen.config, fix=chosen.fix, source=chosen.source, ignore=chosen.ignore, **facts)
        if chosen.preview:
            _report.preview(found, chosen.preview)
        written = [chosen.preview] if chosen.preview else []
        written += _write(found, chosen.out) if chosen.out else []
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    if chosen.json:
        print(json.dumps(plain(_report.as_dict(found)), indent=1))
    else:
        print("\n".join([plan.text(found), *(f"written: {path}" for path in written)]))
    return FOUND if found.errors or (chosen.strict and found.warnings) else FINE


def _serve(chosen: argparse.Namespace, facts: Mapping[str, Any]) -> int:
    """Serves the page of a plan until Ctrl-C."""
    if not chosen.ui:
        raise plan.ConfigError(
            "--host and --port must be given with --ui, got none: add --ui, or leave them out"
        )
    if idle := [f"--{name}" for name in _OF_A_TABLE if getattr(chosen, name)]:
        raise plan.ConfigError(f"--ui must be alone, got {', '.join(idle)}: the page has what they do")
    with contextlib.suppress(KeyboardInterrupt):
        plan.ui.serve(
            chosen.config,
            host=chosen.host or "127.0.0.1",
            port=chosen.port,
            browser=sys.stdout.isatty(),
            told=lambda address: print(f"{address} until Ctrl-C", flush=True),
            source=chosen.source,
            ignore=chosen.ignore,
            **facts,
        )
    return FINE


def _write(found: plan.Plan, out: Path) -> list[Path]:
    """Writes a repaired configuration; with a command line that names a file of settings, that file too."""
    written = rendered(found.config, found.files, out)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return list(written)


def _inspect(path: str, as_json: bool) -> None:
    found = inspection.inspect(path)
    if as_json:
        print(json.dumps(plain(found), indent=1))
        return
    from sfcore import _show

    _show.show(found)


def _launch(trainer: str, words: list[str]) -> int:
    for launcher in entry_points(group=LAUNCHERS, name=trainer):
        try:
            run = launcher.load()
        except ImportError as error:
            print(f"error: the launcher of {trainer} cannot be loaded here: {error}", file=sys.stderr)
            return UNUSABLE
        code: int = run(words[words[:1] == ["--"] :])
        return code
    needs = "pip install 'schedulefree-twin[torch]'"
    print(f"error: no launcher of {trainer} is installed: {needs}", file=sys.stderr)
    return UNUSABLE


def _completion(shell: str) -> int:
    try:
        import shtab
    except ImportError:
        line = "pip install 'schedulefree-twin[completion]'"
        print(f"error: completion needs the package shtab: {line}", file=sys.stderr)
        return UNUSABLE
    parser, commands = _parser()
    for command in commands.values():
        for action in command._actions:
            if action.dest in _PATHS:
                vars(action)["complete"] = shtab.FILE
    print(shtab.complete(parser, shell))
    return FINE


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a path may hold bytes that are no character
            stream.reconfigure(errors="backslashreplace")
    chosen = _parser()[0].parse_args(arguments)
    try:
        code = _run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:  # a pager that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    return code


def _run(chosen: argparse.Namespace) -> int:
    if chosen.command == "completion":
        return _completion(chosen.shell)
    if chosen.command == "plan":
        return _plan(chosen)
    if chosen.command == "launch":
        return _launch(chosen.trainer, chosen.words)
    source = chosen.path if chosen.command == "inspect" else chosen.src
    try:
        if chosen.command == "inspect":
            _inspect(source, chosen.json)
        else:
            path, notices = convert.convert(source, chosen.dst, chosen.to, chosen.map)
            print("\n".join([*notices, f"written: {path}"]))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        unusable = isinstance(error.__cause__, ImportError) or not os.access(source, os.R_OK)
        return UNUSABLE if unusable else FOUND
    return FINE


if __name__ == "__main__":
    sys.exit(main())
