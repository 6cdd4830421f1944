"""The same three networks in Flax nnx, in Flax linen and in torch, all values random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from torch import nn

VOCABULARY, LENGTH, WIDTH, HEADS = 11, 5, 8, 2


class Flax(NamedTuple):
    """Leaves of a Flax model by name, and its output as a function of such leaves and an input."""

    leaves: dict[str, np.ndarray]
    apply: Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]


# torch


class TorchMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class TorchCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 3 * 2, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


class TorchBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class TorchTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.ModuleList([TorchBlock(), TorchBlock()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# Flax nnx


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(6, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.fc1(x)))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(3 * 2 * 4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 12, rngs=rngs), nnx.Linear(12, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.relu(self.up(self.norm2(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.places = nnx.Param(jnp.zeros((LENGTH, WIDTH)))
        self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.places[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# Flax linen, with the names that linen gives


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(7)(x))
        return linen.Dense(3)(x)


class LinenCNN(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), padding="VALID")(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        return linen.Dense(3)(x.reshape(len(x), -1))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.LayerNorm(epsilon=1e-5)(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS)(h)
        h = linen.LayerNorm(epsilon=1e-5)(x)
        h = linen.relu(linen.Dense(12)(h))
        return x + linen.Dense(WIDTH)(h)


class LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        places = self.param("places", linen.initializers.zeros, (LENGTH, WIDTH))
        x = linen.Embed(VOCABULARY, WIDTH)(tokens) + places
        for _ in range(2):
            x = LinenBlock()(x)
        return linen.Dense(VOCABULARY, use_bias=False)(linen.LayerNorm(epsilon=1e-5)(x))


def named(tree: Any) -> dict[str, Any]:
    """Returns "/"-joined key path -> leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _random(leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns random values of the same shapes, positive where they are variances."""
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(np.shape(leaf)).astype(np.float32) for name, leaf in leaves.items()}
    return {name: np.abs(v) + 0.5 if "var" in name.split("/") else v for name, v in values.items()}


def of_nnx(module: type) -> Flax:
    """Returns an nnx model by the names of its state's key paths."""
    graph, state = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
    tree = jax.tree.structure(state)

    def apply(leaves, x):
        filled = jax.tree.unflatten(tree, [jnp.asarray(leaves[name]) for name in named(state)])
        return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(filled, x))

    return Flax(_random(named(state)), apply)


def of_linen(module: type, x: np.ndarray) -> Flax:
    """Returns a linen model by the names of its variables, collections included."""
    variables = jax.eval_shape(module().init, jax.random.key(0), x)
    tree = jax.tree.structure(variables)

    def apply(leaves, x):
        filled = jax.tree.unflatten(tree, [jnp.asarray(leaves[name]) for name in named(variables)])
        return np.asarray(jax.jit(module().apply)(filled, x))

    return Flax(_random(named(variables)), apply)


def torch_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of parameters and buffers."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
