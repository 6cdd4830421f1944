"""Any configuration into a neutral one that remembers what its user calls a field and where it stands."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from sfcore import _safetensors
from sfcore.checks import nearest
from sfcore.exchange import CheckpointError
from sfcore.plan import _datasets, _sd_scripts, _text, _trainers
from sfcore.plan._model import ERROR, ConfigError, Problem
from sfcore.plan._tables import (
    EXPECTED,
    FIELDS,
    WARMUP,
    inner,
    is_set,
    optimizer_kind,
    parse,
    whole,
)
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
    """Where a value stands.

    Attributes:
        key: the field, or the option of a command line.
        item: the argument inside of it, if it holds several.
        outer: the field that holds a piece of a command line, of which `key` is an option.
        file: the file of settings that a command line names, with the field `key`.
    """

    key: str
    item: str = ""
    outer: str = ""
    file: str = ""


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
        at: option of sd-scripts -> where it stands, if that is not a field of `raw`.
        arguments, schedule_arguments: of the optimizer and the scheduler, of sd-scripts and Kohya_SS.
        unread: options whose values only a shell knows.
        malformed: (field, name, text) of those that are not name=literal.
        files: path -> content of the files of settings that a command line names.
    """

    source: Source
    raw: dict[str, Any]
    original: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    at: dict[str, Place] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    schedule_arguments: dict[str, Any] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    malformed: list[tuple[str, str, str]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, name: str, value: Any, key: str, item: str = "") -> None:
        """Takes a value for a neutral field, or notes that it is none."""
        if not is_set(value):
            return
        place = replace(self.at.get(key, Place(key)), item=item)
        try:
            self.values[name] = parse(name, value)
            self.places[name] = place
        except (ValueError, OverflowError):
            self.note_unreadable(place, value, EXPECTED[FIELDS[name].kind])

    def note_unreadable(self, place: Place, value: Any, rule: str) -> None:
        """Notes that a value is not of its kind."""
        why = "The trainer would stop at it."
        self.problems.append(Problem("SF002", ERROR, self.shown(place), value, rule, why, f"write {rule}"))

    def put_fields(self, skip: Iterable[str] = ()) -> None:
        """Takes every field of `raw` that is one of the source's own, as it is."""
        by_key = {key: name for name, key in self.source.fields.items() if name not in skip}
        for key, value in self.raw.items():
            if key in by_key:
                self.put(by_key[key], value, key)

    def set_option(
        self, name: str, given: Any, place: Place, read: Callable[[str, Any], Any] = _sd_scripts.of_toml
    ) -> None:
        """Takes an option of sd-scripts as `read` reads it, or notes that the trainer would stop at it."""
        if _shell_knows(given):
            self.unread.add(name)
        if given is None or name in self.unread:
            return
        try:
            self.raw[name] = read(name, given)
            self.at[name] = place
        except (ValueError, OverflowError):
            found = given[0] if isinstance(given, list) and len(given) == 1 else given or None
            self.note_unreadable(place, found, _sd_scripts.EXPECTED[_sd_scripts.KINDS[name]])

    def note_unknown(self, keys: Iterable[str], known: Iterable[str], inside: str = "") -> None:
        """Notes every key that nobody knows, with the nearest that somebody does."""
        known = tuple(known)
        why = "A misspelt field is ignored by some programs and stops others."
        for key in keys:
            if key not in known:
                near = _nearest(key, known)
                fix = f"did you mean {near}?" if near else "remove it, or look up its name"
                place = self.shown(Place(inside, key) if inside else self.at.get(key, Place(key)))
                self.problems.append(
                    Problem("SF001", ERROR, place, "an unknown name", "a known field", why, fix)
                )

    def shown(self, place: Place) -> str:
        """Returns the words for a place."""
        key = f"--{place.key}" if place.outer else place.key if place.file else self.source.prefix + place.key
        words = " ".join(word for word in (place.outer, key, place.item) if word)
        return f"{words} in {place.file}" if place.file else words

    def name(self, neutral: str) -> str:
        """Returns the user's name of a neutral field, given or not."""
        if neutral in self.facts or neutral in ("script", "launched"):  # which is no option
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
        holder = self.source.inner
        return (
            replace(self.at.get(holder, Place(holder)), item=neutral)
            if neutral in inner() and holder
            else None
        )

    def get(self, neutral: str, default: Any = None) -> Any:
        """Returns a value: as given, or the trainer's default, or `default`."""
        return self.values.get(neutral, self.source.defaults.get(neutral, default))


