"""The map between names: what is found, what is refused, all problems at once."""

import json
import pickle

import numpy as np
import pytest

from sfcore import names
from sfcore.exchange import CheckpointError
from sfcore.names import NamesError


def _problems(function, *args, **kwargs):
    with pytest.raises(NamesError) as error:
        function(*args, **kwargs)
    return error.value.problems


@pytest.mark.parametrize(
    ("jax", "jax_shape", "torch", "torch_shape", "axes"),
    [
        ("a/kernel", (2, 3), "a.weight", (3, 2), (1, 0)),
        ("a/kernel", (5, 2, 3), "a.weight", (3, 2, 5), (2, 1, 0)),
        ("a/kernel", (5, 6, 2, 3), "a.weight", (3, 2, 5, 6), (3, 2, 0, 1)),
        ("a/kernel", (5, 6, 7, 2, 3), "a.weight", (3, 2, 5, 6, 7), (4, 3, 0, 1, 2)),
        ("a/kernel", (8, 2, 4), "a.weight", (8, 8), (1, 2, 0)),
        ("a/kernel", (2, 4, 8), "a.weight", (8, 8), (2, 0, 1)),
        ("a/query/kernel", (8, 2, 3), "a.query.weight", (6, 8), (1, 2, 0)),
        ("a/out/kernel", (2, 3, 8), "a.out_proj.weight", (8, 6), (2, 0, 1)),
        ("a/value/bias", (2, 3), "a.v_proj.bias", (6,), (0, 1)),
        ("a/scale", (3,), "a.weight", (3,), (0,)),
        ("a/scale", (3,), "a.scale", (3,), (0,)),
        ("a/embedding/value", (5, 3), "a.embedding", (5, 3), (0, 1)),
        ("var", (2, 3), "var", (2, 3), (0, 1)),
        ("a/embedding", (5, 3), "a.weight", (5, 3), (0, 1)),
        ("batch_stats/a/mean", (3,), "a.running_mean", (3,), (0,)),
        ("batch_stats/a/var", (3,), "a.running_var", (3,), (0,)),
        ("params/a/kernel/value", (2, 3), "a.weight", (3, 2), (1, 0)),
        ("token", (1, 1, 4), "token", (1, 1, 4), (0, 1, 2)),
        ("value", (4,), "value", (4,), (0,)),
        ("a/value", (4,), "a.value", (4,), (0,)),
        ("a/0/kernel", (1, 1), "a.0.weight", (1, 1), (1, 0)),
    ],
)
def test_a_leaf_is_found_by_its_name_and_laid_out_by_its_shape(jax, jax_shape, torch, torch_shape, axes):
    (pair,) = names.between({jax: jax_shape}, {torch: torch_shape}).pairs
    assert (pair.torch, pair.axes) == (torch, axes)


def test_a_projection_with_one_head_is_not_ambiguous():
    found = names.between({"a/out/kernel": (1, 8, 8)}, {"a.out.weight": (8, 8)})
    array = np.arange(64.0).reshape(1, 8, 8)
    assert np.array_equal(found.to_torch({"a/out/kernel": array})["a.out.weight"], array[0].T)


def test_a_linear_is_transposed_and_an_embedding_is_not():
    found = names.between(
        {"l/kernel": (2, 2), "e/embedding": (2, 2)}, {"l.weight": (2, 2), "e.weight": (2, 2)}
    )
    array = np.array([[1.0, 2.0], [3.0, 4.0]])
    moved = found.to_torch({"l/kernel": array, "e/embedding": array})
    assert moved["l.weight"].tolist() == [[1, 3], [2, 4]]
    assert moved["e.weight"].tolist() == [[1, 2], [3, 4]]


def test_the_only_module_of_its_shape_needs_no_name():
    jax = {"Dense_0/kernel": (2, 3), "Dense_0/bias": (3,), "Dense_1/kernel": (3, 2), "Dense_1/bias": (2,)}
    torch = {"net.0.weight": (3, 2), "net.0.bias": (3,), "net.2.weight": (2, 3), "net.2.bias": (2,)}
    found = names.between(jax, torch)
    assert found.torch_name("Dense_0/kernel") == "net.0.weight"
    assert found.torch_name("Dense_1/bias") == "net.2.bias"


def test_modules_of_one_shape_are_not_guessed_and_the_fix_is_shown():
    jax = {"Dense_0/kernel": (3, 3), "Dense_1/kernel": (3, 3)}
    torch = {"a.weight": (3, 3), "b.weight": (3, 3)}
    problems = _problems(names.between, jax, torch)
    assert len(problems) == 4
    assert '\'Dense_0\' (weight (3, 3)) may be a or b: map it, such as {"Dense_0": "a"}' in problems[0]
    found = names.between(jax, torch, {"Dense_0": "b", "Dense_1": "a"})
    assert found.torch_name("Dense_0/kernel") == "b.weight"


