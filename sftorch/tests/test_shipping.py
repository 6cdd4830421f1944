"""ship_x: whoever asks a model for its state dict gets x, and a run resumed from it ends in the same bits."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn

import sftorch
from sftorch.state.modes import SHIPPED
from sftorch.tests.plain import same_bits

KINDS = {
    "sgd": lambda params: sftorch.SGDScheduleFree(params, lr=0.1),
    "adamw": lambda params: sftorch.AdamWScheduleFree(params, lr=0.05, warmup_steps=2),
    "radam": lambda params: sftorch.RAdamScheduleFree(params, lr=0.05),
    "foreach": lambda params: sftorch.AdamWScheduleFree(params, lr=0.05, fused=False),
    "beta 0": lambda params: sftorch.SGDScheduleFree(params, lr=0.1, momentum=0.0),
    "wrapper": lambda params: sftorch.ScheduleFreeWrapper(torch.optim.RMSprop(params, lr=0.01)),
}


class Net(nn.Module):
    """Tied weights, a frozen one, a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.norm, self.frozen = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, batch):
        return self.last(self.norm(self.frozen(self.first(batch)).tanh()))


def built(kind="adamw", steps=8, dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = KINDS[kind]([p for p in model.parameters() if p.requires_grad])
    go(model, optimizer, 0, steps)
    return model, optimizer


def go(model, optimizer, begin, end):
    for step in range(begin, end):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and same_bits(list(a.values()), list(b.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_is_x_in_both_modes_and_changes_nothing(kind, dtype):
    model, optimizer = built(kind, dtype=dtype)
    x = optimizer.eval_state_dict(model)
    held = [p.clone() for p in model.parameters()]
    assert not same(model.state_dict(), x)
    with sftorch.ship_x(model, optimizer):
        assert same(saved(model.state_dict()), x)
        assert same_bits(list(model.parameters()), held)
        found = model.state_dict()
        assert found["first.weight"] is found["last.weight"]  # tied, as save_pretrained wants to see
        assert found._metadata["first"]["weights_hold"] == "x"
        assert model.state_dict(keep_vars=True)["first.weight"] is model.first.weight
        assert same({"weight": model.first.state_dict()["weight"]}, {"weight": x["first.weight"]})
        optimizer.eval()
        assert same(saved(model.state_dict()), x)
        optimizer.train()
        assert same_bits(list(model.parameters()), held)
    assert same(model.state_dict(), dict(model.state_dict(keep_vars=True)))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_from_what_a_trainer_saves_ends_in_the_same_bits(kind, order):
    model, optimizer = built(kind)
    shipped = sftorch.ship_x(model, optimizer)
    weights, state = saved(model.state_dict()), saved(optimizer.state_dict())
    assert same(weights, optimizer.eval_state_dict(model))
    go(model, optimizer, 8, 12)
    end = saved(model.state_dict())
    for steps in (0, 3):  # into a fresh run, and into one under way
        other, resumed = built(kind, steps)
        with sftorch.ship_x(other, resumed):
            loads = [(other, weights), (resumed, state)]
            for holder, held in loads if order == "model first" else loads[::-1]:
                holder.load_state_dict(held)
            go(other, resumed, 8, 12)
            assert same(other.state_dict(), end)
        assert same_bits(list(other.parameters()), list(model.parameters()))
    shipped.remove()


def test_its_own_x_loaded_in_a_run_leaves_y_in_place():
    model, optimizer = built()
    held = [p.clone() for p in model.parameters()]
    with sftorch.ship_x(model, optimizer):
        model.load_state_dict(model.state_dict())
        assert same_bits(list(model.parameters()), held)
        optimizer.eval()
        model.load_state_dict(model.state_dict())
        optimizer.train()
    assert same_bits(list(model.parameters()), held)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_weights_loaded_in_a_run_are_what_is_shipped(mode, caplog):
    """As load_best_model_at_end does it."""
    model, optimizer = built()
    with sftorch.ship_x(model, optimizer):
        best = saved(model.state_dict())
        go(model, optimizer, 8, 11)
        getattr(optimizer, mode)()
        with caplog.at_level(logging.WARNING, logger="sftorch"):
            model.load_state_dict(best)
        assert "weights of another moment were loaded into 2 parameters of a Linear" in caplog.text
        assert same(model.state_dict(), best)
        optimizer.train()
        assert same(model.state_dict(), best)
        go(model, optimizer, 11, 12)


def test_a_copy_gives_x_until_its_weights_change():
    model, optimizer = built()
    with sftorch.ship_x(model, optimizer):
        x = saved(model.state_dict())
        twin = copy.deepcopy(model)
        again = copy.deepcopy(twin)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        go(model, optimizer, 8, 10)
        for one in (twin, again, loaded):
            assert same(one.state_dict(), x)
        new = saved(model.state_dict())
        twin.load_state_dict(new)  # as an EMA copy is written
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
        assert same(twin.state_dict(), new)
        assert all(again.state_dict()[name].eq(0).all() for name in ("first.weight", "norm.bias"))


def test_copied_together_model_and_optimizer_go_on_by_themselves():
    model, optimizer = built()
    with sftorch.ship_x(model, optimizer):
        other, twin = copy.deepcopy((model, optimizer))
        go(other, twin, 8, 11)
        x = saved(other.state_dict())
        assert same(x, twin.eval_state_dict(other))
        lone = copy.deepcopy(other)
        assert same(lone.state_dict(), x)
        assert same(model.state_dict(), optimizer.eval_state_dict(model))
    assert same(other.state_dict(), x)  # the handle is that of the first


def test_what_is_written_to_the_state_dict_of_a_copy_reaches_it():
    """As timm's ModelEmaV2 and V3 do."""
    model, optimizer = built()
    with sftorch.ship_x(model, optimizer):
        twin, plain = copy.deepcopy(model), Net()
        plain.load_state_dict(model.state_dict())
        go(model, optimizer, 8, 10)
        for one in (twin, plain):
            for average, new in zip(one.state_dict().values(), model.state_dict().values(), strict=True):
                average.copy_((average + new) / 2)
        assert same(twin.state_dict(), plain.state_dict())
        assert not same(twin.state_dict(), model.state_dict())


def test_averaged_models_average_x():
    model, optimizer = built()
    with sftorch.ship_x(model, optimizer):
        averaged = torch.optim.swa_utils.AveragedModel(model)
        assert same(averaged.module.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_wrapped_by_the_compiler_and_by_ddp(tmp_path):
    model, optimizer = built()
    x = optimizer.eval_state_dict(model)
    with sftorch.ship_x(model, optimizer):
        compiled = torch.compile(model, backend="eager")
        assert same(compiled.state_dict(), {f"_orig_mod.{name}": value for name, value in x.items()})
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            assert same(parallel.state_dict(), {f"module.{name}": value for name, value in x.items()})
            del parallel
        finally:
            torch.distributed.destroy_process_group()
    with sftorch.ship_x(torch.compile(model, backend="eager"), optimizer):
        assert same(model.state_dict(), x)


def test_a_group_added_later_is_shipped_too():
    model, optimizer = built()
    with sftorch.ship_x(model, optimizer):
        model.frozen.requires_grad_(True)
        optimizer.add_param_group({"params": list(model.frozen.parameters())})
        go(model, optimizer, 8, 11)
        assert same(model.state_dict(), optimizer.eval_state_dict(model))
        assert not torch.equal(model.state_dict()["frozen.weight"], model.frozen.weight)


def test_removed_it_leaves_nothing_behind():
    model, optimizer = built()
    before = [dict(vars(module)) for module in model.modules()]
    shipped = sftorch.ship_x(model, optimizer)
    assert len(SHIPPED) >= 4
    shipped.remove()
    shipped.remove()
    for module, then in zip(model.modules(), before, strict=True):
        hooks = ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
        assert all(len(vars(module)[name]) == len(then[name]) == 0 for name in hooks)
    assert not any(p in SHIPPED for p in model.parameters())
    assert {group["weights_hold"] for group in optimizer.state_dict()["param_groups"]} == {"y"}


def test_one_optimizer_may_train_several_models():
    """As sd-scripts does: one that is told to stop leaves the other at x."""
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = sftorch.SGDScheduleFree([*model.parameters(), *other.parameters()], lr=0.1)
    with sftorch.ship_x(other, optimizer):
        with sftorch.ship_x(model, optimizer):
            for _ in range(3):
                other(model(torch.ones(2, 4))).square().mean().backward()
                optimizer.step()
        x = optimizer.eval_params()
        assert torch.equal(other.state_dict()["weight"], x[other.weight])
        assert not torch.equal(other.weight, x[other.weight])
        assert torch.equal(model.state_dict()["weight"], model.weight)
    assert torch.equal(other.state_dict()["weight"], other.weight)
    assert not any(p in SHIPPED for p in other.parameters())


def test_what_cannot_be_shipped_is_refused():
    model, optimizer = built()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3"):
        sftorch.ship_x(3, optimizer)
    with pytest.raises(
        TypeError, match=r"optimizer must be one of sftorch's .* got SGD: sftorch.trainers.unwrap"
    ):
        sftorch.ship_x(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="model must be the one whose parameters this optimizer holds"):
        sftorch.ship_x(copy.deepcopy(model), optimizer)
    assert not optimizer._ships_x


def test_the_trainer_of_transformers_ships_x_by_itself_and_resumes_in_the_same_bits(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    data = [{"input_ids": [i % 16] * 4, "labels": [i % 16] * 4} for i in range(40)]

    def trainer(folder):
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=16, **shape))
        optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, warmup_steps=2)
        sftorch.ship_x(model, optimizer)
        arguments = transformers.TrainingArguments(
            str(folder),
            lr_scheduler_type="constant",
            max_steps=8,
            save_steps=4,
            use_cpu=True,
            report_to="none",
        )
        found = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        return found, model, optimizer

    whole, model, optimizer = trainer(tmp_path / "whole")
    whole.train()
    x = optimizer.eval_state_dict(model)
    shipped = load_file(tmp_path / "whole" / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(shipped[name], x[name]) for name in shipped)
    assert not torch.equal(x["bert.embeddings.word_embeddings.weight"], model.get_input_embeddings().weight)
    resumed, other, _ = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same_bits(list(other.parameters()), list(model.parameters()))
    assert same(other.state_dict(), model.state_dict())
