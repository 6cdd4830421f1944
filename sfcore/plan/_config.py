"""Any configuration into a neutral one that remembers what its user calls a field and where it stands, and
a neutral change back to that place."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sfcore.checks import nearest
from sfcore.plan import _text, _trainers
from sfcore.plan._model import ERROR, ConfigError, Problem
from sfcore.plan._tables import EXPECTED, FIELDS, inner, is_adafactor, is_set, optimizer_kind, parse
from sfcore.plan._trainers import Source

SourceName = Literal["own", "sd-scripts", "kohya", "hf"]


class HasToDict(Protocol):
    """An object of fields, such as transformers' TrainingArguments."""

    def to_dict(self) -> Mapping[str, Any]:
        """Returns name -> value."""


ConfigLike = Mapping[str, Any] | str | Path | list[str] | tuple[str, ...] | HasToDict | None

SOURCES: dict[SourceName, Source] = {
    "own": _trainers.OWN,
    "sd-scripts": _trainers.SD_SCRIPTS,
    "kohya": _trainers.KOHYA,
    "hf": _trainers.HF,
}
SCRIPTS = (".sh", ".txt")
# By which fields a source is known.
_MARKS: dict[SourceName, tuple[str, ...]] = {
    "kohya": ("lr_warmup", "LoRA_type"),
    "hf": ("optim", "per_device_train_batch_size", "num_train_epochs", "adam_beta1", "lr_scheduler_kwargs"),
    "sd-scripts": (
        "optimizer_type",
        "optimizer_args",
        "max_train_steps",
        "max_train_epochs",
        "lr_warmup_steps",
        "pretrained_model_name_or_path",
        "network_module",
    ),
}


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
        original: what the user handed over.
        values: neutral field -> value, given ones only.
        places: neutral field -> where it stands in `raw`.
        facts: neutral field -> value, given beside the configuration; they win.
        problems: what could not be read.
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
        if not is_set(value):
            return
        try:
            self.values[name] = parse(name, value)
            self.places[name] = Place(key, item)
        except (ValueError, OverflowError):
            rule = EXPECTED[FIELDS[name].kind]
            place = self.shown(Place(key, item))
            why = "The trainer would stop at it."
            self.problems.append(Problem("SF002", ERROR, place, value, rule, why, f"write {rule}"))

    def put_fields(self, skip: Iterable[str] = ()) -> None:
        """Takes every field of `raw` that is one of the source's own, as it is."""
        by_key = {key: name for name, key in self.source.fields.items() if name not in skip}
        for key, value in self.raw.items():
            if key in by_key:
                self.put(by_key[key], value, key)

    def note_unknown(self, keys: Iterable[str], known: Iterable[str], inside: str = "") -> None:
        """Notes every key that nobody knows, with the nearest that somebody does."""
        known = list(known)
        why = "A misspelt field is ignored by some programs and stops others."
        for key in keys:
            if key not in known:
                near = nearest(key, known)
                fix = f"did you mean {near}?" if near else "remove it, or look up its name"
                place = self.shown(Place(inside, key) if inside else Place(key))
                self.problems.append(
                    Problem("SF001", ERROR, place, "an unknown name", "a known field", why, fix)
                )

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
        place = self.home(neutral)
        return self.shown(place) if place else neutral

    def home(self, neutral: str) -> Place | None:
        """Returns where a field that is not given belongs; None for one that the trainer does not have."""
        if neutral in self.source.fields:
            return Place(self.source.fields[neutral])
        return Place(self.source.inner, neutral) if neutral in inner() and self.source.inner else None

    def get(self, neutral: str, default: Any = None) -> Any:
        """Returns a value: as given, or the trainer's default, or `default`."""
        return self.values.get(neutral, self.source.defaults.get(neutral, default))


