"""Canonical option names, as in S1 to S9, and what each implementation calls them, by their rows."""

from __future__ import annotations

from typing import Any

from sfcore import laws


def row(optimizer: str) -> laws.Law:
    """Returns a law, or a member of the family under the words of its class."""
    return laws.LAWS.get(optimizer) or laws.MEMBERS[optimizer]


def shown(framework: str, optimizer: str, name: str) -> str:
    """Returns what a user of "jax" or "torch" knows an option as."""
    known = laws.JAX_NAMES if framework == "jax" else laws.LAWS[optimizer].torch_names
    return known.get(name, name)


def for_jax(options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of sfjax."""
    return {laws.JAX_NAMES.get(name, name): value for name, value in options.items()}


def for_torch(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of sftorch, schedulefree and pytorch_optimizer."""
    law = row(optimizer)
    own = {name: value for name, value in options.items() if name not in law.defaults}  # a class's own
    return law.to_torch({name: options[name] for name in options.keys() - own.keys()}) | own


def for_optax(options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of optax.contrib, which has fewer."""
    given = for_jax({name: value for name, value in options.items() if name not in OPTAX_LACKS})
    return given | {"warmup_steps": given["warmup_steps"] or None}


WRAPPERS_LACK = ("decay_at", "decay_power")  # that of torch has the second
BETAS = ("beta_rule", "beta_max", "beta_anneal_steps", "beta_hold_steps", "rho")
FAMILY = ("c_warmup", "refined_c", "window", "window_rule", "weight_lr", *BETAS, *WRAPPERS_LACK)
UPSTREAM_LACKS = ("inner_momentum", "prior_steps", *FAMILY)
OPTAX_LACKS = ("inner_momentum", "prior_steps", "r", "silent_sgd_phase", *FAMILY)


def for_upstream(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of schedulefree and pytorch_optimizer."""
    return for_torch(optimizer, {k: v for k, v in options.items() if k not in UPSTREAM_LACKS})
