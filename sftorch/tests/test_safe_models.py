"""The safe-model table: in each real tool what is on disk is x, and a resumed run ends in the same bits.

A tool trains eight steps and saves after the fourth and the eighth, in the middle of training.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sftorch
from sftorch.tests.accelerators import fresh_accelerate  # noqa: F401
from sftorch.tests.pages import blocks, run
from sftorch.trainers import unwrap

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore"),  # what the tools say to each other
    pytest.mark.filterwarnings("error:.*(sftorch|weights hold|is one of y)"),
]
STEPS, HALF = 8, 4
OPTIONS = {"lr": 0.05, "warmup_steps": 2}
SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


class Run(NamedTuple):
    """What a run leaves.

    Attributes:
        on_disk: what was saved last, read as its users would, by the model's own names.
        x, y: what the optimizer says these are.
        state: of the optimizer.
    """

    on_disk: dict
    x: dict
    y: dict
    state: dict


def left(model, optimizer, on_disk, rename=lambda name: name):
    ours = unwrap(optimizer)
    state = ours.state_dict()["state"]
    x = ours.eval_state_dict(model)
    ours.train()
    y = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
    return Run({rename(name): value for name, value in on_disk.items()}, x, y, state)


def net(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.Linear(6, 2))


def optimizer_of(model, safe):
    optimizer = sftorch.AdamWScheduleFree([p for p in model.parameters() if p.requires_grad], **OPTIONS)
    if safe:
        sftorch.ship_x(model, optimizer)
    return optimizer


def batch(step):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, first, last, loss=lambda out: out.square().mean()):
    for step in range(first, last):
        loss(model(batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()


def stretches(resume):
    """Yields the first step, the last, and what is trained between."""
    return [(begin, begin + 4) for begin in (range(0, STEPS, 4) if resume is None else [4])]


def plain_loop(folder, resume, safe):
    model = net()
    optimizer = optimizer_of(model, safe)
    if resume:
        saved = torch.load(resume / "4.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for first, last in stretches(resume):
        train(model, optimizer, first, last)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, folder / f"{last}.pt")
    return left(model, optimizer, torch.load(folder / "8.pt", weights_only=True)["model"])


def accelerate(folder, resume, safe):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    bare = net()
    model, optimizer = accelerator.prepare(bare, optimizer_of(bare, safe))
    if resume:
        accelerator.load_state(resume / "4")
    for first, last in stretches(resume):
        train(model, optimizer, first, last)
        accelerator.save_state(folder / f"{last}")
        accelerator.save_model(model, folder / f"model-{last}")
    on_disk = load_file(folder / "model-8" / "model.safetensors")
    of_state = load_file(folder / "8" / "model.safetensors")
    assert all(torch.equal(on_disk[name], of_state[name]) for name in on_disk)
    return left(bare, optimizer, on_disk)


def ignite(folder, resume, safe):
    pytest.importorskip("ignite", reason="needs pytorch-ignite")
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint

    model = net()
    optimizer = optimizer_of(model, safe)

    def update(engine, _):
        train(model, optimizer, engine.state.iteration - 1, engine.state.iteration)

    trainer = Engine(update)
    parts = {"model": model, "optimizer": optimizer, "trainer": trainer}
    saver = Checkpoint(parts, folder, n_saved=None, global_step_transform=lambda *_: trainer.state.iteration)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    if resume:
        Checkpoint.load_objects(parts, torch.load(resume / "checkpoint_4.pt", weights_only=True))
    trainer.run([None] * HALF, max_epochs=2)
    return left(model, optimizer, torch.load(folder / "checkpoint_8.pt", weights_only=True)["model"])


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return batch(index)[0], torch.zeros(2)


def lightning(folder, resume, safe, callbacks=()):
    from lightning import pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, pair, index):
            return self.net(pair[0]).square().mean()

        def configure_optimizers(self):
            return optimizer_of(self, safe)

    saver = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[saver, *callbacks],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    loader = torch.utils.data.DataLoader(Pairs(), 5)
    trainer.fit(module, loader, ckpt_path=resume and resume / "step=4.ckpt")
    saved = torch.load(folder / "step=8.ckpt", weights_only=True)
    return left(module, trainer.optimizers[0], saved["state_dict"])


def lightning_callback(folder, resume, safe):
    from sftorch.trainers.lightning import ScheduleFreeCallback

    return lightning(folder, resume, False, [ScheduleFreeCallback()])


def fastai(folder, resume, safe):
    pytest.importorskip("fastai", reason="needs fastai, 250 MB with spacy and pandas")
    from fastai.callback.tracker import SaveModelCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    from sftorch.trainers.fastai import ScheduleFreeCallback

    loaders = DataLoaders(torch.utils.data.DataLoader(Pairs(), 5), torch.utils.data.DataLoader(Pairs(), 5))
    learn = Learner(
        loaders,
        net(),
        loss_func=lambda out, target: out.square().mean(),
        opt_func=functools.partial(OptimWrapper, opt=sftorch.AdamWScheduleFree, warmup_steps=2),
        lr=OPTIONS["lr"],
        path=folder,
        cbs=[ScheduleFreeCallback()] if safe else [],
    )
    saver = SaveModelCallback(every_epoch=True, with_opt=True)
    with learn.no_bar(), learn.no_logging():
        if resume:
            learn.load(resume / "models" / "model_0")
        learn.fit(2, cbs=saver, start_epoch=1 if resume else 0)
    on_disk = torch.load(folder / "models" / "model_1.pth", weights_only=True)["model"]
    return left(learn.model, learn.opt, on_disk)


def timm(folder, resume, safe):
    pytest.importorskip("timm", reason="needs timm, 45 MB with torchvision")
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = net()
    optimizer = run("trainers.md", "timm", model=model)["optimizer"] if safe else optimizer_of(model, False)
    average = ModelEmaV3(model, decay=0.5)
    if resume:
        resume_checkpoint(model, resume / "checkpoint-0.pth.tar", optimizer)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(folder))
    for first, last in stretches(resume):
        train(model, optimizer, first, last)
        average.update(model)
        saver.save_checkpoint(last // 4 - 1, metric=last)
    on_disk = torch.load(folder / "checkpoint-1.pth.tar", weights_only=False)
    if safe and not resume:
        half = torch.load(folder / "checkpoint-0.pth.tar", weights_only=False)["state_dict"]
        mean = (net().state_dict()["0.weight"] + half["0.weight"]) / 2
        mean = (mean + on_disk["state_dict"]["0.weight"]) / 2
        torch.testing.assert_close(on_disk["state_dict_ema"]["0.weight"], mean)
    return left(model, optimizer, on_disk["state_dict"])


def arguments(kind, folder, **options):
    return kind(
        str(folder),
        lr_scheduler_type="constant",
        max_steps=STEPS,
        save_steps=HALF,
        per_device_train_batch_size=4,
        logging_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def trained_by(trainer, safe, folder, resume, file, rename=lambda name: name):
    """Runs a Trainer; one that is not ours gets its optimizer ready made."""
    if trainer.optimizer_cls_and_kwargs is None:
        trainer.optimizer = optimizer_of(trainer.model, safe)
    trainer.train(resume_from_checkpoint=resume and str(resume / "checkpoint-4"))
    return left(trainer.model, trainer.optimizer, load_file(folder / "checkpoint-8" / file), rename)


def transformers(folder, resume, safe, mixin=False):
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

    from sftorch.trainers.hf import ScheduleFreeTrainer

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=16, **SHAPE))
    data = [{"input_ids": [i % 16] * 4, "labels": [i % 16] * 4} for i in range(40)]
    own = {"optimizer_cls_and_kwargs": (sftorch.AdamWScheduleFree, OPTIONS)} if mixin else {}
    trainer = (ScheduleFreeTrainer if mixin else Trainer)(
        model, arguments(TrainingArguments, folder), train_dataset=data, **own
    )
    return trained_by(trainer, safe, folder, resume, "model.safetensors")


def transformers_mixin(folder, resume, safe):
    return transformers(folder, resume, safe, mixin=True)


def lora_name(name):
    """Returns a peft model's own name for what its adapter file has."""
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


