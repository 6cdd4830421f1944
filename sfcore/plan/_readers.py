"""The fields of each trainer into neutral ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sfcore.checks import nearest
from sfcore.plan import _fields, _sources, _text
from sfcore.plan._config import Config
from sfcore.plan._tables import is_adafactor, optimizer_kind


def read_own(config: Config) -> None:
    """Reads our own fields, or those of torch and JAX."""
    aliases = dict(_sources.ALIASES)
    schedule_free = optimizer_kind(str(_optimizer(config))).schedule_free
    if not schedule_free:
        # Such an optimizer has no warm-up of its own: who says warmup_steps means the scheduler's.
        aliases["warmup_steps"] = "scheduler_warmup_steps"
    for key, value in config.raw.items():
        if key == "betas":
            _put_betas(config, value, key)
        elif key in aliases or key in _fields.FIELDS:
            config.put(aliases.get(key, key), value, key)
    config.note_unknown(config.raw, [*aliases, *_fields.FIELDS, "betas"])


def _optimizer(config: Config) -> Any:
    key = config.source.fields["optimizer"]
    value = config.raw.get(key)
    return getattr(value, "value", value) or config.source.defaults["optimizer"]


def _put_betas(config: Config, value: Any, key: str, item: str = "") -> None:
    if isinstance(value, list | tuple) and len(value) >= 2:
        config.put("beta", value[0], key, item)
        config.put("b2", value[1], key, item)
    else:
        config.put("beta", value if isinstance(value, str) else repr(value), key, item)


def read_sd(config: Config) -> None:
    """Reads the fields or flags of sd-scripts."""
    config.put_fields(skip=["scheduler_warmup_steps"])
    _put_warmup(config)
    _read_loras(config)
    _read_inner(config)
    if not _fields.is_set(config.raw.get("optimizer_type")):
        for flag, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
            if config.raw.get(flag) is True:
                config.put("optimizer", name, flag)
    _note_close(config)


def _put_warmup(config: Config) -> None:
    """Takes lr_warmup_steps: whole is steps, a float or a percentage is a fraction (`int_or_float`)."""
    value = config.raw.get("lr_warmup_steps")
    if isinstance(value, str) and value.endswith("%"):
        value = _text.literal(value[:-1])
        value = value / 100 if isinstance(value, int | float) else config.raw["lr_warmup_steps"]
    elif isinstance(value, str):
        value = _text.literal(value)
        value = int(value) if isinstance(value, float) and value >= 1 and value.is_integer() else value
    steps = not isinstance(value, float)
    config.put("scheduler_warmup_steps" if steps else "scheduler_warmup_fraction", value, "lr_warmup_steps")


def _read_loras(config: Config) -> None:
    """Takes what sd-scripts and Kohya share: rates of parts, 16-bit parameters."""
    raw = config.raw
    if _fields.is_set(raw.get("unet_lr")) and str(raw["unet_lr"]) not in ("0", "0.0"):
        config.put("lr", raw["unet_lr"], "unet_lr")
    for key, dtype in (("full_fp16", "float16"), ("full_bf16", "bfloat16")):
        if raw.get(key) in (True, "true", "True"):
            config.put("param_dtype", dtype, key)


def _read_inner(config: Config) -> None:
    """Takes the arguments of the optimizer that stand in one field, parsed as the trainer does."""
    key = config.source.inner
    name, inner, aliases = str(config.get("optimizer")), _fields.inner(), _sources.options()
    found = {item: _text.literal(text) for item, text in _text.arguments(config.raw.get(key)).items()}
    for item, value in found.items():
        if item == "betas":
            _put_betas(config, value, key, item)
        elif aliases.get(item, item) in inner:
            config.put(aliases.get(item, item), value, key, item)
    if is_adafactor(name) and (found.get("relative_step", True) or found.get("warmup_init")):
        config.put("scheduler", "adafactor", config.source.fields["scheduler"])  # sd-scripts sees to it
    known = (*inner, *aliases, "betas", "foreach", "maximize", "capturable", "differentiable", "fused")
    if optimizer_kind(name).uses and name.split(".")[0] != "pytorch_optimizer":
        config.note_unknown(found, known, inside=key)


def _note_close(config: Config) -> None:
    """Notes the fields that are almost one of those we read: a trainer has hundreds of others."""
    known = {*config.source.fields.values(), *config.source.neighbours}
    close = [key for key in config.raw if key not in known and nearest(key, config.source.fields.values())]
    config.note_unknown(close, config.source.fields.values())


def read_kohya(config: Config) -> None:
    """Reads a Kohya_SS preset; what its additional_parameters say wins."""
    words = _text.words(str(config.raw.get("additional_parameters") or ""))
    _text.refuse_config_file(words)
    extra = _text.flags(words)
    zero = [key for key in ("max_train_steps", "lr_warmup_steps") if str(config.raw.get(key)) == "0"]
    config.raw = {key: value for key, value in config.raw.items() if key not in zero}
    config.put_fields()
    config.put("weights", config.raw.get("network_weights"), "network_weights")
    if "total_steps" not in config.values and "epochs" not in config.values:
        config.put("epochs", config.raw.get("epoch", 1), "epoch")  # of which the GUI computes the steps
    by_flag = {flag: name for name, flag in _sources.SD_SCRIPTS.fields.items()}
    for flag, value in extra.items():
        if flag in by_flag:
            config.put(by_flag[flag], value, "additional_parameters", f"--{flag}")
    _read_loras(config)
    _read_inner(config)
    _note_close(config)


def read_hf(config: Config) -> None:
    """Reads HF TrainingArguments."""
    raw = config.raw = {key: getattr(value, "value", value) for key, value in config.raw.items()}
    schedule_free = optimizer_kind(str(_optimizer(config))).schedule_free
    config.put_fields(skip=["total_steps", "scheduler_warmup_steps", "warmup_steps", "warmup_ratio"])
    if str(raw.get("max_steps", -1)) != "-1":
        config.put("total_steps", raw["max_steps"], "max_steps")
    config.put("scheduler_warmup_steps", raw.get("warmup_steps"), "warmup_steps")
    if schedule_free:
        config.put("warmup_steps", raw.get("warmup_steps"), "warmup_steps")
    warmup = config.values.get("scheduler_warmup_steps", 0)
    if 0 < warmup < 1:
        # For its scheduler a number below 1 is a fraction; for its Schedule-Free optimizers it is not.
        config.values["scheduler_warmup_fraction"] = config.values.pop("scheduler_warmup_steps")
        config.places["scheduler_warmup_fraction"] = config.places.pop("scheduler_warmup_steps")
    for item, text in _text.arguments(str(raw.get("optim_args") or "").replace(",", " ")).items():
        if item in ("r", "weight_lr_power"):
            config.put(item, text, "optim_args", item)
    _read_schedule_arguments(config, raw.get("lr_scheduler_kwargs"))
    _note_close(config)


def _read_schedule_arguments(config: Config, found: Any) -> None:
    for item, value in (found if isinstance(found, Mapping) else {}).items():
        if item in _sources.HF_SCHEDULE:
            config.put(_sources.HF_SCHEDULE[item], value, "lr_scheduler_kwargs", item)
        elif item == "min_lr" and isinstance(value, int | float) and config.get("lr"):
            config.put("scheduler_min_lr_ratio", value / config.get("lr"), "lr_scheduler_kwargs", item)


READERS: dict[str, Callable[[Config], None]] = {
    _sources.OWN.title: read_own,
    _sources.SD_SCRIPTS.title: read_sd,
    _sources.SD_COMMAND.title: read_sd,
    _sources.KOHYA.title: read_kohya,
    _sources.HF.title: read_hf,
}
