"""A run that was stopped and resumed ends in the same bits as the run that was not."""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sfcore.tests.examples import listed
from sftorch import _rng
from sftorch.checkpoint import Checkpoints
from sftorch.tests.checkpoint_runs import CASES, LENGTH, Case, build, digest, resume_and_finish, save, train

ADAMW = Case("adamw", "float32", 4, 14, "train")


def saved_run(folder, case):
    """Runs a case without a stop, saves it on the way, and returns the digest of its end."""
    model, optimizer = build(case)
    train(model, optimizer, case, 0, case.saved_at)
    save(folder, model, optimizer, case)
    train(model, optimizer, case, case.saved_at, LENGTH)
    return digest(model, optimizer)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_ends_in_the_same_bits(case, tmp_path):
    folder = tmp_path / str(case)
    assert saved_run(folder, case) == resume_and_finish(folder)


@pytest.mark.slow
def test_so_it_does_in_a_fresh_process(tmp_path):
    expected = {str(case): saved_run(tmp_path / str(case), case) for case in CASES}
    command = [
        sys.executable,
        "-m",
        "sftorch.tests.checkpoint_runs",
        *(str(tmp_path / name) for name in expected),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout.split()
    assert dict(zip(expected, found, strict=True)) == expected


def test_saving_changes_nothing_in_the_run(tmp_path):
    model, optimizer = build(ADAMW)
    train(model, optimizer, ADAMW, 0, LENGTH)
    assert digest(model, optimizer) == saved_run(tmp_path, ADAMW)


@pytest.mark.parametrize("background", [True, False])
def test_the_checkpoint_holds_the_moment_of_the_call_and_not_what_came_after(tmp_path, background):
    model, optimizer = build(ADAMW)
    train(model, optimizer, ADAMW, 0, ADAMW.saved_at)
    with Checkpoints(tmp_path, background=background) as checkpoints:
        checkpoints.save(model, optimizer, accumulation=(4, 2))
        train(model, optimizer, ADAMW, ADAMW.saved_at, LENGTH)
        end = digest(model, optimizer)
    checkpoints.restore(model, optimizer)
    train(model, optimizer, ADAMW, ADAMW.saved_at, LENGTH)
    assert digest(model, optimizer) == end


def test_a_second_background_save_does_not_disturb_the_first(tmp_path):
    model, optimizer = build(ADAMW)
    with Checkpoints(tmp_path, keep_newest=9) as checkpoints:
        digests = []
        for step in range(4):
            train(model, optimizer, ADAMW, 4 * step, 4 * step + 4)
            checkpoints.save(model, optimizer)
            state = torch.get_rng_state(), np.random.get_state(), random.getstate()
            digests.append(digest(model, optimizer))
            torch.set_rng_state(state[0])
            np.random.set_state(state[1])
            random.setstate(state[2])
        for step, expected in enumerate(digests, start=1):
            checkpoints.restore(model, optimizer, resume=step)
            assert digest(model, optimizer) == expected, step


def test_another_thread_can_save_while_this_one_does(tmp_path):
    model, optimizer = build(ADAMW)
    train(model, optimizer, ADAMW, 0, 4)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the threads meet everywhere
    try:
        with Checkpoints(tmp_path) as checkpoints, ThreadPoolExecutor() as pool:
            for _ in range(10):
                saves = [pool.submit(checkpoints.save, model, optimizer) for _ in range(3)]
                checkpoints.save(model, optimizer)
                assert [one.result() for one in saves] == [None] * 3
    finally:
        sys.setswitchinterval(interval)
    assert [name[:14] for name in listed(tmp_path)] == ["step_000000001"]


def test_a_restore_in_eval_mode_holds_x_and_train_goes_on_exactly(tmp_path):
    expected = saved_run(tmp_path, ADAMW)
    model, optimizer = build(ADAMW, seed=7)
    optimizer.eval()
    Checkpoints(tmp_path).restore(model, optimizer)
    x = [p.detach().clone() for p in model.parameters()]
    optimizer.train()
    assert all(
        torch.equal(value, optimizer.eval_params()[p]) for value, p in zip(x, model.parameters(), strict=True)
    )
    train(model, optimizer, ADAMW, ADAMW.saved_at, LENGTH)
    assert digest(model, optimizer) == expected


def test_an_incomplete_record_of_random_states_changes_no_generator():
    arrays = _rng.capture()
    torch.rand(3)
    before = torch.get_rng_state(), random.getstate()
    del arrays["rng/python"]
    assert "they stay as they are" in _rng.restore(arrays)[0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_without_rng_the_generators_stay(tmp_path):
    saved_run(tmp_path, ADAMW)
    model, optimizer = build(ADAMW, seed=7)
    before = torch.get_rng_state(), random.getstate()
    Checkpoints(tmp_path).restore(model, optimizer, rng=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel])
def test_a_wrapped_model_and_a_plain_one_share_checkpoints(tmp_path, wrap):
    model, optimizer = build(ADAMW)
    train(model, optimizer, ADAMW, 0, ADAMW.saved_at)
    save(tmp_path, wrap(model), optimizer, ADAMW)
    train(model, optimizer, ADAMW, ADAMW.saved_at, LENGTH)
    expected = digest(model, optimizer)
    other, resumed = build(ADAMW, seed=7)
    Checkpoints(tmp_path).restore(other, resumed)
    train(other, resumed, ADAMW, ADAMW.saved_at, LENGTH)
    assert digest(other, resumed) == expected


def test_an_lr_scheduler_goes_on_where_it_was(tmp_path):
    def start(seed):
        model, optimizer = build(ADAMW, seed)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5)

    def advance(model, optimizer, scheduler, updates):
        for _ in range(updates):
            train(model, optimizer, ADAMW, 0, 4)
            scheduler.step()

    model, optimizer, scheduler = start(0)
    advance(model, optimizer, scheduler, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer, extra={"scheduler": scheduler.state_dict()})
    advance(model, optimizer, scheduler, 4)
    expected = digest(model, optimizer)
    model, optimizer, scheduler = start(1)
    restored = Checkpoints(tmp_path).restore(model, optimizer)
    scheduler.load_state_dict(restored.extra["scheduler"])
    assert restored.notices == []
    advance(model, optimizer, scheduler, 4)
    assert digest(model, optimizer) == expected


def test_the_saved_inference_weights_are_x_and_load_into_a_plain_model(tmp_path):
    from safetensors.torch import load_file

    model, optimizer = build(Case("adamw", "bfloat16", 1, 10, "train"))
    train(model, optimizer, Case("adamw", "bfloat16", 1, 10, "train"), 0, 10)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(model, optimizer)
        path = checkpoints.wait()
    optimizer.eval()
    shipped = load_file(path / "inference.safetensors")
    assert shipped.keys() == model.state_dict().keys()
    assert all(torch.equal(shipped[name], value) for name, value in model.state_dict().items())
