"""A start from weights alone."""

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch.serialization import set_crc32_options

import sftorch
from sfcore import store
from sfcore.checks import HyperparameterError
from sfcore.inspection import inspect
from sfcore.restart import WEIGHTS_ONLY
from sftorch.checkpoint import CheckpointError, Checkpoints
from sftorch.tests.checkpoint_runs import Case, Counting, build, digest, train

CASE = Case("adamw", "float32", 1, 8, "train")


@pytest.fixture
def trained(tmp_path):
    """A model that holds x, and a folder with a checkpoint of its run."""
    model, optimizer = build(CASE)
    train(model, optimizer, CASE, 0, 8)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(model, optimizer)
    optimizer.eval()
    return model, tmp_path


def write(form, model, folder):
    """Returns a path or folder that holds the weights in some form."""
    if form in ("folder", "checkpoint"):
        return folder / "run" if form == "folder" else store.newest(folder / "run")
    if form == "safetensors":
        save_file(model.state_dict(), folder / "w.safetensors")
        return folder / "w.safetensors"
    torch.save(
        model.state_dict() if form == "pt" else {"state_dict": model.state_dict(), "epoch": 3},
        folder / "w.pt",
    )
    return folder / "w.pt"


def start(path, kind="adamw", mode="train", **options):
    model, _ = build(CASE, seed=7)
    classes = {
        "adamw": sftorch.AdamWScheduleFree,
        "radam": sftorch.RAdamScheduleFree,
        "sgd": sftorch.SGDScheduleFree,
    }
    optimizer = classes[kind](model.parameters(), **options)
    train(model, optimizer, CASE, 0, 2)  # what it had learnt is forgotten
    getattr(optimizer, mode)()
    restored = Checkpoints("unused").restore(model, optimizer, resume=f"weights:{path}")
    return model, optimizer, restored