def test_an_embedding_and_a_linear_of_one_shape_are_not_guessed():
    jax = {"E/embedding": (3, 3), "D/kernel": (3, 3)}
    assert len(_problems(names.between, jax, {"a.weight": (3, 3), "b.weight": (3, 3)})) == 4


def test_every_problem_is_listed_at_once():
    jax = {"fc/kernel": (2, 3), "gone/kernel": (4, 5), "heads/kernel": (8, 2, 4), "same": (2,)}
    torch = {"fc.weight": (2, 3), "new.weight": (9,), "heads.weight": (4, 8), "same": (2,)}
    problems = _problems(names.between, jax, torch)
    assert len(problems) == 4
    for text in (
        "fc/kernel (2, 3) and fc.weight (2, 3) must have fitting shapes",
        "heads/kernel (8, 2, 4) and heads.weight (4, 8) must have fitting shapes",
        "JAX module 'gone' (in torch's words weight (5, 4)) has no counterpart",
        "torch module 'new' (in torch's words weight (9,)) has no counterpart",
    ):
        assert any(text in problem for problem in problems), text


def test_the_count_of_batches_has_no_counterpart_and_needs_none():
    torch = {"n.weight": (2,), "n.num_batches_tracked": ()}
    found = names.between({"n/scale": (2,)}, torch)
    assert list(found.to_jax({"n.weight": np.zeros(2), "n.num_batches_tracked": np.zeros(())})) == ["n/scale"]


def test_a_leaf_claimed_twice_is_refused():
    jax = {"a/kernel": (2, 2), "b/kernel": (2, 2)}
    problems = _problems(names.between, jax, {"a.weight": (2, 2)}, {"b": "a"})
    assert problems == (
        "torch leaf 'a.weight' must be filled once, got parts [(0, 1), (0, 1)] from a/kernel and b/kernel: "
        "map the others",
    )


def test_a_stacked_leaf_needs_all_its_parts():
    jax = {f"a/{name}/kernel": (6, 2, 3) for name in ("query", "key", "value")}
    torch = {"a.in_proj_weight": (18, 6)}
    found = names.between(jax, torch)
    arrays = {name: np.full((6, 2, 3), float(i)) for i, name in enumerate(jax)}
    assert found.to_torch(arrays)["a.in_proj_weight"][:, 0].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert found.jax_names("a.in_proj_weight") == list(jax)
    del arrays["a/key/kernel"]
    assert "got no a/key/kernel" in _problems(found.to_torch, arrays)[0]
    arrays["a/key/kernel"] = np.zeros((6, 2, 3), np.float32)
    assert "must have one dtype" in _problems(found.to_torch, arrays)[0]
    del jax["a/key/kernel"]
    assert "got parts [(0, 3), (2, 3)]" in _problems(names.between, jax, torch)[0]


def test_applying_a_map_names_every_leaf_that_does_not_fit():
    found = names.to_torch({"a/kernel": (2, 3)})
    problems = _problems(found.to_torch, {"a/kernel": np.zeros((3, 2)), "b": np.zeros(1)})
    assert problems == (
        "jax leaf 'a/kernel' must have the shape (2, 3), got (3, 2)",
        "jax leaf 'b' must be in the map, got none of that name",
    )
    assert len(_problems(found.to_jax, {"a.weight": np.zeros((2, 3)), "b": np.zeros(1)})) == 2
    with pytest.raises(KeyError):
        found.jax_names("b")


def test_a_star_stands_for_any_one_part_of_a_path():
    jax = {f"Block_{i}/Dense_{j}/kernel": (3, 3) for i in range(12) for j in range(2)}
    torch = {f"h.{i}.{name}.weight": (3, 3) for i in range(12) for name in ("up", "down")}
    found = names.between(jax, torch, {"Block_*/Dense_0": "h.*.up", "Block_*/Dense_1": "h.*.down"})
    assert found.torch_name("Block_11/Dense_1/kernel") == "h.11.down.weight"
    assert names.to_jax(
        {**torch, **{n.replace("weight", "bias"): (3,) for n in torch}},
        {"Block_*/Dense_0": "h.*.up", "Block_*/Dense_1": "h.*.down"},
    ).jax_names("h.11.up.weight") == ["Block_11/Dense_0/kernel"]