def read(config: ConfigLike, source: SourceName | None, facts: Mapping[str, Any]) -> Config:
    """Returns the neutral configuration of whatever a user hands over.

    Args:
        config: a mapping; an object such as TrainingArguments; the path of a TOML or JSON file, or of a
            script (.sh, .txt) that holds one command line; that as text or as a list of words; None for
            `facts` alone.
        source: "own", "sd-scripts", "kohya" or "hf"; None: told from its fields.
        facts: neutral fields beside it, which win.

    Raises:
        ConfigError: if it cannot be read, with line and column where it is text.
    """
    if config is None:
        config, facts = dict(facts), {}
    config = _script(config)
    command = [str(word) for word in config] if isinstance(config, list | tuple) else None
    if isinstance(config, str) and _is_command(config):
        command = _text.words(config)
    if command is not None:
        _text.refuse_config_file(command)
        found = Config(_trainers.SD_COMMAND, _text.flags(command), config)
    else:
        raw = _fields_of(config)
        # What HF nests are settings of other programs, not sections.
        fields = raw if any(mark in raw for mark in _MARKS["hf"]) else flat(raw)
        found = Config(_source(source, fields), fields, raw)
    _READERS[found.source.title](found)
    for name, value in facts.items():
        if name in FIELDS:
            found.facts[name] = value
            found.put(name, value, name)
    found.note_unknown(facts, FIELDS)
    return found


def _script(config: Any) -> Any:
    """Returns the text of a script that holds a command line; anything else as it is."""
    # A command line may end in such a suffix too, and be too long for a path.
    if isinstance(config, str | Path) and Path(config).suffix in SCRIPTS and os.path.isfile(config):
        text = _text.read_text(Path(config))
        return text if _is_command(text) else config
    return config


def _is_command(text: str) -> bool:
    return bool(text.split()[1:]) and "--" in text


def _fields_of(config: Any) -> dict[str, Any]:
    if isinstance(config, str | Path):
        return _text.read_file(Path(config))
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if hasattr(config, "__dict__"):
        return {key: value for key, value in vars(config).items() if not key.startswith("_")}
    raise ConfigError(
        "config must be a mapping, a path, a command line or an object of fields, "
        f"got {type(config).__name__}: pass one of these"
    )


def flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields without the sections that hold them, as sd-scripts reads its files."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        sections = isinstance(value, Mapping) and key not in ("lr_scheduler_kwargs", "optim_args")
        found.update(value if sections else {key: value})
    return found


def _source(source: SourceName | None, raw: Mapping[str, Any]) -> Source:
    if source is not None:
        if source not in SOURCES:
            raise ConfigError(f"source must be one of {', '.join(SOURCES)}, got {source!r}: choose one")
        return SOURCES[source]
    if "lr_scheduler_type" in raw and "lr_scheduler" not in raw:
        return _trainers.HF
    return next((SOURCES[name] for name, marks in _MARKS.items() if {*marks} & {*raw}), _trainers.OWN)


def _is_schedule_free(config: Config) -> bool:
    value = config.raw.get(config.source.fields["optimizer"])
    name = getattr(value, "value", value) or config.source.defaults["optimizer"]
    return optimizer_kind(str(name)).schedule_free


def _read_own(config: Config) -> None:
    """Reads our own fields, or those of torch and JAX."""
    aliases = dict(_trainers.ALIASES)
    if not _is_schedule_free(config):
        # Such an optimizer has no warm-up of its own: who says warmup_steps means the scheduler's.
        aliases["warmup_steps"] = "scheduler_warmup_steps"
    for key, value in config.raw.items():
        if key == "betas":
            _put_betas(config, value, key)
        elif key in aliases or key in FIELDS:
            config.put(aliases.get(key, key), value, key)
    config.note_unknown(config.raw, [*aliases, *FIELDS, "betas"])


def _put_betas(config: Config, value: Any, key: str, item: str = "") -> None:
    if isinstance(value, list | tuple) and len(value) >= 2:
        config.put("beta", value[0], key, item)
        config.put("b2", value[1], key, item)
    else:
        config.put("beta", value if isinstance(value, str) else repr(value), key, item)


def _read_sd(config: Config) -> None:
    """Reads the fields or flags of sd-scripts."""
    config.put_fields(skip=["scheduler_warmup_steps"])
    # Whole is steps, a float or a percentage is a fraction (`int_or_float`).
    warmup = config.raw.get("lr_warmup_steps")
    if isinstance(warmup, str) and warmup.endswith("%"):
        share = _text.literal(warmup[:-1])
        warmup = share / 100 if isinstance(share, int | float) else warmup
    elif isinstance(warmup, str):
        warmup = _text.literal(warmup)
        warmup = int(warmup) if isinstance(warmup, float) and warmup >= 1 and warmup.is_integer() else warmup
    unit = "fraction" if isinstance(warmup, float) else "steps"
    config.put(f"scheduler_warmup_{unit}", warmup, "lr_warmup_steps")
    _read_loras(config)
    if not is_set(config.raw.get("optimizer_type")):
        for flag, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
            if config.raw.get(flag) is True:
                config.put("optimizer", name, flag)
    _note_close(config)


