"""torch.distributed.checkpoint in a single process: its helpers and its files."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import sftorch
from sftorch.checkpoint import Checkpoints
from sftorch.tests.checkpoint_runs import LENGTH, Case, build, digest, train

CASES = [Case(kind, "float32", 1, 10, "train") for kind in ("sgd", "adamw", "radam", "wrapper")]
# It warns that no process group was made, which is what a single process is.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def until_saved(case):
    model, optimizer = build(case)
    train(model, optimizer, case, 0, case.saved_at)
    return model, optimizer


def finish(model, optimizer, case, generator):
    """Finishes a run with the random numbers that it had when it was saved."""
    optimizer.train()
    torch.set_rng_state(generator)
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = None
    for step in range(case.saved_at, LENGTH):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_goes_on_exactly_through_its_files(case, flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = until_saved(case)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    generator = torch.get_rng_state()
    expected = finish(model, optimizer, case, generator)
    model, optimizer = build(case, seed=9)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    found = finish(model, optimizer, case, generator)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_state_keeps_its_types_through_its_files(case, tmp_path):
    model, optimizer = until_saved(case)
    before = repr(optimizer.state_dict())
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
    model, optimizer = build(case, seed=9)
    _, state = get_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert repr(optimizer.state_dict()) == before


def test_a_state_of_the_wrong_weights_is_refused_through_its_files(tmp_path):
    case = CASES[1]
    model, optimizer = until_saved(case)
    _, state = get_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
    model, optimizer = build(case, seed=9)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    with pytest.raises(RuntimeError, match="must be the x or the y of the loaded optimizer state"):
        optimizer.train()


def test_weights_saved_as_x_are_recognised_through_the_helpers():
    case = CASES[1]
    model, optimizer = until_saved(case)
    optimizer.eval()
    weights, state = map(copy.deepcopy, get_state_dict(model, optimizer))
    expected = finish(model, optimizer, case, torch.get_rng_state())
    model, optimizer = build(case, seed=9)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    assert all(
        torch.equal(a, b)
        for a, b in zip(finish(model, optimizer, case, torch.get_rng_state()), expected, strict=True)
    )


def test_the_digest_sees_a_changed_bit():
    model, optimizer = until_saved(CASES[1])
    generator = torch.get_rng_state()
    before = digest(model, optimizer)
    torch.set_rng_state(generator)
    optimizer.state[model[0].weight]["z"].view(torch.int32)[0, 0] ^= 1
    assert digest(model, optimizer) != before


class TestDTensors:
    """Parameters that lie in parts."""

    @pytest.fixture
    def mesh(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    def build(self, mesh, seed, dtype=torch.float32):
        torch.manual_seed(seed)
        model = torch.nn.Linear(4, 3, bias=False).to(dtype)
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        return model, sftorch.AdamWScheduleFree(model.parameters(), lr=0.01)

    def advance(self, mesh, model, optimizer, first, last):
        for step in range(first, last):
            gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            model.weight.grad = distribute_tensor(gradient.to(model.weight.dtype), mesh, [Shard(0)])
            optimizer.step()

    @pytest.mark.parametrize("order", [("weights", "state"), ("state", "weights")])
    @pytest.mark.parametrize("mode", ["train", "eval"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_run_goes_on_exactly_in_either_order(self, mesh, dtype, mode, order):
        model, optimizer = self.build(mesh, 0, dtype)
        self.advance(mesh, model, optimizer, 0, 5)
        getattr(optimizer, mode)()
        weights, state = model.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
        assert {"x_print", "y_print"} <= state["state"][0].keys()
        optimizer.train()
        self.advance(mesh, model, optimizer, 5, 8)
        other, resumed = self.build(mesh, 1, dtype)
        for what in order:
            if what == "weights":
                with torch.no_grad():
                    other.weight.copy_(weights)
            else:
                resumed.load_state_dict(state)
        resumed.train()
        self.advance(mesh, other, resumed, 5, 8)
        ours, theirs = optimizer.state[model.weight], resumed.state[other.weight]
        assert torch.equal(model.weight.to_local(), other.weight.to_local())
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"z", "y_rest", "exp_avg_sq"}:
            assert torch.equal(ours[name].to_local(), theirs[name].to_local())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_in_16_bits_they_step_as_whole_parameters_do(self, mesh, dtype):
        model, optimizer = self.build(mesh, 0, dtype)
        optimizer.param_groups[0]["foreach"] = False  # one path for both; they round differently
        whole = torch.nn.Parameter(model.weight.detach().to_local().clone())
        other = sftorch.AdamWScheduleFree([whole], lr=0.01, foreach=False)
        for step in range(5):
            self.advance(mesh, model, optimizer, step, step + 1)
            whole.grad = model.weight.grad.to_local()
            other.step()
        assert torch.equal(model.weight.to_local(), whole)
        assert torch.equal(optimizer.state[model.weight]["y_rest"].to_local(), other.state[whole]["y_rest"])

    def test_a_checkpoint_of_one_process_holds_them_whole(self, mesh, tmp_path):
        model, optimizer = self.build(mesh, 0)
        self.advance(mesh, model, optimizer, 0, 3)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(model, optimizer)
        other, resumed = self.build(mesh, 1)
        assert Checkpoints(tmp_path).restore(other, resumed).notices == []
        assert torch.equal(other.weight.to_local(), model.weight.to_local())
        z, saved = resumed.state[other.weight]["z"], optimizer.state[model.weight]["z"]
        assert torch.equal(z.to_local(), saved.to_local())
