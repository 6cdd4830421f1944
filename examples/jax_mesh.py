"""Training with sfjax on a mesh: weights and state are cut over devices, and the code is that of one device.

    python examples/jax_mesh.py                 eight devices that the CPU plays
    python examples/jax_mesh.py --devices 1     the same run on one, to compare

State lies like the parameters by itself. An update exchanges nothing between devices; the gradient of a
batch that is cut over them does, and XLA sees to it.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sfjax
from _digits import Settings, batches, load

WIDTH = 64


def forward(params: Any, images: Any) -> Any:
    """Returns logits of shape (batch, 10)."""
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ params["in"] + params["bias"])
    return hidden @ params["out"]


def train(devices: int, steps: int) -> float:
    """Returns the test accuracy at x."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    digits, settings = load(), Settings("adamw", 0.01, 0.9, 0.0, 20, 1.0, steps, 64, 1, 0, steps)
    inputs = digits.test_images[0].size
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "in": jax.device_put(jax.random.normal(first, (inputs, WIDTH)) * inputs**-0.5, rows),
        "out": jax.device_put(jax.random.normal(second, (WIDTH, 10)) * WIDTH**-0.5, rows),
        "bias": jax.device_put(jnp.zeros(WIDTH), everywhere),
    }
    tx = sfjax.schedule_free_adamw(settings.lr, warmup_steps=20)
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, images: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(forward(params, images), labels).mean()

        return tx.step(params, state, gradients=jax.grad(loss)(params))

    for images, labels in batches(settings, digits):
        params, state = step(params, state, *jax.device_put((images[0], labels[0]), rows))
    assert sfjax.find_state(state).z["in"].sharding == params["in"].sharding
    x = sfjax.schedule_free_eval_params(state, params)
    hits = forward(x, jnp.asarray(digits.test_images)).argmax(-1) == digits.test_labels
    return float(hits.mean())


def main() -> None:
    """Reads the options and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    # Steps in flight can hold the threads that a collective of another one waits for, on few processors.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    accuracy = train(options.devices, options.steps)
    print(f"{options.devices} device(s), {options.steps} steps: {accuracy:.2%} of the test digits right at x")


if __name__ == "__main__":
    main()
