"""Any configuration into a neutral one, and which trainer it is for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from sfcore.plan import _fields, _sources, _text
from sfcore.plan._config import Config, Source
from sfcore.plan._model import ConfigError
from sfcore.plan._readers import READERS

SourceName = Literal["own", "sd-scripts", "kohya", "hf"]


class HasToDict(Protocol):
    """An object of fields, such as transformers' TrainingArguments."""

    def to_dict(self) -> Mapping[str, Any]:
        """Returns name -> value."""


ConfigLike = Mapping[str, Any] | str | Path | list[str] | tuple[str, ...] | HasToDict | None

SOURCES: dict[SourceName, Source] = {
    "own": _sources.OWN,
    "sd-scripts": _sources.SD_SCRIPTS,
    "kohya": _sources.KOHYA,
    "hf": _sources.HF,
}
SCRIPTS = (".sh", ".txt")
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
    command = _command(config)
    if command is not None:
        _text.refuse_config_file(command)
        found = Config(_sources.SD_COMMAND, _text.flags(command), config)
    else:
        raw = _fields_of(config)
        # What HF nests are settings of other programs, not sections.
        fields = raw if any(mark in raw for mark in _MARKS["hf"]) else flat(raw)
        found = Config(_source(source, fields), fields, raw)
    READERS[found.source.title](found)
    _take_facts(found, facts)
    return found


def _script(config: Any) -> Any:
    """Returns the text of a script that holds a command line; anything else as it is."""
    # A command line may end in such a suffix too, and be too long for a path.
    if isinstance(config, str | Path) and Path(config).suffix in SCRIPTS and os.path.isfile(config):
        text = _text.read_text(Path(config))
        return text if _is_command(text) else config
    return config


def _command(config: Any) -> list[str] | None:
    """Returns the words of a command line; None if it is no command line."""
    if isinstance(config, list | tuple):
        return [str(word) for word in config]
    return _text.words(config) if isinstance(config, str) and _is_command(config) else None


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
        return _sources.HF
    for name, marks in _MARKS.items():
        if any(mark in raw for mark in marks):
            return SOURCES[name]
    return _sources.OWN


def _take_facts(config: Config, facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if name in _fields.FIELDS:
            config.facts[name] = value
            config.put(name, value, name)
    config.note_unknown(facts, _fields.FIELDS)
