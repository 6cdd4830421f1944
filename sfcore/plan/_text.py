"""Text into data and back: files with line and column, command lines, arguments such as "betas=0.9,0.99"."""

from __future__ import annotations

import ast
import datetime
import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfcore.plan._model import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A backslash before a letter is no escape but part of a Windows path, D:\lora; what is quoted stays.
_UNQUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*')|\\(?=\w)""")
# A line of a script that is a comment.
_COMMENT = re.compile(r"^[ \t]*#.*$", re.MULTILINE)
# The flags of sd-scripts that take several values.
SEVERAL = ("optimizer_args", "lr_scheduler_args", "network_args")


def read_file(path: Path) -> dict[str, Any]:
    """Returns the content of a TOML or JSON file.

    Raises:
        ConfigError: with line and column of what is garbled or missing.
    """
    text = read_text(path)
    if path.suffix.lower() == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            place = re.search(r" \(at line (\d+), column (\d+)\)", str(error))
            lines = text.split("\n")
            line, column = (int(n) for n in place.groups()) if place else (len(lines), len(lines[-1]) + 1)
            reason = re.sub(r" \(at .*\)$", "", str(error))
            raise _garbled(path, "TOML", reason, line, column) from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise _garbled(path, "JSON", error.msg, error.lineno, error.colno) from error
    if not isinstance(found, dict):
        raise _garbled(path, "a JSON object of fields", f"a {type(found).__name__}", 1, 1)
    return found


def read_text(path: Path) -> str:
    """Returns the content of a text file, without its byte order mark.

    Raises:
        ConfigError: if it cannot be read; with line and column of what is no text.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} must be a readable file, got {error.strerror}: check the path") from error
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise _garbled(path, "text in UTF-8", "another byte", line, column) from error


def _garbled(path: Path, rule: str, found: str, line: int, column: int) -> ConfigError:
    place = f"line {line}, column {column}"
    message = f"{path} must be {rule}, got {found} at {place}: repair it there; the file may be half written"
    return ConfigError(message, line, column)


def words(command: str) -> list[str]:
    """Returns the words of a command line; line breaks after a backslash and lines of comments are no words.

    Raises:
        ConfigError: with line and column, if a quotation does not end.
    """
    command = _COMMENT.sub("", command)
    joined = command.replace("\\\r\n", " ").replace("\\\n", " ")
    joined = _UNQUOTED.sub(lambda found: found[1] or "\\\\", joined)
    try:
        return shlex.split(joined)
    except ValueError as error:
        start = max(command.rfind('"'), command.rfind("'"), 0)
        line, column = command.count("\n", 0, start) + 1, start - command.rfind("\n", 0, start)
        message = f"the command line must be well quoted, got {error} at line {line}, column {column}"
        raise ConfigError(f"{message}: close the quotation", line, column) from error


def refuse_config_file(tokens: list[str]) -> None:
    """Raises ConfigError if the script of a command line takes its settings from a file beside it.

    What stands before the script's name is its launcher's: `accelerate launch --config_file` is another file.
    As argparse does, it takes the last of several, and abbreviations of which `--conf` is the shortest.
    """
    scripts = [place for place, token in enumerate(tokens) if token.endswith(".py")]
    modules = [place + 1 for place, token in enumerate(tokens) if token in ("-m", "--module")]
    start = (scripts or modules or [0])[0]
    value: str | None = ""
    for place, token in enumerate(tokens[start:], start):
        flag, equals, attached = token.partition("=")
        if "--output_config".startswith(flag) and len(flag) > len("--output_"):
            return  # it writes the arguments into that file, and trains nothing
        if "--config_file".startswith(flag) and len(flag) >= len("--conf"):
            after = tokens[place + 1] if place + 1 < len(tokens) else "-"
            value = attached if equals else None if after.startswith("-") else after
    if value == "":  # not there, or empty, which sd-scripts takes for not there
        return
    if value is None:
        raise ConfigError("--config_file must be followed by the path of a TOML file, got none: name it")
    file = value if value.endswith(".toml") else f"{value}.toml"
    raise ConfigError(
        f"--config_file must not be part of a command line that is checked, got {value!r}: settings of that "
        f"run stand in {file}, which is not read from here. Check that file itself, "
        f"`plan {shlex.quote(file)}`, and add what the command line changes with --set"
    )


def flags(tokens: list[str]) -> dict[str, Any]:
    """Returns flag -> value of a command line: True without a value, a list with several."""
    found: dict[str, Any] = {}
    name = None
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            found[name] = [value] if equals else []
        elif name is not None:
            found[name].append(token)
    return {
        name: values if name in SEVERAL else values[0] if values else True for name, values in found.items()
    }


def literal(text: str) -> Any:
    """Returns a Python literal, as sd-scripts reads an argument; the text itself if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # the last for {[]: 1}
        return text


def arguments(value: Any) -> dict[str, str]:
    """Returns name -> text of "a=b" items: a list of them, or a text with spaces between."""
    items = words(value) if isinstance(value, str) else [str(item) for item in value or ()]
    pairs = (item.partition("=") for item in items if item)
    return {name.strip(): text.strip() for name, _, text in pairs}


def as_text(config: Any, suffix: str) -> str:
    """Returns a configuration as TOML for the suffix ".toml", as JSON otherwise, as words if it is words."""
    if isinstance(config, str):
        return config + "\n"
    if isinstance(config, list | tuple):
        return shlex.join(map(str, config)) + "\n"
    if suffix != ".toml":
        return json.dumps(plain(config), indent=2) + "\n"
    # Fields, then sections.
    lines = _items({key: value for key, value in config.items() if not isinstance(value, Mapping)})
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{_key(key)}]", *_items(value)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _items(fields: Mapping[str, Any]) -> list[str]:
    """Returns lines of TOML, which has no null, so that a field without a value is left out."""
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


def plain(value: Any) -> Any:
    """Returns what JSON can hold: a value that it has not, such as NaN, becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite and isinstance(value, str | int | float | bool | None) else str(value)