def _read_loras(config: Config) -> None:
    """Takes what sd-scripts and Kohya share: rates of parts, 16-bit parameters, the optimizer's arguments,
    which stand in one field and are parsed as the trainer does."""
    raw = config.raw
    if is_set(raw.get("unet_lr")) and str(raw["unet_lr"]) not in ("0", "0.0"):
        config.put("lr", raw["unet_lr"], "unet_lr")
    for key, dtype in (("full_fp16", "float16"), ("full_bf16", "bfloat16")):
        if raw.get(key) in (True, "true", "True"):
            config.put("param_dtype", dtype, key)
    key, name, aliases = config.source.inner, str(config.get("optimizer")), _trainers.options()
    found = {item: _text.literal(text) for item, text in _text.arguments(raw.get(key)).items()}
    for item, value in found.items():
        if item == "betas":
            _put_betas(config, value, key, item)
        elif aliases.get(item, item) in inner():
            config.put(aliases.get(item, item), value, key, item)
    if is_adafactor(name) and (found.get("relative_step", True) or found.get("warmup_init")):
        config.put("scheduler", "adafactor", config.source.fields["scheduler"])  # sd-scripts sees to it
    known = (*inner(), *aliases, "betas", "foreach", "maximize", "capturable", "differentiable", "fused")
    if optimizer_kind(name).uses and name.split(".")[0] != "pytorch_optimizer":
        config.note_unknown(found, known, inside=key)


def _note_close(config: Config) -> None:
    """Notes the fields that are almost one of those we read: a trainer has hundreds of others."""
    known = {*config.source.fields.values(), *config.source.neighbours}
    close = [key for key in config.raw if key not in known and nearest(key, config.source.fields.values())]
    config.note_unknown(close, config.source.fields.values())


def _read_kohya(config: Config) -> None:
    """Reads a Kohya_SS preset; what its additional_parameters say wins."""
    words = _text.words(str(config.raw.get("additional_parameters") or ""))
    _text.refuse_config_file(words)
    zero = [key for key in ("max_train_steps", "lr_warmup_steps") if str(config.raw.get(key)) == "0"]
    config.raw = {key: value for key, value in config.raw.items() if key not in zero}
    config.put_fields()
    config.put("weights", config.raw.get("network_weights"), "network_weights")
    if "total_steps" not in config.values and "epochs" not in config.values:
        config.put("epochs", config.raw.get("epoch", 1), "epoch")  # of which the GUI computes the steps
    by_flag = {flag: name for name, flag in _trainers.SD_SCRIPTS.fields.items()}
    for flag, value in _text.flags(words).items():
        if flag in by_flag:
            config.put(by_flag[flag], value, "additional_parameters", f"--{flag}")
    _read_loras(config)
    _note_close(config)


def _read_hf(config: Config) -> None:
    """Reads HF TrainingArguments."""
    raw = config.raw = {key: getattr(value, "value", value) for key, value in config.raw.items()}
    config.put_fields(skip=["total_steps", "scheduler_warmup_steps", "warmup_steps", "warmup_ratio"])
    if str(raw.get("max_steps", -1)) != "-1":
        config.put("total_steps", raw["max_steps"], "max_steps")
    config.put("scheduler_warmup_steps", raw.get("warmup_steps"), "warmup_steps")
    if _is_schedule_free(config):
        config.put("warmup_steps", raw.get("warmup_steps"), "warmup_steps")
    if 0 < config.values.get("scheduler_warmup_steps", 0) < 1:
        # For its scheduler a number below 1 is a fraction; for its Schedule-Free optimizers it is not.
        for kept in (config.values, config.places):
            kept["scheduler_warmup_fraction"] = kept.pop("scheduler_warmup_steps")
    for item, text in _text.arguments(str(raw.get("optim_args") or "").replace(",", " ")).items():
        if item in ("r", "weight_lr_power"):
            config.put(item, text, "optim_args", item)
    given = raw.get("lr_scheduler_kwargs")
    for item, value in (given if isinstance(given, Mapping) else {}).items():
        if item in _trainers.HF_SCHEDULE:
            config.put(_trainers.HF_SCHEDULE[item], value, "lr_scheduler_kwargs", item)
        elif item == "min_lr" and isinstance(value, int | float) and config.get("lr"):
            config.put("scheduler_min_lr_ratio", value / config.get("lr"), "lr_scheduler_kwargs", item)
    _note_close(config)


