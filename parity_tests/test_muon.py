"""Muon: its directions are those of torch.optim and optax.contrib; what is a matrix; what is refused."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import sfjax
import sftorch
from sfcore import HyperparameterError, store
from sfcore.convert import convert
from sfcore.matrices import is_matrix
from sfjax.state.arguments import kinds_of_leaves
from sftorch.checkpoint import Checkpoints

SHAPES = {"tall": (12, 5), "wide": (4, 9), "square": (6, 6), "row": (1, 7)}
STEPS, LR = 12, 0.1
GRADS = [
    {name: np.random.default_rng([step, *shape]).normal(size=shape) for name, shape in SHAPES.items()}
    for step in range(STEPS)
]
# At beta = 0 and without decay z takes plain steps along the direction.
PLAIN: dict[str, Any] = {"adjust_lr": "original", "mu": 0.9}


def moved_in_torch(make: Any) -> dict[str, np.ndarray]:
    """Returns where an optimizer takes zeros, y of ours and the parameters of another."""
    params = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()
    }
    optimizer = make(list(params.values()))
    for grads in GRADS:
        for name, p in params.items():
            p.grad = torch.from_numpy(grads[name])
        optimizer.step()
    return {name: p.detach().numpy() for name, p in params.items()}


def ours(**options: Any) -> dict[str, np.ndarray]:
    """Returns where sftorch takes them."""
    return moved_in_torch(
        lambda params: sftorch.MuonScheduleFree(params, LR, (0.0, 0.999), **(PLAIN | options))
    )


def moved_in_jax(tx: Any) -> dict[str, np.ndarray]:
    """Returns where a transformation takes zeros."""
    with jax.enable_x64(True):
        params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
        state, update = tx.init(params), jax.jit(tx.update)
        for grads in GRADS:
            updates, state = update({name: jnp.asarray(g) for name, g in grads.items()}, state, params)
            params = optax.apply_updates(params, updates)
        return {name: np.asarray(p) for name, p in params.items()}


def gap(found: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """Returns the largest difference over the largest movement of its leaf."""
    return max(np.abs(found[name] - want[name]).max() / np.abs(want[name]).max() for name in want)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_directions_are_those_of_torch_optim_muon(nesterov, adjust_lr, monkeypatch):
    def theirs(params: Any) -> Any:
        return torch.optim.Muon(params, LR, 0.0, 0.9, nesterov, adjust_lr_fn=adjust_lr)

    found = ours(nesterov=nesterov, adjust_lr=adjust_lr)
    # It iterates in bfloat16, whose numbers have 8 bits. Measured: 1.4e-2.
    assert gap(found, moved_in_torch(theirs)) < 0.03
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    # In float64: it divides by the norm where we divide by the norm and 1e-7. Measured: 4.1e-7.
    assert gap(found, moved_in_torch(theirs)) < 1e-6


@pytest.mark.parametrize(("adjust_lr", "consistent_rms"), [("original", None), ("match_rms_adamw", 0.2)])
def test_directions_are_those_of_optax_contrib_muon(adjust_lr, consistent_rms):
    theirs = optax.contrib.muon(LR, beta=0.9, eps=1e-7, nesterov=False, consistent_rms=consistent_rms)
    want = moved_in_jax(theirs)
    # Its kernels have outputs last. It corrects the bias of m, which matters beside the 1e-7 only.
    # Measured: 2.5e-7.
    options = PLAIN | {"nesterov": False, "adjust_lr": adjust_lr, "output_axis": "last"}
    assert gap(moved_in_jax(sfjax.schedule_free_muon(LR, b1=0.0, **options)), want) < 1e-6
    assert gap(ours(**options), want) < 1e-6


def test_nesterov_of_optax_corrects_both_its_terms_and_ours_neither_as_torchs():
    """optax divides m by 1 - mu^(t+1) and g by 1 - mu^t: another direction while t is small."""
    theirs = moved_in_jax(optax.contrib.muon(LR, beta=0.9, eps=1e-7, nesterov=True))
    # Measured: 0.042 after 12 steps.
    assert gap(ours(output_axis="last"), theirs) > 0.01


def test_singular_values_come_near_1_and_rows_of_normuon_to_one_size():
    options = {"adjust_lr": "original", "mu": 0.0, "b2_rows": 0.0, "eps": 1e-30}
    grads = {"tall": torch.from_numpy(GRADS[0]["tall"])}
    for normalize in ("none", "rows"):
        p = torch.nn.Parameter(torch.zeros(12, 5, dtype=torch.float64))
        optimizer = sftorch.MuonScheduleFree([p], 1.0, (0.0, 0.999), normalize=normalize, **options)
        p.grad = grads["tall"]
        optimizer.step()
        step = p.detach() / math.sqrt(12 / 5)
        if normalize == "none":
            values = torch.linalg.svdvals(step)
            assert 0.6 < float(values.min()) < float(values.max()) < 1.3
            size = float(torch.linalg.vector_norm(step))
        else:
            rows = torch.linalg.vector_norm(step, dim=1)
            assert torch.allclose(rows, rows[0].expand(12), rtol=1e-12)
            assert float(torch.linalg.vector_norm(step)) == pytest.approx(size, rel=1e-12)


@pytest.mark.parametrize("normalize", ["none", "rows"])
def test_matrices_of_one_shape_and_its_transpose_are_taken_together_and_get_the_same(normalize):
    shapes = [(4, 7), (7, 4), (4, 7), (5, 5), (2, 2, 7)]
    values = [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for shape in shapes
    ]
    runs = []
    for foreach in (True, False):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = sftorch.MuonScheduleFree(params, 0.1, normalize=normalize, foreach=foreach)
        for _ in range(5):
            for p, value in zip(params, values, strict=True):
                p.grad = value + p.detach()
            optimizer.step()
        runs.append([p.detach() for p in params])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


NAMES = {
    "transformer.wte.weight": ((50, 8), False),
    "model.embed_tokens.weight": ((50, 8), False),
    "transformer.h.0.attn.c_attn.weight": ((8, 24), True),
    "h.0.attn.c_attn.bias": ((8, 24), False),
    "blocks.1.conv.weight": ((4, 3, 3, 3), True),
    "patch_embed.proj.weight": ((8, 3, 4, 4), False),
    "pos_embedding": ((1, 5, 8), False),
    "cls_token": ((1, 1, 8), False),
    "norm.weight": ((8,), False),
    "lm_head.weight": ((50, 8), False),
    "layers.3.heads_mix.weight": ((8, 8), True),
    "nothing.weight": ((0, 8), False),
}


@pytest.mark.parametrize(("name", "shape", "expected"), [(name, *want) for name, want in NAMES.items()])
def test_matrices_are_told_by_shape_and_name(name, shape, expected):
    assert is_matrix(shape, name) == is_matrix(shape, name.replace(".", "/")) == expected


def test_both_twins_find_the_same_matrices():
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, (shape, _) in NAMES.items()]
    groups = sftorch.MuonScheduleFree(named).param_groups
    tree = {name.replace(".", "/"): jnp.zeros(shape) for name, (shape, _) in NAMES.items()}
    kinds = dict(zip(sorted(tree), kinds_of_leaves(tree, None, "first"), strict=True))
    assert [group["use_muon"] for group in groups] == [True, False]
    assert set(groups[0]["param_names"]) == {name for name, (_, yes) in NAMES.items() if yes}
    assert {name for name, kind in kinds.items() if kind == "matrices"} == {
        name.replace(".", "/") for name in groups[0]["param_names"]
    }


def test_groups_and_masks_say_otherwise():
    table, bias = torch.nn.Parameter(torch.zeros(5, 2)), torch.nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [("wte.weight", table)], "use_muon": True, "lr": 0.5},
        {"params": [("bias", bias)], "use_muon": False},
    ]
    found = sftorch.MuonScheduleFree(groups).param_groups
    assert [(group["use_muon"], group["lr"]) for group in found] == [(True, 0.5), (False, 0.0025)]
    tree = {"wte": jnp.zeros((5, 2)), "up": jnp.zeros((2, 2))}
    state = sfjax.schedule_free_muon(muon_mask={"wte": True, "up": False}).init(tree).base_optimizer_state
    assert state.momentum["up"] is None is state.nu["wte"]
    assert state.row_nu is None


def test_what_can_be_no_matrix_is_refused_by_name_all_at_once():
    vector, scalar = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), ()))
    pair = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    group = {
        "params": [("norm.weight", vector), ("gain", scalar), ("mix", pair)],
        "use_muon": True,
        "mu": 2.0,
    }
    with pytest.raises(HyperparameterError) as caught:
        sftorch.MuonScheduleFree([group])
    text = str(caught.value)
    for part in ("mu must be a number in [0, 1), got 2.0", "norm.weight", "gain", "mix", "must be real"):
        assert part in text
    assert len(caught.value.problems) == 4
    params = {"norm": jnp.zeros(3), "gain": jnp.zeros(()), "mix": jnp.zeros((2, 2), jnp.complex64)}
    with pytest.raises(HyperparameterError) as caught:
        sfjax.schedule_free_muon(muon_mask=True).init(params)
    assert len(caught.value.problems) == 3
    assert "params['norm'] of Muon must have two axes or more and some elements, got the shape (3,)" in str(
        caught.value
    )


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = sftorch.MuonScheduleFree([torch.nn.Parameter(torch.zeros(2, 2))])
    more = [torch.nn.Parameter(torch.zeros(3, 3)), torch.nn.Parameter(torch.zeros(3))]
    for wrong, text in (({"mu": -1.0}, "mu must be"), ({"use_muon": "yes"}, "use_muon must be")):
        with pytest.raises(HyperparameterError, match=text):
            optimizer.add_param_group({"params": more, **wrong})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": more})
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, True, False]


def test_a_run_without_matrices_is_refused():
    with pytest.raises(
        HyperparameterError, match="params must have a matrix for Muon, got none among 1: use AdamW"
    ):
        sftorch.MuonScheduleFree([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(
        HyperparameterError, match="params must have a matrix for Muon, got none among 1: use AdamW"
    ):
        sfjax.schedule_free_muon().init({"bias": jnp.zeros(3)})


def test_a_convolution_of_flax_wants_outputs_last():
    params = {"Conv_0": {"kernel": jnp.zeros((3, 3, 4, 8))}}
    with pytest.raises(HyperparameterError, match="output_axis must be 'last' for a convolution of Flax"):
        sfjax.schedule_free_muon().init(params)
    state = sfjax.schedule_free_muon(output_axis="last", normalize="rows").init(params)
    assert state.base_optimizer_state.row_nu["Conv_0"]["kernel"].shape == (1, 1, 1, 8)


def test_newton_schulz_of_zeros_is_zero_and_has_no_nan():
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = sftorch.MuonScheduleFree([p], 0.1, normalize="rows")
    p.grad = torch.zeros(3, 2)
    optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))
    tx = sfjax.schedule_free_muon(0.1, normalize="rows")
    params = {"w": jnp.ones((3, 2))}

    def after(scale: Any) -> Any:
        updates, _ = tx.update({"w": scale * jnp.ones((3, 2))}, tx.init(params), params)
        return updates["w"].sum()

    assert float(after(0.0)) == 0.0
    assert float(jax.grad(after)(0.0)) == float(jax.grad(after)(0.0))  # a number


def test_a_conversion_turns_rows_with_their_matrix_and_back_again(tmp_path):
    model = torch.nn.Sequential()
    for name, layer in (("up", torch.nn.Linear(4, 6)), ("down", torch.nn.Linear(6, 2))):
        model.add_module(name, layer)
    optimizer = sftorch.MuonScheduleFree(model.named_parameters(), normalize="rows")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(8.0).view(2, 4)).square().sum().backward()
        optimizer.step()
    with Checkpoints(tmp_path / "torch") as checkpoints:
        checkpoints.save(model, optimizer)
    convert(tmp_path / "torch", tmp_path / "jax", to="jax")
    convert(tmp_path / "jax", tmp_path / "back", to="torch")
    (_, saved), (meta, there), (_, back) = (
        store.read(store.at(tmp_path / name)) for name in ("torch", "jax", "back")
    )
    assert meta.optimizer == "muon"
    assert there["u/up/kernel"].shape == (1, 6)
    np.testing.assert_array_equal(there["momentum/up/kernel"], saved["momentum/up.weight"].T)
    assert saved.keys() == back.keys()
    assert all(np.array_equal(saved[leaf], back[leaf]) for leaf in saved)


def test_numbers_may_be_injected_and_changed_on_the_way():
    params = {"up": jnp.asarray(GRADS[0]["tall"], jnp.float32), "bias": jnp.ones(5)}
    grads = {"up": jnp.asarray(GRADS[1]["tall"], jnp.float32), "bias": jnp.arange(5.0)}
    options = {"mu": 0.8, "normalize": "rows", "ns_steps": 4, "adam_lr_ratio": 0.5}
    injected = optax.inject_hyperparams(sfjax.schedule_free_muon)(0.1, **options)
    plain = sfjax.schedule_free_muon(0.1, **options)
    found = []
    for tx in (injected, plain):
        y, state = params, tx.init(params)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(grads, state, y)
            y = optax.apply_updates(y, updates)
        found.append(y)
    # Measured: 1.2e-7, an ulp.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *found)
    assert float(found[0]["bias"][1]) == pytest.approx(1 - 3 * 0.1 * 0.5, abs=0.05)


def test_the_lean_form_keeps_every_buffer_in_bfloat16_near_the_exact_run():
    start = {"up": jnp.asarray(GRADS[0]["square"], jnp.bfloat16), "bias": jnp.ones(6, jnp.bfloat16)}
    finals = []
    for precision in ("exact", "lean"):
        tx = sfjax.schedule_free_muon(0.01, normalize="rows", precision=precision)
        y, state, update = start, tx.init(start), jax.jit(tx.update)
        for grads in GRADS:
            g = {"up": jnp.asarray(grads["square"], jnp.bfloat16), "bias": jnp.ones(6, jnp.bfloat16)}
            updates, state = update(g, state, y)
            y = optax.apply_updates(y, updates)
        finals.append(sfjax.schedule_free_eval_params(state, y, jnp.float32))
    buffers = jax.tree.leaves(state.base_optimizer_state)
    assert {leaf.dtype for leaf in buffers} == {jnp.dtype(jnp.bfloat16)}
    assert [leaf.shape for leaf in jax.tree.leaves(state.base_optimizer_state.row_nu)] == [(6, 1)]
    moved = float(jnp.abs(finals[0]["up"] - start["up"].astype(jnp.float32)).max())
    # Momentum rounded to 8 bits turns a polar factor a little. Measured: 3.7e-3 of the movement.
    assert float(jnp.abs(finals[0]["up"] - finals[1]["up"]).max()) < 0.01 * moved
