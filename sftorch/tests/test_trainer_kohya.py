"""A flow of the shape that sd-scripts has around its optimizers: names, literals, modes, LoRA files.

Facts are from kohya-ss/sd-scripts, library/optimizer.py and train_network.py as of mid-2026; no code of it.
"""

import ast
import importlib
import re

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import sftorch
from sfcore import plan
from sfcore.checks import HyperparameterError
from sftorch.tests.accelerators import fresh_accelerate  # noqa: F401
from sftorch.tests.pages import DOCS, blocks, flags
from sftorch.trainers import sd_scripts

ARGS = ("weight_decay=0.01", "betas=(0.9,0.99)", "warmup_steps=5")
UPDATES, ACCUMULATE = 12, 8
MIXED = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))  # of rank 4, as the network is


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Lora(torch.nn.Module):
    """Two low-rank layers; its parameters come in two groups, as dict values, each with an lr of its own."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.unet = torch.nn.ParameterDict(
            {"down": torch.randn(4, 16, generator=generator) / 4, "up": torch.zeros(16, 4)}
        )
        self.text = torch.nn.ParameterDict({"bias": torch.zeros(16)})

    def forward(self, inputs):
        return inputs @ self.unet["down"].T @ self.unet["up"].T + self.text["bias"]

    def groups(self, lr):
        named = [({f"u.{k}": p for k, p in self.unet.items()}, lr), (dict(self.text.items()), lr / 2)]
        return [{"params": params.values(), "lr": of_group} for params, of_group in named]


class NoScheduler:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        pass

    def get_last_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]


def find(optimizer_type):
    """A name that ends so is looked up in schedulefree, which must be there, and then by its dots."""
    assert optimizer_type.lower().endswith("schedulefree")
    stock = vars(importlib.import_module("schedulefree"))
    module, _, name = optimizer_type.rpartition(".")
    return getattr(importlib.import_module(module), name) if module else stock[name]


def get_optimizer(optimizer_type, optimizer_args, params, lr):
    kwargs = {}
    for arg in optimizer_args:
        key, value = arg.split("=")
        kwargs[key] = ast.literal_eval(value)
    optimizer = find(optimizer_type)(params, lr=lr, **kwargs)
    optimizer.train()
    return optimizer


def batch(micro, count=2):
    generator = torch.Generator().manual_seed(micro)
    inputs = torch.randn(count, 16, generator=generator)
    return inputs, inputs[:, :4] @ MIXED + 0.1 * torch.randn(count, 16, generator=generator)


def loss(network, inputs, targets):
    return (network(inputs) - targets).square().mean()


class Training:
    """One start of the trainer."""

    def __init__(
        self, args=ARGS, kind="sftorch.AdamWScheduleFree", weights=None, state=None, dtype=torch.float32
    ):
        self.network, self.dtype = Lora(seed=0), dtype
        if weights is not None:
            self.network.load_state_dict(load_file(weights))
        self.raw = get_optimizer(kind, args, self.network.groups(0.02), 0.02)
        self.train_fn, self.eval_fn = self.raw.train, self.raw.eval
        scheduler = NoScheduler(self.raw)
        self.network.to(dtype)  # full_bf16 casts after the optimizer is built
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
        prepared = self.accelerator.prepare(self.network, self.raw, scheduler)
        self.network, self.optimizer, self.scheduler = prepared
        if state is not None:
            self.accelerator.load_state(state)
        self.x, self.losses = {}, []

    def validate(self):
        self.eval_fn()
        inputs, targets = batch(10_000, 512)
        with torch.no_grad():
            found = float(loss(self.network, inputs.to(self.dtype), targets))
        self.train_fn()
        return found

    def run(self, first, last, folder=None):
        for micro in range(first * ACCUMULATE, last * ACCUMULATE):
            inputs, targets = (t.to(self.dtype) for t in batch(micro))
            with self.accelerator.accumulate(self.network):
                self.accelerator.backward(loss(self.network, inputs, targets))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.network.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad(set_to_none=True)
            if self.accelerator.sync_gradients:
                self.save((micro + 1) // ACCUMULATE, folder)
        return self

    def save(self, update, folder):
        self.x[update] = self.raw.eval_state_dict(self.network)
        self.losses.append(self.validate())
        self.eval_fn()
        if folder is not None:
            copies = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
            save_file(copies, folder / f"{update}.safetensors")
            self.accelerator.save_state(folder / f"{update}-state")
        self.train_fn()


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_each_optimizer_is_found_by_its_dotted_name(name):
    found = find(f"sftorch.{name}")
    assert issubclass(found, torch.optim.Optimizer)
    assert found.__module__.startswith("sftorch.")


def test_literals_and_the_lr_of_each_group_arrive():
    optimizer = Training().raw
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01]
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["warmup_steps"]) == (0.01, (0.9, 0.99), 5)


def test_what_is_wrong_with_the_arguments_is_said_at_once():
    with pytest.raises(HyperparameterError) as caught:
        Training(("warmup_steps=0.05", "betas=(0.9,1.5)"))
    assert len(caught.value.problems) == 2


def test_a_misspelt_argument_is_refused():
    with pytest.raises(TypeError, match="prior_step"):
        Training(("prior_step=800",))


def test_every_file_holds_x_and_sampling_does_not_disturb_training(tmp_path):
    saved, plain = Training().run(0, UPDATES, tmp_path), Training().run(0, UPDATES)
    for update in range(1, UPDATES + 1):
        assert same(load_file(tmp_path / f"{update}.safetensors"), saved.x[update])
        assert same(saved.x[update], plain.x[update])
    assert not same(saved.x[UPDATES], saved.network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "full_bf16"])
def test_a_resumed_state_goes_on_in_the_same_bits(dtype, tmp_path):
    whole = Training(dtype=dtype).run(0, UPDATES, tmp_path)
    resumed = Training(dtype=dtype, state=tmp_path / "7-state").run(7, UPDATES)
    assert all(same(resumed.x[update], whole.x[update]) for update in range(8, UPDATES + 1))
    assert same(resumed.network.state_dict(), whole.network.state_dict())


def test_the_warm_up_is_the_optimizers_and_the_scheduler_reports_the_full_lr():
    training = Training()
    lrs = []
    for update in range(7):
        training.run(update, update + 1)
        lrs.append(training.raw.metrics()[0]["lr"])
    assert lrs == pytest.approx([0.004, 0.008, 0.012, 0.016, 0.02, 0.02, 0.02])
    assert training.scheduler.get_last_lr() == [0.02, 0.01]


@pytest.fixture
def lora_file(tmp_path):
    """A well trained LoRA, without optimizer state: the loss left is the noise of the targets, 0.01."""
    trained = {"unet.down": torch.eye(4, 16), "unet.up": MIXED.T.contiguous(), "text.bias": torch.zeros(16)}
    save_file(trained, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def worst_after_restart(args, file):
    """Returns the largest validation loss at x of 20 updates over the loss of the file."""
    training = Training(args, weights=file)
    before = training.validate()
    return max(training.run(0, 20).losses) / before


def test_prior_steps_keep_a_lora_file_that_is_trained_on_with_accumulation(lora_file):
    # Measured: 1.0006.
    assert worst_after_restart((*ARGS, "prior_steps=800"), lora_file) < 1.01


def test_without_prior_steps_the_first_update_throws_the_file_away(lora_file):
    # Measured: 2.26 with a warm-up of 5, 4.40 without.
    assert worst_after_restart(ARGS, lora_file) > 1.5
    assert worst_after_restart(ARGS[:2], lora_file) > 3


def test_the_flags_of_the_page_build_the_optimizer_that_it_describes():
    said = [block for block in blocks("kohya.md", "bash") if "--optimizer_type" in block]
    assert [plan.check(block).problems for block in said] == [(), ()]
    commands = [flags(block) for block in said]
    for command, prior_steps in zip(commands, (0, 800), strict=True):
        (kind,), (lr,) = command["--optimizer_type"], command["--learning_rate"]
        group = get_optimizer(kind, command["--optimizer_args"], Lora(0).groups(1.0), float(lr)).param_groups[
            0
        ]
        assert (group["betas"], group["warmup_steps"], group["prior_steps"]) == (
            (0.9, 0.99),
            100,
            prior_steps,
        )
        assert (command["--lr_scheduler"], command["--lr_warmup_steps"]) == (["constant"], ["0"])
    assert commands[1]["--network_weights"] == ["last.safetensors"]


def test_weights_that_are_scaled_behind_the_optimizer_corrupt_x():
    """As --scale_weight_norms does; x is the plain average of z here."""
    for limit in (None, 0.5):
        p = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
        optimizer = sftorch.SGDScheduleFree([p], lr=0.1, weight_lr_power=0.0)
        z = []
        for _ in range(5):
            p.grad = p.detach() - torch.tensor([1.0, -1.0])
            optimizer.step()
            z.append(optimizer.state[p]["z"].clone())
            if limit is not None:
                p.data.mul_(min(1.0, limit / float(p.data.norm())))
        gap = (optimizer.eval_params()[p] - torch.stack(z).mean(0)).abs().max()
        assert gap < 1e-6 if limit is None else gap > 0.1


NAMED = re.compile(r"`(test_\w+)`")


def test_every_section_of_the_pages_names_its_tests_and_they_are_there():
    root = DOCS.parent
    there = {
        name
        for package in ("sfcore", "sftorch")
        for path in (root / package / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    page, patch = ((DOCS / name).read_text(encoding="utf-8") for name in ("kohya.md", "kohya-patch.md"))
    sections = re.split(r"^#+ .*$", page, flags=re.MULTILINE)[1:]
    assert all(NAMED.search(section) for section in sections)
    named = {*NAMED.findall(page), *NAMED.findall(patch)}
    assert named - there == set()
    assert len(named) > 20


def test_the_page_of_the_patch_has_it_as_it_is_applied():
    (diff,) = blocks("kohya-patch.md", "diff")
    assert diff == sd_scripts.PATCH.read_text(encoding="utf-8")
