"""Runs the real NetworkTrainer.train() of sd-scripts on a toy: python sd_scripts_train.py FOLDER.

FOLDER is a checkout, or holds links to train_network.py, library and networks of one. Reads a JSON list of
runs from standard input, makes each in a process of its own, and prints a JSON list of what they tell: see
`Told`; null for one that was killed. Only the loading of models and data, and the loss, are the toy's;
packages that sd-scripts imports and that are not installed are empty.
"""

import contextlib
import enum
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import types
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers  # noqa: F401  before anything is empty: it asks what is installed
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel  # noqa: F401

WIDTH, BATCH = 8, 4
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
    """Batches that are shuffled at each epoch, and changed at random as they are read."""

    batch_size, num_reg_images, image_data = BATCH, 0, {}
    subsets, tag_frequency, enable_bucket, bucket_info, image_dir = (), {}, False, None, None
    width = height = min_bucket_reso = max_bucket_reso = 64
    resize_interpolation = None

    def __init__(self, samples):
        self.datasets, self.epoch, self.num_train_images = [self], 0, samples
        self.inputs = list(torch.randn(samples, BATCH, WIDTH, generator=torch.Generator().manual_seed(5)))

    def __getattr__(self, name):
        if name.startswith(("set_", "verify_", "is_")):
            return lambda *args: True
        if name.startswith("_"):
            raise AttributeError(name)
        return 0

    def set_current_epoch(self, epoch):
        while self.epoch < epoch:
            self.epoch += 1
            random.seed(self.epoch)
            random.shuffle(self.inputs)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, place):
        flipped = self.inputs[place] * random.choice((-1.0, 1.0))
        return flipped + 0.1 * np.random.random() + 0.1 * torch.randn(BATCH, WIDTH)


class Batches(Data):
    """As fine_tune.py reads them."""

    def __getitem__(self, place):
        return {"latents": super().__getitem__(place), "input_ids_list": [torch.zeros(1)]}


class Unet(Model):
    def forward(self, latents, timesteps, hidden):
        return types.SimpleNamespace(sample=super().forward(latents))


def as_fine_tuning(fine_tune):
    """What the end of fine_tune.py does; the loop and what saves are its own."""
    from library import model_util, strategy_base, strategy_sd, train_util

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = Unet()
    files, losses, optimizers, real = {}, [], [], train_util.get_optimizer

    def get_optimizer(args, trainable_params):
        found = real(args, trainable_params)
        optimizers.append(found[2])
        return found

    def save(v2, file, text_encoder, unet, *more):
        optimizer = optimizers[0]
        files[Path(file).name] = {
            "weights": taken(unet.state_dict()),
            "x": taken({name: optimizer.eval_params()[p] for name, p in unet.named_parameters()}),
            "y": taken(dict(unet.named_parameters())),
        }

    def noisy(args, scheduler, latents):
        noise = torch.randn(latents.shape)
        return noise, latents + noise, None

    def loss(*args):
        found = (args[0] - args[1]).square().mean()
        losses.append(found.item().hex())
        return found

    said = types.SimpleNamespace(tokenizer=None, encode_tokens=lambda *args: [None])
    train_util.get_optimizer = get_optimizer
    train_util.load_arbitrary_dataset = lambda *args: Batches(_spec["samples"])
    train_util.load_target_model = lambda *args: (Model(), Model(), unet, True)
    train_util.get_noise_noisy_latents_and_timesteps, train_util.conditional_loss = noisy, loss
    model_util.save_stable_diffusion_checkpoint = save
    strategy_sd.SdTokenizeStrategy = strategy_sd.SdTextEncodingStrategy = lambda *args: said
    for name in ("TokenizeStrategy", "LatentsCachingStrategy", "TextEncodingStrategy"):
        getattr(strategy_base, name).set_strategy = classmethod(lambda cls, one: None)
    fine_tune.prepare_scheduler_for_custom_training = lambda *args: None
    fine_tune.train(fine_tune.setup_parser().parse_args())
    Path(_spec["out"]).write_text(json.dumps({"files": files, "losses": losses}))


