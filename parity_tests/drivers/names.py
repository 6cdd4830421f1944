"""Canonical option names, as in S1 to S9, and what each implementation calls them. The only translation."""

from __future__ import annotations

from typing import Any

# canonical name -> the name in an error message; others keep their name.
JAX_NAMES = {"lr": "learning_rate", "beta": "b1"}
_BETAS = {"beta": "betas[0]", "b2": "betas[1]"}
TORCH_NAMES = {"sgd": {"beta": "momentum"}, "adamw": _BETAS, "radam": _BETAS}


def shown(framework: str, optimizer: str, name: str) -> str:
    """Returns what a user of "jax" or "torch" knows an option as."""
    return (JAX_NAMES if framework == "jax" else TORCH_NAMES[optimizer]).get(name, name)


def for_jax(options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of sfjax."""
    return {JAX_NAMES.get(name, name): value for name, value in options.items()}


def for_torch(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of sftorch, schedulefree and pytorch_optimizer."""
    given = dict(options)
    if optimizer == "sgd":
        return given | ({"momentum": given.pop("beta")} if "beta" in given else {})
    if "beta" in given or "b2" in given:
        given["betas"] = (given.pop("beta", 0.9), given.pop("b2", 0.999))
    return given


def for_optax(options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of optax.contrib, which has fewer."""
    given = for_jax(options)
    for missing in OPTAX_LACKS:
        given.pop(missing, None)
    return given | {"warmup_steps": given["warmup_steps"] or None}


UPSTREAM_LACKS = ("inner_momentum", "prior_steps")
OPTAX_LACKS = ("inner_momentum", "prior_steps", "r", "silent_sgd_phase")


def for_upstream(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns canonical options as keyword arguments of schedulefree and pytorch_optimizer."""
    return for_torch(optimizer, {k: v for k, v in options.items() if k not in UPSTREAM_LACKS})
