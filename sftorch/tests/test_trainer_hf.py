"""A real transformers.Trainer: what it ships is x, and an interrupted run ends in the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, TrainerCallback, TrainingArguments

import sftorch
from sfcore.checks import HyperparameterError
from sftorch.tests.pages import run
from sftorch.trainers import unwrap
from sftorch.trainers.hf import ScheduleFreeTrainer

OPTIMIZERS = {
    "adamw": (sftorch.AdamWScheduleFree, {"lr": 0.01, "betas": (0.9, 0.99), "warmup_steps": 5}),
    "radam": (sftorch.RAdamScheduleFree, {"lr": 0.01}),
}
SAVED = (3, 6, 9, 12)  # evaluations are at 4, 8 and 12: two of the saves lie between them


def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=24, max_position_embeddings=8, **shape))  # has dropout


def data(count, seed):
    tokens = torch.randint(1, 24, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Witness(TrainerCallback):
    """Notes, from the optimizer and not from the weights, what x is when something is saved or evaluated."""

    def __init__(self):
        self.x, self.held, self.lrs = {}, {}, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = unwrap(optimizer)
        assert inner.param_groups[0]["train_mode"]
        self.x[state.global_step] = {k: v.clone() for k, v in inner.eval_state_dict(model).items()}
        self.lrs.append(inner.metrics()[0]["lr"])

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.held[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def arguments(folder, **options):
    usual = {"lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 4, "save_steps": 3}
    usual["logging_strategy"] = "no"
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=12,
        save_strategy="steps",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        weight_decay=0.1,
        **(usual | options),
    )


def trainer(folder, kind="adamw", callbacks=(), **options):
    return ScheduleFreeTrainer(
        model(),
        arguments(folder, **options),
        train_dataset=data(40, 1),
        eval_dataset=data(8, 2),
        optimizer_cls_and_kwargs=OPTIMIZERS[kind],
        callbacks=list(callbacks),
    )


def assert_same(found, expected):
    assert found.keys() <= expected.keys()
    assert len(found) > 10
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request, tmp_path_factory):
    """A run from start to end: its trainer, its witness, its folder, and its kind."""
    folder, witness = tmp_path_factory.mktemp("whole"), Witness()
    finished = trainer(folder, request.param, [witness])
    finished.train()
    return finished, witness, folder, request.param


def test_every_checkpoint_ships_x(whole):
    _, witness, folder, _ = whole
    for step in SAVED:
        assert_same(load_file(folder / f"checkpoint-{step}" / "model.safetensors"), witness.x[step])


def test_evaluations_see_x(whole):
    _, witness, _, _ = whole
    assert sorted(witness.held) == [4, 8, 12]
    for step, held in witness.held.items():
        assert_same(held, witness.x[step])


def test_the_model_that_training_leaves_and_the_export_are_x(whole, tmp_path):
    finished, witness, _, _ = whole
    assert_same(finished.model.state_dict(), witness.x[12])
    finished.save_model(tmp_path)
    exported = BertForMaskedLM.from_pretrained(tmp_path)
    assert_same(exported.state_dict(), witness.x[12])


def test_x_is_not_y(whole):
    finished, _, folder, _ = whole
    state = torch.load(folder / "checkpoint-12" / "optimizer.pt", weights_only=True)
    stored = [entry["y"] for entry in state["state"].values()]
    assert len(stored) > 10
    x = [value for value in finished.model.parameters() if value.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(stored, x, strict=False))


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_ends_in_the_same_bits(whole, step, tmp_path):
    finished, witness, _, kind = whole
    trainer(tmp_path, kind, [StopAt(step)]).train()
    later = Witness()
    resumed = trainer(tmp_path, kind, [later])
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert sorted(later.x) == list(range(step + 1, 13))
    for at in later.x:
        assert_same(later.x[at], witness.x[at])
    assert_same(resumed.model.state_dict(), finished.model.state_dict())
    before, after = (unwrap(which.optimizer).state_dict()["state"] for which in (finished, resumed))
    assert all(torch.equal(before[i]["y"], after[i]["y"]) for i in before)


def test_there_is_one_warm_up_and_no_decay(whole):
    _, witness, _, kind = whole
    if kind == "adamw":
        assert witness.lrs == pytest.approx([0.002, 0.004, 0.006, 0.008] + [0.01] * 8)
    else:
        assert witness.lrs == sorted(witness.lrs)


@pytest.mark.slow
def test_the_best_model_is_loaded_over_x_and_stays_what_it_was(tmp_path):
    # Stops in train mode, two steps after the last evaluation.
    options = {"load_best_model_at_end": True, "save_steps": 4}
    stopped = trainer(tmp_path, callbacks=[StopAt(10)], **options)
    stopped.train()
    best = load_file(stopped.state.best_model_checkpoint + "/model.safetensors")
    stopped.save_model(tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), best)
    assert_same(best, stopped.model.state_dict())
    with pytest.raises(RuntimeError, match=r"Call optimizer\.rebase\(\)"):
        stopped.train()
    unwrap(stopped.optimizer).rebase()
    stopped.train()
    assert unwrap(stopped.optimizer).metrics()[0]["step"] == 20


def test_a_save_between_a_gradient_and_its_step_does_not_disturb_training(whole, tmp_path):
    finished, witness, _, kind = whole

    class Saves(TrainerCallback):
        """As transformers saves at SIGTERM, with enable_jit_checkpoint."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            other._save_checkpoint(other.model, trial=None)

    other = trainer(tmp_path, kind, [Saves()])
    other.train()
    assert_same(other.model.state_dict(), finished.model.state_dict())
    assert_same(load_file(tmp_path / "checkpoint-5" / "model.safetensors"), witness.x[5])


