"""The data of `benchmarks quality`, from packages of Debian: fetched once, checked, kept out of the
repository.

`python -m benchmarks quality --fetch` writes into the data folder what is not there yet. It takes installed
files where there are some (`apt-get install dataset-fashion-mnist bible-kjv-text r-cran-mlbench`), and else
downloads the three packages with apt-get, without installing them. Whatever release the files come from,
their content must have the checksums below. Digits, Iris and Wine come with scikit-learn.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent / "data"  # git ignores it

Arrays = tuple[np.ndarray, np.ndarray]  # inputs float32 (n, ...), classes int32 (n,)


class Source(NamedTuple):
    """A file of the data folder.

    Attributes:
        package: of Debian.
        path: of the file in it, from the root.
        sha256: of what `make` returns.
        make: the file's bytes -> what is kept.
    """

    package: str
    path: str
    sha256: str
    make: Callable[[bytes], bytes]


def plain_text(packed: bytes) -> bytes:
    """Returns the text of bible.data: blocks that `compress` packed, one after another."""
    starts = [found.start() for found in re.finditer(b"\x1f\x9d\x90", packed)] + [len(packed)]
    text, at = b"", 0
    while at < len(starts) - 1:
        # The three bytes also occur inside a block: then the block ends at one of the next.
        for end in range(at + 1, min(at + 5, len(starts))):
            block = packed[starts[at] : starts[end]]
            done = subprocess.run(["zcat"], input=block, capture_output=True, check=False)
            if (
                done.returncode in (0, 2) and len(done.stdout) > 1000
            ):  # 2: a warning of what follows the block
                text, at = text + done.stdout, end
                break
        else:
            at += 1
    return re.sub(rb"^\w+:\d+ ", b"", text, flags=re.MULTILINE)[63:]  # the first line names the edition


_MNIST = ("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist/{}-ubyte.gz")
_R = ("r-cran-mlbench", "usr/lib/R/site-library/mlbench/data/{}.rda")


def _mnist(name: str, sha256: str) -> Source:
    return Source(_MNIST[0], _MNIST[1].format(name), sha256, gzip.decompress)


def _r(name: str, sha256: str) -> Source:
    return Source(_R[0], _R[1].format(name), sha256, unpacked)


def unpacked(packed: bytes) -> bytes:
    """Returns what an .rda file of R holds, whichever of its three compressions it has."""
    for magic, unpack in (
        (b"BZh", bz2.decompress),
        (b"\xfd7zXZ", lzma.decompress),
        (b"\x1f\x8b", gzip.decompress),
    ):
        if packed.startswith(magic):
            return unpack(packed)
    return packed


SOURCES = {
    "fashion-train-images": _mnist(
        "train-images-idx3", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "fashion-train-labels": _mnist(
        "train-labels-idx1", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "fashion-test-images": _mnist(
        "t10k-images-idx3", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "fashion-test-labels": _mnist(
        "t10k-labels-idx1", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
    "kjv.txt": Source(
        "bible-kjv-text",
        "usr/lib/bible.data",
        "b5c4940bcfeee072c0935b5200d0f9d88a00a0199cb0961d16133458fcdfae5d",
        plain_text,
    ),
    "glass": _r("Glass", "6d740b8023661263c637f261e1d7c24b6fdb9dbe65aacbb67d95e3865171da6c"),
    "vehicle": _r("Vehicle", "bb9b43b8bd2b087cd2fda9715acf4076437a0416d0a04ed9a90c38c50e5df598"),
    "vowel": _r("Vowel", "eefe4e7c077a7637bc53aeef0fb9fd1f3abda57ea27859f2ea251839966a8ac6"),
    "dna": _r("DNA", "2b15a9b2d1dfb0c08f108668e2ac65c7720499a022636140eccae92d4c06b291"),
    "letter": _r("LetterRecognition", "92844a4562cfe66720dea2b19f30cf83c155dec85c96a20f041f3e4e6db01c61"),
}


def fetch(folder: Path = FOLDER) -> list[str]:
    """Writes the files that are not there.

    Returns:
        A line for each file that was written.

    Raises:
        ValueError: if a file has not the content that the results were measured with.
        OSError, subprocess.CalledProcessError: if a package cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, source in SOURCES.items():
            if (folder / name).exists():
                continue
            content = source.make(_packaged(source, Path(scratch)).read_bytes())
            _check(name, content)
            (folder / f"{name}.part").write_bytes(content)
            (folder / f"{name}.part").replace(folder / name)
            told.append(f"{name}: {len(content):,} bytes, from {source.package}")
    return told