def trl(folder, resume, safe, mixin=False, lora=False):
    pytest.importorskip("trl", reason="needs trl, 260 MB with datasets and pyarrow")
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from sftorch.trainers.hf import ScheduleFreeMixin

    class Ours(ScheduleFreeMixin, SFTTrainer):
        pass

    words = {f"w{i}": i for i in range(20)} | {"<pad>": 20, "<eos>": 21}
    tokens = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    data = [{"text": " ".join(f"w{i * k % 20}" for k in range(1, 6))} for i in range(40)]
    torch.manual_seed(0)
    own = {"optimizer_cls_and_kwargs": (sftorch.AdamWScheduleFree, OPTIONS)} if mixin else {}
    if lora:
        own["peft_config"] = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    trainer = (Ours if mixin else SFTTrainer)(
        LlamaForCausalLM(LlamaConfig(vocab_size=24, num_key_value_heads=2, **SHAPE)),
        args=arguments(SFTConfig, folder, bf16=False, max_length=8, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(data),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>"
        ),
        **own,
    )
    if lora:
        return trained_by(trainer, safe, folder, resume, "adapter_model.safetensors", lora_name)
    return trained_by(trainer, safe, folder, resume, "model.safetensors")


def trl_peft(folder, resume, safe):
    return trl(folder, resume, safe, lora=True)


