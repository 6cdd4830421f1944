"""What sd-scripts and musubi-tuner do with what they are told: facts of their code, each with its place.

Read in github.com/kohya-ss/sd-scripts at 48d368f (February 2026) and github.com/kohya-ss/musubi-tuner at
30c658c (June 2026); `sfcore/tests/test_sd_scripts.py` compares them with a checkout. Of sd-scripts'
library/train_util.py: `add_optimizer_arguments`, `get_optimizer`, `get_scheduler_fix` and
`read_config_from_file`; of musubi-tuner's src/musubi_tuner/training: parser_common.py and trainer_base.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sfcore import laws
from sfcore.checks import nearest

COMMIT, MUSUBI_COMMIT = "48d368fa557731ad0488c07304dfeba8c07910eb", "30c658c4f4b0bf05038b3346eff9670259b10fc7"

# In a command line before the script: it resumes from where its state stands.
LAUNCHERS = (
    "schedulefree launch sd-scripts ",
    "sfcore launch sd-scripts ",
    "-m sftorch.trainers.sd_scripts ",
)


class Script(NamedTuple):
    """One training script.

    Attributes:
        evaluates: it calls `optimizer.eval()` before it samples and saves; others write y.
        resumes: it counts what a saved state has done, and has --skip_until_initial_step.
        blockwise: it has --blockwise_fused_optimizers.
        musubi: it is one of musubi-tuner, whose `get_optimizer` knows fewer names.
        mended: it writes y, and x when our launcher runs it.
    """

    evaluates: bool = True
    resumes: bool = False
    blockwise: bool = False
    musubi: bool = False
    mended: bool = False


_SCRIPTS = {
    # train_network.py, and the subclasses of its NetworkTrainer.
    Script(resumes=True): """
        train_network sdxl_train_network flux_train_network sd3_train_network lumina_train_network
        hunyuan_image_train_network anima_train_network""",
    Script(blockwise=True): "flux_train flux_train_control_net sd3_train lumina_train",
    Script(): "anima_train",
    Script(evaluates=False, mended=True): """
        sdxl_train train_db fine_tune train_control_net train_controlnet sdxl_train_control_net""",
    Script(evaluates=False): """
        sdxl_train_control_net_lllite sdxl_train_control_net_lllite_old train_textual_inversion
        sdxl_train_textual_inversion train_textual_inversion_XTI""",
    Script(musubi=True): """
        hv_train_network wan_train_network fpack_train_network flux_kontext_train_network flux_2_train_network
        flux_2_train_network_self_flow hv_1_5_train_network kandinsky5_train_network qwen_image_train_network
        zimage_train_network ideogram4_train_network krea2_train_network hidream_o1_train_network
        hidream_o1_train hv_train qwen_image_train zimage_train""",
}
SCRIPTS: Mapping[str, Script] = {name: one for one, names in _SCRIPTS.items() for name in names.split()}

# Every option of the training scripts, for abbreviations, which argparse takes, and for misspellings.
_OPTIONS = """
adaptive_noise_scale ae alpha_mask apply_lg_attn_mask apply_t5_attn_mask async_upload attn_mode base_weights
base_weights_multiplier block_lr blocks_to_swap blockwise_fused_optimizers bucket_no_upscale bucket_reso_steps
byt5 cache_info cache_latents cache_latents_to_disk cache_text_encoder_outputs
cache_text_encoder_outputs_to_disk caption_dropout_every_n_epochs caption_dropout_rate caption_extension
caption_extention caption_prefix caption_separator caption_suffix caption_tag_dropout_rate clip_g
clip_g_dropout_rate clip_l clip_l_dropout_rate clip_skip color_aug cond_emb_dim conditioning_data_dir
config_file console_log_file console_log_level console_log_simple control_net_lr controlnet_model_name_or_path
cpu_offload_checkpointing cross_attn_lr dataset_class dataset_config dataset_repeats
ddp_gradient_as_bucket_view ddp_static_graph ddp_timeout debiased_estimation_loss debug_dataset deepspeed
diffusers_xformers dim_from_weights disable_mmap_load_safetensors discrete_flow_shift double_blocks_to_swap
dynamo_backend enable_bucket enable_scaled_pos_embed enable_wildcard face_crop_aug_range flip_aug
fp16_master_weights_and_gradients fp8_base fp8_base_unet fp8_scaled fp8_vl full_bf16 full_fp16
fused_backward_pass fused_optimizer_groups gemma2 gemma2_max_token_length gradient_accumulation_steps
gradient_checkpointing guidance_scale highvram huber_c huber_scale huber_schedule huggingface_path_in_repo
huggingface_repo_id huggingface_repo_type huggingface_repo_visibility huggingface_token in_json init_word
initial_epoch initial_step input_image_dir ip_noise_gamma ip_noise_gamma_random_strength keep_tokens
keep_tokens_separator learning_rate learning_rate_te learning_rate_te1 learning_rate_te2 learning_rate_te3
llm_adapter_lr llm_adapter_path log_config log_prefix log_tracker_config log_tracker_name log_with logging_dir
logit_mean logit_std loss_type lowram lr_decay_steps lr_scheduler lr_scheduler_args lr_scheduler_min_lr_ratio
lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_timescale lr_scheduler_type lr_warmup_steps
masked_loss max_bucket_reso max_data_loader_n_workers max_grad_norm max_timestep max_token_length
max_train_epochs max_train_steps max_validation_steps mem_eff_attn mem_eff_save metadata_author
metadata_description metadata_is_negative_embedding metadata_license metadata_merged_from
metadata_preprocessor metadata_tags metadata_thumbnail metadata_title metadata_trigger_phrase
metadata_usage_hint min_bucket_reso min_snr_gamma min_timestep mixed_precision mlp_lr mod_lr mode_scale
model_prediction_type model_type multires_noise_discount multires_noise_iterations network_alpha network_args
network_dim network_dropout network_module network_train_text_encoder_only network_train_unet_only
network_weights no_half_vae no_metadata no_token_padding noise_offset noise_offset_random_strength
num_last_block_to_freeze num_vectors_per_token offload_optimizer_device offload_optimizer_nvme_path
offload_param_device offload_param_nvme_path optimizer_args optimizer_type output_config output_dir
output_image_dir output_name persistent_data_loader_workers pos_emb_random_crop_rate
pretrained_model_name_or_path prior_loss_weight qwen3 qwen3_max_token_length random_crop reg_data_dir
resize_interpolation resolution resume resume_from_huggingface sample_at_first sample_batch_size
sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler save_clip save_every_n_epochs
save_every_n_steps save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state
save_model_as save_n_epoch_ratio save_precision save_state save_state_on_train_end save_state_to_huggingface
save_t5xxl scale_v_pred_loss_like_noise_pred scale_weight_norms sdpa secondary_separator seed self_attn_lr
shuffle_caption sigmoid_scale single_blocks_to_swap skip_cache_check skip_latents_validity_check
skip_until_initial_step split_attn split_mode stop_text_encoder_training system_prompt t5_dropout_rate
t5_max_token_length t5_tokenizer_path t5xxl t5xxl_device t5xxl_dtype t5xxl_max_token_length text_encoder
text_encoder_batch_size text_encoder_cpu text_encoder_lr timestep_sampling token_string token_warmup_min
token_warmup_step tokenizer_cache_dir torch_compile train_batch_size train_data_dir train_t5xxl
train_text_encoder training_comment training_shift unet_lr unsloth_offload_checkpointing use_8bit_adam
use_flash_attn use_lion_optimizer use_object_template use_safetensors use_sage_attn use_style_template
use_t5xxl_cache_only v2 v_parameterization v_pred_like_loss vae vae_batch_size vae_chunk_size
vae_disable_cache validate_every_n_epochs validate_every_n_steps validation_seed validation_split
wandb_api_key wandb_run_name weighted_captions weighting_scheme weights xformers zero3_init_flag
zero3_save_16bit_model zero_stage zero_terminal_snr
"""
OPTIONS = tuple(_OPTIONS.split())
_KINDS = {
    "int": """
        max_train_steps max_train_epochs train_batch_size gradient_accumulation_steps lr_scheduler_num_cycles
        lr_scheduler_timescale initial_step initial_epoch""",
    "float": """
        learning_rate unet_lr lr_scheduler_power lr_scheduler_min_lr_ratio scale_weight_norms""",
    "steps": "lr_warmup_steps lr_decay_steps",
    "text": "optimizer_type lr_scheduler lr_scheduler_type network_weights resume",
    "list": "optimizer_args lr_scheduler_args",
    "flag": """
        full_fp16 full_bf16 use_8bit_adam use_lion_optimizer skip_until_initial_step fused_backward_pass
        blockwise_fused_optimizers""",
}
KINDS: Mapping[str, str] = {name: kind for kind, names in _KINDS.items() for name in names.split()}
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "steps": "a whole number of steps, a fraction below 1 or a percentage",
    "text": "text",
    "list": "a list of name=value",
    "flag": "true or false",
}


def of_words(option: str, words: list[str]) -> Any:
    """Returns the value that argparse makes of the words behind an option; of none that is read here, text.

    Raises:
        ValueError: if it refuses them.
    """
    kind = KINDS.get(option)
    if kind == "list":
        return words
    if kind == "flag" or kind is None:
        return words[0] if words else True
    if not words:
        raise ValueError
    text = words[0]
    if kind == "steps":  # `int_or_float`
        if text.endswith("%"):
            return float(text[:-1]) / 100.0
        return int(text) if float(text) >= 1 else float(text)
    return int(text) if kind == "int" else float(text) if kind == "float" else text


def of_toml(option: str, value: Any) -> Any:
    """Returns a value of a configuration file, which argparse does not look at.

    Raises:
        ValueError: if the trainer stops at a value of this kind.
    """
    kind = KINDS.get(option)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wrong = {
        "int": not number or (isinstance(value, float) and not value.is_integer()),
        "float": not number,
        "steps": not number,
        "text": not isinstance(value, str),
        "list": not (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)),
    }
    if wrong.get(kind or ""):
        raise ValueError
    return value


# Class -> its arguments beside params and lr. torch.optim of torch 2.13, transformers 5.23, lion-pytorch at
# 05258c9, prodigyopt at 009a715, bitsandbytes at 06029dd.
_DEFERRED = "foreach maximize capturable differentiable"
_BITS = "args min_8bit_size percentile_clipping block_wise"
_TORCH = {
    "Adadelta": f"rho eps weight_decay {_DEFERRED}",
    "Adafactor": "beta2_decay eps d weight_decay foreach maximize",
    "Adagrad": "lr_decay weight_decay initial_accumulator_value eps foreach maximize differentiable fused",
    "Adam": f"betas eps weight_decay amsgrad {_DEFERRED} fused decoupled_weight_decay",
    "AdamW": f"betas eps weight_decay amsgrad {_DEFERRED} fused",
    "Adamax": f"betas eps weight_decay {_DEFERRED}",
    "ASGD": f"lambd alpha t0 weight_decay {_DEFERRED}",
    "LBFGS": "max_iter max_eval tolerance_grad tolerance_change history_size line_search_fn",
    "Muon": "weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn",
    "NAdam": f"betas eps weight_decay momentum_decay decoupled_weight_decay {_DEFERRED}",
    "RAdam": f"betas eps weight_decay decoupled_weight_decay {_DEFERRED}",
    "RMSprop": f"alpha eps weight_decay momentum centered {_DEFERRED}",
    "Rprop": f"etas step_sizes {_DEFERRED}",
    "SGD": "momentum dampening weight_decay nesterov maximize foreach differentiable fused",
    "SparseAdam": "betas eps maximize",
}
_ADAFACTOR = "eps clip_threshold decay_rate beta1 weight_decay scale_parameter relative_step warmup_init"
# Name in small letters -> arguments; "" of dadaptation, which is not known here, and of the laws.
_BUILT_IN = {
    "lion": "betas weight_decay use_triton decoupled_weight_decay",
    "adamw8bit": f"betas eps weight_decay amsgrad optim_bits is_paged {_BITS}",
    "sgdnesterov8bit": f"momentum dampening weight_decay {_BITS}",
    "lion8bit": f"betas weight_decay is_paged {_BITS}",
    "pagedadamw8bit": f"betas eps weight_decay amsgrad optim_bits {_BITS}",
    "pagedlion8bit": f"betas weight_decay {_BITS}",
    "pagedadamw": f"betas eps weight_decay amsgrad optim_bits {_BITS}",
    "pagedadamw32bit": f"betas eps weight_decay amsgrad optim_bits {_BITS}",
    "sgdnesterov": "momentum dampening weight_decay maximize foreach differentiable fused",
    "dadaptation": "",
    "dadaptadampreprint": "",
    "dadaptadagrad": "",
    "dadaptadam": "",
    "dadaptadan": "",
    "dadaptadanip": "",
    "dadaptlion": "",
    "dadaptsgd": "",
    "prodigy": "betas beta3 eps weight_decay decouple use_bias_correction safeguard_warmup d0 d_coef "
    "growth_rate fsdp_in_use slice_p",
    "adafactor": _ADAFACTOR,
    "adamw": _TORCH["AdamW"],
    "radamschedulefree": "",
    "adamwschedulefree": "",
    "sgdschedulefree": "",
}
_MUSUBI_BUILT_IN = ("adamw8bit", "adafactor", "adamw")
# How people write them, for advice.
_WRITTEN = """
AdamW AdamW8bit PagedAdamW PagedAdamW8bit PagedAdamW32bit Lion Lion8bit PagedLion8bit SGDNesterov
SGDNesterov8bit DAdaptation DAdaptAdamPreprint DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptAdanIP DAdaptLion
DAdaptSGD Prodigy Adafactor AdamWScheduleFree RAdamScheduleFree SGDScheduleFree
"""
# What our torch classes have beside the options of their law; our own tests compare it with the classes.
OURS = ("foreach", "maximize", "fused", "precision", "seed", "capturable", "differentiable")
ONLY_OURS = (
    *("prior_steps", "inner_momentum", "c_warmup", "refined_c", "window", "window_rule", "weight_lr"),
    *("beta_rule", "beta_max", "beta_anneal_steps", "beta_hold_steps", "rho", "decay_at", "decay_power"),
)


class Built(NamedTuple):
    """What `get_optimizer` makes of a name.

    Attributes:
        arguments: what its class takes beside params and lr; None where the class is not known here.
        fix: what to do about a name that leads to no optimizer; "" for one that does.
        instead: the name that was likely meant.
    """

    arguments: tuple[str, ...] | None = None
    fix: str = ""
    instead: str | None = None


def built(name: str, musubi: bool = False) -> Built:
    """Returns what becomes of an optimizer's name.

    Example:
        >>> from sfcore.plan._sd_scripts import built
        >>> built("AdEMAMix8bit").fix, built("adamw8bit").fix
        ('choose bitsandbytes.optim.AdEMAMix8bit', '')
    """
    low = name.lower()
    known = {one: _BUILT_IN[one] for one in _MUSUBI_BUILT_IN} if musubi else _BUILT_IN
    module, _, last = name.rpartition(".")
    if low in known:
        law = next((law for law in laws.LAWS.values() if law.torch.lower() == low), None)
        return Built(_schedulefree(law) if law else tuple(known[low].split()) or None)
    if low.startswith("dadapt") and not musubi:
        return _unknown(last, [one for one in _WRITTEN.split() if one.startswith("DAdapt")])
    if not module or module == "torch.optim":
        if last in _TORCH:
            return Built(tuple(_TORCH[last].split()))
        if "ademamix" in low:
            return Built(None, f"choose bitsandbytes.optim.{last}", f"bitsandbytes.optim.{last}")
        if musubi and low.endswith("schedulefree"):
            return Built(None, f"choose schedulefree.{last}", f"schedulefree.{last}")
        return _unknown(last, [*(_TORCH if musubi or module else _WRITTEN.split()), *_TORCH])
    return _of_module(module, last)


def _of_module(module: str, last: str) -> Built:
    by_torch = {law.torch: law for law in laws.LAWS.values() if law.direction != "base"}
    if module == "transformers.optimization" and last == "Adafactor":
        return Built(tuple(_ADAFACTOR.split()))
    if module not in ("sftorch", "schedulefree"):
        return Built()
    ours = module == "sftorch"
    theirs = {key: law for key, law in by_torch.items() if ours or law.elsewhere.get(module) == key}
    law = theirs.get(last.removesuffix("Closure"))
    if law is None:
        return _unknown(last, [f"{module}.{one}" for one in theirs])
    kinds = ("use_muon",) if any(one.leaves for one in law.buffers) else ()
    own = (*(name for name in law.torch_options if name != "lr"), *OURS, *kinds)
    return Built(own if ours else _schedulefree(law))


def _schedulefree(law: laws.Law) -> tuple[str, ...]:
    """Returns the arguments of schedulefree's class."""
    return (*(name for name in law.torch_options if name not in ("lr", *ONLY_OURS)), "foreach")


