"""The record: it comes back as it went, refuses what would break a ranking, and notices a changed byte."""

import json
import math
import zlib

import numpy as np
import pytest
import torch

from sfcore.exchange import CheckpointError
from sfcore.meta import FORMAT_VERSION, Meta
from sfcore.tests import examples


def _signed(body):
    body.pop("crc32", None)
    return json.dumps(body | {"crc32": zlib.crc32(json.dumps(body, sort_keys=True).encode())})


def test_a_record_comes_back_as_it_went():
    meta = examples.meta(7, metrics={"loss": 0.25}, extra={"note": "née", "list": [1, None, True]})
    assert Meta.from_json(meta.to_json()) == meta


def test_numbers_come_back_exactly():
    clock = {"weight_sum": 0.1 + 0.2, "lr_max": 5e-324, "step": 2**53 + 1}
    meta = examples.meta(groups=[{"clock": clock}])
    assert Meta.from_json(meta.to_json()).groups[0]["clock"] == clock


def test_keys_that_json_turns_into_strings_keep_the_checksum_right():
    # Sorted as numbers 2 < 10, as strings "10" < "2".
    meta = examples.meta(extra={"by_epoch": {2: "b", 10: "a"}, "pair": (1, 2)})
    assert Meta.from_json(meta.to_json()).extra == {"by_epoch": {"2": "b", "10": "a"}, "pair": [1, 2]}


def test_scalars_of_numpy_and_torch_become_numbers(tmp_path):
    extra = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(2.5), "d": tmp_path}
    read = Meta.from_json(examples.meta(extra=extra).to_json()).extra
    assert read == {"a": 0.5, "b": 3, "c": 2.5, "d": str(tmp_path)}


def test_nan_outside_the_metrics_is_kept_because_a_diverged_run_must_still_save():
    read = Meta.from_json(examples.meta(recent={"update_norm": math.nan}).to_json())
    assert math.isnan(read.recent["update_norm"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), "0.1", None, True])
def test_a_metric_that_is_no_finite_number_is_refused(value):
    with pytest.raises(CheckpointError, match="metrics must be finite numbers, got loss = "):
        examples.meta(metrics={"accuracy": 1.0, "loss": value}).to_json()


@pytest.mark.parametrize("value", [np.zeros(2), object(), {1j: 2}, torch.zeros(2)])
def test_a_value_without_a_json_form_is_refused(value):
    with pytest.raises(CheckpointError, match="meta must be JSON"):
        examples.meta(extra={"odd": value}).to_json()


def test_a_newer_version_says_to_upgrade():
    body = json.loads(examples.meta().to_json()) | {"format_version": FORMAT_VERSION + 1}
    with pytest.raises(CheckpointError, match=r"version <= 2, got 3: .*upgrade with pip install -U") as error:
        Meta.from_json(_signed(body))
    assert "damaged" not in str(error.value)


def test_a_flipped_version_number_is_called_damage_as_well():
    text = examples.meta().to_json().replace('"format_version": 1', '"format_version": 9')
    with pytest.raises(CheckpointError, match="or it is damaged"):
        Meta.from_json(text)


def test_a_version_that_is_no_number_is_damage():
    text = examples.meta().to_json().replace('"format_version": 1', '"format_version": "x"')
    with pytest.raises(CheckpointError, match="is damaged"):
        Meta.from_json(text)


def test_fields_added_later_get_their_defaults():
    body = json.loads(examples.meta(3).to_json())
    for name in ("recent", "accumulation", "extra"):
        del body[name]
    assert Meta.from_json(_signed(body)) == examples.meta(3)


def test_a_required_field_that_is_missing_is_named():
    body = json.loads(examples.meta().to_json())
    del body["step"]
    with pytest.raises(CheckpointError, match="must have the key 'step'"):
        Meta.from_json(_signed(body))


def test_an_unknown_field_is_named_with_the_nearest():
    body = json.loads(examples.meta().to_json()) | {"precison": "float32"}
    with pytest.raises(CheckpointError, match="got 'precison'; did you mean 'precision'"):
        Meta.from_json(_signed(body))


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}', "null", "3"])
def test_the_json_of_another_program_is_refused(text):
    with pytest.raises(CheckpointError, match="must say it is a schedulefree-twin checkpoint"):
        Meta.from_json(text, "here.json")
