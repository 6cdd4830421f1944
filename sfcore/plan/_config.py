"""A configuration in neutral fields that remembers what its user calls them, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sfcore.checks import nearest
from sfcore.plan import _fields
from sfcore.plan._model import ERROR, Problem


@dataclass(frozen=True)
class Source:
    """A trainer, or whatever else a configuration is written for.

    Attributes:
        title: its name for people.
        fields: neutral field -> the trainer's own name.
        defaults: neutral field -> what the trainer does where nothing is said.
        neighbours: fields that are none of ours but look like one.
        nested: neutral field -> the field and the key inside of it.
        prefix: what stands before a name on its command line.
        inner: the field that holds arguments of the optimizer; "" where they stand beside the rest.
        dummy_scheduler: with a Schedule-Free optimizer it ignores the scheduler and its warm-up.
        shares_warmup: with a Schedule-Free optimizer one field is the warm-up of both.
        steps_per_process: its scheduler counts one step for every process.
        bare_is_ours: an optimizer's name without a module may be this project's class.
    """

    title: str
    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    neighbours: frozenset[str] = frozenset()
    nested: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    inner: str = ""
    dummy_scheduler: bool = False
    shares_warmup: bool = False
    steps_per_process: bool = False
    bare_is_ours: bool = False


@dataclass(frozen=True)
class Place:
    """Where a value stands: in the field `key`, or under `item` inside of it."""

    key: str
    item: str = ""


@dataclass
class Config:
    """A configuration as read.

    Attributes:
        source: what it is written for.
        raw: the fields as written, by their own names.
        values: neutral field -> value, given ones only.
        places: neutral field -> where it stands in `raw`.
        facts: neutral field -> value, given beside the configuration; they win.
        problems: what could not be read.
        original: what the user handed over.
    """

    source: Source
    raw: dict[str, Any]
    original: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def put(self, name: str, value: Any, key: str, item: str = "") -> None:
        """Takes a value for a neutral field, or notes that it is none."""
        if not _fields.is_set(value):
            return
        try:
            self.values[name] = _fields.parse(name, value)
            self.places[name] = Place(key, item)
        except (ValueError, OverflowError):
            rule = _fields.EXPECTED[_fields.FIELDS[name].kind]
            self.problems.append(_unreadable(self.shown(Place(key, item)), value, rule))

    def put_fields(self, skip: Iterable[str] = ()) -> None:
        """Takes every field of `raw` that is one of the source's own, as it is."""
        by_key = {key: name for name, key in self.source.fields.items() if name not in skip}
        for key, value in self.raw.items():
            if key in by_key:
                self.put(by_key[key], value, key)

    def note_unknown(self, keys: Iterable[str], known: Iterable[str], inside: str = "") -> None:
        """Notes every key that nobody knows, with the nearest that somebody does."""
        known = list(known)
        for key in keys:
            if key not in known:
                place = Place(inside, key) if inside else Place(key)
                self.problems.append(_unknown(self.shown(place), nearest(key, known)))

    def shown(self, place: Place) -> str:
        """Returns the words for a place."""
        key = f"{self.source.prefix}{place.key}"
        return f"{key} {place.item}" if place.item else key

    def name(self, neutral: str) -> str:
        """Returns the user's name of a neutral field, given or not."""
        if neutral in self.facts:
            return neutral
        if neutral in self.places:
            return self.shown(self.places[neutral])
        if neutral in self.source.nested:
            return self.source.nested[neutral]
        if neutral in self.source.fields:
            return f"{self.source.prefix}{self.source.fields[neutral]}"
        inner = neutral in _fields.inner() and self.source.inner
        return f"{self.source.prefix}{self.source.inner} {neutral}" if inner else neutral

    def get(self, neutral: str, default: Any = None) -> Any:
        """Returns a value: as given, or the trainer's default, or `default`."""
        return self.values.get(neutral, self.source.defaults.get(neutral, default))


def _unreadable(name: str, value: Any, rule: str) -> Problem:
    return Problem("SF002", ERROR, name, value, rule, "The trainer would stop at it.", f"write {rule}")


def _unknown(name: str, near: str | None) -> Problem:
    fix = f"did you mean {near}?" if near else "remove it, or look up its name"
    why = "A misspelt field is ignored by some programs and stops others."
    return Problem("SF001", ERROR, name, "an unknown name", "a known field", why, fix)
