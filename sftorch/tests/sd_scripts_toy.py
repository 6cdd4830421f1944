# ruff: noqa: E501
"""A toy of sd-scripts for its launcher: the shape of its loop, with the lines that the patch reads.

Only lines that `resume.patch` has anyway are upstream's. `sfcore/tests/test_sd_scripts_runs.py` runs the real one.
"""

TRAIN_UTIL = """
import importlib


def verify_training_args(args):
    pass


def get_optimizer_train_eval_fn(optimizer, args):
    return lambda: None, lambda: None


def get_optimizer(args, trainable_params):
    module, _, name = args.optimizer_type.rpartition(".")
    return name, {}, getattr(importlib.import_module(module), name)(trainable_params, lr=0.05)


def sample_image_inference(
    accelerator, args, pipeline, save_dir, prompt_dict, epoch, steps, prompt_replacement, controlnet=None
):
    return [p.detach().clone() for p in pipeline.parameters()]


class collator_class:
    def __init__(self, epoch, step, dataset):
        self.epoch, self.dataset = epoch, dataset

    def __call__(self, examples):
        self.dataset.set_current_epoch(self.epoch.value)
        return examples[0]


class LossRecorder:
    pass
"""

TRAIN_NETWORK = """
import argparse
import json
import logging
import math
import os
import random
from multiprocessing import Value

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

import library.train_util as train_util
import sftorch

logger = logging.getLogger(__name__)
TOLD = []


class Data(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = list(torch.randn(11, 3, generator=torch.Generator().manual_seed(4)))
        self.epoch = 0

    def set_current_epoch(self, epoch):
        while self.epoch < epoch:
            self.epoch += 1
            random.seed(self.epoch)
            random.shuffle(self.rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index] * random.choice((1, -1)) + np.random.random() + torch.rand(3)


class NetworkTrainer:
    def train(self, args):
        train_util.verify_training_args(args)
        train_dataset_group = Data()

        if args.seed is None:
            args.seed = random.randint(0, 2**32)
        set_seed(args.seed)
        current_epoch, current_step = Value("i", 0), Value("i", 0)
        collator = train_util.collator_class(current_epoch, current_step, train_dataset_group)
        accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True)
        network = torch.nn.Linear(3, 1)
        optimizer = sftorch.AdamWScheduleFree(network.parameters(), lr=0.05, warmup_steps=3)
        train_fn, eval_fn = train_util.get_optimizer_train_eval_fn(optimizer, args)

        train_dataloader = torch.utils.data.DataLoader(
            train_dataset_group,
            batch_size=1,
            shuffle=True,
            collate_fn=collator,
        )
        network, optimizer, train_dataloader = accelerator.prepare(network, optimizer, train_dataloader)
        steps_from_state = None

        def save(models, weights, output_dir):
            train_state_file = os.path.join(output_dir, "train_state.json")
            with open(train_state_file, "w", encoding="utf-8") as f:
                json.dump({"current_epoch": current_epoch.value, "current_step": current_step.value + 1}, f)

        accelerator.register_save_state_pre_hook(save)
        if args.resume:
            accelerator.load_state(args.resume)
            with open(os.path.join(args.resume, "train_state.json")) as f:
                steps_from_state = json.load(f)["current_step"]
        num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)
        initial_step = args.initial_step or steps_from_state or 0
        epoch_to_start = 0
        if initial_step > 0:
            if args.skip_until_initial_step:
                logger.info(f"skipping {initial_step} steps / {initial_step}ステップをスキップします")
                initial_step *= args.gradient_accumulation_steps

                # set epoch to start to make initial_step less than len(train_dataloader)
                epoch_to_start = initial_step // math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            else:
                initial_step = 0
        global_step = 0
        train_fn()
        # training loop
        if initial_step > 0:  # only if skip_until_initial_step is specified
            for skip_epoch in range(epoch_to_start):  # skip epochs
                logger.info(f"skipping epoch {skip_epoch+1} because initial_step (multiplied) is {initial_step}")
                initial_step -= len(train_dataloader)
            global_step = initial_step

        progress_bar = tqdm(
            range(args.max_train_steps - initial_step), smoothing=0, disable=not accelerator.is_local_main_process, desc="steps"
        )
        for epoch in range(epoch_to_start, num_train_epochs):
            current_epoch.value = epoch + 1

            skipped_dataloader = None
            if initial_step > 0:
                skipped_dataloader = accelerator.skip_first_batches(train_dataloader, initial_step - 1)
                initial_step = 1
            for step, batch in enumerate(skipped_dataloader or train_dataloader):
                current_step.value = global_step
                if initial_step > 0:
                    initial_step -= 1
                    continue
                with accelerator.accumulate(network):
                    loss = (network(batch + torch.randn(3)) - batch.sum()).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                TOLD.append(loss.item().hex())
                if accelerator.sync_gradients:
                    global_step += 1
                    progress_bar.update(1)
                    eval_fn()
                    if global_step in args.save:
                        accelerator.save_state(os.path.join(args.output_dir, str(global_step)))
                    train_fn()
                if global_step >= args.max_train_steps:
                    break
        progress_bar.close()
        eval_fn()
        state = {name: p.detach().clone() for name, p in network.named_parameters()}
        torch.save({"x": state, "losses": TOLD, "seed": args.seed}, os.path.join(args.output_dir, "last.pt"))


def setup_parser():
    parser = argparse.ArgumentParser()
    for name in ("seed", "max_train_steps", "gradient_accumulation_steps", "initial_step", "initial_epoch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--save", type=int, nargs="*", default=[])
    parser.add_argument("--skip_until_initial_step", action="store_true")
    parser.add_argument("--output_dir")
    parser.add_argument("--resume")
    return parser


if __name__ == "__main__":
    NetworkTrainer().train(setup_parser().parse_args())
"""

