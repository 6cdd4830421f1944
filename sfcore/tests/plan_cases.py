"""Configurations for the plan checker: minimal bad ones for every code, and good ones."""

from typing import Any

_SD = "accelerate launch train_network.py --max_train_steps 1000 --learning_rate 1e-3"
_HF = {"optim": "schedule_free_adamw", "learning_rate": 1e-3, "max_steps": 1000, "save_strategy": "no"}
_SF = {"optimizer": "sftorch.AdamWScheduleFree", "total_steps": 1000, "warmup_steps": 50}
_AFTER = ["clip_by_global_norm", "schedule_free_adamw", "add_noise"]

# code -> configurations whose first problem is this one, or which have it beside others.
BAD: dict[str, list[Any]] = {
    "SF001": [
        _SF | {"weigth_decay": 0.1},
        f"{_SD} --optimizer_type AdamWScheduleFree --optimizer_args warmup=50",
    ],
    "SF002": [_SF | {"lr": "fast"}, {"lr_warmup": 0, "lr_scheduler": "constant", "learning_rate": "1e-4x"}],
    "SF003": [{"optimizer": "AdmaWScheduleFree", "total_steps": 1000, "warmup_steps": 50}],
    "SF004": [
        f"{_SD} --optimizer_type AdamW --optimizer_args weight_decay",
        f"{_SD} --lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:10,0.01",
    ],
    "SF101": [
        {"optimizer": "AdamW", "scheduler": "constant", "warmup_steps": 100},
        {"optimizer": "AdamW8bit", "lr_scheduler": "constant", "lr_warmup": 10},
        {"optimizer": "Adafactor", "lr_scheduler": "adafactor", "lr_warmup": "10"},
        {"optimizer": "Adafactor", "lr_scheduler": "constant_with_warmup", "lr_warmup": 10},
        f"{_SD} --lr_scheduler constant --lr_warmup_steps 100",
        {"optim": "adamw_torch", "lr_scheduler_type": "constant", "warmup_steps": 100},
        _SF | {"scheduler": "constant", "warmup_steps": 0, "scheduler_warmup_steps": 50},
    ],
    "SF102": [_SF | {"scheduler": "cosine"}, _HF | {"lr_scheduler_type": "cosine", "warmup_steps": 0}],
    "SF103": [
        f"{_SD} --optimizer_type AdamWScheduleFree --lr_scheduler cosine --optimizer_args warmup_steps=50",
        f"{_SD} --optimizer_type AdamWScheduleFree --lr_warmup_steps 100",
        f"{_SD} --optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=50 --lr_scheduler_power 2",
        {"optimizer": "AdamWScheduleFree", "lr_scheduler": "cosine", "lr_warmup": 10, "max_train_steps": 500},
    ],
    "SF104": [
        {"optimizer": "AdamW", "scheduler": "cosine"},
        {"optimizer": "AdamW", "scheduler": "cosine_with_min_lr", "total_steps": 1000},
        {"optimizer": "AdamW", "scheduler": "cosine_warmup_with_min_lr", "total_steps": 1000},
        {"optimizer": "AdamW", "scheduler": "warmup_stable_decay", "total_steps": 1000},
        f"{_SD} --lr_scheduler piecewise_constant",
    ],
    "SF105": [
        {"optimizer": "AdamW", "scheduler": "cosine", "total_steps": 1000, "scheduler_power": 2.0},
        f"{_SD} --lr_scheduler linear --lr_scheduler_num_cycles 3",
    ],
    "SF106": [{"optimizer": "AdamW", "scheduler": "cosin", "total_steps": 1000}, f"{_SD} --lr_scheduler rex"],
    "SF107": [f"{_SD} --optimizer_type AdamW --lr_scheduler adafactor:1e-4"],
    "SF108": [
        f"{_SD} --lr_scheduler cosine --lr_scheduler_args cycles=2",
        f"{_SD} --lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=9 min=0",
        f"{_SD} --lr_scheduler polynomial --lr_scheduler_args lr_end=1.0",
        f"{_SD} --lr_scheduler cosine_with_min_lr --lr_scheduler_args min_lr=0 "
        "--lr_scheduler_min_lr_ratio 0.1",
    ],
    "SF201": [
        _SF | {"scheduler": "constant_with_warmup", "scheduler_warmup_steps": 100},
        _HF | {"lr_scheduler_type": "linear", "warmup_steps": 100},
    ],
    "SF202": [
        _SF | {"warmup_steps": 0.03},
        _HF | {"lr_scheduler_type": "constant", "warmup_steps": 0.03},
        {"optimizer": "AdamW", "scheduler": "linear", "total_steps": 100, "warmup_steps": 0.1},
    ],
    "SF203": [
        {
            "optimizer": "AdamW",
            "lr_scheduler": "linear",
            "lr_warmup": 10,
            "lr_warmup_steps": 100,
            "max_train_steps": 900,
        },
        {"optim": "adamw_torch", "max_steps": 1000, "warmup_steps": 100, "warmup_ratio": 0.1},
    ],
    "SF204": [
        _SF | {"warmup_steps": 1000},
        {"optimizer": "AdamW", "lr_scheduler": "linear", "lr_warmup": 100, "max_train_steps": 900},
    ],
    "SF205": [
        _SF | {"warmup_steps": 2000, "accumulation": 8},
        _SF | {"accumulation": 4, "epochs": 2, "samples": 4000, "batch_size": 8},
    ],
    "SF206": [
        {"optimizer": "RAdamScheduleFree", "warmup_steps": 50},
        f"{_SD} --optimizer_type RAdamScheduleFree --optimizer_args warmup_steps=50",
        _HF
        | {"optim": "schedule_free_radam", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 50},
    ],
    "SF207": [_SF | {"warmup_steps": 0}],
    "SF208": [f"{_SD} --num_processes 4 --lr_scheduler cosine --lr_warmup_steps 100"],
    "SF301": [_SF | {"lr": -1.0}, _SF | {"beta": 1.5}, {"optimizer": "RAdamScheduleFree", "b2": 0.5}],
    "SF302": [_SF | {"lr": 1.0}, _SF | {"lr": 1e-9}],
    "SF303": [_SF | {"optimizer": "SGDScheduleFree", "lr": 1e-3}, _HF | {"optim": "schedule_free_sgd"}],
    "SF304": [_SF | {"beta": 0.0}, _SF | {"betas": (0.999, 0.99)}],
    "SF305": [_SF | {"b2": 0.5}, _SF | {"b2": 0.9999}],
    "SF306": [
        _SF | {"optimizer": "SGDScheduleFree", "lr": 1.0, "b2": 0.99},
        _SF | {"optimizer": "schedulefree.AdamWScheduleFree", "prior_steps": 800},
        f"{_SD} --optimizer_type AdamWScheduleFree --optimizer_args prior_steps=800",
        {"optimizer": "sftorch.ScheduleFreeWrapper", "warmup_steps": 50},
        {"optimizer": "sftorch.ScheduleFreeWrapper", "inner_momentum": 0.5},
    ],
    "SF307": ["train_network.py --optimizer_type AdamW", "fine_tune.py --optimizer_type Prodigy"],
    "SF308": [
        {"optimizer": "sftorch.MuonScheduleFree", "matrices": 0, "warmup_steps": 50, "total_steps": 1000},
        {"optimizer": "sfjax.schedule_free_muon", "matrices": 0, "warmup_steps": 50, "total_steps": 1000},
    ],
    "SF309": [
        {"optimizer": "schedulefree.AdamCScheduleFreePlusPaper", "polyak_beta": 0.9, "total_steps": 1000},
        {"optimizer": "AdamCScheduleFreePlusPaper", "polyak_beta": 0.5, "total_steps": 1000},
    ],
    "SF401": [
        _SF | {"weights": "lora.safetensors", "accumulation": 16},
        f"{_SD} --optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=50 "
        "--network_weights lora.safetensors --gradient_accumulation_steps 16",
    ],
    "SF402": [
        f"{_SD} --resume state --gradient_accumulation_steps 4 --skip_until_initial_step",
        f"{_SD} --resume state --initial_step 500 --gradient_accumulation_steps 2 --skip_until_initial_step",
    ],
    "SF403": [
        f"{_SD} --resume state",
        "accelerate launch sdxl_train.py --learning_rate 1e-3 --resume state --initial_step 500",
    ],
    "SF404": [f"{_SD} --resume state --initial_step 1000"],
    "SF501": [
        _SF | {"param_dtype": "float16"},
        f"{_SD} --optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=50 --full_fp16",
    ],
    "SF502": [_SF | {"optimizer": "schedulefree.AdamWScheduleFree", "param_dtype": "torch.bfloat16"}],
    "SF503": [_SF | {"batchnorm": True}],
    "SF504": [_SF | {"chain": _AFTER}],
    "SF505": [_SF | {"ema": True}],
    "SF506": [
        _SF | {"saves": "y"},
        {key: value for key, value in _HF.items() if key != "save_strategy"}
        | {"lr_scheduler_type": "constant"},
    ],
    "SF507": [f"{_SD} --optimizer_type pytorch_optimizer.ScheduleFreeAdamW --optimizer_args warmup_steps=50"],
    "SF508": [
        f"{_SD} --optimizer_type AdamWScheduleFree --optimizer_args warmup_steps=50 --scale_weight_norms 1",
        "accelerate launch flux_train.py --optimizer_type AdamWScheduleFree --learning_rate 1e-3 "
        "--optimizer_args warmup_steps=50 --blockwise_fused_optimizers",
        "sdxl_train.py --optimizer_type AdamW --learning_rate 1e-4 --fused_backward_pass",
    ],
}

