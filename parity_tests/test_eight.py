"""precision="8bit" crosses: torch, JAX and torch again hold the same numbers, rounded to the nearest code."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sfjax
import sftorch
from sfcore import names
from sfcore.hyperparameters import AdamW
from sfcore.iterates import widened
from sfcore.store import read
from sfjax.checkpoint import export_exchange, import_exchange
from sfjax.state import eight as jax_codes
from sfjax.state import forms as jax_forms
from sftorch.checkpoint import Checkpoints
from sftorch.state import eight, forms

SHAPES = {"kernel": (32, 20), "bias": (20,)}


def trained(dtype, steps=6):
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 20).to(dtype)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, precision="8bit", seed=3)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def held(model, optimizer):
    """Returns y, z - y and v of the weight, in float32."""
    p, state = model.weight, optimizer.state[model.weight]
    found = forms.joined(p.detach(), state).float(), forms.gap_of(state), eight.opened(state, "exp_avg_sq")
    return [one.numpy() for one in found]


def held_in_jax(params, state):
    """Returns the same of the kernel, in torch's layout."""
    p, z, scale = params["kernel"], state.z["kernel"], state.scale["kernel"]
    rest = None if state.y_rest is None else state.y_rest["kernel"]
    v = jax_codes.decoded(state.base_optimizer_state.nu["kernel"], scale[:, 1])
    y = jax_forms.whole(p, rest).astype(jnp.float32)
    return [np.asarray(one).T for one in (y, jax_codes.gap_of(z, rest, scale), v)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_in_codes_crosses_and_comes_back(tmp_path, dtype):
    model, optimizer = trained(getattr(torch, dtype))
    first = held(model, optimizer)
    with Checkpoints(tmp_path / "torch") as checkpoints:
        checkpoints.save(model, optimizer)
    tx = sfjax.schedule_free_adamw(0.01, precision="8bit", seed=3)
    params = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    there = import_exchange(tmp_path / "torch", params, tx.init(params), hyperparameters=AdamW(lr=0.01))
    second = held_in_jax(there.params, sfjax.find_state(there.opt_state))
    export_exchange(
        tmp_path / "jax",
        there.params,
        there.opt_state,
        step=6,
        hyperparameters=AdamW(lr=0.01),
        names=names.between(SHAPES, {"weight": (20, 32), "bias": (20,)}),
    )
    other, back = trained(getattr(torch, dtype), 0)
    with Checkpoints(tmp_path / "jax") as checkpoints:
        checkpoints.restore(other, back)
    y, gap, v = first
    # Of y half a 64th of its last place in bfloat16, of a gap half a code; of v half a 16th of an octave, and
    # the least that a row has: a row of the one is a column of the other.
    in_16_bits = dtype == "bfloat16"
    rounding = np.abs(y).max() * 2.0**-14 if in_16_bits else 0.0
    code = np.abs(gap).max() * 2.0 ** (2 - (10 if in_16_bits else 16))
    for crossing, (found_y, found_gap, found_v) in enumerate((second, held(other, back)), start=1):
        assert np.abs(found_y - y).max() <= crossing * rounding
        assert np.abs(found_y + found_gap - y - gap).max() <= crossing * (code / 2) + 1e-7
        np.testing.assert_allclose(found_v, v, rtol=crossing * 2.0**-5, atol=crossing * v.max() * 2.0**-16)


def test_numpy_reads_what_torch_wrote(tmp_path):
    model, optimizer = trained(torch.bfloat16)
    y, gap, v = held(model, optimizer)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    found = widened(read(path)[1])
    np.testing.assert_array_equal(found["z/weight"], y + gap)
    np.testing.assert_array_equal(found["v/weight"], v)