@pytest.mark.parametrize("form", ["folder", "checkpoint", "safetensors", "pt", "nested pt"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_run_starts_from_the_weights_and_says_so(trained, form, mode):
    shipped, folder = trained
    path = write(form, shipped, folder)
    model, optimizer, restored = start(path, mode=mode)
    assert restored.meta is None
    assert restored.notices[0] == f"{path}: no optimizer state: starting from x"
    assert all(torch.equal(value, shipped.state_dict()[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert optimizer.metrics()[0]["step"] == 0
    assert optimizer.param_groups[0]["train_mode"] is (mode == "train")


@pytest.mark.parametrize("kind", ["adamw", "radam", "sgd"])
def test_the_policy_protects_the_weights_in_the_first_steps(trained, kind):
    model, optimizer, restored = start(write("pt", *trained), kind, lr=0.01)
    assert f"prior_steps is set to {WEIGHTS_ONLY['prior_steps']}" in restored.notices[1]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, CASE, 8, 14)
    # RAdam's first steps weigh less than a full one.
    assert 0 < optimizer.metrics()[0]["c"] <= 1 / WEIGHTS_ONLY["prior_steps"]
    moved = [
        float((optimizer.eval_params()[p] - x).abs().max())
        for p, x in zip(model.parameters(), before, strict=True)
    ]
    away = [
        float((optimizer.state[p]["z"] - x).abs().max())
        for p, x in zip(model.parameters(), before, strict=True)
    ]
    assert all(x_moved <= 0.02 * z_moved for x_moved, z_moved in zip(moved, away, strict=True))


def test_explicit_arguments_win(trained):
    _, optimizer, restored = start(write("pt", *trained), prior_steps=7, warmup_steps=3)
    assert (optimizer.param_groups[0]["prior_steps"], optimizer.param_groups[0]["warmup_steps"]) == (7, 3)
    assert len(restored.notices) == 1
    assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(7 * 0.0025**2)


def test_the_wrapper_is_protected_too(trained):
    model, _ = build(CASE, seed=7)
    optimizer = sftorch.ScheduleFreeWrapper(torch.optim.RMSprop(model.parameters(), lr=0.01))
    train(model, optimizer, CASE, 0, 2)
    Checkpoints("unused").restore(model, optimizer, resume=f"weights:{write('pt', *trained)}")
    train(model, optimizer, CASE, 0, 1)
    assert optimizer.metrics()[0]["c"] == pytest.approx(1 / (WEIGHTS_ONLY["prior_steps"] + 1))


def test_another_dtype_is_converted_and_said(trained):
    shipped, folder = trained
    save_file(
        {
            name: value.to(torch.float16) if value.is_floating_point() else value
            for name, value in shipped.state_dict().items()
        },
        folder / "half.safetensors",
    )
    model, _, restored = start(folder / "half.safetensors")
    assert "converted to the model's dtype, the first '0.weight': float16 to float32" in restored.notices[1]
    assert torch.equal(model[0].weight, shipped[0].weight.half().float())


def test_a_file_that_says_it_holds_y_is_taken_for_x_and_that_is_said(trained):
    shipped, folder = trained
    save_file(shipped.state_dict(), folder / "y.safetensors", metadata={"weights_hold": "y"})
    _, _, restored = start(folder / "y.safetensors")
    assert "says that it holds y, which is taken for x" in restored.notices[1]


def test_weights_of_another_model_are_refused_with_every_problem(trained):
    shipped, folder = trained
    weights = dict(shipped.state_dict())
    weights["0.weight"] = weights["0.weight"].T.contiguous()
    weights["other"] = weights.pop("3.bias")
    save_file(weights, folder / "w.safetensors")
    with pytest.raises(CheckpointError, match="nothing has changed") as caught:
        start(folder / "w.safetensors")
    for problem in (
        "'3.bias' must be in the file",
        "'other' must be in the model",
        "shape (6, 4), got (4, 6)",
    ):
        assert problem in str(caught.value)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.last.weight = self.first.weight


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch about itself
@pytest.mark.parametrize(
    "wrappers", [[torch.nn.DataParallel], [torch.compile], [torch.compile, torch.nn.DataParallel]]
)
def test_weights_saved_from_a_wrapped_model_fit_it_with_and_without_the_wrappers(tmp_path, wrappers):
    def wrapped(model):
        for wrapper in wrappers:
            model = wrapper(model)
        return model

    shipped, _ = build(CASE)
    torch.save(wrapped(shipped).state_dict(), tmp_path / "w.pt")
    for wrap in (wrapped, lambda model: model):
        model, optimizer = build(CASE, seed=7)
        Checkpoints(tmp_path).restore(wrap(model), optimizer, resume=f"weights:{tmp_path / 'w.pt'}")
        assert all(
            torch.equal(model.state_dict()[name], value) for name, value in shipped.state_dict().items()
        )


def test_state_that_modules_keep_themselves_comes_with_the_weights(tmp_path):
    model = torch.nn.Sequential(Counting(2, 1))
    model[0].calls = 5
    torch.save(model.state_dict(), tmp_path / "w.pt")
    model[0].calls = 0
    optimizer = sftorch.SGDScheduleFree(model.parameters())
    Checkpoints(tmp_path).restore(model, optimizer, resume=f"weights:{tmp_path / 'w.pt'}")
    assert model[0].calls == 5


def test_tied_weights_may_be_in_the_file_once(tmp_path):
    shipped, model = Tied(), Tied()
    save_model(shipped, tmp_path / "w.safetensors")
    optimizer = sftorch.AdamWScheduleFree(model.parameters())
    restored = Checkpoints("unused").restore(model, optimizer, resume=f"weights:{tmp_path / 'w.safetensors'}")
    assert torch.equal(model.last.weight, shipped.first.weight)
    assert [notice for notice in restored.notices if "stay" in notice] == []


class Adapted(torch.nn.Module):
    """A frozen base with statistics, and a LoRA beside it that is trained."""

    def __init__(self):
        super().__init__()
        self.base, self.norm = torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.BatchNorm1d(3)
        self.norm.requires_grad_(False)
        self.down, self.up = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(1, 3, bias=False)

    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]


def start_adapted(weights, folder):
    save_file(weights, folder / "lora.safetensors")
    model = Adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = sftorch.AdamWScheduleFree(model.trained())
    resume = f"weights:{folder / 'lora.safetensors'}"
    return model, before, Checkpoints("unused").restore(model, optimizer, resume=resume)


def test_a_lora_alone_leaves_the_frozen_weights_as_they_are_and_says_so(tmp_path):
    lora = {name: torch.randn_like(p) for name, p in Adapted().named_parameters() if p.requires_grad}
    model, before, restored = start_adapted(lora, tmp_path)
    assert (
        "7 weights are not trained and not in the file: they stay, the first 'base.w" in restored.notices[1]
    )
    assert all(torch.equal(v, (before | lora)[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize("lost", ["up.weight", "norm.running_mean"])
def test_what_is_trained_or_belongs_to_what_is_there_must_be_in_the_file(tmp_path, lost):
    weights = {name: value.clone() for name, value in Adapted().state_dict().items() if name != lost}
    with pytest.raises(CheckpointError, match=f"prior_steps=800, without which(.|\n)*'{lost}' must be in"):
        start_adapted(weights, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a file of torch", b"hello", None])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "w.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pt (is|must be)"):
        start(path)


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="must hold a model's state dict"):
        start(tmp_path / "w.pt")


def test_an_lr_of_zero_cannot_weigh_the_weights_and_that_is_said(trained):
    _, optimizer, restored = start(write("pt", *trained), lr=0.0)
    assert "lr is 0, so the loaded weights cannot be weighed" in restored.notices[1]
    assert optimizer.param_groups[0]["weight_sum"] == 0


@pytest.mark.parametrize(("form", "steps"), [("folder", 8), ("safetensors", WEIGHTS_ONLY["prior_steps"])])
def test_weights_count_as_the_steps_they_were_trained_for_where_a_file_says_so(trained, form, steps):
    shipped, folder = trained
    _, optimizer, _ = start(write(form, shipped, folder))
    assert optimizer.param_groups[0]["prior_steps"] == steps


@pytest.mark.parametrize("prior_steps", [0, 5])
def test_prior_steps_given_to_restore_win(trained, prior_steps):
    shipped, folder = trained
    model, _ = build(CASE, seed=7)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01)
    path = write("safetensors", shipped, folder)
    Checkpoints("unused").restore(model, optimizer, resume=f"weights:{path}", prior_steps=prior_steps)
    group = optimizer.param_groups[0]
    assert group["prior_steps"] == prior_steps
    assert group["weight_sum"] == pytest.approx(prior_steps * 0.01**2, rel=1e-12)


def test_a_state_dict_loaded_before_is_forgotten_too(trained):
    path = write("pt", *trained)
    model, optimizer, _ = start(path)
    train(model, optimizer, CASE, 0, 2)
    saved = optimizer.state_dict()
    model, optimizer = build(CASE, seed=7)
    optimizer.load_state_dict(saved)
    Checkpoints("unused").restore(model, optimizer, resume=f"weights:{path}")
    train(model, optimizer, CASE, 0, 2)  # whose weights are no longer those of the state dict
    assert optimizer.metrics()[0]["step"] == 2


@pytest.mark.parametrize("kind", ["adamw", "wrapper"])
def test_a_run_that_began_with_weights_goes_on_in_the_same_bits_and_under_strict(trained, kind):
    def anew():
        model, _ = build(CASE, seed=7)
        if kind == "adamw":
            return model, sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, r=1.0)
        return model, sftorch.ScheduleFreeWrapper(torch.optim.RMSprop(model.parameters(), lr=0.01), r=1.0)

    path = write("pt", *trained)
    with Checkpoints(path.parent / "second run") as checkpoints:
        model, optimizer = anew()
        checkpoints.restore(model, optimizer, resume=f"weights:{path}")
        train(model, optimizer, CASE, 0, 3)
        checkpoints.save(model, optimizer)
        train(model, optimizer, CASE, 3, 6)
        whole = digest(model, optimizer)
        model, optimizer = anew()
        checkpoints.restore(model, optimizer, strict=True)
        train(model, optimizer, CASE, 3, 6)
    assert digest(model, optimizer) == whole


@pytest.mark.parametrize("prior_steps", [-5, 0.5])
def test_prior_steps_out_of_range_are_refused_and_change_nothing(trained, prior_steps):
    path = write("pt", *trained)
    model, optimizer = build(CASE, seed=7)
    before = repr(model.state_dict())
    with pytest.raises(HyperparameterError, match="prior_steps must be a whole number of optimizer steps"):
        Checkpoints("unused").restore(model, optimizer, resume=f"weights:{path}", prior_steps=prior_steps)
    assert repr(model.state_dict()) == before


def _changed(path):
    content = path.read_bytes()
    number = torch.arange(4.0).numpy().tobytes()
    path.write_bytes(content.replace(number, number[:-1] + b"\1"))


def _repacked(path):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("content", "then", "finding"),
    [
        ({"w": torch.arange(4.0)}, _changed, "the CRC-32 of its .*data/0 is not the recorded one"),
        ({"w": torch.arange(4.0)}, _repacked, "a zip with compressed or repeated entries"),
        ({"w": torch.ones(1).expand(1 << 30)}, None, "tensors that are 4294967292 bytes larger"),
        ({"w": torch.zeros(1 << 31, 1 << 31, 0)}, None, "must have a possible shape"),
    ],
)
def test_a_torch_file_is_what_was_written_and_no_more(content, then, finding, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(content, path)
    if then:
        then(path)
    with pytest.raises(CheckpointError, match=finding):
        inspect(path)


def test_a_torch_file_saved_without_checksums_is_read(tmp_path):
    set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, tmp_path / "w.pt")
    finally:
        set_crc32_options(True)
    assert inspect(tmp_path / "w.pt")["elements"] == 4


@pytest.mark.parametrize("times", [5, 30])
def test_a_pickle_whose_tuples_hold_each_other_over_and_over_is_refused_at_once(times, tmp_path):
    held = ()
    for _ in range(times):
        held = (held,) * 10
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"w": held}, 2))
    with pytest.raises(CheckpointError, match="over and over" if times > 5 else "torch cannot read it"):
        inspect(tmp_path / "w.pt")
