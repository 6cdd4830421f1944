"""What a form holds and does, whoever draws it: fields that follow the choices, and the file they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfcore import laws
from sfcore.plan import _check, _config, _sd_scripts, _text, _trainers, _written
from sfcore.plan._config import Config, SourceName
from sfcore.plan._model import Change, ConfigError, FieldState, Plan
from sfcore.plan._run import Run
from sfcore.plan._tables import FIELDS, SCHEDULERS, SHAPE, WARMUP, inner, is_set

LARGEST = 2**20  # bytes of a text that is opened or pasted; a preset has 10,000
_ROUNDS = 8  # a value that comes back may enable the next one; no chain is longer than 3
_TOML_LINE = re.compile(r"\[|[\w.\"-]+\s+=")  # a shell has no spaces before =
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Choices": ("optimizer", "scheduler"),
    "Learning rate": ("lr", *WARMUP, "warmup_steps", "scheduler_class", "scheduler_args", *SHAPE),
    "Run": ("total_steps", "epochs", "samples", "batch_size", "accumulation", "devices"),
    "Start from": ("weights", "trained_steps", "resume"),
}
_BESIDE = ("samples", "devices", "trained_steps")  # a plan asks for them, and no file of a trainer says them
_RARE = ("scheduler_class", "scheduler_args", *SHAPE)  # shown where they are given, or looked at


def arguments() -> tuple[str, ...]:
    """Returns the optimizer's arguments but for those that stand beside the learning rate."""
    return tuple(name for name in inner() if name not in GROUPS["Learning rate"])


def fields() -> tuple[str, ...]:
    """Returns the neutral fields of a form."""
    return (*(name for names in GROUPS.values() for name in names), *arguments())


@dataclass(frozen=True)
class Form:
    """A configuration that is being edited.

    Attributes:
        config: as it stands now.
        suffix: ".json", ".toml" or ".sh", of the file that it becomes.
        name: of the file that it was, without suffix.
        ignored: codes of rules that are meant as they are.
        states: neutral field -> its state, which remembers what comes back.
        changes: what the last repair changed.
    """

    config: Config
    suffix: str
    name: str
    ignored: frozenset[str]
    states: Mapping[str, FieldState]
    changes: tuple[Change, ...] = ()

    @property
    def plan(self) -> Plan:
        """What the run will do, and what is wrong with it."""
        return _check.judged(self.config, False, self.ignored)[0]

    @property
    def files(self) -> dict[str, str]:
        """Name -> content of the file that it becomes, and of one of settings that a command line names."""
        out = Path(f"{self.name}-checked{self.suffix}")
        found = _written.rendered(self.config.original, self.config.files, out)
        return {str(path): text for path, text in found.items()}


@dataclass(frozen=True)
class Row:
    """One field as a form shows it.

    Attributes:
        label: its name in the user's own file.
        value: what it holds; None for nothing.
        default: what the run does where it holds nothing; None where that is nothing, or not known.
        enabled: whether it has any effect.
        info: what it means, or why it is disabled.
        shown: False for what this trainer has not, and for what would only clutter.
    """

    label: str = ""
    value: Any = None
    default: Any = None
    enabled: bool = True
    info: str = ""
    shown: bool = False


def opened(
    text: str,
    suffix: str = "",
    name: str = "run",
    source: SourceName | None = None,
    facts: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
    reads_files: bool = True,
) -> Form:
    """Returns the form of a text: JSON, TOML, or a command line.

    Nothing is changed yet: what a choice forbids and the text says is a problem of its own.

    Args:
        text: of at most 1 MiB.
        suffix: of the file that it stood in; default "": told from the text.
        name: of that file, without suffix.
        source, facts, ignore: as for `check`.
        reads_files: the file of settings that a command line names may be read from this disk.

    Raises:
        ConfigError: if it cannot be read, with line and column.
    """
    called, size = f"{name}{suffix}" if suffix else "the text", len(text.encode("utf-8", "replace"))
    if size > LARGEST:
        raise ConfigError(f"{called} must be at most 1 MiB, got {size / 2**20:.1f} MiB: check the file")
    suffix = suffix.lower() or _suffix(text)
    config: Any = text
    if suffix in (".json", ".toml"):
        config = _text.fields_of(text, called, suffix == ".toml")
    elif suffix not in _config.SCRIPTS or not _config.is_command(text):
        forms, fix = ", ".join((".json", ".toml", *_config.SCRIPTS)), "write its fields as one of these"
        got = "no command line" if suffix in _config.SCRIPTS else suffix
        raise ConfigError(f"{called} must be one of {forms}, got {got}: {fix}")
    elif not reads_files and _names_a_file(text):
        raise ConfigError(f"{called} must be whole, got --config_file: open the file that it names")
    config = _config.read(config, source, facts or {})
    states = _check.states(Run(config), {})
    return Form(config, suffix, name, _check.known_codes(ignore), states)