def _unknown(name: str, known: list[str]) -> Built:
    by_low = {one.rpartition(".")[2].lower(): one for one in reversed(known)}
    near = by_low.get(name.lower()) or by_low.get(nearest(name.lower(), by_low) or "")
    fix = (
        f"did you mean {near}?"
        if near
        else "write it with its module, such as bitsandbytes.optim.AdEMAMix8bit"
    )
    return Built(None, fix, near)


class Schedule(NamedTuple):
    """What a scheduler needs and what it has in --lr_scheduler_args, and whether it can be used."""

    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    usable: bool = True


def _schedules(rows: Mapping[str, str | None]) -> dict[str, Schedule]:
    """Returns name -> schedule; "!" marks what is needed, None stands for one that cannot be used."""
    found = {}
    for name, words in rows.items():
        each = (words or "").split()
        needs = tuple(word[:-1] for word in each if word.endswith("!"))
        takes = (*(word.rstrip("!") for word in each), "last_epoch")
        found[name] = Schedule(needs, takes, words is not None)
    return found


# Names of --lr_scheduler -> what their function takes beside what is passed to it already. Those that cannot
# be used are called with arguments that they do not have, whatever is said.
SCHEDULERS: Mapping[str, Schedule] = _schedules(
    {
        "constant": "",
        "constant_with_warmup": "",
        "linear": "",
        "cosine": "num_cycles",
        "cosine_with_restarts": "",
        "polynomial": "lr_end",
        "inverse_sqrt": "",
        "cosine_with_min_lr": "min_lr",
        "warmup_stable_decay": "warmup_type decay_type",
        "piecewise_constant": "step_rules!",
        "cosine_warmup_with_min_lr": None,
        "reduce_lr_on_plateau": None,
        "greedy": None,
    }
)
# Classes of torch.optim.lr_scheduler, torch 2.13. Those that cannot be used need functions or other
# schedulers, which no literal is, or the loss, which no trainer passes.
TORCH_SCHEDULERS: Mapping[str, Schedule] = _schedules(
    {
        "ConstantLR": "factor total_iters",
        "CosineAnnealingLR": "T_max! eta_min",
        "CosineAnnealingWarmRestarts": "T_0! T_mult eta_min",
        "CyclicLR": "base_lr! max_lr! step_size_up step_size_down mode gamma scale_fn scale_mode "
        "cycle_momentum base_momentum max_momentum",
        "ExponentialLR": "gamma!",
        "LinearLR": "start_factor end_factor total_iters",
        "MultiStepLR": "milestones! gamma",
        "OneCycleLR": "max_lr! total_steps epochs steps_per_epoch pct_start anneal_strategy cycle_momentum "
        "base_momentum max_momentum div_factor final_div_factor three_phase",
        "PolynomialLR": "total_iters power",
        "StepLR": "step_size! gamma",
        "ReduceLROnPlateau": None,
        "LambdaLR": None,
        "MultiplicativeLR": None,
        "SequentialLR": None,
        "ChainedScheduler": None,
    }
)