_READERS: dict[str, Callable[[Config], None]] = {
    _trainers.OWN.title: _read_own,
    _trainers.SD_SCRIPTS.title: _read_sd,
    _trainers.SD_COMMAND.title: _read_sd,
    _trainers.KOHYA.title: _read_kohya,
    _trainers.HF.title: _read_hf,
}


def written(config: Config, changes: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the configuration and the facts with changes made; the originals stay as they are.

    Args:
        config: as read.
        changes: neutral field -> value; None takes the field away.
    """
    original = copy.deepcopy(config.original)
    facts, places = dict(config.facts), dict(config.places)
    kind = optimizer_kind(str(changes.get("optimizer") or config.get("optimizer")))
    shown = kind.law.torch_names if kind.law else {}
    for name in sorted(changes, key=lambda name: changes[name] is not None):  # what goes, goes first
        value, place = changes[name], places.get(name) or config.home(name)
        if name in facts or place is None:
            facts[name] = value
            continue
        if name not in places and place.item:
            place = Place(place.key, shown.get(name, name).partition("[")[0])
        if "betas" in (place.key, place.item):
            if value is None:  # SGD has no second one: the first stays, by the name it has there
                original = _put(original, place, None)
                place = places["beta"] = Place(place.key, "momentum") if place.item else Place("beta")
                value = config.get("beta")
            else:
                pair = {"beta": config.get("beta", 0.9), "b2": config.get("b2", 0.999)}
                value = tuple((pair | {name: value}).values())
        original = _put(original, place, value)
    return original, {name: value for name, value in facts.items() if value is not None}


def _put(original: Any, place: Place, value: Any) -> Any:
    if isinstance(original, Mapping):
        return _put_in_fields(dict(original), place, value)
    tokens = _text.words(original) if isinstance(original, str) else [str(word) for word in original]
    tokens = _put_in_words(tokens, place, value)
    return shlex.join(tokens) if isinstance(original, str) else type(original)(tokens)


def _put_in_fields(fields: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    # A new key goes to the first section of a file of nothing else.
    sections = [name for name, held in fields.items() if isinstance(held, Mapping) and name != place.key]
    holding = [name for name in sections if place.key in fields[name]]
    only = sections if sections and len(sections) == len(fields) else []
    if place.key not in fields and (holding or only):
        section = (holding or only)[0]
        return fields | {section: _put_in_fields(dict(fields[section]), place, value)}
    if place.item:
        value = _inside(fields.get(place.key), place.item, value)
    if value is None:
        fields.pop(place.key, None)
    else:
        fields[place.key] = value
    return fields


def _inside(holder: Any, item: str, value: Any) -> Any:
    """Returns what a field holds with one item inside of it changed, in the form that it has."""
    if isinstance(holder, Mapping):
        kept = {key: old for key, old in holder.items() if key != item}
        return kept if value is None else kept | {item: value}
    if item.startswith("--"):  # Kohya's additional_parameters
        return shlex.join(_put_in_words(_text.words(str(holder or "")), Place(item[2:]), value))
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
    """Returns the words of a command line with one flag changed, taken away or added at the end."""
    flag = f"--{place.key}"
    starts = [i for i, token in enumerate(tokens) if token.split("=", 1)[0] == flag]
    start = starts[-1] if starts else len(tokens)
    end = start + 1
    with_equals = bool(starts) and "=" in tokens[start]
    longest = len(tokens) if place.key in _text.SEVERAL else end if with_equals else start + 2
    while end < min(longest, len(tokens)) and not tokens[end].startswith("--"):
        end += 1
    if place.item:
        held = _text.flags(tokens[start:end]).get(place.key)
        value = _inside(held if isinstance(held, list) else [], place.item, value)
    values = [] if value is True else value if isinstance(value, list) else [_as_text(value)]
    new = [] if value is None or value == [] else [flag, *values]
    return tokens[:start] + new + tokens[end:]