def trl_mixin(folder, resume, safe):
    return trl(folder, resume, safe, mixin=True)


def trl_mixin_peft(folder, resume, safe):
    return trl(folder, resume, safe, mixin=True, lora=True)


def adapted():
    pytest.importorskip("peft", reason="needs peft")
    from peft import LoraConfig, get_peft_model

    bare = net(nn.LayerNorm)  # an adapter's file has no buffers of the model
    return get_peft_model(bare, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="gaussian"))


def peft(folder, resume, safe):
    model = adapted()
    optimizer = optimizer_of(model, safe)
    if resume:
        model.load_adapter(resume / "4", "default")
        model.train()
        optimizer.load_state_dict(torch.load(resume / "4" / "optimizer.pt", weights_only=True))
    for first, last in stretches(resume):
        train(model, optimizer, first, last)
        model.save_pretrained(folder / f"{last}")
        torch.save(optimizer.state_dict(), folder / f"{last}" / "optimizer.pt")
    return left(model, optimizer, load_file(folder / "8" / "adapter_model.safetensors"), lora_name)


# Plain ones, with ship_x or with nothing, and those with something of ours in them.
TOOLS = {
    "torch.save": plain_loop,
    "accelerate": accelerate,
    "ignite": ignite,
    "Lightning": lightning,
    "fastai": fastai,
    "timm": timm,
    "peft": peft,
    "transformers": transformers,
    "TRL": trl,
    "TRL and peft": trl_peft,
}
OURS = {
    "Lightning, our callback": lightning_callback,
    "transformers, our mixin": transformers_mixin,
    "TRL, our mixin": trl_mixin,
    "TRL and peft, our mixin": trl_mixin_peft,
}


def assert_same(found, expected):
    assert found.keys() <= expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("tool", [*TOOLS, *OURS])
def test_what_is_on_disk_is_x_and_a_resumed_run_ends_in_the_same_bits(tool, tmp_path):
    train_with = (TOOLS | OURS)[tool]
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    for folder in folders:
        folder.mkdir()
    whole = train_with(folders[0], None, safe=True)
    moved = {name for name in whole.x if not torch.equal(whole.x[name], whole.y[name])}
    assert len(moved) >= 4 or tool.startswith("TRL and peft")
    assert moved & whole.on_disk.keys()
    assert_same(whole.on_disk, whole.x)
    resumed = train_with(folders[1], folders[0], safe=True)
    assert_same(resumed.on_disk, whole.on_disk)
    assert_same(resumed.y, whole.y)
    assert resumed.state.keys() == whole.state.keys()
    for index, state in whole.state.items():
        assert all(torch.equal(state[name], resumed.state[index][name]) for name in ("z", "exp_avg_sq"))