def _packaged(source: Source, scratch: Path) -> Path:
    """Returns the file as it is installed, or as it is in the package, unpacked in the scratch folder."""
    installed = Path("/", source.path)
    if installed.exists():
        return installed
    root = scratch / source.package
    if not root.exists():
        if not shutil.which("apt-get"):
            raise OSError(
                f"apt-get must be there to fetch {source.package}, got none: take the package from a Debian "
                f"mirror, and unpack it so that /{source.path} exists"
            )
        subprocess.run(["apt-get", "download", "-q", source.package], cwd=scratch, check=True)
        (archive,) = scratch.glob(f"{source.package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root / source.path


def _check(name: str, content: bytes) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SOURCES[name].sha256:
        raise ValueError(
            f"{name} must have the SHA-256 {SOURCES[name].sha256}, got {found}: the package "
            f"{SOURCES[name].package} has changed, or the file is damaged; delete it and fetch it again"
        )


def read(name: str, folder: Path = FOLDER) -> bytes:
    """Returns a file of the data folder.

    Raises:
        FileNotFoundError, ValueError: if it is not there, or not what it was; with what to do.
    """
    if not (folder / name).exists():
        raise FileNotFoundError(
            f"{folder / name} must be there, got nothing: run python -m benchmarks quality --fetch"
        )
    content = (folder / name).read_bytes()
    _check(name, content)
    return content


def have(name: str, folder: Path = FOLDER) -> bool:
    """Returns whether a file was fetched."""
    return (folder / name).exists()


def digits() -> Arrays:
    """Returns scikit-learn's 1,797 handwritten digits: inputs (n, 64) in [0, 1]."""
    from sklearn.datasets import load_digits

    inputs, classes = load_digits(return_X_y=True)
    return (inputs / 16).astype(np.float32), classes.astype(np.int32)


def fashion(part: str) -> Arrays:
    """Returns Fashion-MNIST, "train" or "test", (n, 196) in [0, 1]: means of four pixels each."""
    images = np.frombuffer(read(f"fashion-{part}-images"), np.uint8, offset=16).reshape(-1, 14, 2, 14, 2)
    classes = np.frombuffer(read(f"fashion-{part}-labels"), np.uint8, offset=8)
    return (images.mean((2, 4)).reshape(len(images), -1) / 255).astype(np.float32), classes.astype(np.int32)


def kjv() -> tuple[np.ndarray, int]:
    """Returns the King James Bible as indices of characters, int32 (n,), and how many there are."""
    text = np.frombuffer(read("kjv.txt"), np.uint8)
    characters, indices = np.unique(text, return_inverse=True)
    return indices.astype(np.int32), len(characters)


def convex(name: str) -> Arrays:
    """Returns one of the sets of the paper's Fig. 8; every input is scaled to [-1, 1], as LIBSVM's are."""
    if name in ("iris", "wine"):
        from sklearn import datasets

        inputs, classes = getattr(datasets, f"load_{name}")(return_X_y=True)
    else:
        inputs, classes = _table(read(name))
    if name == "vowel":
        inputs = inputs[:, 1:]  # the first column is the number of the speaker
    low, high = inputs.min(0), inputs.max(0)
    keep = high > low  # a column that never changes says nothing
    scaled = (2 * (inputs - low) / np.where(keep, high - low, 1) - 1)[:, keep]
    return scaled.astype(np.float32), classes.astype(np.int32)


def _table(content: bytes) -> Arrays:
    """Returns inputs and classes of the data frame of an .rda file."""
    ((_, (columns, attributes)),) = _read_rda(content)
    names = attributes["names"]
    target = next(name for name in ("Class", "Type", "lettr") if name in names)
    inputs = [
        np.asarray(column, float) for name, (column, _) in zip(names, columns, strict=True) if name != target
    ]
    classes = np.asarray(columns[names.index(target)][0]) - 1
    return np.stack(inputs, 1), classes


def _read_rda(content: bytes) -> list[tuple[str, Any]]:
    """Returns the (name, (value, attributes)) of a file that R's `save` wrote in its format 2."""
    stream = BytesIO(content)
    if stream.read(7) != b"RDX2\nX\n":
        raise ValueError(
            f"an .rda file must begin with RDX2 and X, got {content[:7]!r}: save it with version = 2"
        )
    stream.read(12)  # the format's version, and R's
    return list(_item(stream, []))


def _item(stream: BytesIO, symbols: list[str]) -> Any:
    """Reads one value: pairs as a list of (tag, value), vectors with their attributes."""

    def whole() -> int:
        return struct.unpack(">i", stream.read(4))[0]

    flags = whole() & 0xFFFFFFFF
    kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
    if kind == 254:  # the empty list
        return []
    if kind == 255:
        return symbols[(flags >> 8 or whole()) - 1]
    if kind == 1:
        symbols.append(_item(stream, symbols))
        return symbols[-1]
    if kind == 2:
        tag = _item(stream, symbols) if has_tag else ""
        return [(tag, _item(stream, symbols)), *_item(stream, symbols)]
    count = whole()
    if kind == 9:
        return stream.read(max(count, 0)).decode("latin1")
    if kind in (10, 13, 14):
        size, dtype = (8, ">f8") if kind == 14 else (4, ">i4")
        value: Any = np.frombuffer(stream.read(size * count), dtype)
    elif kind in (16, 19):
        value = [_item(stream, symbols) for _ in range(count)]
    else:
        raise ValueError(
            f"a value of R must be a vector, a list or a symbol, got kind {kind}: save it as a data frame"
        )
    attributes = dict(_item(stream, symbols)) if has_attributes else {}
    if kind == 16:  # names: strings without attributes of their own
        return value if not has_attributes else (value, attributes)
    attributes = {tag: one[0] if isinstance(one, tuple) else one for tag, one in attributes.items()}
    return value, attributes
