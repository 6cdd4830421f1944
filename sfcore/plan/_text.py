"""Text into data and back: files with line and column, command lines, arguments such as "betas=0.9,0.99"."""

from __future__ import annotations

import ast
import datetime
import json
import os
import re
import shlex
import stat
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfcore.plan._model import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A backslash before a letter is no escape but part of a Windows path, D:\lora; what is quoted stays.
# So does 2>&1, which is one word.
_UNQUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*')|(?<!\S)(\d>>?(?:&\d)?|>&\d)|\\(?=\w)""")
_ONE = "\x1f"  # before a word that is an operator of several signs
# A line of a script that is a comment.
_COMMENT = re.compile(r"^[ \t]*#.*$", re.MULTILINE)
# The next line goes on if the one before ends in a backslash, or if it begins with an option.
_GOES_ON = re.compile(r"\\\r?\n|\r?\n(?=[ \t]*-)")
_LARGEST = 16 * 2**20  # bytes of a file of settings


def read_file(path: Path) -> dict[str, Any]:
    """Returns the content of a TOML or JSON file.

    Raises:
        ConfigError: with line and column of what is garbled or missing; for YAML.
    """
    text = read_text(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ConfigError(
            f"{path} must be TOML, JSON or a script with a command line, got YAML: write its fields as one "
            "of these, or pass what yaml.safe_load makes of it to sfcore.plan.check"
        )
    return fields_of(text, path, path.suffix.lower() == ".toml")


def fields_of(text: str, path: Path | str, is_toml: bool) -> dict[str, Any]:
    """Returns the fields of a text in TOML or JSON.

    Args:
        path: what the text is called in a message.

    Raises:
        ConfigError: with line and column of what is garbled or missing.
    """
    try:
        found = tomllib.loads(text) if is_toml else json.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+), column (\d+)\)", str(error))
        lines = text.split("\n")
        line, column = (int(n) for n in place.groups()) if place else (len(lines), len(lines[-1]) + 1)
        reason = re.sub(r" \(at .*\)$", "", str(error))
        raise _garbled(path, "TOML", reason, line, column) from error
    except json.JSONDecodeError as error:
        raise _garbled(path, "JSON", error.msg, error.lineno, error.colno) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 5,000 deep
        kind = "TOML" if is_toml else "JSON"
        raise _garbled(path, kind, "what Python cannot hold", 1, 1) from error
    if not isinstance(found, dict):
        raise _garbled(path, "a JSON object of fields", f"a {type(found).__name__}", 1, 1)
    return found


def read_text(path: Path, name: str = "") -> str:
    """Returns the content of a text file, without its byte order mark.

    Args:
        name: what it is called in a message; default "": its path.

    Raises:
        ConfigError: if it cannot be read; with line and column of what is no text.
    """
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):  # may never end
            raise ConfigError(f"{path} must be a readable file, got a pipe or a device: write it to a file")
        if about.st_size > _LARGEST:
            size = f"{about.st_size / 2**20:.0f} MiB"
            raise ConfigError(f"{path} must be a file of settings, got {size}: check the path")
        return path.read_bytes().decode("utf-8-sig")
    except ConfigError:  # which is a ValueError
        raise
    except OSError as error:
        raise ConfigError(f"{path} must be a readable file, got {error.strerror}: check the path") from error
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise _garbled(name or path, "text in UTF-8", "another byte", line, column) from error
    except ValueError as error:  # a NUL or half a character in it
        raise ConfigError(f"{str(path)!r} must be a path, got one that no system has: check it") from error


def _garbled(path: Path | str, rule: str, found: str, line: int, column: int) -> ConfigError:
    place = f"line {line}, column {column}"
    message = f"{path} must be {rule}, got {found} at {place}: repair it there; the file may be half written"
    return ConfigError(message, line, column)


class Operator(str):
    """A word of a shell that is none of a program's: the end of a line, ";", "&&", "|", ">"."""

    __slots__ = ()