def test_a_merge_of_adapters_is_that_of_x():
    model = adapted()
    optimizer = optimizer_of(model, safe=True)
    train(model, optimizer, 0, STEPS)
    expected = adapted()
    expected.load_state_dict(model.state_dict())
    expected = expected.merge_and_unload().state_dict()
    with optimizer.evaluation():
        merged = model.merge_and_unload()
    assert_same(merged.state_dict(), expected)
    assert not torch.equal(merged[0].weight, net(nn.LayerNorm)[0].weight)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_a_merge_of_y_is_not_made_without_a_warning(merge, safe):
    model = adapted()
    optimizer = optimizer_of(model, safe=safe)
    train(model, optimizer, 0, STEPS)
    with pytest.warns(UserWarning, match=rf"^{merge} of a .* merges y.*optimizer\.evaluation\(\)") as caught:
        getattr(model, merge)()
    assert [one.filename for one in caught if "merges y" in str(one.message)] == [__file__]


@pytest.mark.parametrize("tool", TOOLS)
def test_with_nothing_on_y_is_not_shipped_without_a_warning(tool, tmp_path):
    with pytest.warns(UserWarning, match=r"is one of y.*sftorch\.ship_x\(model, optimizer\)") as caught:
        run = TOOLS[tool](tmp_path, None, safe=False)
    assert sum("is one of y" in str(one.message) for one in caught) == 1
    assert any(not torch.equal(run.on_disk[name], run.x[name]) for name in run.on_disk)


def test_timm_knows_the_name_and_can_do_without_a_scheduler():
    pytest.importorskip("timm", reason="needs timm, 45 MB with torchvision")
    from timm.scheduler import create_scheduler_v2

    optimizer = run("trainers.md", "timm", model=net())["optimizer"]
    assert type(optimizer) is sftorch.AdamWScheduleFree
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert {group["warmup_steps"] for group in optimizer.param_groups} == {100}
    assert create_scheduler_v2(optimizer, sched="none")[0] is None


def test_the_page_on_ignite_tells_the_truth(tmp_path, monkeypatch):
    pytest.importorskip("ignite", reason="needs pytorch-ignite")
    monkeypatch.chdir(tmp_path)
    names = run("trainers.md", "ignite", model=net(), loader=[batch(step) for step in range(3)])
    (file,) = (tmp_path / "checkpoints").glob("*.pt")
    x = names["optimizer"].eval_state_dict(names["model"])
    assert_same(torch.load(file, weights_only=True)["model"], x)


def test_the_page_on_any_trainer_tells_the_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    optimizer = run("trainers.md", "Any trainer", model=model)["optimizer"]
    train(model, optimizer, 0, 3)
    x = optimizer.eval_state_dict(model)
    assert_same(model.state_dict(), x)
    assert not torch.equal(x["0.weight"], model[0].weight)
    assert torch.load("model.pt", weights_only=True).keys() == x.keys()


def test_the_page_on_logging_tells_the_truth():
    model = net()
    optimizer = optimizer_of(model, safe=False)
    train(model, optimizer, 0, 3)
    scalars, logged = {}, {}

    class Writer:
        def add_scalar(self, name, value, step):
            scalars[name] = (value, step)

    class Logger:
        def log(self, values, step):
            logged.update({name: (value, step) for name, value in values.items()})

    for code in blocks("trainers.md", "python", "Logging"):
        exec(code, {"optimizer": optimizer, "step": 3, "writer": Writer(), "run": Logger()})
    assert scalars == logged
    assert all(type(value) is float and step == 3 for value, step in logged.values())
    assert logged["schedule_free/lr"] == (0.05, 3)
    names = {f"schedule_free/{name}" for name in ("c", "effective_lr", "lr", "lr_max", "step", "weight_sum")}
    assert logged.keys() == names | {"schedule_free/x_z_distance"}