def read(
    config: ConfigLike,
    source: SourceName | None,
    facts: Mapping[str, Any],
    files: Mapping[str, dict[str, Any]] | None = None,
) -> Config:
    """Returns the neutral configuration of whatever a user hands over.

    Args:
        config: a mapping; an object such as TrainingArguments; the path of a TOML or JSON file, or of a
            script (.sh, .txt) that holds one command line; that as text or as a list of words; None for
            `facts` alone.
        source: "own", "sd-scripts", "kohya" or "hf"; None: told from its fields.
        facts: neutral fields beside it, which win.
        files: path -> content of files that a command line names and that are not to be read again.

    Raises:
        ConfigError: if it cannot be read, with line and column where it is text.
    """
    if config is None:
        config, facts = dict(facts), {}
    config = _script(config)
    command = [str(word) for word in config] if isinstance(config, list | tuple) else None
    if isinstance(config, str) and is_command(config):
        command = _text.words(config)
    if command is not None:
        found = _read_command(command, config, files or {})
    else:
        raw = _fields_of(config)
        if isinstance(raw.get("datasets"), list):
            raise ConfigError(
                "config must be of a run, got datasets, which is of its data: give the command line or the "
                "preset that names it as dataset_config"
            )
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


def _read_command(tokens: list[str], original: Any, files: Mapping[str, dict[str, Any]]) -> Config:
    """Reads a command line as the script does: its file of settings first, over which its options win."""
    found = Config(_trainers.SD_COMMAND, {}, original)
    launch = _text.launch(tokens)
    options = _text.flags(tokens[launch.start : launch.end], _sd_scripts.OPTIONS)
    launched = _text.flags(tokens[: launch.start], ())
    named = options.pop("config_file", [])
    if named == [] and "config_file" in _text.flags(tokens[launch.start : launch.end], _sd_scripts.OPTIONS):
        raise ConfigError("--config_file must be followed by the path of a TOML file, got none: name it")
    if named and named[0] and "output_config" not in options:  # that writes the file, and trains nothing
        path = named[0] if named[0].endswith(".toml") else f"{named[0]}.toml"
        try:
            content = files[path] if path in files else _text.read_file(Path(path))
        except ConfigError as error:
            raise ConfigError(f"--config_file: {error}", error.line, error.column) from error
        found.files[path] = content
        for name, value in flat(content).items():
            found.set_option(name, value, Place(name, file=path))
    for name, words in options.items():
        found.set_option(name, words, Place(name), _sd_scripts.of_words)
    for name in ("num_processes", "nproc_per_node", "num_gpus"):
        if launched.get(name):
            found.raw.setdefault("num_processes", launched[name][0])
    script = _sd_scripts.SCRIPTS.get(launch.script)
    for name in options if script is None or not script.musubi else ():
        meant = [f"--{one}" for one in _sd_scripts.OPTIONS if one.startswith(name)]
        if meant and name not in _sd_scripts.OPTIONS:
            why, fix = "argparse stops at what may be several.", f"write it out: {', '.join(meant)}"
            shown = found.shown(Place(name))
            found.problems.append(Problem("SF001", ERROR, shown, "an abbreviation", "one option", why, fix))
    found.put("script", launch.script if script else None, "script")
    before = " ".join(tokens[: launch.start])
    found.put("launched", any(one in before for one in _sd_scripts.LAUNCHERS) or None, "launched")
    _read_sd(found)
    return found


def steps_of_state(folder: str) -> int | None:
    """Returns how many optimizer steps a state of sd-scripts' train_network.py has done, if it is here."""
    try:
        found = _text.read_file(Path(folder) / "train_state.json").get("current_step")
    except ConfigError:
        return None
    return whole(found)


