"""What a changed configuration does to the sum of weights: c goes on as it was."""

import pytest

from sfcore import changes, exchange, hyperparameters, laws
from sfcore.changes import DROPPED, Change, at_last_update, carried_sum, of_batches, of_optimizer, refuse
from sfcore.exchange import CheckpointError
from sfcore.laws import Buffer, Law
from sfcore.meta import Meta, as_accumulation


def run(steps, lr, r=0.0, weight_lr_power=2.0, prior_steps=0):
    """Returns the clock after some steps at a constant lr (S3 to S5)."""
    weights = [t**r * lr**weight_lr_power for t in range(1, prior_steps + steps + 1)]
    return {"step": steps, "lr_max": lr if steps else 0.0, "weight_sum": sum(weights)}


@pytest.mark.parametrize("prior_steps", [0, 30])
@pytest.mark.parametrize("steps", [0, 40])
@pytest.mark.parametrize(("before", "after"), [(2.0, 0.0), (0.0, 2.0), (2.0, 1.5)])
def test_with_a_constant_lr_another_power_gives_the_sum_it_would_have_had(before, after, steps, prior_steps):
    options = {"lr": 0.0025, "prior_steps": prior_steps}
    saved = options | {"weight_lr_power": before}
    _, found = carried_sum(run(steps, **saved), saved, options | {"weight_lr_power": after})
    assert found == pytest.approx(run(steps, **options, weight_lr_power=after)["weight_sum"], rel=1e-12)


@pytest.mark.parametrize(("before", "after"), [(0.0, 3.0), (3.0, 0.0), (0.0, 0.5)])
def test_another_r_leaves_the_share_of_the_next_step_near_what_it_was(before, after):
    saved, now = ({"lr": 0.1, "r": r} for r in (before, after))
    clock = run(100, **saved)

    def c(weight_sum, r):
        weight = 101**r * 0.1**2
        return weight / (weight_sum + weight)

    # 101 / 100 to the power of r apart, no more.
    assert c(carried_sum(clock, saved, now)[1], after) == pytest.approx(
        c(clock["weight_sum"], before), rel=0.035
    )


def test_what_is_not_known_counts_as_unchanged():
    clock = run(10, 0.1)
    assert carried_sum(clock, {}, {"weight_lr_power": 1.0}) == (0.1, clock["weight_sum"])
    assert carried_sum(clock, {"r": 2.0}, {}) == (0.1, clock["weight_sum"])


def test_another_unit_of_lr_keeps_the_number_of_steps_that_the_sum_stands_for():
    lr_max, weight_sum = carried_sum(run(50, 0.001), {}, {}, new_lr=5.0)
    assert (lr_max, weight_sum / lr_max**2) == (5.0, pytest.approx(50))


def test_a_run_at_lr_zero_keeps_its_empty_sum():
    clock = {"step": 5, "lr_max": 0.0, "weight_sum": 0.0}
    assert carried_sum(clock, {"weight_lr_power": 2.0}, {"weight_lr_power": 1.0}) == (0.0, 0.0)


def test_strict_names_every_difference():
    rows = [
        Change("lr", 0, 1, 2, "x"),
        of_optimizer(None, "sgd", "adamw"),
        *of_batches({"steps": 1}, 8, None),
    ]
    with pytest.raises(CheckpointError, match=r"got 3 difference\(s\)") as caught:
        refuse("run/5", rows)
    assert all(str(row) in str(caught.value) for row in rows)
    refuse("run/5", [])


def test_the_place_in_the_data_is_never_before_its_beginning():
    # The update began in the epoch before, or nobody said the position.
    meta = Meta("torch", "sgd", 3, epoch=2, position=1, accumulation={"steps": 4, "position": 3})
    moved, notices = at_last_update(meta, DROPPED)
    assert (moved.position, moved.accumulation["position"]) == (0, 0)
    assert "position 1 was saved" in notices[0]
    assert notices[0].endswith("take them again from position 0")


@pytest.mark.parametrize("given", [4, (4, 1, 2), "ab", (4, 4), (4, None)])
def test_an_accumulation_that_is_no_pair_is_refused_with_its_rule(given):
    with pytest.raises(CheckpointError, match=r"accumulation must be \(steps, position\) with .* got"):
        as_accumulation(given, None)


def test_names_of_laws_compare_by_their_rows():
    assert changes.same("adamw or radam", "radam")
    assert not changes.same("adamw", "radam")
    assert changes.comparable("adamw", "radam")
    assert not changes.comparable("sgd", "adamw")
    assert not changes.comparable("wrapper", "sgd")
    assert changes.comparable("plain", "plain")
    assert not changes.comparable("plain", "adamw")
    assert "carried over: x, y, z, the average, the second moment v" in str(
        of_optimizer(None, "radam", "adamw")
    )
    assert "starts anew: the second moment v" in str(of_optimizer(None, "sgd", "adamw or radam"))


def test_a_law_that_joins_is_compared_by_its_direction_and_its_buffers():
    buffer = Buffer("s", "sum", "sum", "sum of squares")
    toy = Law("toy", "Toy", hyperparameters.Wrapper, "Toy", "toy", {}, (buffer,), "rms", "base")
    with laws.register(toy):
        assert changes.comparable("toy", "adamw")
        assert "starts anew: the sum of squares s" in str(of_optimizer(None, "adamw", "toy"))
        assert exchange.split("s/w") == ("s", "w")
    with pytest.raises(exchange.CheckpointError, match="must be named ROLE/NAME"):
        exchange.split("s/w")


def test_every_option_has_an_effect():
    assert changes.effect_of("seed") == "later steps are rounded with other random bits"
    assert changes.effect_of("eps") == changes.effect_of("lr of a base") == hyperparameters.NEXT
