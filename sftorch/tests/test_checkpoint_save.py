"""What save accepts, keeps and refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sftorch
from sfcore import store
from sfcore.tests.examples import listed
from sftorch.checkpoint import CheckpointError, Checkpoints, _arrays
from sftorch.tests.checkpoint_runs import PLAIN, build, started, train


@pytest.mark.parametrize("resume", ["auto", "weights:{}"])
def test_a_state_that_is_half_restored_is_not_saved_until_it_is_whole(tmp_path, monkeypatch, resume):
    model, optimizer = started()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, optimizer)
    train(model, optimizer, PLAIN, 3, 5)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sftorch.checkpoint._restore._put_entries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.restore(model, optimizer)
    with pytest.raises(CheckpointError, match=r"one step's state.*call restore\(\) again"):
        checkpoints.save(model, optimizer)
    checkpoints.restore(model, optimizer, resume=resume.format(tmp_path))
    checkpoints.save(model, optimizer)
    checkpoints.close()


def test_restored_state_is_its_own_and_of_no_more_memory_than_it_needs(tmp_path):
    """It lies where it was read: two restores share nothing, and nothing else lies there."""
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        held = []
        for _ in range(2):
            checkpoints.restore(model, optimizer)
            held.append([value for p in model.parameters() for value in optimizer.state[p].values()])
    first, second = ([v for v in values if isinstance(v, torch.Tensor)] for values in held)
    assert len(first) == len(second) > 0
    pointers = {t.untyped_storage().data_ptr() for t in (*first, *second, *model.parameters())}
    assert len(pointers) == len(first) + len(second) + len(list(model.parameters()))
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in second)
    train(model, optimizer, PLAIN, 3, 5)


def test_the_newest_and_the_best_are_kept(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path, keep_newest=2, keep_best=1) as checkpoints:
        for step, loss in enumerate((0.5, 0.1, 0.3, 0.4, 0.2)):
            checkpoints.save(model, optimizer, step=step, metrics={"loss": loss})
    assert list(store.steps(tmp_path)) == [1, 3, 4]


def test_weights_of_another_optimizer_are_named_once_and_hold_x_if_it_is_in_eval(tmp_path, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    ours, other = (sftorch.SGDScheduleFree(layer.parameters(), lr=0.1) for layer in model)
    for _ in range(3):
        model(torch.ones(4, 2)).sum().backward()
        ours.step()
        other.step()
    x = other.eval_params()[model[1].weight]
    assert not torch.equal(x, model[1].weight)
    other.eval()
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        checkpoints.save(model, ours)
    shipped = load_file(checkpoints.wait() / store.INFERENCE)
    assert torch.equal(shipped["1.weight"], x)
    assert ["2 weights" in message and "'1.weight'" in message for message in caplog.messages] == [True]


def test_a_step_saved_again_is_replaced(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        for epoch in range(3):
            checkpoints.save(model, optimizer, epoch=epoch)
    restored = checkpoints.restore(model, optimizer)
    assert list(store.steps(tmp_path)) == [3]
    assert (restored.meta.step, restored.meta.epoch) == (3, 2)


@pytest.mark.parametrize("damaged", [False, True])
def test_newer_checkpoints_of_an_abandoned_run_are_set_aside(tmp_path, caplog, damaged):
    model, optimizer = build(PLAIN)
    checkpoints = Checkpoints(tmp_path, background=False)
    for step in (3, 9):
        checkpoints.save(model, optimizer, step=step)
    if damaged:
        (tmp_path / "step_000000009" / "state.safetensors").write_bytes(b"")
    checkpoints.restore(model, optimizer, resume="latest-good" if damaged else 3)
    checkpoints.save(model, optimizer, step=5)
    assert listed(tmp_path) == [
        "set-aside",
        "step_000000003",
        "step_000000005",
    ]
    assert "is newer than step 5, where this run is: it was set aside" in caplog.messages[-1]
    assert checkpoints.restore(model, optimizer).meta.step == 5


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_a_step_that_is_no_count_is_refused(tmp_path, step):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match="step must be a whole number >= 0"):
        Checkpoints(tmp_path).save(model, optimizer, step=step)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "low", True, torch.ones(2)])
def test_a_metric_that_is_no_finite_number_is_refused_before_anything_is_written(tmp_path, value):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match="loss"):
        Checkpoints(tmp_path / "new").save(model, optimizer, metrics={"loss": value})
    assert not (tmp_path / "new").exists()


def test_metrics_may_be_tensors_and_numpy_scalars(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, metrics={"loss": torch.tensor(0.5), "accuracy": np.float32(0.25)})
        assert checkpoints.restore(model, optimizer).meta.metrics == {"loss": 0.5, "accuracy": 0.25}


@pytest.mark.parametrize("accumulation", [(4, 4), (0, 0), (4, -1), 4, (4,)])
def test_an_accumulation_that_cannot_be_is_refused(tmp_path, accumulation):
    model, optimizer = started()
    with pytest.raises(CheckpointError, match="0 <= position < steps"):
        Checkpoints(tmp_path).save(model, optimizer, accumulation=accumulation)


@pytest.mark.parametrize(("name", "value"), [("keep_newest", 0), ("keep_best", -1), ("keep_newest", 1.5)])
def test_numbers_that_keep_nothing_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        Checkpoints(tmp_path, **{name: value})


def test_a_model_without_the_optimizers_parameters_is_refused(tmp_path):
    _, optimizer = started()
    with pytest.raises(CheckpointError, match=r"got 6 that it does not, the first: parameter 0 of group 0"):
        Checkpoints(tmp_path).save(torch.nn.Linear(2, 2), optimizer)


def test_the_record_says_what_it_is(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, epoch=2, position=7, batch_size=5, accumulation=(4, 1))
        meta = json.loads((checkpoints.wait() / "meta.json").read_text())
    assert (meta["framework"], meta["optimizer"], meta["precision"], meta["weights_hold"]) == (
        "torch",
        "adamw",
        "float32",
        "y",
    )
    assert (meta["step"], meta["epoch"], meta["position"]) == (3, 2, 7)
    assert meta["accumulation"] == {"steps": 4, "position": 1, "batch_size": 5}
    assert meta["groups"][0]["hyperparameters"]["beta"] == 0.9
    assert meta["groups"][0]["parameters"] == [name for name, _ in model.named_parameters()]
    assert meta["parameters"]["0.weight"]["clock"]["step"] == 3
    assert [meta["parameters"][name]["kind"] for name in ("0.weight", "1.weight")] == [
        "Linear",
        "BatchNorm1d",
    ]
    assert "torch" in meta["versions"]


def test_weights_that_were_written_to_in_eval_mode_are_not_saved(tmp_path):
    model, optimizer = started()
    optimizer.eval()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="rebase"):
        Checkpoints(tmp_path).save(model, optimizer)


def test_a_save_in_an_evaluation_in_inference_mode_leaves_later_ones_possible(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path) as checkpoints:
        with torch.inference_mode(), optimizer.evaluation():
            checkpoints.save(model, optimizer)
        train(model, optimizer, PLAIN, 3, 6)
        checkpoints.save(model, optimizer)
    assert list(store.steps(tmp_path)) == [3, 6]


def test_a_restore_in_inference_mode_leaves_a_state_that_can_be_trained_on(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, fused=False)
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            checkpoints.save(model, optimizer)
            with torch.inference_mode():
                checkpoints.restore(model, optimizer)
    assert optimizer.param_groups[0]["k"] == 2


def test_a_checkpoint_that_was_moved_and_linked_to_leaves_nothing_when_it_goes(tmp_path):
    model, optimizer = started()
    with Checkpoints(tmp_path / "run", keep_newest=1) as checkpoints:
        checkpoints.save(model, optimizer, step=1)
        path = checkpoints.wait()
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert checkpoints.restore(model, optimizer).meta.step == 1
        checkpoints.save(model, optimizer, step=2)
    assert listed(tmp_path / "run") == ["step_000000002"]
    assert (tmp_path / "elsewhere" / store.META).exists()


def test_an_empty_folder_starts_anew_and_none_never_restores(tmp_path):
    model, optimizer = started()
    for folder in (tmp_path, tmp_path / "not there yet"):
        assert Checkpoints(folder).restore(model, optimizer) is None
        assert Checkpoints(folder).restore(model, optimizer, resume="latest-good") is None
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        assert checkpoints.restore(model, optimizer, resume="none") is None


@pytest.mark.parametrize("form", [str, lambda path: path])
def test_a_path_may_be_a_checkpoint_or_a_folder_of_them(tmp_path, form):
    model, optimizer = started()
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    other = Checkpoints(tmp_path / "b")
    for place in (path, tmp_path / "a"):
        assert other.restore(model, optimizer, resume=form(place)).path == path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.999)}], ids=["beta 0.9", "beta 0"])
def test_x_that_is_made_in_pieces_is_what_eval_mode_holds(tmp_path, monkeypatch, dtype, options):
    monkeypatch.setattr("sftorch.checkpoint._save.PIECE", 7)
    torch.manual_seed(0)
    shapes = [(5, 5), (7,), (), (0, 3), (2, 3, 4, 5)]
    model = torch.nn.ParameterList([torch.randn(shape, dtype=dtype) for shape in shapes])
    model[4].data = model[4].data.contiguous(memory_format=torch.channels_last)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.1, **options)
    for _ in range(3):
        for p in model:
            p.grad = torch.randn_like(p)
        optimizer.step()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    _, shipped = store.read(path, store.INFERENCE)
    optimizer.eval()
    x = {f"x/{name}": _arrays.to_numpy(p) for name, p in model.named_parameters()}
    assert all(shipped[leaf.removeprefix("x/")].tobytes() == array.tobytes() for leaf, array in x.items())
