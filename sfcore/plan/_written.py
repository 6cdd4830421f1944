"""A neutral change back into a configuration, at the place and in the form in which its user wrote it."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sfcore.plan import _sd_scripts, _text
from sfcore.plan._config import Config, Place
from sfcore.plan._tables import OptimizerKind, optimizer_kind


class Rewritten(NamedTuple):
    """A configuration, the facts beside it and the files that it names, with changes made."""

    original: Any
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]


def written(config: Config, changes: Mapping[str, Any]) -> Rewritten:
    """Returns the configuration with changes made; the originals stay as they are.

    Args:
        config: as read.
        changes: neutral field -> value; None takes the field away.
    """
    found = Rewritten(copy.deepcopy(config.original), dict(config.facts), copy.deepcopy(config.files))
    places = dict(config.places)
    kind = optimizer_kind(str(changes.get("optimizer") or config.get("optimizer")))
    for name in sorted(changes, key=lambda name: changes[name] is not None):  # what goes, goes first
        value, place = changes[name], places.get(name) or config.home(name)
        if name in found.facts or place is None:
            found.facts[name] = value
            continue
        if name not in places and place.item:
            place = replace(place, item=_named_argument(config, kind, name, changes))
        if "betas" in (place.key, place.item):
            pair = {"beta": config.get("beta", 0.9), "b2": config.get("b2", 0.999)}
            gone = [one for one in pair if changes.get(one, 0) is None]
            if gone == ["b2"]:  # SGD has no second one: the first stays, by the name it has there
                found = _put(found, place, None)
                place = replace(place, item="momentum") if place.item else replace(place, key="beta")
                places["beta"], value = place, config.get("beta")
            elif len(gone) < len(pair):
                value = tuple((pair | {name: 0.9 if value is None else value}).values())
        found = _put(found, place, value)
    facts = {name: value for name, value in found.facts.items() if value is not None}
    return found._replace(facts=facts)


def _named_argument(config: Config, kind: OptimizerKind, name: str, changes: Mapping[str, Any]) -> str:
    """Returns what the optimizer's class calls an argument."""
    if kind.law:
        return kind.law.torch_names.get(name, name).partition("[")[0]
    takes = _sd_scripts.built(str(changes.get("optimizer") or config.get("optimizer"))).arguments or ()
    theirs = {"beta": ("betas", "momentum"), "b2": ("betas",)}.get(name, ())
    return next((one for one in theirs if one in takes), name)


def rendered(config: Any, files: Mapping[str, dict[str, Any]], out: Path) -> dict[Path, str]:
    """Returns file -> content of a configuration; of a command line that names one of settings, that too."""
    written: dict[Path, str] = {}
    for fields in files.values():
        settings = out.with_suffix(".toml")
        out = out.with_suffix(".sh") if out == settings else out
        written[settings] = _text.as_text(fields, ".toml")
        config = _put(Rewritten(copy.deepcopy(config), {}, {}), Place("config_file"), str(settings)).original
    return {out: _text.as_text(config, out.suffix), **written}


def _put(found: Rewritten, place: Place, value: Any) -> Rewritten:
    original = found.original
    if place.file:
        changed = _put_in_fields(dict(found.files[place.file]), replace(place, file=""), value)
        return found._replace(files=found.files | {place.file: changed})
    if isinstance(original, Mapping):
        return found._replace(original=_put_in_fields(dict(original), place, value))
    tokens = _text.words(original) if isinstance(original, str) else [str(word) for word in original]
    launch = _text.launch(tokens)
    own = _put_in_words(tokens[launch.start : launch.end], place, value)
    tokens[launch.start : launch.end] = own
    return found._replace(
        original=_text.joined(tokens) if isinstance(original, str) else type(original)(tokens)
    )


def _put_in_fields(fields: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    # A new key goes to the first section of a file of nothing else.
    key = place.outer or place.key
    sections = [name for name, held in fields.items() if isinstance(held, Mapping) and name != key]
    holding = [name for name in sections if key in fields[name]]
    only = sections if sections and len(sections) == len(fields) else []
    if key not in fields and (holding or only):
        section = (holding or only)[0]
        return fields | {section: _put_in_fields(dict(fields[section]), place, value)}
    if place.outer:
        tokens = str(fields.get(key) or "").replace('"', "").split()
        value = " ".join(_put_in_words(tokens, replace(place, outer=""), value))
    elif place.item:
        value = _inside(fields.get(key), place.item, value)
    if value is None:
        fields.pop(key, None)
    else:
        fields[key] = value
    return fields


def _inside(holder: Any, item: str, value: Any) -> Any:
    """Returns what a field holds with one item inside of it changed, in the form that it has."""
    if isinstance(holder, Mapping):
        kept = {key: old for key, old in holder.items() if key != item}
        return kept if value is None else kept | {item: value}
    by_commas = isinstance(holder, str) and " " not in holder.strip() and holder.count("=") > 1  # HF's
    pairs = _text.arguments(holder.replace(",", " ") if by_commas else holder)
    if value is None:
        pairs.pop(item, None)
    else:
        pairs[item] = _as_text(value)
    items = [f"{name}={text}" for name, text in pairs.items()]
    return items if isinstance(holder, list) else ",".join(items) if by_commas else shlex.join(items)


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _put_in_words(tokens: list[str], place: Place, value: Any) -> list[str]:
    """Returns the options of a command line with one changed, taken away or added at the end."""
    named = [_text.option(token, _sd_scripts.OPTIONS) for token in tokens]
    starts = [i for i, name in enumerate(named) if name == place.key]
    start = starts[-1] if starts else len(tokens)
    end = next((i for i in range(start + 1, len(tokens)) if named[i] is not None), len(tokens))
    several = _sd_scripts.KINDS.get(place.key) == "list"
    with_equals = bool(starts) and "=" in tokens[start]
    end = min(end, len(tokens) if several else start + (1 if with_equals else 2))
    if place.item:
        held = _text.flags(tokens[start:end], _sd_scripts.OPTIONS).get(place.key, [])
        value = _inside(list(held), place.item, value)
    values = [] if value is True else value if isinstance(value, list) else [_as_text(value)]
    new = [] if value is None or value == [] else [f"--{place.key}", *values]
    return tokens[:start] + new + tokens[end:]
