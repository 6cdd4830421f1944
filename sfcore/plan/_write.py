"""A neutral change back into the user's own configuration, at the place where the value stands."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from typing import Any

from sfcore.plan import _fields, _text
from sfcore.plan._config import Config, Place
from sfcore.plan._tables import optimizer_kind


def written(config: Config, changes: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the configuration and the facts with changes made; the originals stay as they are.

    Args:
        config: as read.
        changes: neutral field -> value; None takes the field away.
    """
    original = copy.deepcopy(config.original)
    facts, places = dict(config.facts), dict(config.places)
    for name in sorted(changes, key=lambda name: changes[name] is not None):  # what goes, goes first
        value = changes[name]
        if name in facts or _is_fact(config, name):
            facts[name] = value
            continue
        place = places.get(name) or _new_place(config, name, changes)
        if "betas" in (place.key, place.item):
            if value is None:  # SGD has no second one: the first stays, by the name it has there
                original = _put(config, original, place, None)
                place = places["beta"] = Place(place.key, "momentum") if place.item else Place("beta")
                value = config.get("beta")
            else:
                value = _as_list(config, name, value)
        original = _put(config, original, place, value)
    return original, {name: value for name, value in facts.items() if value is not None}


def _is_fact(config: Config, name: str) -> bool:
    """Returns whether a field is none that its trainer has."""
    inner = name in _fields.inner() and config.source.inner
    return name not in config.places and name not in config.source.fields and not inner


def _new_place(config: Config, name: str, changes: Mapping[str, Any]) -> Place:
    if name in config.source.fields:
        return Place(config.source.fields[name])
    kind = optimizer_kind(str(changes.get("optimizer") or config.get("optimizer")))
    shown = kind.law.torch_names.get(name, name) if kind.law else name
    return Place(config.source.inner, shown.partition("[")[0])


def _as_list(config: Config, name: str, value: Any) -> tuple[Any, Any]:
    pair = [config.get("beta", 0.9), config.get("b2", 0.999)]
    pair[name == "b2"] = value
    return pair[0], pair[1]


def _put(config: Config, original: Any, place: Place, value: Any) -> Any:
    if isinstance(original, Mapping):
        return _put_in_fields(dict(original), place, value)
    tokens = _text.words(original) if isinstance(original, str) else [str(word) for word in original]
    tokens = _put_in_words(tokens, place, value)
    return shlex.join(tokens) if isinstance(original, str) else type(original)(tokens)


def _put_in_fields(fields: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    section = _section(fields, place.key)
    if section is not None:
        fields[section] = _put_in_fields(dict(fields[section]), place, value)
        return fields
    if place.item:
        value = _inside(fields.get(place.key), place.item, value)
    if value is None:
        fields.pop(place.key, None)
    else:
        fields[place.key] = value
    return fields


def _section(fields: Mapping[str, Any], key: str) -> str | None:
    """Returns the section of a file that holds a key; a new key goes to the first section of a file of
    nothing else."""
    sections = [name for name, value in fields.items() if isinstance(value, Mapping) and name != key]
    held = [name for name in sections if key in fields[name]]
    if key in fields or held:
        return None if key in fields else held[0]
    return sections[0] if sections and len(sections) == len(fields) else None


def _inside(holder: Any, item: str, value: Any) -> Any:
    """Returns what a field holds with one item inside of it changed, in the form that it has."""
    if isinstance(holder, Mapping):
        return {key: old for key, old in holder.items() if key != item} | (
            {} if value is None else {item: value}
        )
    if item.startswith("--"):  # Kohya's additional_parameters
        return shlex.join(_put_in_words(_text.words(str(holder or "")), Place(item[2:]), value))
    pairs = _text.arguments(holder.replace(",", " ") if _by_commas(holder) else holder)
    pairs.pop(item, None) if value is None else pairs.update({item: _as_text(value)})
    items = [f"{name}={text}" for name, text in pairs.items()]
    if isinstance(holder, list):
        return items
    return ",".join(items) if _by_commas(holder) else shlex.join(items)


def _by_commas(holder: Any) -> bool:
    """Returns whether items are separated by commas, as in HF's optim_args."""
    return isinstance(holder, str) and " " not in holder.strip() and holder.count("=") > 1


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _put_in_words(tokens: list[str], place: Place, value: Any) -> list[str]:
    """Returns the words of a command line with one flag changed, taken away or added at the end."""
    flag = f"--{place.key}"
    starts = [i for i, token in enumerate(tokens) if token.split("=", 1)[0] == flag]
    start = starts[-1] if starts else len(tokens)
    end = start + 1
    with_equals = bool(starts) and "=" in tokens[start]
    longest = len(tokens) if place.key in _text.SEVERAL else end if with_equals else start + 2
    while end < min(longest, len(tokens)) and not tokens[end].startswith("--"):
        end += 1
    held = _text.flags(tokens[start:end]).get(place.key)
    if place.item:
        value = _inside(held if isinstance(held, list) else [], place.item, value)
    if value is None or value == []:
        new = []
    else:
        new = [flag, *([] if value is True else value if isinstance(value, list) else [_as_text(value)])]
    return tokens[:start] + new + tokens[end:]
