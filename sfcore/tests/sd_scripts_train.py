"""Runs the real NetworkTrainer.train() of sd-scripts on a toy: python sd_scripts_train.py CHECKOUT.

Reads a JSON list of argument lists from standard input, trains with each in turn, and prints as JSON how many
micro-batches each has trained on. Only the loading of models and data, and the loss, are the toy's; packages
that sd-scripts imports and that are not installed are empty.
"""

import contextlib
import enum
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types

import torch
import transformers  # noqa: F401  before anything is empty: it asks what is installed
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel  # noqa: F401

WIDTH, SAMPLES, BATCH = 8, 96, 4
# Pipelines that draw pictures, written for older versions of transformers.
NOT_NEEDED = ("library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion", "library.model_util")
MISSING = ("cv2", "diffusers", "einops", "imagesize", "sentencepiece", "toml", "torchvision", "voluptuous")
MISSING = tuple(name for name in MISSING if importlib.util.find_spec(name) is None)


class Nothing(type):
    """A class, a function and a value of a package that is not there."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else cls

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING or name in NOT_NEEDED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        if module.__name__ == "diffusers.optimization":
            module.SchedulerType = enum.Enum("SchedulerType", {"PIECEWISE_CONSTANT": "piecewise_constant"})
            module.TYPE_TO_SCHEDULER_FUNCTION = {}


class Transformer2DModel(torch.nn.Module):
    """networks.lora looks for modules of this name."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(WIDTH, 16), torch.nn.Linear(16, WIDTH)

    def forward(self, inputs):
        return self.outer(torch.tanh(self.inner(inputs)))


class Model(torch.nn.Module):
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.block = Transformer2DModel()

    def forward(self, inputs):
        return self.block(inputs)

    def enable_xformers_memory_efficient_attention(self, *args):
        pass

    set_use_memory_efficient_attention = enable_xformers_memory_efficient_attention


class Data(torch.utils.data.Dataset):
    batch_size, num_train_images, num_reg_images, image_data = BATCH, SAMPLES, 0, {}
    subsets, tag_frequency, enable_bucket, bucket_info, image_dir = (), {}, False, None, None
    width = height = min_bucket_reso = max_bucket_reso = 64
    resize_interpolation = None

    def __init__(self):
        self.datasets = [self]
        self.inputs = torch.randn(SAMPLES, BATCH, WIDTH, generator=torch.Generator().manual_seed(5))

    def __getattr__(self, name):
        if name.startswith(("set_", "verify_", "is_")):
            return lambda *args: True
        if name.startswith("_"):
            raise AttributeError(name)
        return 0

    def __len__(self):
        return SAMPLES

    def __getitem__(self, place):
        return self.inputs[place]


def trainer(counts):
    from train_network import NetworkTrainer

    class Toy(NetworkTrainer):
        def load_target_model(self, *args):
            torch.manual_seed(0)
            return "sd_v1", Model(), torch.nn.Identity(), Model()

        def get_noise_scheduler(self, *args):
            return types.SimpleNamespace(config=types.SimpleNamespace(num_train_timesteps=1000))

        def get_tokenizers(self, *args):
            return []

        def is_train_text_encoder(self, args):
            return False

        def process_batch(self, batch, text_encoders, unet, *args, **kwargs):
            counts[-1] += 1
            return (unet(batch) - torch.sin(batch)).square().mean()

    for name in ("get_tokenize_strategy", "get_latents_caching_strategy", "get_text_encoding_strategy"):
        setattr(Toy, name, lambda self, *args: None)
    for name in ("assert_extra_args", "cache_text_encoder_outputs_if_needed", "sample_images"):
        setattr(Toy, name, lambda self, *args: None)
    return Toy


def main():
    sys.path.insert(0, sys.argv[1])
    sys.meta_path.insert(0, Finder())
    from library import strategy_base, train_util
    from train_network import setup_parser

    train_util.load_arbitrary_dataset = lambda *args: Data()
    for name in ("TokenizeStrategy", "LatentsCachingStrategy", "TextEncodingStrategy"):
        getattr(strategy_base, name).set_strategy = classmethod(lambda cls, one: None)
    counts = []
    make = trainer(counts)
    for words in json.load(sys.stdin):
        counts.append(0)
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        common = ["--pretrained_model_name_or_path", "toy", "--network_module", "networks.lora"]
        common += [
            "--dataset_class",
            "of.Toys",
            "--max_data_loader_n_workers",
            "0",
            "--mixed_precision",
            "no",
        ]
        with contextlib.redirect_stdout(sys.stderr):
            make().train(setup_parser().parse_args([*common, "--network_dim", "2", "--seed", "1", *words]))
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
