"""The ways to go on from saved weights. All take gradients from torch; only the update differs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import schedulefree
import torch
from torch import Tensor

import sfjax
import sftorch
from sfcore.restart import weights_only_policy


@dataclass(frozen=True)
class Saved:
    """What the first run leaves behind: x for a restart from weights alone, y and state for an exact one."""

    lr: float
    warmup_steps: int
    x: list[Tensor]
    y: list[Tensor]
    state: dict[str, Any]


class Run(ABC):
    """Abstract: weights to take the gradient at, an update, and x."""

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """Returns y, as leaves that need a gradient."""

    @abstractmethod
    def step(self, grads: Sequence[Tensor]) -> None:
        """Updates the weights."""

    @abstractmethod
    def x(self) -> list[Tensor]:
        """Returns what is evaluated; the weights keep their values."""


class TorchRun(Run):
    """A torch optimizer of sftorch or schedulefree."""

    def __init__(self, weights: Sequence[Tensor], make: Callable[[list[Tensor]], Any]):
        self._weights: list[Tensor] = [torch.nn.Parameter(w.clone()) for w in weights]
        self.optimizer = make(self._weights)
        self.optimizer.train()

    def weights(self) -> list[Tensor]:
        return self._weights

    def step(self, grads: Sequence[Tensor]) -> None:
        for weight, grad in zip(self._weights, grads, strict=True):
            weight.grad = grad
        self.optimizer.step()

    def x(self) -> list[Tensor]:
        y = [w.detach().clone() for w in self._weights]
        self.optimizer.eval()
        x = [w.detach().clone() for w in self._weights]
        self.optimizer.train()
        # schedulefree's train() rounds: put back what was there.
        for weight, kept in zip(self._weights, y, strict=True):
            weight.data.copy_(kept)
        return x


class OptaxRun(Run):
    """An optax transformation, jitted; weights and gradients cross over as NumPy arrays."""

    def __init__(self, weights: Sequence[Tensor], tx: Any, eval_params: Callable[[Any, Any], Any]):
        self.params = [jnp.array(w.numpy()) for w in weights]
        self.state = tx.init(self.params)
        self._eval_params = jax.jit(eval_params)

        @jax.jit
        def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._update = update

    def weights(self) -> list[Tensor]:
        return [tensor.requires_grad_() for tensor in to_torch(self.params)]

    def step(self, grads: Sequence[Tensor]) -> None:
        self.params, self.state = self._update([g.numpy() for g in grads], self.state, self.params)

    def x(self) -> list[Tensor]:
        return to_torch(self._eval_params(self.state, self.params))


def to_torch(arrays: Sequence[jax.Array]) -> list[Tensor]:
    """Returns copies that torch may write to."""
    return [torch.from_numpy(np.array(array)) for array in arrays]


@dataclass(frozen=True)
class Method:
    """One way to go on.

    Attributes:
        name: its name in results.
        label: its name for people.
        start: what makes the run from what was saved.
    """

    name: str
    label: str
    start: Callable[[Saved], Run]


def exact(saved: Saved) -> Run:
    """Returns the run that was never interrupted, as far as the optimizer can tell."""

    def make(weights: list[Tensor]) -> Any:
        optimizer = sftorch.AdamWScheduleFree(weights, lr=saved.lr, warmup_steps=saved.warmup_steps)
        optimizer.load_state_dict(copy.deepcopy(saved.state))
        return optimizer

    return TorchRun(saved.y, make)


def ours(explicit: dict[str, int], framework: str = "torch") -> Callable[[Saved], Run]:
    """Returns our AdamW from weights alone, under the default policy unless arguments are given."""
    options = weights_only_policy(explicit)

    def start(saved: Saved) -> Run:
        if framework == "jax":
            tx = sfjax.schedule_free_adamw(saved.lr, **options)
            return OptaxRun(saved.x, tx, sfjax.schedule_free_eval_params)
        return TorchRun(saved.x, lambda weights: sftorch.AdamWScheduleFree(weights, lr=saved.lr, **options))

    return start


def upstream(name: str, **options: Any) -> Callable[[Saved], Run]:
    """Returns schedulefree's optimizer of that name from weights alone."""
    make = getattr(schedulefree, name)
    return lambda saved: TorchRun(saved.x, lambda weights: make(weights, lr=saved.lr, **options))


def optax_contrib(saved: Saved) -> Run:
    """Returns optax.contrib's AdamW from weights alone."""
    tx = optax.contrib.schedule_free_adamw(saved.lr)  # its warmup_steps=0 never moves
    return OptaxRun(saved.x, tx, optax.contrib.schedule_free_eval_params)


EXACT = Method("exact", "ours, exact state", exact)
OURS = Method("ours", "ours, weights alone", ours({}))
OURS_JAX = Method("ours-jax", "ours, weights alone (JAX)", ours({}, "jax"))
RADAM = Method("radam", "schedulefree RAdam", upstream("RAdamScheduleFree"))
PEERS = (
    Method("upstream-50", "schedulefree AdamW, warm-up 50", upstream("AdamWScheduleFree", warmup_steps=50)),
    Method("upstream-5", "schedulefree AdamW, warm-up 5", upstream("AdamWScheduleFree", warmup_steps=5)),
    Method("upstream-0", "schedulefree AdamW", upstream("AdamWScheduleFree")),
    Method("optax", "optax.contrib AdamW", optax_contrib),
)
METHODS: tuple[Method, ...] = (EXACT, OURS, OURS_JAX, RADAM, *PEERS)


def policy(prior_steps: int, warmup_steps: int = 0) -> Method:
    """Returns ours with another policy."""
    name = f"prior {prior_steps}" + (f", warm-up {warmup_steps}" if warmup_steps else "")
    explicit = {"prior_steps": prior_steps, "warmup_steps": warmup_steps}
    return Method(name.replace(" ", "-").replace(",", ""), name, ours(explicit))


def sweep(trained: int) -> tuple[Method, ...]:
    """Returns what the policy was chosen from; weights that were trained for `trained` steps may say so."""
    priors = sorted({100, 200, 400, 600, 800, 1000, 1600, trained})
    with_warmup = ((400, 200), (600, 20), (800, 20), (800, 50), (800, 100))
    return (EXACT, RADAM, *map(policy, priors), *(policy(*both) for both in with_warmup))
