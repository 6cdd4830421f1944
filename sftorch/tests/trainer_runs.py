"""Real trainers on two processes: `torchrun --nproc-per-node 2 -m sftorch.tests.trainer_runs FOLDER KIND`.

Each function runs to the end, is cut and resumed, and returns facts about both, which are written as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def _same(found, expected):
    return found.keys() <= expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def _whole(state):
    return {
        k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in state.items()
    }


def hf(folder):
    from safetensors.torch import load_file

    from sftorch.tests.test_trainer_hf import StopAt, Witness, trainer

    witness, later = Witness(), Witness()
    finished = trainer(folder / "whole", callbacks=[witness])
    finished.train()
    trainer(folder / "cut", callbacks=[StopAt(6)]).train()
    resumed = trainer(folder / "cut", callbacks=[later])
    resumed.train(resume_from_checkpoint=str(folder / "cut" / "checkpoint-6"))
    shipped = load_file(folder / "whole" / "checkpoint-12" / "model.safetensors")
    return {
        "processes": finished.args.world_size,
        "same bits": _same(later.x[12], witness.x[12]),
        "ships x": _same(shipped, witness.x[12]),
        "leaves x": _same(resumed.model.state_dict(), witness.x[12]),
    }


def _accelerate(folder, plugin):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    import sftorch
    from sftorch.trainers import unwrap

    def build(seed):
        AcceleratorState._reset_state(reset_partial_state=False)
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, fsdp_plugin=plugin())
        optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, warmup_steps=3)
        return accelerator, *accelerator.prepare(model, optimizer)

    def advance(accelerator, model, optimizer, first, last):
        optimizer.train()
        for micro in range(3 * first, 3 * last):
            generator = torch.Generator().manual_seed(10 * micro + accelerator.process_index)
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(5, 4, generator=generator)).square().mean())
                optimizer.step()
                optimizer.zero_grad()

    def x_of(accelerator, model, optimizer):
        return _whole(unwrap(optimizer).eval_state_dict(accelerator.unwrap_model(model)))

    run = build(0)
    advance(*run, 0, 4)
    run[0].save_state(str(folder))
    x = x_of(*run)
    advance(*run, 4, 8)
    other = build(9)
    other[0].load_state(str(folder))
    restored = x_of(*other)
    advance(*other, 4, 8)
    return {
        "processes": run[0].num_processes,
        "restores x": _same(restored, x),
        "same bits": _same(x_of(*other), x_of(*run)),
        "moved": not _same(x_of(*run), x),
    }


def accelerate(folder):
    return _accelerate(folder, lambda: None)


def accelerate_fsdp2(folder):
    from accelerate import FullyShardedDataParallelPlugin

    def plugin():
        return FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
        )

    return _accelerate(folder, plugin)


def lightning(folder):
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from sftorch.tests.test_trainer_lightning import Module, Witness, loaders
    from sftorch.trainers.lightning import ScheduleFreeCallback

    def fit(place, witness, ckpt=None):
        saves = ModelCheckpoint(place, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=2,
            use_distributed_sampler=False,
            callbacks=[witness, ScheduleFreeCallback(), saves],
            **quiet,
        )
        module = Module()
        trainer.fit(module, **loaders(), ckpt_path=ckpt)
        return trainer, module

    witness, later = Witness(), Witness()
    trainer, module = fit(folder / "whole", witness)
    fit(folder / "resumed", later, str(folder / "whole" / "step=4.ckpt"))
    shipped = torch.load(folder / "whole" / "step=4.ckpt", weights_only=False)["state_dict"]
    last = max(witness.x)
    return {
        "processes": trainer.world_size,
        "same bits": max(later.x) == last and _same(later.x[last], witness.x[last]),
        "ships x": _same(shipped, witness.x[4]),
        "leaves x": _same(module.state_dict(), witness.x[last]),
    }


def main():
    torch.set_num_threads(1)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    found = globals()[kind](folder)
    rank = os.environ["RANK"]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