def trained_steps(file: str) -> int | None:
    """Returns how many optimizer steps sd-scripts has trained a LoRA for, if the file is here and says so."""
    try:
        is_here = file.endswith(".safetensors") and os.path.isfile(file)
        found = _safetensors.read_metadata(Path(file)).get("ss_steps", "") if is_here else ""
        return whole(int(found))
    except (CheckpointError, OSError, ValueError):
        return None


def _shell_knows(given: Any) -> bool:
    """Returns whether a value is one that only the shell knows: $LR, `seq 3`, %RATE%."""
    first = given[0] if isinstance(given, list) and given else given
    return isinstance(first, str) and bool(re.search(r"\$[\w{(]|`|^%\w+%$", first))


def _script(config: Any) -> Any:
    """Returns the text of a script that holds a command line; anything else as it is."""
    # A command line may end in such a suffix too, and be too long for a path.
    if isinstance(config, str | Path) and Path(config).suffix in SCRIPTS and os.path.isfile(config):
        text = _text.read_text(Path(config))
        return text if is_command(text) else config
    return config


def is_command(text: str) -> bool:
    """Returns whether a text is a command line."""
    return bool(text.split()[1:]) and "--" in text


def _fields_of(config: Any) -> dict[str, Any]:
    if isinstance(config, str | Path):
        return _text.read_file(Path(config))
    if isinstance(config, Mapping):
        return _named(config)
    if hasattr(config, "to_dict"):
        return _named(config.to_dict())
    if hasattr(config, "__dict__"):
        return {key: value for key, value in vars(config).items() if not key.startswith("_")}
    raise ConfigError(
        "config must be a mapping, a path, a command line or an object of fields, "
        f"got {type(config).__name__}: pass one of these"
    )


_MOST_BITS = 14_000  # about the 4,300 digits that Python writes


def _named(fields: Mapping[Any, Any], inside: str = "") -> dict[str, Any]:
    """Returns a mapping as a dict; raises `ConfigError` for what no file could hold, at any depth."""
    for key, value in fields.items():
        if not isinstance(key, str):
            where = f" in {inside}" if inside else ""
            raise ConfigError(f"the names of fields must be text, got {key!r}{where}: put it in quotes")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ConfigError(
                f"{key} must be a number that can be written, got one of {value.bit_length()} bits"
            )
        if isinstance(value, Mapping):
            _named(value, key)
    return dict(fields)


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


def _read_sd_fields(config: Config) -> None:
    """Reads the fields of sd-scripts, as its file of settings has them."""
    fields, config.raw = config.raw, {}
    for name, value in fields.items():
        config.set_option(name, value, Place(name))
    _read_sd(config)


def _read_sd(config: Config) -> None:
    """Takes the options of sd-scripts, each of its kind already."""
    raw = config.raw
    config.put_fields(skip=["scheduler_warmup_steps"])
    _put_sd_warmup(config)
    named = "optimizer_type" if is_set(raw.get("optimizer_type")) else ""
    for flag, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if raw.get(flag) and named:
            shown, fix = config.shown(config.at[flag]), f"keep {config.shown(config.at[named])} alone"
            why, rule = "sd-scripts asserts it.", "the only name of the optimizer"
            config.problems.append(Problem("SF003", ERROR, shown, True, rule, why, fix))
        elif raw.get(flag):
            config.put("optimizer", name, flag)
            named = flag
    _read_loras(config)
    _note_close(config)


def _put_sd_warmup(config: Config) -> None:
    """Takes the option that is steps as a whole number, and a part of the run as a float."""
    warmup = config.raw.get("lr_warmup_steps")
    unit = "fraction" if isinstance(warmup, float) and warmup else "steps"
    config.put(f"scheduler_warmup_{unit}", 0 if warmup == 0 else warmup, "lr_warmup_steps")


