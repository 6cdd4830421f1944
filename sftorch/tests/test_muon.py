"""Muon in torch: its forms in memory, parameters that are DTensors, and what a checkpoint keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import sftorch
from sfcore import inspection
from sftorch.checkpoint import Checkpoints
from sftorch.tests.plain import same_bits, some_grads, some_params

SHAPES = [(6, 4), (4, 6), (3, 2, 2), (5,), ()]


def run(dtype, steps=20, **options):
    """Returns the parameters and the optimizer after some steps along gradients that no run changes."""
    params = some_params(dtype, shapes=SHAPES)
    optimizer = sftorch.MuonScheduleFree(params, lr=0.01, **options)
    for grads in some_grads(steps, params):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("normalize", ["none", "rows"])
@pytest.mark.parametrize("form", [{}, {"precision": "lean"}], ids=["exact", "lean"])
def test_16_bits_take_the_path_of_float32(normalize, form):
    wide = some_params(torch.bfloat16, shapes=SHAPES)
    truth = [p.detach().float() for p in wide]
    params, optimizer = run(torch.bfloat16, normalize=normalize, **form)
    leaves = [torch.nn.Parameter(value.clone()) for value in truth]
    other = sftorch.MuonScheduleFree(leaves, lr=0.01, normalize=normalize)
    for grads in some_grads(20, params):
        for p, g in zip(leaves, grads, strict=True):
            p.grad = g.float()
        other.step()
    ours, theirs = optimizer.eval_params(), other.eval_params()
    for p, q, start in zip(params, leaves, truth, strict=True):
        moved = (theirs[q] - start).abs().max()
        # What ships is rounded to bfloat16: half an ulp of values up to 4 is 8e-3.
        assert (ours[p].float() - theirs[q]).abs().max() <= 8e-3 + 0.05 * moved
    state = optimizer.state[params[0]]
    kept = torch.bfloat16 if form else torch.float32
    assert state["momentum_buffer"].dtype == kept
    assert "exp_avg_sq" not in state
    assert optimizer.state[params[3]]["exp_avg_sq"].dtype == kept
    if normalize == "rows":
        assert (state["row_exp_avg_sq"].dtype, state["row_exp_avg_sq"].shape) == (kept, (6, 1))


def test_a_step_in_backward_has_the_bits_of_a_step():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    twin = copy.deepcopy(model)
    inputs = torch.linspace(-1, 1, 12).view(3, 4)
    made = [sftorch.MuonScheduleFree(m.named_parameters(), foreach=False, fused=False) for m in (model, twin)]
    handle = sftorch.step_in_backward(made[0])
    for _ in range(3):
        for m, optimizer in zip((model, twin), made, strict=True):
            m(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    assert same_bits(list(model.parameters()), list(twin.parameters()))


def test_a_compiled_step_takes_the_same_path():
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (2,))]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    plain = sftorch.MuonScheduleFree(params, normalize="rows", foreach=False, fused=False)
    compiled = sftorch.MuonScheduleFree(twins, normalize="rows")
    step = torch.compile(compiled.step, backend="aot_eager")
    for time in range(4):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.linspace(-1, 1 + time, p.numel()).view_as(p)
            q.grad = p.grad.clone()
        plain.step()
        step()
    for p, q in zip(params, twins, strict=True):
        assert float((p.detach() - 1).abs().max()) > 1e-3
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # measured: 0


def test_a_state_dict_goes_back_and_knows_its_matrices():
    params, optimizer = run(torch.float32, normalize="rows")
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = sftorch.MuonScheduleFree(again, normalize="rows")
    other.load_state_dict(optimizer.state_dict())
    for one, leaves in ((optimizer, params), (other, again)):
        for p, g in zip(leaves, *some_grads(1, params, 99), strict=True):
            p.grad = g
        one.step()
    assert same_bits(params, again)
    plain = sftorch.AdamWScheduleFree([torch.nn.Parameter(p.detach().clone()) for p in params])
    with pytest.raises(ValueError, match="parameter groups"):
        plain.load_state_dict(optimizer.state_dict())


def test_rows_that_are_counted_along_another_axis_start_anew(tmp_path):
    model = torch.nn.Linear(4, 3)
    saved = sftorch.MuonScheduleFree(model.named_parameters(), normalize="rows")
    model(torch.ones(2, 4)).square().sum().backward()
    saved.step()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, saved)
    told = inspection.inspect(tmp_path)
    assert (told["optimizer"], told["leaves"]["momentum"], told["leaves"]["u"]) == ("muon", 1, 1)
    assert told["norms"]["u"] > 0
    other = sftorch.MuonScheduleFree(model.named_parameters(), normalize="rows", output_axis="last")
    Checkpoints(tmp_path).restore(model, other)
    state = other.state[model.weight]
    assert state["row_exp_avg_sq"].tolist() == [[0.0] * 4]
    assert same_bits([state["momentum_buffer"]], [saved.state[model.weight]["momentum_buffer"]])


def test_a_description_tells_the_matrices_and_what_lacks_names():
    layer = torch.nn.Linear(4, 3)
    named = sftorch.MuonScheduleFree(layer.named_parameters()).describe()
    assert "group 0: 1 matrices (float32) hold y" in named
    assert "group 1: 1 parameters for AdamW (float32) hold y" in named
    told = sftorch.MuonScheduleFree(layer.parameters()).describe()
    assert "group 0: 1 matrices by shape, for want of names also embeddings and heads, (float32)" in told


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("form", [{}, {"foreach": False}, {"precision": "lean"}], ids=str)
def test_dtensors_of_one_column_have_the_bits_of_plain_ones(mesh, form):
    """One number a row then has the shape of the matrix, and is whole beside its parts."""
    runs = []
    for placements in ([Shard(0)], [Replicate()], None):
        params = some_params(torch.float32, shapes=[(4, 1), (4, 3)])
        if placements:
            params = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in params]
        optimizer = sftorch.MuonScheduleFree(params, normalize="rows", **form)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p) + p.detach()
            optimizer.step()
        runs.append([p.detach().full_tensor() if placements else p.detach() for p in params])
        assert optimizer.state[params[0]]["row_exp_avg_sq"].shape == (4, 1)
    assert same_bits(runs[0], runs[2])
    assert same_bits(runs[1], runs[2])