SDXL_TRAIN_NETWORK = """
import train_network


class Sdxl(train_network.NetworkTrainer):
    pass


if __name__ == "__main__":
    Sdxl().train(train_network.setup_parser().parse_args())
"""


TRAIN_DB = """
import argparse
import os

import torch
from accelerate import Accelerator

import library.train_util as train_util


def train(args):
    train_util.verify_training_args(args)
    torch.manual_seed(3)
    accelerator = Accelerator(cpu=True)
    unet, text_encoder = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    vae = torch.nn.Linear(1, 1)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    _, _, optimizer = train_util.get_optimizer(args, trainable_params=parameters)
    inner = optimizer
    unet, text_encoder, vae = (accelerator.prepare(one) for one in (unet, text_encoder, vae))
    optimizer = accelerator.prepare(optimizer)
    if args.resume:
        accelerator.load_state(args.resume)
    for step in range(args.max_train_steps):
        text_encoder(unet(torch.ones(4, 3) * (step + 1))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            drawn = train_util.sample_image_inference(accelerator, args, unet, None, {}, None, 2, None)
            told = [inner.eval_params()[p] for p in unet.parameters()] if hasattr(inner, "eval_params") else drawn
            assert all(torch.equal(a, b) for a, b in zip(drawn, told)), "y was drawn"
    accelerator.save_state(os.path.join(args.output_dir, "state"))
    models = {"unet": accelerator.unwrap_model(unet), "text_encoder": text_encoder, "vae": vae}
    saved = {name: model.state_dict() for name, model in models.items()}
    y = {name: {k: p.detach().clone() for k, p in model.named_parameters()} for name, model in models.items()}
    torch.save({"saved": saved, "y": y}, os.path.join(args.output_dir, "last.pt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("output_dir", "resume", "optimizer_type"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--max_train_steps", type=int)
    train(parser.parse_args())
"""


def write(folder):
    """Writes the toy into a folder."""
    (folder / "library").mkdir(parents=True)
    (folder / "library" / "__init__.py").write_text("")
    (folder / "library" / "train_util.py").write_text(TRAIN_UTIL)
    (folder / "train_network.py").write_text(TRAIN_NETWORK, encoding="utf-8")
    (folder / "sdxl_train_network.py").write_text(SDXL_TRAIN_NETWORK)
    (folder / "train_db.py").write_text(TRAIN_DB)
    return folder
