"""Short real runs in torch and in JAX, saved in every form that a person may have lying around."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import sfjax
from sfcore import store
from sfcore.meta import Meta

STEPS = 7


def torch_model():
    """Returns a small CNN with BatchNorm; the same values each time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3),
        torch.nn.BatchNorm2d(3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 2),
    )


def torch_run(build, steps=STEPS):
    """Returns (model, optimizer in train mode) after some steps; `build` takes the parameters."""
    model = torch_model()
    optimizer = build(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def torch_iterates(model, optimizer):
    """Returns {"x", "y", "z"} -> float64 vector of all parameters, by eval() and train() of the optimizer."""

    def flat(tensors):
        return torch.cat([t.detach().double().reshape(-1) for t in tensors]).numpy()

    found = {"y": flat(model.parameters())}
    found["z"] = flat(optimizer.state[p]["z"] for p in model.parameters())
    optimizer.eval()
    found["x"] = flat(model.parameters())
    optimizer.train()
    return found


def store_checkpoint(folder, model, optimizer, *, kinds=True):
    """Writes our checkpoint of a torch run with an upstream-like optimizer; returns its path."""
    group = optimizer.param_groups[0]
    clock = {"step": group["k"], "lr_max": group["lr_max"], "weight_sum": group["weight_sum"]}
    names = [name for name, _ in model.named_parameters()]
    state, parameters = {}, {}
    for name, p in model.named_parameters():
        state[f"y/{name}"] = p.detach().numpy()
        state[f"z/{name}"] = optimizer.state[p]["z"].numpy()
        if "exp_avg_sq" in optimizer.state[p]:
            state[f"v/{name}"] = optimizer.state[p]["exp_avg_sq"].numpy()
        parameters[name] = {"shape": list(p.shape), "dtype": "float32", "clock": dict(clock)}
        if kinds:
            parameters[name]["kind"] = type(model.get_submodule(name.rpartition(".")[0])).__name__
    buffers = {name: b.numpy() for name, b in model.named_buffers()}
    state |= {f"buffer/{name}": b for name, b in buffers.items()}
    state["rng/torch"] = torch.get_rng_state().numpy()
    state["extra/mine"] = np.arange(3)
    optimizer.eval()
    x = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer.train()
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    values = {"lr": group["lr"], "beta": beta, "r": group["r"], "weight_lr_power": group["weight_lr_power"]}
    meta = Meta(
        framework="torch",
        optimizer="adamw" if "betas" in group else "sgd",
        step=group["k"],
        epoch=2,
        position=5,
        groups=[{"hyperparameters": values, "clock": clock, "parameters": names}],
        parameters=parameters,
        metrics={"loss": 0.25},
    )
    return store.write(folder, meta, state, x | buffers)


def jax_run(transformation, steps=STEPS):
    """Returns (params, optimizer state) after some steps."""
    rng = np.random.default_rng(0)
    params = {"fc": {"kernel": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32), "bias": jnp.zeros(3)}}
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for _ in range(steps):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def sfjax_transformation():
    """Returns clipping and our AdamW."""
    return optax.chain(optax.clip_by_global_norm(1.0), sfjax.schedule_free_adamw(0.01))