def words(command: str) -> list[str]:
    """Returns the words of a command line, its operators among them; lines of comments are no words.

    Raises:
        ConfigError: with line and column, if a quotation does not end.
    """
    command = _COMMENT.sub("", command)
    joined = _UNQUOTED.sub(_kept, _GOES_ON.sub(" ", command))
    reader = shlex.shlex(joined, posix=True, punctuation_chars="\n;|&<>")
    reader.whitespace, reader.whitespace_split, reader.commenters = " \t\r", True, ""
    try:
        return [_word(token) for token in reader]
    except ValueError as error:
        start = max(command.rfind('"'), command.rfind("'"), 0)
        line, column = command.count("\n", 0, start) + 1, start - command.rfind("\n", 0, start)
        message = f"the command line must be well quoted, got {error} at line {line}, column {column}"
        raise ConfigError(f"{message}: close the quotation", line, column) from error


def _kept(found: re.Match[str]) -> str:
    return found[1] or (f"'{_ONE}{found[2]}'" if found[2] else "\\\\")


def _word(token: str) -> str:
    if token.startswith(_ONE):
        return Operator(token[1:])
    return Operator(token) if token and not token.strip("\n;|&<>") else token


def joined(tokens: Iterable[str]) -> str:
    """Returns a command line of words, as a shell reads it."""
    each = (word if isinstance(word, Operator) else shlex.quote(word) for word in tokens)
    return re.sub(r" ?\n ?", "\n", " ".join(each)).strip("\n")


class Launch(NamedTuple):
    """Which words of a command line are a training script's.

    Attributes:
        script: its name, without folder and suffix; "" if there is none.
        start, end: its options are the words from start to end.
    """

    script: str
    start: int
    end: int


def launch(tokens: list[str]) -> Launch:
    """Returns the launch of a training script: the first command with a script and options, or with options.

    What stands before the script's name is its launcher's: `accelerate launch --config_file` is another file.
    """
    found: list[Launch] = []
    first = 0
    for end, token in enumerate([*tokens, Operator("\n")]):
        if not isinstance(token, Operator):
            continue
        if any(word.startswith("--") for word in tokens[first:end]):
            found.append(_launch(tokens, first, end))
        first = end + 1
    return next((one for one in found if one.script), found[0] if found else Launch("", 0, len(tokens)))


def _launch(tokens: list[str], first: int, end: int) -> Launch:
    for place in range(first, end):
        if tokens[place].endswith(".py"):
            return Launch(re.split(r"[/\\]", tokens[place])[-1][: -len(".py")], place + 1, end)
    for place in range(first, end - 1):
        if tokens[place] in ("-m", "--module"):
            name = tokens[place + 1]
            if not name.startswith("accelerate.") and name != "torch.distributed.run":
                return Launch(name.rpartition(".")[2], place + 2, end)
    return Launch("", first, end)


def option(token: str, known: Sequence[str]) -> str | None:
    """Returns the name of the option that a word is, abbreviated or not; None for a word that is none."""
    if not token.startswith("--") or token == "--":
        return None
    name = token[2:].partition("=")[0]
    meant = [one for one in known if one.startswith(name)] if name not in known else []
    return meant[0] if len(meant) == 1 else name


def flags(tokens: Iterable[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Returns option -> the words behind it; of one that stands there twice, the last, as argparse does."""
    found: dict[str, list[str]] = {}
    name = None
    for token in tokens:
        is_option = option(token, known)
        if is_option is not None:
            name = is_option
            found[name] = [token.partition("=")[2]] if "=" in token else []
        elif name is not None:
            found[name].append(token)
    return found


def literal(text: str, strict: bool = False) -> Any:
    """Returns a Python literal, as sd-scripts reads an argument; the text itself if it is none.

    Raises:
        ValueError: if it is none, and that is not wanted.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" is deprecated
            return ast.literal_eval(text)
    except (
        ValueError,
        SyntaxError,
        TypeError,
        MemoryError,
        RecursionError,
    ) as error:  # {[]: 1}; 20,000 dashes
        if strict:
            raise ValueError from error
        return text


def arguments(value: Any) -> dict[str, str]:
    """Returns name -> text of "a=b" items: a list of them, or a text with spaces between."""
    items = words(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    pairs = (str(item).partition("=") for item in items if item)
    return {name.strip(): text.strip() for name, _, text in pairs}


def as_text(config: Any, suffix: str) -> str:
    """Returns a configuration as TOML for the suffix ".toml", as JSON otherwise, as words if it is words."""
    if isinstance(config, str):
        return config + "\n"
    if isinstance(config, list | tuple):
        return joined(map(str, config)) + "\n"
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
