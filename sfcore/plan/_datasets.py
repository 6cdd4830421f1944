"""How many micro-batches an epoch of sd-scripts has, as far as its data is here: images, repeats, batches.

Facts of sd-scripts' library/config_util.py (`BlueprintGenerator`, and what makes subsets of folders) and
library/train_util.py (`DreamBoothDataset`, `FineTuningDataset`, `make_buckets`) at 48d368f, and of Kohya_SS'
lora_gui.py (`train_model`) at 45088f0. `sfcore/tests/test_sd_scripts.py` compares them with a checkout.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sfcore.plan import _text
from sfcore.plan._model import ConfigError

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # in small letters or in capitals
_GUI_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
DEFAULT_STEPS = 1600
# What is raised for a field that is not of its kind, and for data that is not here.
_WRONG = (ConfigError, OSError, TypeError, ValueError, ArithmeticError, AttributeError)


class _Subset(NamedTuple):
    """Images that are read several times an epoch."""

    images: int
    repeats: int
    regularizes: bool = False


def batches(options: Mapping[str, Any]) -> int | None:
    """Returns the micro-batches of one epoch, of all devices together.

    Args:
        options: sd-scripts' own, by name.

    Returns:
        None where the data is not here, is split for validation, or is sorted into buckets by its sizes,
        which are not looked at: with a batch of 1 these make no difference.
    """
    try:
        found = [_of_dataset(one, options) for one in _datasets(options)]
    except _WRONG:
        return None
    known = [one for one in found if one is not None]
    return sum(known) if found and len(known) == len(found) and sum(known) else None


def _datasets(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields each data set with what `general` says of it."""
    if options.get("dataset_class"):
        return
    if options.get("dataset_config"):
        config = _text.read_file(Path(str(options["dataset_config"])))
        for one in config.get("datasets", []):
            yield {**config.get("general", {}), **one}
    elif options.get("in_json"):
        yield {"subsets": [{"image_dir": options.get("train_data_dir"), "metadata_file": options["in_json"]}]}
    else:
        sources = ((options.get("train_data_dir"), False), (options.get("reg_data_dir"), True))
        yield {"subsets": [one for folder, is_reg in sources for one in _by_name(folder, is_reg)]}


def _by_name(folder: Any, is_reg: bool) -> Iterator[dict[str, Any]]:
    """Yields a subset of each folder `REPEATS_NAME` inside of a folder."""
    for inner in Path(str(folder)).iterdir() if folder and os.path.isdir(folder) else ():
        first = inner.name.split("_")[0]
        if inner.is_dir() and first.lstrip("+-").isdecimal() and int(first) > 0:
            yield {"image_dir": str(inner), "num_repeats": int(first), "is_reg": is_reg}


def _of_dataset(dataset: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    def said(name: str, option: str, default: Any) -> Any:
        found = dataset.get(name)
        found = options.get(option) if found is None else found
        return default if found is None or found == "" else found

    batch = int(said("batch_size", "train_batch_size", 1))
    buckets = str(said("enable_bucket", "enable_bucket", False)).lower() == "true"
    if float(said("validation_split", "validation_split", 0.0)) or (buckets and batch > 1):
        return None
    subsets: dict[str, _Subset] = {}
    for one in dataset.get("subsets", []):
        repeats = one.get("num_repeats")
        repeats = said("num_repeats", "dataset_repeats", 1) if repeats is None else repeats
        place = str(one.get("metadata_file") or one.get("image_dir"))
        found = _Subset(_images(one), int(repeats), bool(one.get("is_reg", dataset.get("is_reg"))))
        if place not in subsets and found.images and found.repeats > 0:  # the first of two counts
            subsets[place] = found
    trained = sum(one.images * one.repeats for one in subsets.values() if not one.regularizes)
    return math.ceil((trained + _regularizing(subsets, trained)) / batch)


def _regularizing(subsets: Mapping[str, _Subset], trained: int) -> int:
    """Returns how often images that regularize are read: as often as the others, but each its repeats."""
    every = [one for one in subsets.values() if one.regularizes]
    if sum(one.images * one.repeats for one in every) <= trained:
        return trained if every else 0
    sums = itertools.accumulate(one.repeats for one in every for _ in range(one.images))
    return next((found for found in sums if found >= trained), 0) if trained else 0


def _images(subset: Mapping[str, Any]) -> int:
    """Returns how many images a subset has."""
    if subset.get("metadata_file"):
        return len(_text.read_file(Path(str(subset["metadata_file"]))))
    folder = str(subset.get("image_dir"))
    if not os.path.isdir(folder):
        raise ConfigError("the images are not here")
    stems = (os.path.splitext(name)[1] for name in os.listdir(folder) if not name.startswith("."))
    return sum(ending in (ending.lower(), ending.upper()) and ending.lower() in _IMAGES for ending in stems)


def steps_of_the_form(fields: Mapping[str, Any]) -> int | None:
    """Returns the steps that Kohya_SS computes of folders and epochs, where its form says 0 steps.

    It rounds once, at the end; with a configuration of the data it leaves sd-scripts its own number.
    """
    if fields.get("dataset_config"):
        return DEFAULT_STEPS
    try:
        return _of_folders(fields, str(fields.get("train_data_dir") or "")) or None
    except _WRONG:
        return None


def _of_folders(fields: Mapping[str, Any], folder: str) -> int:
    read = 0
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        inner, repeats = os.path.join(folder, name), name.split("_")[0]
        if os.path.isdir(inner) and repeats.lstrip("+-").isdecimal():
            read += int(repeats) * sum(file.lower().endswith(_GUI_IMAGES) for file in os.listdir(inner))
    batch, accumulation, epochs = (
        int(fields.get(name) or 1) for name in ("train_batch_size", "gradient_accumulation_steps", "epoch")
    )
    return math.ceil(read / batch / accumulation * epochs * (2 if fields.get("reg_data_dir") else 1))
