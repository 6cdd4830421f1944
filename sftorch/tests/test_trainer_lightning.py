"""A real lightning.pytorch.Trainer: validation and files at x, resumes in the same bits, mid-epoch too."""

import itertools
from types import MethodType

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

import sftorch
from sftorch.tests.pages import run
from sftorch.trainers.lightning import ScheduleFreeCallback

pytestmark = [
    # Lightning 2.6 asks torch 2.13 for the kind of a tree in the old way.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # A resumed run goes on in the folder of the killed one.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCHES, EPOCHS = 6, 2  # validation after 3 and 6 of them; saves after every 2nd, so 2 and 4 lie between
OPTIMIZERS = {
    "adamw": lambda params: sftorch.AdamWScheduleFree(params, lr=0.01, warmup_steps=3),
    "polyak": lambda params: sftorch.SGDScheduleFree(params, lr=0.1, momentum=0.0),
    "wrapper": lambda params: sftorch.ScheduleFreeWrapper(torch.optim.RMSprop(params, lr=0.01)),
}


class Batches:
    """A loader that knows its place, which is what Lightning needs to resume in the middle of an epoch."""

    def __init__(self):
        self.epoch, self.place, self.loaded = -1, 0, False

    def __len__(self):
        return BATCHES

    def __iter__(self):
        self.epoch, self.place = (self.epoch, self.place) if self.loaded else (self.epoch + 1, 0)
        self.loaded = False
        while self.place < BATCHES:
            self.place += 1
            yield torch.randn(
                5, 4, generator=torch.Generator().manual_seed(self.epoch * BATCHES + self.place)
            )

    def state_dict(self):
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state):
        self.epoch, self.place, self.loaded = state["epoch"], state["place"], True


class Module(LightningModule):
    def __init__(self, kind="adamw"):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
        self.kind, self.validated = kind, []

    def training_step(self, batch, index):
        torch.manual_seed(index)  # Lightning saves no random state; its dropout is the same in both runs
        return self.layers(batch).square().mean()

    def validation_step(self, batch, index):
        self.validated.append(copied(self.layers.state_dict()))

    def configure_optimizers(self):
        return OPTIMIZERS[self.kind](self.parameters())


class Witness(Callback):
    """Notes x after each step, from the optimizer and not from the weights."""

    def __init__(self, stop=None):
        self.x, self.stop = {}, stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.x[trainer.global_step] = trainer.optimizers[0].eval_state_dict(pl_module)
        if trainer.global_step == self.stop:
            raise KeyboardInterrupt


def copied(state_dict):
    return {name: value.detach().clone() for name, value in state_dict.items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def trainer_of(callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, **quiet, **options)


def loaders():
    return {"train_dataloaders": Batches(), "val_dataloaders": [torch.zeros(1)]}


def fit(folder, kind="adamw", stop=None, ckpt_path=None, **options):
    """Trains; returns the trainer, the module and the witness."""
    witness, module = Witness(stop), Module(kind)
    saves = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=2,
        save_top_k=-1,
        save_on_train_epoch_end=False,
        **options,
    )
    trainer = trainer_of([saves, ScheduleFreeCallback(), witness], val_check_interval=3)
    if stop is None:
        trainer.fit(module, **loaders(), ckpt_path=ckpt_path)
    else:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(module, **loaders())
    return trainer, module, witness


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return *fit(folder, request.param), folder, request.param


def test_every_checkpoint_ships_x(whole):
    *_, witness, folder, _ = whole
    files = sorted(folder.glob("*.ckpt"))
    assert len(files) == BATCHES * EPOCHS // 2
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert same(saved["state_dict"], witness.x[saved["global_step"]]), file


def test_a_checkpoint_loads_for_inference(whole):
    *_, witness, folder, kind = whole
    module = Module.load_from_checkpoint(folder / "step=4.ckpt", kind=kind)
    assert same(module.state_dict(), witness.x[4])


def test_validation_sees_x(whole):
    _, module, witness, _, _ = whole
    validated = module.validated[1:]  # the first is the check before training
    assert len(validated) == 4
    for step, held in zip((3, 6, 9, 12), validated, strict=True):
        assert same({f"layers.{k}": v for k, v in held.items()}, witness.x[step]), step


