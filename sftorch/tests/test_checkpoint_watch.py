"""The first steps after a restart are watched, and a jump is reported once."""

import logging

import pytest
import torch

import sftorch
from sfcore.watch import WATCHED_STEPS
from sftorch.checkpoint import Checkpoints
from sftorch.tests.checkpoint_runs import Case, build, train

CASE = Case("adamw", "float32", 1, 30, "train")


def reports(caplog):
    return [message for message in caplog.messages if "after the restart" in message]


def iterates(optimizer):
    """Returns z and x, flat."""
    pairs = [(optimizer.state[p]["z"], x) for p, x in optimizer.eval_params().items()]
    return tuple(torch.cat([pair[i].detach().reshape(-1) for pair in pairs]).clone() for i in (0, 1))


@pytest.fixture
def saved(tmp_path):
    model, optimizer = build(CASE)
    train(model, optimizer, CASE, 0, CASE.saved_at)
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(model, optimizer)
    return checkpoints


@pytest.mark.parametrize("kind", ["sgd", "adamw", "radam", "polyak", "wrapper"])
def test_an_exact_resume_reports_nothing_and_the_watch_ends(tmp_path, caplog, kind):
    case = CASE._replace(kind=kind)
    model, optimizer = build(case)
    train(model, optimizer, case, 0, case.saved_at)
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(model, optimizer)
    checkpoints.restore(model, optimizer)
    train(model, optimizer, case, 30, 30 + WATCHED_STEPS + 5)
    (metrics,) = optimizer.metrics()
    assert reports(caplog) == []
    assert metrics["restart_steps"] == WATCHED_STEPS
    assert metrics["restart_jump"] == 0


def test_the_way_of_x_is_at_least_its_distance(saved):
    model, optimizer = build(CASE, seed=7)
    saved.restore(model, optimizer)
    before = {p: x.clone() for p, x in optimizer.eval_params().items()}
    train(model, optimizer, CASE, 30, 40)
    after = optimizer.eval_params()
    distance = sum(float((after[p] - x).square().sum()) for p, x in before.items()) ** 0.5
    way = optimizer.metrics()[0]["restart_moved"]
    # The steps of x turn little, so their sum is not far above: measured 1.005 to 1.012 times, 6 seeds.
    assert distance <= way * (1 + 1e-6) <= 1.1 * distance


def test_an_average_that_began_anew_is_reported_once_with_cause_and_fix(saved, caplog):
    model, optimizer = build(CASE, seed=7)
    saved.restore(model, optimizer)
    for p in model.parameters():  # what a state without its clocks would do
        optimizer.state[p]["weight_sum"] = 0.0
    optimizer.param_groups[0]["weight_sum"] = 0.0
    with caplog.at_level(logging.WARNING, "sftorch.checkpoint"):
        train(model, optimizer, CASE, 30, 40)
    (report,) = reports(caplog)
    assert "the averaging began anew" in report
    assert "prior_steps" in report
    assert optimizer.metrics()[0]["restart_jump"] == 1


def test_a_much_larger_lr_is_named_as_the_cause(saved, caplog):
    model, _ = build(CASE, seed=7)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.1, weight_decay=0.1)
    saved.restore(model, optimizer)
    train(model, optimizer, CASE, 30, 33)
    (report,) = reports(caplog)
    assert "by the changed lr" in report


def test_a_loss_that_jumps_is_reported(tmp_path, caplog):
    model, optimizer = build(CASE)
    checkpoints = Checkpoints(tmp_path, background=False)
    for place in range(60):
        if place == 30:
            checkpoints.save(model, optimizer)
            checkpoints.restore(model, optimizer)
        for _ in range(2):  # two micro-batches
            checkpoints.observe(optimizer, loss=torch.tensor(1.0 if place < 30 else 3.0))
        train(model, optimizer, CASE, place, place + 1)
    (report,) = reports(caplog)
    assert "5 step(s) after the restart the mean loss is 3, 3 times the 1 before" in report


def test_an_update_that_jumps_is_reported(tmp_path, caplog):
    model, _ = build(CASE)
    optimizer = sftorch.SGDScheduleFree(model.parameters(), lr=0.1)
    checkpoints = Checkpoints(tmp_path, background=False)
    assert checkpoints.restore(model, optimizer) is None  # from here on it sees the steps
    train(model, optimizer, CASE, 0, 30)
    checkpoints.save(model, optimizer)
    checkpoints.restore(model, optimizer)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    optimizer.step()
    (report,) = reports(caplog)
    assert "the update is" in report
    assert "the gradients are not what they were" in report


def test_the_record_is_of_the_steps_before(tmp_path):
    model, optimizer = build(CASE)
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.restore(model, optimizer)
    train(model, optimizer, CASE, 0, 29)
    z, x = iterates(optimizer)
    train(model, optimizer, CASE, 29, 30)
    z1, x1 = iterates(optimizer)
    checkpoints.save(model, optimizer)
    recent = checkpoints.restore(model, optimizer).meta.recent
    assert recent["steps"] == WATCHED_STEPS
    assert recent["c"] == optimizer.metrics()[0]["c"]
    # The largest of 20, of which this is one.
    assert recent["update_norm"] >= float((z1 - z).norm()) * (1 - 1e-6)
    assert recent["x_step"] >= float((x1 - x).norm()) * (1 - 1e-6)


def test_a_start_from_weights_under_the_policy_reports_nothing(saved, caplog):
    model, optimizer = build(CASE, seed=7)
    saved.restore(model, optimizer, resume=f"weights:{saved.folder}")
    train(model, optimizer, CASE, 0, WATCHED_STEPS)
    assert reports(caplog) == []


def test_a_start_from_weights_without_it_is_reported(saved, caplog):
    model, _ = build(CASE, seed=7)
    optimizer = sftorch.AdamWScheduleFree(model.parameters(), lr=0.01, prior_steps=1)
    saved.restore(model, optimizer, resume=f"weights:{saved.folder}")
    train(model, optimizer, CASE, 0, 2)
    (report,) = reports(caplog)
    assert "the share of x that one step replaces" in report


def test_a_second_restore_watches_anew(saved):
    model, optimizer = build(CASE, seed=7)
    for _ in range(2):
        saved.restore(model, optimizer)
        train(model, optimizer, CASE, 30, 33)
    assert optimizer.metrics()[0]["restart_steps"] == 3
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_the_closure_form_is_watched_too(tmp_path):
    model, _ = build(CASE)
    optimizer = sftorch.SGDScheduleFreeClosure(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(5, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(model, optimizer)
    checkpoints.restore(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure)
    moved = [(p.detach() - x).square().sum() for p, x in zip(model.parameters(), before, strict=True)]
    distance = float(torch.stack(moved).sum()) ** 0.5
    assert optimizer.metrics()[0]["restart_moved"] == pytest.approx(distance, rel=1e-4)


def test_a_loss_may_be_written_to_after_it_was_observed(tmp_path):
    model, optimizer = build(CASE)
    checkpoints = Checkpoints(tmp_path, background=False)
    loss = torch.tensor(2.0)
    checkpoints.observe(optimizer, loss)
    loss.zero_()
    train(model, optimizer, CASE, 0, 1)
    checkpoints.save(model, optimizer)
    assert checkpoints.restore(model, optimizer).meta.recent["loss"] == 2.0