def test_a_ready_made_optimizer_is_taken(tmp_path):
    ready = model()
    optimizer = sftorch.SGDScheduleFree(ready.parameters(), lr=0.1)
    finished = ScheduleFreeTrainer(
        ready,
        arguments(tmp_path, save_steps=5),
        train_dataset=data(40, 1),
        eval_dataset=data(8, 2),
        optimizers=(optimizer, None),
    )
    finished.train()
    assert unwrap(finished.optimizer) is optimizer
    assert optimizer.metrics()[0]["step"] == 12
    assert json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["global_step"] == 5


def test_all_that_is_wrong_with_the_schedule_is_said_before_training(tmp_path):
    with pytest.raises(HyperparameterError) as caught:
        ScheduleFreeTrainer(
            model(),
            arguments(tmp_path, lr_scheduler_type="linear", warmup_steps=5, eval_strategy="no"),
            optimizer_cls_and_kwargs=(sftorch.AdamWScheduleFree, {"weight_decay": 0.5}),
        )
    found = caught.value.problems
    starts = ["lr_scheduler_type must be 'constant', got 'linear'", "warmup_steps must be 0", "optimizer_cls"]
    assert [problem.startswith(start) for problem, start in zip(found, starts, strict=False)] == [True] * 3
    assert found[3].startswith("weight_decay must be given in TrainingArguments, got 0.5")


def test_another_optimizer_is_refused_when_training_begins(tmp_path):
    other = ScheduleFreeTrainer(model(), arguments(tmp_path, eval_strategy="no"))
    with pytest.raises(TypeError, match=r"must be one of sftorch's .* got torch\.optim\.adamw\.AdamW"):
        other.create_optimizer()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_the_page_tells_the_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = run("trainers.md", "Hugging Face Trainer", model=model(), train_dataset=data(40, 1))["trainer"]
    assert unwrap(finished.optimizer).metrics()[0]["step"] == 20
    exported = load_file(tmp_path / "out" / "final" / "model.safetensors")
    assert_same(exported, unwrap(finished.optimizer).eval_state_dict(finished.model))
    assert_same(load_file(tmp_path / "out" / "checkpoint-20" / "model.safetensors"), exported)


def test_the_logs_show_warm_up_c_and_the_distance_of_x_from_z(tmp_path):
    finished = trainer(tmp_path, logging_strategy="steps", logging_steps=1)
    finished.train()
    logs = [entry for entry in finished.state.log_history if "schedule_free/lr" in entry]
    assert [entry["schedule_free/step"] for entry in logs] == [*range(1, 13)]
    rates = [entry["schedule_free/lr"] for entry in logs]
    assert rates == sorted(rates)
    assert rates[0] < rates[4] == rates[-1]  # warmed up after 5 steps
    assert logs[0]["schedule_free/c"] == 1.0
    assert all(0 < entry["schedule_free/c"] < 1 for entry in logs[1:])
    assert logs[0]["schedule_free/x_z_distance"] == pytest.approx(0.0, abs=1e-6)
    assert all(entry["schedule_free/x_z_distance"] > 0 for entry in logs[1:])