def _suffix(text: str) -> str:
    """Returns what a pasted text is: ".json", ".toml" or ".sh"."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if text.lstrip().startswith("{"):
        return ".json"
    is_toml = not lines or _TOML_LINE.match(lines[0]) is not None
    return ".sh" if "--" in text and not is_toml else ".toml"


def _names_a_file(command: str) -> bool:
    words = _text.words(command)
    return any(_text.option(word, _sd_scripts.OPTIONS) == "config_file" for word in words)


def edited(form: Form, name: str, text: Any) -> Form:
    """Returns the form after a user has changed one field, with all that follows from it.

    Args:
        name: neutral.
        text: what stands in the field now; an empty one takes the field away.
    """
    config, change = form.config, {name: _typed(form.config, name, text)}
    # Each class has names of its own for its decay rates: they are taken out, and put in again.
    pair = _decay_rates(form) if name == "optimizer" else {}
    for changes in (dict.fromkeys(pair), change, pair):
        config = _check.changed(config, changes) if changes else config
    config, states = settled(config, form.states)
    return replace(form, config=config, states=states, changes=())


def _decay_rates(form: Form) -> dict[str, Any]:
    """Returns the given ones of beta and b2, and one that is remembered."""
    values = form.config.values
    found: dict[str, Any] = {name: values[name] for name in ("beta", "b2") if name in values}
    state = form.states.get("b2")
    remembered = state is not None and not state.enabled and state.restore is not None
    return {**found, "b2": state.restore} if state and remembered and found else found


def _typed(config: Config, name: str, text: Any) -> Any:
    text = text.strip() if isinstance(text, str) else text
    if not is_set(text):
        return None
    if FIELDS[name].kind == "list":
        return text if config.source is _trainers.KOHYA else str(text).split()
    found = (
        _text.literal(text) if FIELDS[name].kind in ("number", "either") and isinstance(text, str) else text
    )
    return found if isinstance(found, int | float) else text


def repaired(form: Form) -> Form:
    """Returns the form with everything repaired that can be repaired without guessing."""
    plan, config = _check.judged(form.config, True, form.ignored)
    states = _check.states(Run(config), form.states)
    return replace(form, config=config, states=states, changes=plan.changes)


def settled(config: Config, before: Mapping[str, FieldState]) -> tuple[Config, dict[str, FieldState]]:
    """Returns a configuration in which every field that was switched off or on holds what it then should.

    Args:
        before: the states so far; a field that is not there counts as one that was on.
    """
    for _ in range(_ROUNDS):
        states = _check.states(Run(config), before)
        due = {
            name: state.value
            for name, state in states.items()
            if _turned(before.get(name), state) and _is_due(config.values.get(name), state)
        }
        before = states
        if not due:
            break
        config = _check.changed(config, due)
    return config, dict(before)


def _turned(before: FieldState | None, now: FieldState) -> bool:
    return (before is None or before.enabled) != now.enabled


def _is_due(given: Any, state: FieldState) -> bool:
    """Returns whether a field must be written: what nobody has given need not be taken away."""
    return given != state.value and (state.value if state.enabled else given) is not None


def rows(form: Form) -> dict[str, Row]:
    """Returns neutral field -> what to show, for every field; a field of the user's once."""
    run = Run(form.config)
    found = {name: _row(form, run, name) for name in fields()}
    best: dict[str, str] = {}
    for name, row in found.items():
        other = best.get(row.label) if row.shown else ""
        if other is None or (other and _weight(row) > _weight(found[other])):
            best[row.label] = name
    return {name: replace(row, shown=name in best.values()) for name, row in found.items()}


def _weight(row: Row) -> tuple[bool, bool]:
    return row.value is not None, row.enabled


def _row(form: Form, run: Run, name: str) -> Row:
    config, state = form.config, form.states.get(name)
    value, enabled = config.values.get(name), state is None or state.enabled
    default = config.source.defaults.get(name, getattr(run.kind.rules, name, None))
    info = _meaning(run, name) if state is None or enabled else _why(config, name, state)
    label, of_pair = config.name(name), ("beta", "b2")
    label = label.rpartition(" ")[2] if name in arguments() else label  # their group says what they are
    if name in of_pair and label.endswith("betas"):
        label += f"[{of_pair.index(name)}]"
    return Row(label, value, default, enabled, info, _is_shown(run, name, state))


def _meaning(run: Run, name: str) -> str:
    if name in laws.options() and not run.kind.schedule_free:
        return "step size" if name == "lr" else ""
    return re.sub(r" \(S\d\)", "", FIELDS[name].doc)


def _why(config: Config, name: str, state: FieldState) -> str:
    kept = state.restore
    if not is_set(kept or None) or kept == state.value:
        return f"{state.reason}."
    if config.values.get(name) == kept:
        return f"{state.reason}; the file says {kept} all the same."
    return f"{state.reason}. {kept} will come back."


def _is_shown(run: Run, name: str, state: FieldState | None) -> bool:
    source, given = run.config.source, name in run.config.values
    has = name in source.fields or name in source.nested or name in _BESIDE
    has = has or (name in inner() and bool(source.inner))
    if given or (state is not None and not state.enabled and is_set(state.restore or None)):
        return True
    if name in WARMUP[1:] and source.bare_is_ours:
        return False
    if name in _RARE:
        kind = run.scheduler
        return has and not run.ignored and kind is not None and name in (*kind.needs, *kind.uses)
    if name in arguments():
        return has and state is not None and state.enabled
    if name == "warmup_steps":
        return has and run.kind.schedule_free
    return has and (name != "trained_steps" or "weights" in run.config.values)


def optimizers(config: Config) -> list[str]:
    """Returns names of optimizers to choose from, as the trainer has them."""
    ours = [f"sftorch.{law.torch}" for law in laws.LAWS.values() if law.direction != "base"]
    if config.source.shares_warmup:
        theirs = [
            law.elsewhere["transformers"] for law in laws.LAWS.values() if "transformers" in law.elsewhere
        ]
        return [
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_bnb_8bit",
            "adafactor",
            "lion_32bit",
            "sgd",
            *theirs,
        ]
    if config.source.bare_is_ours:
        return [*(name.partition(".")[2] for name in ours), "AdamW", "SGD"]
    return [*_sd_scripts._WRITTEN.split(), *ours]


def schedulers() -> list[str]:
    """Returns names of schedulers to choose from."""
    return [*SCHEDULERS]
