"""The JAX side of train.py: a Flax network, optax and sfjax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import sfjax
from _digits import LAYERS, Digits, Point, Settings, Weights, initial_weights, make_point


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Clips the gradient, then takes a Schedule-Free step: nothing may come after it in the chain."""
    options: dict[str, Any] = {"b1": settings.beta, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        schedule_free = sfjax.schedule_free_sgd(settings.lr, settings.warmup_steps, **options)
    elif settings.optimizer == "adamw":
        schedule_free = sfjax.schedule_free_adamw(settings.lr, settings.warmup_steps, **options)
    else:
        schedule_free = sfjax.schedule_free_radam(settings.lr, **options)
    optimizer = optax.chain(optax.clip_by_global_norm(settings.clip), schedule_free)
    return optax.MultiSteps(optimizer, every_k_schedule=settings.accumulate).gradient_transformation()


class Network(linen.Module):
    """A perceptron on flat images: (n, 64) -> (n, 10). It is smooth: a kink would blow up rounding."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        for width in LAYERS[1:-1]:
            images = linen.silu(linen.Dense(width)(images))
        return linen.Dense(LAYERS[-1])(images)


def train(settings: Settings, digits: Digits, batches: Iterable[Any]) -> Iterator[Point]:
    """Trains on `batches` and yields a point every `settings.every` steps."""
    model = Network()
    params = to_flax(initial_weights(settings.seed))
    optimizer = make_optimizer(settings)
    state = optimizer.init(params)

    def logits_of(params: Any, images: Any) -> Any:
        return model.apply({"params": params}, images)

    def loss_of(params: Any, images: Any, labels: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(params, images), labels)
        return losses.mean()

    @jax.jit
    def micro_step(params: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)  # params hold y
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def measure(params: Any) -> tuple[jax.Array, jax.Array]:
        hits = logits_of(params, digits.test_images).argmax(-1) == digits.test_labels
        return loss_of(params, digits.test_images, digits.test_labels), hits.mean()

    losses: list[jax.Array] = []
    for step, batch in enumerate(batches, start=1):
        for images, labels in zip(*batch, strict=True):
            params, state, loss = micro_step(params, state, images, labels)
            losses.append(loss)
        if step % settings.every == 0 or step == settings.steps:
            x = sfjax.schedule_free_eval_params(state, params)  # the weights to evaluate and to ship
            yield make_point(step, losses, (*measure(x), to_numpy(x)), (*measure(params), to_numpy(params)))
            losses.clear()


def to_flax(weights: Weights) -> dict[str, dict[str, jax.Array]]:
    """Returns the weights under Flax's names."""
    return {
        f"Dense_{i}": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        for i, (kernel, bias) in enumerate(weights)
    }


def to_numpy(params: Any) -> Weights:
    """Returns (kernel, bias) of each layer."""
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    return [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in layers]