def test_the_fit_leaves_x_and_gives_the_trainer_its_method_back(whole, tmp_path):
    trainer, module, witness, _, _ = whole
    assert same(module.state_dict(), witness.x[12])
    trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert same(saved["state_dict"], witness.x[12])
    assert trainer.save_checkpoint == MethodType(Trainer.save_checkpoint, trainer)


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_run_that_was_killed_in_the_middle_of_an_epoch_ends_in_the_same_bits(whole, step, tmp_path):
    trainer, module, witness, _, kind = whole
    fit(tmp_path, kind, stop=step + 1)
    resumed, other, later = fit(tmp_path, kind, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert sorted(later.x) == list(range(step + 1, BATCHES * EPOCHS + 1))
    assert all(same(later.x[at], witness.x[at]) for at in later.x)
    assert same(other.state_dict(), module.state_dict())
    before, after = (which.optimizers[0].state_dict()["state"] for which in (trainer, resumed))
    assert all(torch.equal(before[i]["y"], after[i]["y"]) for i in before)


def test_a_file_of_weights_alone_holds_x(tmp_path):
    _, _, witness = fit(tmp_path, save_weights_only=True)
    for step in (2, 4, 8):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert "optimizer_states" not in saved
        assert same(saved["state_dict"], witness.x[step])


def test_an_interrupted_fit_leaves_x_and_saves_it(tmp_path):
    _, module, witness = fit(tmp_path, stop=5, save_on_exception=True)
    assert same(module.state_dict(), witness.x[5])
    (file,) = [f for f in tmp_path.glob("*.ckpt") if torch.load(f, weights_only=True)["global_step"] == 5]
    assert same(torch.load(file, weights_only=True)["state_dict"], witness.x[5])


def test_a_callback_that_saw_an_interrupted_fit_serves_the_next_trainer(tmp_path):
    callback = ScheduleFreeCallback()
    interrupted = trainer_of([callback, Witness(stop=2)], enable_checkpointing=False)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        interrupted.fit(Module(), **loaders())
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer_of([callback, saves, witness := Witness()]).fit(Module(), **loaders())
    assert same(torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"], witness.x[4])


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_the_place_among_the_callbacks_is_free(order, tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [ScheduleFreeCallback(), witness := Witness()]
    trainer_of([saves, *(callbacks[i] for i in order)]).fit(Module(), **loaders())
    assert same(torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"], witness.x[4])


def test_a_fit_without_our_optimizer_is_refused():
    class Foreign(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = trainer_of([ScheduleFreeCallback()], enable_checkpointing=False)
    with pytest.raises(TypeError, match=r"must be one of sftorch's .* got torch\.optim\.sgd\.SGD"):
        trainer.fit(Foreign(), **loaders())


@pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed")  # of the default logger
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_the_page_tells_the_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = torch.utils.data.DataLoader(torch.ones(18, 4), batch_size=3)
    trainer = run("trainers.md", "Lightning", torch=torch, loader=loader)["trainer"]
    (optimizer,) = trainer.optimizers
    assert optimizer.metrics()[0]["step"] == 12
    assert same(trainer.lightning_module.state_dict(), optimizer.eval_state_dict(trainer.lightning_module))


def test_the_loggers_get_warm_up_c_and_the_distance_of_x_from_z(tmp_path):
    class Kept(Logger):
        name, version, rows = "kept", 0, ()

        def log_hyperparams(self, *args, **kwargs):
            pass

        def log_metrics(self, metrics, step=None):
            self.rows += ((step, metrics),)

    kept = Kept()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[ScheduleFreeCallback()],
        logger=kept,
        log_every_n_steps=1,
        **quiet,
    )
    trainer.fit(Module("adamw"), **loaders())
    rows = [(step, row) for step, row in kept.rows if "schedule_free/lr" in row]
    assert (
        [row["schedule_free/step"] for _, row in rows]
        == [step for step, _ in rows]
        == [*range(1, len(rows) + 1)]
    )
    rates = [row["schedule_free/lr"] for _, row in rows]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert rows[0][1]["schedule_free/c"] == 1.0
    assert all(row["schedule_free/x_z_distance"] > 0 for _, row in rows[1:])