def _read_loras(config: Config) -> None:
    """Takes what sd-scripts and Kohya share: rates of parts, 16-bit parameters, the optimizer's arguments."""
    raw = config.raw
    if is_set(raw.get("unet_lr")) and str(raw["unet_lr"]) not in ("0", "0.0"):
        config.put("lr", raw["unet_lr"], "unet_lr")
    for key, dtype in (("full_fp16", "float16"), ("full_bf16", "bfloat16")):
        if raw.get(key) in (True, "true", "True"):
            config.put("param_dtype", dtype, key)
    _read_items(config, "lr_scheduler_args", config.schedule_arguments)
    key, name, aliases = config.source.inner, str(config.get("optimizer")), _trainers.options()
    _read_items(config, key, config.arguments)
    kind = optimizer_kind(name)
    for item, value in config.arguments.items():
        if not kind.schedule_free and not isinstance(value, int | float | str) and item != "betas":
            continue  # such as Adafactor's two eps
        if item == "betas":
            _put_betas(config, value, key, item)
        elif aliases.get(item, item) in inner():
            config.put(aliases.get(item, item), value, key, item)
    given = config.arguments
    if name.lower() == "adafactor" and (given.get("relative_step", True) or given.get("warmup_init")):
        config.put("scheduler", "adafactor", config.source.fields["scheduler"])  # sd-scripts sees to it


def _read_items(config: Config, key: str, found: dict[str, Any]) -> None:
    """Takes the arguments of a field, each parsed as sd-scripts does."""
    given = config.raw.get(key)
    if isinstance(given, str):  # Kohya_SS takes its quotation marks away
        given = given.replace('"', "").split()
    for text in given if isinstance(given, list | tuple) else []:
        name, equals, value = str(text).partition("=")
        try:
            if not equals or "=" in value:
                raise ValueError
            found[name] = _text.literal(value, strict=True)
        except ValueError:
            config.malformed.append((key, name if equals else "", str(text)))


def _note_close(config: Config) -> None:
    """Notes the fields that are almost one of those we read: a trainer has hundreds of others."""
    known = {*config.source.fields.values(), *config.source.neighbours}
    names = tuple(config.source.fields.values())
    config.note_unknown([key for key in config.raw if key not in known and _nearest(key, names)], names)


# A form reads its file at every key, and a file may have thousands of unknown fields.
_nearest = lru_cache(maxsize=2**16)(nearest)


def _read_kohya(config: Config) -> None:
    """Reads a Kohya_SS preset; what its additional_parameters say wins."""
    words = str(config.raw.get("additional_parameters") or "").replace('"', "").split()
    extra = _text.flags(words, _sd_scripts.OPTIONS)
    if "config_file" in extra:
        raise ConfigError(
            f"additional_parameters must not have --config_file, got {' '.join(extra['config_file'])!r}: of "
            "two such files sd-scripts takes the last, and no field of this one. Check that file itself"
        )
    zero = [
        key for key in ("max_train_steps", "max_train_epochs", "lr_warmup_steps") if _is_zero(config, key)
    ]
    config.raw = {key: value for key, value in config.raw.items() if key not in zero}
    config.put_fields()
    for model in ("flux1", "sd3"):  # each has a field of its own, of which the GUI takes one
        if config.raw.get(f"{model}_checkbox"):
            key = f"{model.rstrip('1')}_fused_backward_pass"
            config.put("fused_backward", config.raw.get(key, False), key)
    config.put("weights", config.raw.get("network_weights"), "network_weights")
    if "total_steps" not in config.values and "epochs" not in config.values:
        steps = _datasets.steps_of_the_form(config.raw)
        if steps:
            config.put("total_steps", steps, "epoch")
        else:
            config.put("epochs", config.raw.get("epoch", 1), "epoch")  # of which the GUI computes the steps
    by_flag = {flag: name for name, flag in _trainers.SD_SCRIPTS.fields.items()}
    if "lr_warmup_steps" in extra:
        for name in WARMUP:
            config.values.pop(name, None)
    for flag, given in extra.items():
        place = Place(flag, outer="additional_parameters")
        config.set_option(flag, given, place, _sd_scripts.of_words)
        if flag == "lr_warmup_steps":
            _put_sd_warmup(config)
        elif flag in by_flag and flag in config.at:
            config.put(by_flag[flag], config.raw[flag], flag)
    _read_loras(config)
    _note_close(config)


def _is_zero(config: Config, key: str) -> bool:
    return str(config.raw.get(key)) == "0"


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
    _trainers.SD_SCRIPTS.title: _read_sd_fields,
    _trainers.KOHYA.title: _read_kohya,
    _trainers.HF.title: _read_hf,
}