def resumed(batches: int, accumulation: int, done: int, total: int, skip: bool) -> int:
    """Returns how many micro-batches a resumed run of train_network.py trains on.

    `done` is multiplied by the accumulation to skip micro-batches, and then divided by the updates of an
    epoch to skip epochs (train_network.py, "calculate steps to skip" and "training loop").

    Args:
        batches: micro-batches of one epoch on each device.
        accumulation: micro-batches of one update.
        done: updates that the state has done, or --initial_step.
        total: --max_train_steps.
        skip: whether --skip_until_initial_step is given.

    Example:
        >>> from sfcore.plan._sd_scripts import resumed
        >>> [resumed(24, accumulation, 12, 24, skip=True) for accumulation in (1, 4)]
        [12, 0]
    """
    an_epoch = -(-batches // accumulation)
    last = -(-total // an_epoch)
    first, to_skip = done // an_epoch, 0
    if skip:
        first = done * accumulation // an_epoch
        to_skip = done * accumulation - first * batches
    ran, update, since = 0, to_skip, 0
    for epoch in range(first, last):
        batch = max(to_skip - 1, 0) if epoch == first or to_skip > 0 else 0
        if to_skip > 0:
            to_skip = 0 if batch < batches else 1
            batch += 1
        while batch < batches:
            batch += 1
            ran, since = ran + 1, since + 1
            if since == accumulation or batch == batches:  # accelerate updates at the end of the data, too
                update, since = update + 1, 0
            if update >= total:
                break
    return ran