GOOD: list[Any] = [
    _SF,
    _SF | {"scheduler": "constant", "lr": 0.01},
    _SF | {"optimizer": "sfjax.schedule_free_adamw", "b1": 0.95, "learning_rate": 0.0025},
    _SF | {"optimizer": "SGDScheduleFree", "lr": 5.0, "momentum": 0.95},
    {"optimizer": "RAdamScheduleFree", "lr": 0.0025, "total_steps": 1000},
    {
        "optimizer": "sftorch.ScheduleFreeWrapper",
        "lr": 0.1,
        "prior_steps": 100,
        "weights": "model.safetensors",
    },
    {"optimizer": "ProdigyPlusScheduleFree", "lr": 1.0},
    _SF | {"decay_power": "normalized", "weight_decay": 0.1, "optimizer": "sftorch.AdamWScheduleFree"},
    _SF | {"decay_power": "2", "weight_decay": 20.0, "optimizer": "sftorch.AdamWScheduleFree"},
    {"optimizer": "sftorch.AdamCScheduleFreePlusPaper", "lr": 1.0, "sf_beta1": 0.9, "f_star": -0.5},
    {"optimizer": "sftorch.GPAAdamW", "lr": 0.001, "total_steps": 100, "scheduler": "cosine", "beta": 0.7},
    _SF | {"weights": "model.safetensors", "prior_steps": 800, "warmup_steps": 0},
    _SF | {"weights": "model.safetensors", "resume": "state"},
    _SF | {"param_dtype": "float32", "batchnorm": True, "recalibrate": True, "saves": "x", "ema": False},
    _SF | {"chain": ["clip_by_global_norm", "schedule_free_adamw"]},
    _SF | {"samples": 4000, "batch_size": 8, "epochs": 8, "accumulation": 4, "total_steps": 1000},
    {"optimizer": "AdamW", "scheduler": "constant"},
    {"optimizer": "AdamW", "scheduler": "constant_with_warmup", "warmup_steps": 100},
    {"optimizer": "AdamW", "scheduler": "cosine", "warmup_steps": 100, "total_steps": 1000},
    {"optimizer": "AdamW", "scheduler": "cosine", "epochs": 3, "samples": 1000},
    {"optimizer": "AdamW", "scheduler": "cosine_with_restarts", "scheduler_cycles": 3, "total_steps": 1000},
    {"optimizer": "AdamW", "scheduler": "polynomial", "scheduler_power": 2, "total_steps": 1000},
    {"optimizer": "AdamW", "scheduler": "inverse_sqrt", "warmup_steps": 100, "scheduler_timescale": 1000},
    {
        "optimizer": "AdamW",
        "scheduler": "cosine_with_min_lr",
        "scheduler_min_lr_ratio": 0.1,
        "total_steps": 99,
    },
    {
        "optimizer": "AdamW",
        "scheduler": "warmup_stable_decay",
        "scheduler_decay_steps": 0.2,
        "total_steps": 99,
    },
    {"optimizer": "Adafactor", "scheduler": "adafactor"},
    {
        "optimizer": "Adafactor",
        "optimizer_args": "relative_step=False",
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup": 10,
    },
    _HF | {"lr_scheduler_type": "constant", "warmup_steps": 100},
    _HF
    | {
        "lr_scheduler_type": "constant",
        "warmup_steps": 100,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
    },
    {"optim": "adamw_torch", "max_steps": 1000, "warmup_steps": 0.1, "save_strategy": "steps"},
    {"optim": "adamw_torch", "num_train_epochs": 3, "warmup_ratio": 0.1},
    f"{_SD} --optimizer_type sftorch.AdamWScheduleFree --optimizer_args warmup_steps=50 betas=0.9,0.99",
    f"{_SD} --optimizer_type sftorch.AdamWScheduleFree --optimizer_args warmup_steps=0 prior_steps=800 "
    "--network_weights lora.safetensors --gradient_accumulation_steps 16",
    f"{_SD} --optimizer_type schedulefree.RAdamScheduleFree --optimizer_args weight_decay=0.01",
    f"{_SD} --lr_scheduler cosine --lr_warmup_steps 0.1 --num_processes 4",
    f"{_SD} --lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=1000",
    f"{_SD} --lr_scheduler cosine_with_min_lr --lr_scheduler_args min_lr=1e-6",
    f"{_SD} --lr_scheduler constant --lr_warmup_steps 0.0001",  # int() makes it 0
    f"{_SD} --optimizer_type sftorch.AdamWScheduleFree --full_bf16 "
    "--optimizer_args warmup_steps=50 precision='\"lean\"' seed=3",
    f"{_SD} --optimizer_type Adafactor --optimizer_args eps=1e-30,1e-3 clip_threshold=2.0",
    f"{_SD} --optimizer_type bitsandbytes.optim.AdEMAMix8bit --optimizer_args betas=0.9,0.999,0.9999",
    "accelerate launch wan_train_network.py --learning_rate 1e-4 --lr_scheduler rex --lr_warmup_steps 10",
    "accelerate launch flux_train_network.py --optimizer_type schedulefree.RAdamScheduleFree "
    "--learning_rate 1e-3 2>&1 | tee log.txt",
    "cd sd-scripts\nexport LR=1e-4\naccelerate launch --num_processes 2 train_network.py \\\n"
    "  --learning_rate $LR --lr_scheduler cosine \\\n  --optimizer_args weight_decay=0.01 > log\n"
    "echo done --now",
    f"{_SD} --lr_scheduler piecewise_constant --lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\"",
    {
        "optimizer": "AdamW8bit",
        "lr_scheduler": "cosine",
        "lr_warmup": 10,
        "learning_rate": "1e-4",
        "epoch": 4,
    },
    {
        "optimizer": "Prodigy",
        "lr_scheduler": "constant",
        "lr_warmup": 0,
        "optimizer_args": "d_coef=1.0 decouple=True",
    },
]
