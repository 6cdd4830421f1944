"""Real networks in Flax nnx, Flax linen and torch compute the same from converted arrays."""

import numpy as np
import pytest
import torch

from sfcore import names
from sfcore.tests import examples, models

FLATTENED = {"split": [3, 2, 4, 3], "axes": [3, 2, 0, 1]}
ATTENTION = {
    f"LinenBlock_*/MultiHeadDotProductAttention_0/{part}/{leaf}": {
        "torch": f"blocks.*.attention.in_proj_{word}",
        "part": [k, 3],
    }
    for k, part in enumerate(["query", "key", "value"])
    for leaf, word in [("kernel", "weight"), ("bias", "bias")]
}
LINEN_TRANSFORMER = {
    "LinenBlock_*": "blocks.*",
    "LinenBlock_*/LayerNorm_0": "blocks.*.norm1",
    "LinenBlock_*/LayerNorm_1": "blocks.*.norm2",
    "LinenBlock_*/Dense_0": "blocks.*.up",
    "LinenBlock_*/Dense_1": "blocks.*.down",
    "LinenBlock_*/MultiHeadDotProductAttention_0": "blocks.*.attention",
    "Embed_0": "tokens",
    "Dense_0": "head",
    "LayerNorm_0": "norm",
}
PICTURE, VECTOR, TOKENS = (4, 5, 4, 2), (4, 6), (3, models.LENGTH)


def _input(shape):
    rng = np.random.default_rng(1)
    if shape == TOKENS:
        return rng.integers(0, models.VOCABULARY, shape)
    return rng.standard_normal(shape).astype(np.float32)


def _sequential():
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))


# id: (flavour, Flax module, torch module, input, the user's map)
CASES = {
    "mlp nnx": ("nnx", models.NnxMLP, models.TorchMLP, VECTOR, None),
    "mlp nnx against Sequential": ("nnx", models.NnxMLP, _sequential, VECTOR, None),
    "mlp linen": ("linen", models.LinenMLP, models.TorchMLP, VECTOR, None),
    "cnn nnx": (
        "nnx",
        models.NnxCNN,
        models.TorchCNN,
        PICTURE,
        {"head/kernel": FLATTENED | {"torch": "head.weight"}},
    ),
    "cnn linen": (
        "linen",
        models.LinenCNN,
        models.TorchCNN,
        PICTURE,
        {"Dense_0/kernel": FLATTENED | {"torch": "head.weight"}, "Dense_0": "head"},
    ),
    "transformer nnx": ("nnx", models.NnxTransformer, models.TorchTransformer, TOKENS, None),
    "transformer linen": (
        "linen",
        models.LinenTransformer,
        models.TorchTransformer,
        TOKENS,
        LINEN_TRANSFORMER,
    ),
    "transformer linen, parts by hand": (
        "linen",
        models.LinenTransformer,
        models.TorchTransformer,
        TOKENS,
        LINEN_TRANSFORMER | ATTENTION,
    ),
}


def _built(case):
    flavour, flax, build, shape, user = CASES[case]
    x = _input(shape)
    torch.manual_seed(0)
    return (models.of_nnx(flax) if flavour == "nnx" else models.of_linen(flax, x)), build().eval(), x, user


def _shapes(leaves):
    return {name: leaf.shape for name, leaf in leaves.items()}


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree_after_conversion(case):
    flax, model, x, user = _built(case)
    found = names.between(_shapes(flax.leaves), models.torch_shapes(model), user)
    arrays = found.to_torch(flax.leaves)
    model.load_state_dict({n: torch.from_numpy(a) for n, a in arrays.items()}, strict="cnn" not in case)
    channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1) if x.ndim == 4 else x))
    with torch.no_grad():
        got = model(channels_first).numpy()
    expected = flax.apply(flax.leaves, x)
    # float32; measured: at most 5e-7 of the largest output, which is 6 to 29.
    assert np.abs(got - expected).max() <= 5e-6 * np.abs(expected).max()
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64])
def test_there_and_back_is_the_identity_bit_for_bit(case, dtype):
    flax, model, _, user = _built(case)
    found = names.between(_shapes(flax.leaves), models.torch_shapes(model), user)
    ours = {name: (leaf * 1000).astype(dtype) for name, leaf in flax.leaves.items()}
    assert examples.same(found.to_jax(found.to_torch(ours)), ours)
    theirs = {n: v.numpy() for n, v in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert examples.same(found.to_torch(found.to_jax(theirs)), theirs)


@pytest.mark.parametrize("case", CASES)
def test_a_map_written_out_and_read_back_is_the_same_map(case, tmp_path):
    flax, model, _, user = _built(case)
    ours, theirs = _shapes(flax.leaves), models.torch_shapes(model)
    found = names.between(ours, theirs, user)
    (tmp_path / "map.json").write_text(found.to_json())
    assert set(names.between(ours, theirs, tmp_path / "map.json").pairs) == set(found.pairs)
    assert set(names.to_torch(ours, tmp_path / "map.json").pairs) == set(found.pairs)
    assert set(names.to_jax(theirs, tmp_path / "map.json").pairs) == set(found.pairs)


def _kinds(model):
    return {
        f"{path}.{leaf}".removeprefix("."): type(module).__name__
        for path, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("build", [models.TorchMLP, models.TorchCNN])
def test_flax_names_follow_from_torch_alone_as_nnx_would_give_them(build):
    model = build()
    flax = models.of_nnx({models.TorchMLP: models.NnxMLP, models.TorchCNN: models.NnxCNN}[build])
    found = names.to_jax(models.torch_shapes(model))
    ours = {name.removesuffix("/value"): leaf.shape for name, leaf in flax.leaves.items()}
    assert {pair.jax: pair.jax_shape for pair in found.pairs} == ours


def test_kinds_tell_an_embedding_from_a_linear_without_bias():
    model = models.TorchTransformer()
    shapes = {n: s for n, s in models.torch_shapes(model).items() if "in_proj" not in n}
    with pytest.raises(names.NamesError) as error:
        names.to_jax(shapes)
    assert len(error.value.problems) == 2
    found = names.to_jax(shapes, kinds=_kinds(model))
    assert found.jax_names("tokens.weight") == ["tokens/embedding"]
    assert found.jax_names("head.weight") == ["head/kernel"]


@pytest.mark.parametrize("case", ["mlp linen", "cnn linen", "transformer linen"])
def test_torch_names_follow_from_flax_alone(case):
    flax, _, _, _ = _built(case)
    found = names.to_torch(_shapes(flax.leaves))
    assert examples.same(found.to_jax(found.to_torch(flax.leaves)), flax.leaves)
    assert all("/" not in pair.torch and "kernel" not in pair.torch for pair in found.pairs)


def test_heads_are_merged_into_a_linear_from_flax_alone():
    flax, _, _, _ = _built("transformer nnx")
    found = {pair.torch: pair.torch_shape for pair in names.to_torch(_shapes(flax.leaves)).pairs}
    assert found["blocks.0.attention.query.weight"] == (8, 8)
    assert found["blocks.0.attention.query.bias"] == (8,)
    assert found["blocks.0.attention.out.weight"] == (8, 8)
