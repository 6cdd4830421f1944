"""The trainers that are read, and what they call things: data.

- sd-scripts: `_sd_scripts` has its facts. With an optimizer whose name ends in ScheduleFree it installs a
  dummy scheduler, and it imports schedulefree, for sftorch's classes too: that must be installed. With
  Adafactor it takes Adafactor's scheduler unless relative_step=False. The scheduler counts one step for every
  process: `AcceleratedScheduler.step` of accelerate.
- Kohya_SS: kohya_gui/class_basic_training.py, lora_gui.py and common_gui.py, github.com/bmaltais/kohya_ss at
  45088f0. lr_warmup is a percentage; lr_warmup_steps wins over it. It writes its fields into a file for
  --config_file, and adds additional_parameters to the command line, without quotation marks, split at spaces.
- HF Trainer: `TrainingArguments` and `_get_schedule_free_optimizer` of transformers 5.23, which hands
  warmup_steps to the optimizer as it is, a fraction too, beside the scheduler's own warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sfcore import laws
from sfcore.plan._sd_scripts import OPTIONS
from sfcore.plan._tables import FIELDS, Live


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


_SCHEDULE = {
    "scheduler": "lr_scheduler",
    "scheduler_class": "lr_scheduler_type",
    "scheduler_args": "lr_scheduler_args",
    "scheduler_warmup_steps": "lr_warmup_steps",
    "scheduler_cycles": "lr_scheduler_num_cycles",
    "scheduler_power": "lr_scheduler_power",
    "scheduler_timescale": "lr_scheduler_timescale",
    "scheduler_min_lr_ratio": "lr_scheduler_min_lr_ratio",
    "scheduler_decay_steps": "lr_decay_steps",
    "lr": "learning_rate",
    "total_steps": "max_train_steps",
    "epochs": "max_train_epochs",
    "batch_size": "train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "devices": "num_processes",
    "resume": "resume",
    "initial_step": "initial_step",
    "initial_epoch": "initial_epoch",
    "skip_done": "skip_until_initial_step",
    "norm_limit": "scale_weight_norms",
    "blockwise": "blockwise_fused_optimizers",
    "fused_backward": "fused_backward_pass",
}
# What looks like one of these fields in Kohya_SS and is another.
_NEIGHBOURS = frozenset(
    (
        *OPTIONS,
        "epoch",
        "batch_size",
        "learning_rate_value",
        "flux_fused_backward_pass",
        "sd3_fused_backward_pass",
        "lr_warmup",
        "num_machines",
        "lora_network_weights",
    )
)
SD_SCRIPTS = Source(
    "sd-scripts",
    _SCHEDULE | {"optimizer": "optimizer_type", "weights": "network_weights"},
    {
        "optimizer": "AdamW",
        "lr": 2e-6,
        "scheduler": "constant",
        "total_steps": 1600,
        "batch_size": 1,
        "accumulation": 1,
        "devices": 1,
    },
    _NEIGHBOURS,
    inner="optimizer_args",
    dummy_scheduler=True,
    steps_per_process=True,
)
SD_COMMAND = replace(SD_SCRIPTS, title="sd-scripts command line", prefix="--")
KOHYA = replace(
    SD_SCRIPTS,
    title="Kohya_SS",
    fields=_SCHEDULE
    | {
        "optimizer": "optimizer",
        "scheduler_warmup_percent": "lr_warmup",
        "weights": "lora_network_weights",
    },
    defaults={name: value for name, value in SD_SCRIPTS.defaults.items() if name != "total_steps"}
    | {"optimizer": "AdamW8bit", "lr": 1e-6},
)
_OTHER_HF_FIELDS = """
logging_steps logging_strategy save_total_limit save_only_model per_device_eval_batch_size
lr_scheduler_kwargs optim_args eval_delay gradient_checkpointing eval_accumulation_steps
optim_target_modules per_gpu_train_batch_size train_batch_size eval_batch_size max_grad_norm
batch_eval_metrics
"""
# Keys of lr_scheduler_kwargs; min_lr is one in the units of the lr.
HF_SCHEDULE = {
    "num_cycles": "scheduler_cycles",
    "power": "scheduler_power",
    "timescale": "scheduler_timescale",
    "min_lr_rate": "scheduler_min_lr_ratio",
    "num_decay_steps": "scheduler_decay_steps",
    "min_lr_ratio": "scheduler_min_lr_ratio",
    "warmup_lr_rate": "scheduler_warmup_lr_ratio",
}
HF = Source(
    "HF TrainingArguments",
    {
        "optimizer": "optim",
        "lr": "learning_rate",
        "weight_decay": "weight_decay",
        "beta": "adam_beta1",
        "b2": "adam_beta2",
        "eps": "adam_epsilon",
        "scheduler": "lr_scheduler_type",
        "scheduler_warmup_steps": "warmup_steps",
        "scheduler_warmup_fraction": "warmup_ratio",
        "warmup_steps": "warmup_steps",
        "total_steps": "max_steps",
        "epochs": "num_train_epochs",
        "batch_size": "per_device_train_batch_size",
        "accumulation": "gradient_accumulation_steps",
        "resume": "resume_from_checkpoint",
        "save_strategy": "save_strategy",
        "save_steps": "save_steps",
        "eval_strategy": "eval_strategy",
        "eval_steps": "eval_steps",
    },
    {
        "optimizer": "adamw_torch_fused",
        "lr": 5e-5,
        "scheduler": "linear",
        "epochs": 3.0,
        "batch_size": 8,
        "accumulation": 1,
        "devices": 1,
        "save_strategy": "steps",
        "save_steps": 500,
        "eval_strategy": "no",
    },
    frozenset(_OTHER_HF_FIELDS.split()),
    nested={name: f"lr_scheduler_kwargs {item}" for item, name in reversed(HF_SCHEDULE.items())},
    inner="optim_args",
    shares_warmup=True,
)
OWN = Source(
    "plan",
    Live(lambda: {name: name for name in FIELDS}),
    {"optimizer": "AdamWScheduleFree", "accumulation": 1, "devices": 1},
    bare_is_ours=True,
)
# Other words for our own fields: those of torch, JAX and the trainers.
_ALIASES = {
    "lr_scheduler": "scheduler",
    "max_steps": "total_steps",
    "num_epochs": "epochs",
    "batches": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "num_processes": "devices",
    "dtype": "param_dtype",
    "warmup_ratio": "scheduler_warmup_fraction",
}


@laws.derived
def options() -> dict[str, str]:
    """Returns what JAX and torch call an option -> its own name; betas, which hold two, are no such word."""
    rows = [laws.JAX_NAMES, *(law.torch_names for law in [*laws.LAWS.values(), laws.MEMBERS["plus"]])]
    return {shown: name for row in rows for name, shown in row.items() if "[" not in shown}


ALIASES: Mapping[str, str] = Live(lambda: options() | _ALIASES)