def test_the_longest_entry_wins():
    found = names.to_torch(
        {"a/b/kernel": (1, 1), "a/c/kernel": (1, 1)}, {"a": "x", "a/b": "y", "a/b/kernel": "z.w"}
    )
    assert [pair.torch for pair in found.pairs] == ["z.w", "x.c.weight"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": 3}, 'must be "torch.path" or'),
        ({"a": ""}, 'must be "torch.path" or'),
        ({"a": {"axes": [0]}}, 'must be "torch.path" or'),
        ({"a": {"torch": "a", "axess": [0]}}, r"got 'axess'; did you mean 'axes'\?"),
        ({"a": {"torch": "a", "axes": [1, 1]}}, "each axis from 0 once"),
        ({"a": {"torch": "a", "axes": "10"}}, "whole numbers"),
        ({"a": {"torch": "a", "axes": [0.5]}}, "whole numbers"),
        ({"a": {"torch": "a", "part": [3, 3]}}, "k < n"),
        ({"a": {"torch": "a", "part": [1]}}, "k < n"),
        ({"a_*": "b"}, r"as many \* in 'b'"),
        ({"other": "b"}, "map entry 'other' must name a JAX leaf or module"),
        ({"a": "c"}, "sends 'a/kernel' to 'c.weight', of which torch has none"),
        ({"a/kernel": "a.wight"}, "the nearest is 'a.weight'"),
        ({"a": {"torch": "a", "axes": [1, 0]}}, "gives a layout to a module"),
        ({"a/kernel": {"torch": "a.weight", "axes": [0, 1, 2]}}, "count the elements and the axes"),
        ({"a/kernel": {"torch": "a.weight", "split": [5], "axes": [0]}}, "count the elements and the axes"),
        ({"a/kernel": {"torch": "a.weight", "part": [0, 2]}}, "no 2 equal parts"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(entries, message):
    with pytest.raises(NamesError, match=message):
        names.between({"a/kernel": (2, 3)}, {"a.weight": (3, 2)}, entries)


def test_every_malformed_entry_is_listed(tmp_path):
    entries = {"a": 3, "b": {"torch": "b", "axes": [1]}, "c": "c"}
    (tmp_path / "map.json").write_text(json.dumps(entries))
    assert len(_problems(names.to_torch, {"c": (1,)}, tmp_path / "map.json")) == 2


def test_a_map_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="is missing"):
        names.to_torch({}, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(NamesError, match="must be JSON"):
        names.to_torch({}, tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(NamesError, match="must be a JSON object"):
        names.to_torch({}, tmp_path / "list.json")


@pytest.mark.parametrize(
    ("shapes", "kinds", "leaf"),
    [
        ({"a.weight": (3, 2), "a.bias": (3,)}, {}, "kernel"),
        ({"a.weight": (3, 2)}, {}, "may be a Linear's without bias or an Embedding's"),
        ({"a.weight": (3, 2)}, {"a.weight": "Linear"}, "kernel"),
        ({"a.weight": (3, 2)}, {"a.weight": "Embedding"}, "embedding"),
        ({"a.weight": (3, 2, 5, 5)}, {}, "kernel"),
        ({"a.weight": (3,), "a.bias": (3,)}, {}, "scale"),
        ({"a.weight": (1,)}, {}, "no layer that is known"),
        ({"a.weight": (1,), "a.running_mean": (1,)}, {}, "scale"),
        ({"a.weight": (3, 3, 5)}, {"a.weight": "ConvTranspose1d"}, "ConvTranspose1d, whose layout"),
        ({"a.weight": (3,)}, {"a.weight": "PReLU"}, "PReLU, whose layout"),
        ({"a.weight": (3, 3)}, {"a.weight": "Mine"}, "Mine, of which no layout is known"),
        ({"a.in_proj_weight": (9, 3)}, {}, "holds query, key and value in one"),
        ({"a": (9, 3)}, {}, "a"),
    ],
)
def test_what_torch_alone_tells_of_a_leaf(shapes, kinds, leaf):
    if " " in leaf:
        assert leaf in _problems(names.to_jax, shapes, kinds=kinds)[0]
    else:
        assert names.to_jax(shapes, kinds=kinds).pairs[0].jax.rpartition("/")[2] == leaf


@pytest.mark.parametrize(
    ("jax", "message"),
    [
        ({"ConvTranspose_0/kernel": (3, 3, 2, 2)}, "transposed convolution"),
        ({"a/kernel": (3,)}, "kernel of 2 to 5 axes"),
        ({"a/kernel": (1,) * 6}, "kernel of 2 to 5 axes"),
        ({"a/scale": (2,), "a/embedding": (2, 2)}, "torch leaf 'a.weight' must be filled once"),
    ],
)
def test_what_flax_alone_does_not_tell_is_refused(jax, message):
    assert message in _problems(names.to_torch, jax)[0]


def test_two_torch_leaves_for_one_jax_leaf_are_refused():
    torch = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (2, 3), "b.bias": (2,)}
    assert "JAX leaf 'a/kernel' must be filled once" in _problems(names.to_jax, torch, {"a": "b"})[0]


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(NamesError(["one", "two"])))
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"
