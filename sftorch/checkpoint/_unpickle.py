"""Reads what torch.save wrote: nothing in it is executed, and nothing of it is larger than the file says.

torch itself refuses to call what a file names. What it lets through is held here against the checksums of the
zip, which torch does not look at, and against small files that become large: objects that hold each other ten
times over, whose hash has no end, tensors with a stride of 0, compressed entries.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sfcore.exchange import CheckpointError, cannot_read, reading
from sfcore.sources import unknown

_DEEPEST = 500  # containers in containers; a hash deeper than this ends the process
_ITEMS = 1 << 20  # that a file of a few bytes may hold, each counted as often as it is held
_EXPANDED = 1 << 28  # bytes of the tensors that are larger than what is stored of them
_LENGTHS = (
    26  # in the header of an entry of a zip: those of its name and of what else stands before its bytes
)
_MAGIC, _LEGACY_PICKLES = (
    b"PK\x03\x04",
    5,
)  # of the format before the zip: magic, version, system, object, keys


def load(path: Path) -> Any:
    """Returns what a torch file holds, on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: if it cannot be read, is damaged, or holds other objects.
    """
    with reading(path):
        _check(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(cannot_read(path, error)) from error
    except pickle.UnpicklingError as error:
        raise unknown(path, "a pickle with objects that are no state dicts, which is not executed") from error
    except Exception as error:  # of a changed byte torch makes whatever its readers stumble over
        raise _damaged(path, error) from error
    expanded = sum(map(_excess, _tensors(content)))
    if expanded > _EXPANDED:
        raise unknown(path, f"tensors that are {expanded} bytes larger than what is stored of them")
    return content


def _damaged(path: Path, error: Exception) -> CheckpointError:
    why = str(error).partition("\n")[0] or type(error).__name__
    return CheckpointError(f"{path} is damaged: torch cannot read it ({why})")


def _check(path: Path) -> None:
    with open(path, "rb") as file:
        try:
            if file.read(len(_MAGIC)) == _MAGIC:
                _check_zip(path, file)
                return
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _check_program(path, file)
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # whatever a changed byte leads to
            raise _damaged(path, error) from error


def _check_zip(path: Path, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename.lower() for entry in entries}
        if len(names) < len(entries) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise unknown(path, "a zip with compressed or repeated entries, which torch does not write")
        # Those who save without checksums (torch.serialization.set_crc32_options) leave zeros.
        changed = archive.testzip() if any(entry.CRC for entry in entries) else None
        if changed is not None:
            raise CheckpointError(f"{path} is damaged: the CRC-32 of its {changed} is not the recorded one")
    for entry in entries:
        if entry.filename.lower().endswith("data.pkl"):
            # By hand, because zipfile holds what it reads against a checksum that may not be there.
            file.seek(entry.header_offset + _LENGTHS)
            file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
            _check_program(path, io.BytesIO(file.read(entry.file_size)))


def _check_program(path: Path, program: IO[bytes]) -> None:
    """Raises if the object of a pickle holds far more than the pickle has opcodes, or goes too deep.

    Each object on the stack is a list of what it holds and how deep: what is put into it later counts too.
    """
    stack: list[Any] = []
    memo: dict[Any, list[int]] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        name, after = opcode.name, len(opcode.stack_after)
        if name == "MARK":
            stack.append(None)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            items, before = [], len(opcode.stack_before)
            if pickletools.stackslice in opcode.stack_before:
                while (item := stack.pop()) is not None:
                    items.append(item)
                before -= 2  # the mark and the slice
            # What stays on the stack with more in it: APPENDS, SETITEM, BUILD and so on.
            stays = before > 0 and after == 1 and name.startswith(("APPEND", "SETITEM", "ADDITEMS", "BUILD"))
            items += [stack.pop() for _ in range(before - stays)]
            held = stack[-1] if stays else [1, 0]
            for item in items:
                held[0] += item[0]
                held[1] = max(held[1], item[1] + 1)
            if held[0] > _ITEMS + 16 * count or held[1] > _DEEPEST:
                raise unknown(path, "a pickle whose objects hold each other over and over")
            if after and not stays:
                stack.append(held)


def _tensors(content: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | Set):
            waiting += value


def _excess(tensor: Tensor) -> int:
    """Returns the bytes by which a tensor in full is larger than its storage."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return 0
    return max(0, tensor.numel() * tensor.element_size() - tensor.untyped_storage().nbytes())
