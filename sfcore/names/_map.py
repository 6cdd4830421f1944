"""A user's map between JAX and torch names: JSON, modules or leaves, "*" for any one part of a path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfcore.checks import hint
from sfcore.exchange import CheckpointError, cannot_read
from sfcore.names._flax import jax_paths

_KEYS = ("torch", "axes", "split", "part", "jax_shape", "torch_shape")


class NamesError(CheckpointError):
    """Names or shapes of two frameworks do not fit together; the message lists every problem, one a line.

    Attributes:
        problems: one sentence each.
    """

    def __init__(self, problems: list[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (list(self.problems),)


@dataclass(frozen=True)
class Rule:
    """One entry: a JAX path, the torch path, and for a leaf how the array lies.

    Attributes:
        jax: the path without its collection, by which it is found.
        written: the path as the user wrote it.
    """

    jax: tuple[str, ...]
    torch: tuple[str, ...]
    written: tuple[str, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)

    def forward(self, path: tuple[str, ...]) -> tuple[str, ...] | None:
        """Returns the torch path of a JAX path that this rule names or leads to, or None."""
        return _rewrite(path, self.jax, self.torch)

    def backward(self, path: tuple[str, ...]) -> tuple[str, ...] | None:
        """Returns the JAX path of a torch path, or None."""
        return _rewrite(path, self.torch, self.written)


def _rewrite(
    path: tuple[str, ...], pattern: tuple[str, ...], template: tuple[str, ...]
) -> tuple[str, ...] | None:
    if len(path) < len(pattern):
        return None
    caught: list[str] = []
    for part, expected in zip(path, pattern, strict=False):
        found = re.fullmatch(re.escape(expected).replace(r"\*", "(.+)"), part)
        if found is None:
            return None
        caught += found.groups()
    filled = iter(caught)
    return tuple(re.sub(r"\*", lambda _: next(filled), part) for part in template) + path[len(pattern) :]


def read(source: Path | str | Mapping[str, Any] | None) -> list[Rule]:
    """Reads a map, the longest paths first, so that a leaf's own entry wins over its module's.

    Args:
        source: a JSON file, its content as a mapping, or None for no entries. An entry is
            "JAX/path": "torch.path" for a module or a leaf, or for a leaf "JAX/path": {"torch": "torch.path",
            "axes": [...], "split": [...], "part": [k, n], "jax_shape": [...], "torch_shape": [...]}, all but
            "torch" optional; see `sfcore.names._flax.Pair`.

    Raises:
        NamesError: with every entry that is malformed.
        CheckpointError: if the file cannot be read.
    """
    entries = _load(Path(source)) if isinstance(source, str | Path) else dict(source or {})
    problems: list[str] = []
    for jax, entry in entries.items():
        problems += [f"map entry {jax!r} {text}" for text in _problems(jax, entry)]
    if problems:
        raise NamesError(problems)
    rules = [
        _rule(jax, entry if isinstance(entry, dict) else {"torch": entry}) for jax, entry in entries.items()
    ]
    return sorted(rules, key=lambda rule: (-len(rule.jax), rule.jax.count("*")))


def _rule(jax: str, entry: Mapping[str, Any]) -> Rule:
    layout = {key: tuple(value) for key, value in entry.items() if key != "torch"}
    written = tuple(jax.split("/"))
    # The longer of the two readings: a leaf may itself be called "value".
    return Rule(jax_paths(jax)[-1], tuple(entry["torch"].split(".")), written, layout)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(cannot_read(path, error)) from error
    except ValueError as error:
        raise NamesError([f"{path} must be JSON, got {error}"]) from error
    if not isinstance(content, dict):
        raise NamesError(
            [f'{path} must be a JSON object such as {{"Dense_0": "fc1"}}, got a {type(content).__name__}']
        )
    return content


def _problems(jax: str, entry: Any) -> list[str]:
    if isinstance(entry, str):
        entry = {"torch": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("torch"), str) or not entry["torch"]:
        return [f'must be "torch.path" or {{"torch": "torch.path", ...}}, got {entry!r}']
    found = []
    for key in entry:
        if key not in _KEYS:
            found.append(f"must have the keys {', '.join(_KEYS)} only, got {key!r}{hint(key, _KEYS)}")
    for key in set(entry) & set(_KEYS[1:]):
        if not _whole_numbers(entry[key]):
            found.append(f"must have whole numbers >= 0 in {key!r}, got {entry[key]!r}")
    if not found and "axes" in entry and sorted(entry["axes"]) != list(range(len(entry["axes"]))):
        found.append(f"must have each axis from 0 once in 'axes', got {entry['axes']!r}")
    if (
        not found
        and "part" in entry
        and not (len(entry["part"]) == 2 and entry["part"][0] < entry["part"][1])
    ):
        found.append(f"must have [k, n] with k < n as 'part', got {entry['part']!r}")
    if jax.count("*") != entry["torch"].count("*"):
        found.append(f"must have as many * in {entry['torch']!r}")
    return found


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value)