class Told:
    """What a run tells: how many micro-batches it has trained on, their losses, and prints of what it leaves.

    Attributes:
        trained: micro-batches.
        losses: of each, in hexadecimal.
        weights: print of the tensors in the last file.
        x, y: prints of the network's x and y at the end.
        state: print of the optimizer's state.
    """

    def __init__(self, spec):
        self.spec, self.losses, self.network, self.optimizer = spec, [], None, None

    def loss(self, value, network):
        self.network = network
        self.losses.append(value.hex())
        if len(self.losses) == self.spec.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)

    def at_the_end(self, args):
        if not self.losses:
            return {"trained": 0, "losses": []}
        file = Path(args.output_dir) / f"{args.output_name}.safetensors"
        weights = safetensors.torch.load_file(file)
        ours = hasattr(self.optimizer, "eval_params")
        x = self.optimizer.eval_params() if ours else {}
        held = {name: x.get(p, p) for name, p in self.network.named_parameters()}
        held |= dict(self.network.named_buffers())
        state = [each for _, each in sorted(self.optimizer.state_dict()["state"].items())]
        told = {"trained": len(self.losses), "losses": self.losses, "weights": taken(weights)}
        told |= {"x": taken({name: held[name] for name in weights})}
        told["state"] = taken({f"{i} {k}": v for i, each in enumerate(state) for k, v in each.items()})
        if ours:
            self.optimizer.train()
        now = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        return told | {"y": taken({name: now[name] for name in weights})}


def taken(tensors):
    """Returns a print of tensors by name."""
    print_ = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            print_.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return print_.hexdigest()


def trainer(told):
    from train_network import NetworkTrainer

    class Toy(NetworkTrainer):
        def load_target_model(self, *args):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return "sd_v1", Model(), torch.nn.Identity(), Model()

        def get_noise_scheduler(self, *args):
            return types.SimpleNamespace(config=types.SimpleNamespace(num_train_timesteps=1000))

        def get_tokenizers(self, *args):
            return []

        def is_train_text_encoder(self, args):
            return False

        def process_batch(self, batch, text_encoders, unet, network, *args, **kwargs):
            noise = 0.1 * torch.randn(batch.shape)  # of the run, not of the data
            loss = (unet(batch + noise) - torch.sin(batch)).square().mean()
            told.loss(loss.item(), network)
            return loss

    for name in ("get_tokenize_strategy", "get_latents_caching_strategy", "get_text_encoding_strategy"):
        setattr(Toy, name, lambda self, *args: None)
    for name in ("assert_extra_args", "cache_text_encoder_outputs_if_needed", "sample_images"):
        setattr(Toy, name, lambda self, *args: None)
    return Toy()


COMMON = """
--pretrained_model_name_or_path toy --dataset_class of.Toys --mixed_precision no --max_data_loader_n_workers 0
"""
_spec = {}


def as_script(train_network):
    """What the end of each script of sd-scripts does, of a toy."""
    from library import strategy_base, train_util

    told, real = Told(_spec), train_util.get_optimizer

    def get_optimizer(*args):
        found = real(*args)
        told.optimizer = found[2]
        return found

    class Unshuffled(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "shuffle": False})

    if not _spec.get("shuffled", True):
        torch.utils.data.DataLoader = Unshuffled
    train_util.get_optimizer = get_optimizer
    train_util.load_arbitrary_dataset = lambda *args: Data(_spec["samples"])
    for name in ("TokenizeStrategy", "LatentsCachingStrategy", "TextEncodingStrategy"):
        getattr(strategy_base, name).set_strategy = classmethod(lambda cls, one: None)
    args = train_network.setup_parser().parse_args()
    trainer(told).train(args)
    Path(_spec["out"]).write_text(json.dumps(told.at_the_end(args)))


def one(folder):
    """Makes the run `_spec`, and ends the process."""
    torch.set_num_threads(1)
    base = _spec.get("script", "train_network")
    words = [*COMMON.split(), "--seed", "1", *_spec["words"]]
    words += ["--network_module", "networks.lora", "--network_dim", "2"] if base == "train_network" else []
    if _spec.get("unseeded"):
        words.remove("--seed"), words.remove("1")
    script = Path(folder) / f"toy_{base}.py"
    with contextlib.redirect_stdout(sys.stderr):
        if _spec.get("launched"):
            from sftorch.trainers.sd_scripts import __main__ as launcher

            code = launcher.main([str(script), *words])
        else:
            sys.argv = [str(script), *words]
            {"train_network": as_script, "fine_tune": as_fine_tuning}[base](importlib.import_module(base))
            code = 0
    sys.stderr.flush()
    os._exit(code)


def main():
    sys.path.insert(0, sys.argv[1])
    sys.meta_path.insert(0, Finder())
    sys.modules["sd_scripts_train"] = sys.modules["__main__"]
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("library.train_util")
        importlib.import_module("library.config_util")
        importlib.import_module("networks.lora")
    found = []
    for spec in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as folder:
            _spec.clear()
            _spec.update({"samples": 96, "out": f"{folder}/told"} | spec)
            sys.stderr.flush()
            child = os.fork()
            if child == 0:
                try:
                    one(sys.argv[1])
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            killed = code == -signal.SIGKILL and "kill" in spec
            if code and not killed:
                raise SystemExit(f"{spec} ended with {code}")
            found.append(None if killed else json.loads(Path(_spec["out"]).read_text()))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
