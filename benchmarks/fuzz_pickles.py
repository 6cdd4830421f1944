"""The pickles of fuzz.py: files of torch.save that would run a program, or never end, if they could."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import fuzz_torch
from benchmarks.fuzz import Case, Reading
from sfcore import inspection
from sftorch.checkpoint import Checkpoints


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _global(name: str) -> bytes:
    module, _, attribute = name.partition(":")
    return f"c{module}\n{attribute}\n".encode()


def _stack_global(name: str) -> bytes:
    module, _, attribute = name.partition(":")
    return _text(module) + _text(attribute) + b"\x93"


def _plain(value: Any) -> bytes:
    """Returns the opcodes that leave a value on the stack."""
    return value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1]


def _call(function: bytes, *arguments: Any) -> bytes:
    return function + b"(" + b"".join(map(_plain, arguments)) + b"tR"


def payloads(marker: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Returns name -> (module:function, arguments) of calls that make a file of this name."""
    program, touch = f"open({marker!r}, 'w').close()", f"touch {marker}"
    nested = pickle.dumps([])[:-2] + _call(_global("os:system"), touch) + b"."
    return {
        "os.system": ("os:system", (touch,)),
        "posix.system": ("posix:system", (touch,)),
        "os.popen": ("os:popen", (touch,)),
        "os.mkdir": ("os:mkdir", (marker,)),
        "os.makedirs": ("os:makedirs", (marker,)),
        "eval": ("builtins:eval", (program,)),
        "exec": ("builtins:exec", (program,)),
        "eval of Python 2": ("__builtin__:eval", (program,)),
        "open": ("builtins:open", (marker, "w")),
        "io.open": ("io:open", (marker, "w")),
        "io.FileIO": ("io:FileIO", (marker, "w")),
        "codecs.open": ("codecs:open", (marker, "w")),
        "subprocess.call": ("subprocess:call", (["touch", marker],)),
        "subprocess.run": ("subprocess:run", (["touch", marker],)),
        "subprocess.check_output": ("subprocess:check_output", (["touch", marker],)),
        "subprocess.getoutput": ("subprocess:getoutput", (touch,)),
        "timeit.timeit": ("timeit:timeit", (program, "pass", _global("time:time"), 1)),
        "runpy": ("runpy:_run_code", (_call(_global("builtins:compile"), program, "x", "exec"), {})),
        "getattr of a module": (
            "builtins:getattr", (_call(_global("importlib:import_module"), "os"), "system")
        ),
        "pickle.loads": ("pickle:loads", (nested,)),
        "_pickle.loads": ("_pickle:loads", (nested,)),
        "numpy.save": ("numpy:save", (marker, 1)),
        "torch.save": ("torch:save", (1, marker)),
        "torch.storage": ("torch.storage:_load_from_bytes", (_zip(nested),)),
        "torch.load": ("torch.serialization:load", (_call(_global("io:BytesIO"), _zip(nested)),)),
        "shutil.copyfile": ("shutil:copyfile", ("/etc/hostname", marker)),
        "tempfile": ("tempfile:mkdtemp", ("", "", marker)),
    }  # fmt: skip


def carriers(marker: str, function: str, arguments: tuple[Any, ...]) -> dict[str, bytes]:
    """Returns name -> opcodes that would call a function and leave something on the stack."""
    touch = f"touch {marker}"
    of = b"".join(map(_plain, arguments))
    module, _, attribute = function.partition(":")
    call = _call(_global(function), *arguments)
    if attribute == "getattr":  # which gives the function that is meant
        call = call + b"(" + _plain(touch) + b"tR"
        return {"reduce": call, "in a call of torch": _call(_global("torch._utils:_rebuild_tensor_v2"), call)}
    storage = b"(" + _text("storage") + call + _text("0") + _text("cpu") + b"K\x01tQ"
    rebuilt = _call(_global("torch._utils:_rebuild_tensor_v2"), storage, 0, (1,), (1,), False)
    setter = b"}" + _text("__setstate__") + _global(function) + b"sb"
    state = of if len(arguments) == 1 else b"N"
    return {
        "reduce": call,
        "reduce of a stack global": _call(_stack_global(function), *arguments),
        "inst": b"(" + of + f"i{module}\n{attribute}\n".encode(),
        "obj": b"(" + _global(function) + of + b"o",
        "newobj": _global(function) + b"(" + of + b"t\x81",
        "newobj with keywords": _global(function) + b"(" + of + b"t}\x92",
        "build": _call(_global("collections:OrderedDict")) + setter + state + b"b",
        "persistent id": storage,
        "in a call of torch": rebuilt,
        "as a type": _call(_global("torch._tensor:_rebuild_from_type_v2"), _global(function), call, (), {}),
        "memo": call + b"q\x00" + b"0" + b"h\x00",
    }  # fmt: skip


def nests(opcodes: bytes) -> dict[str, bytes]:
    """Returns name -> opcodes with others as a part of what a training program saves."""
    weights = _plain({"w": 1.0})
    group = b"](}" + _text("lr") + _plain(0.1) + b"s" + _text("params") + opcodes + b"se"
    return {
        "alone": opcodes,
        "a value": b"}" + _text("model") + weights + b"s" + _text("extra") + opcodes + b"s",
        "a group": b"}"
        + _text("state")
        + b"}s"
        + _text("param_groups")
        + group.replace(b"](}", b"](}", 1)
        + b"s",
        "a key": b"}" + opcodes + _text("x") + b"s",
        "dropped": opcodes + b"0" + weights,
    }


def _zip(program: bytes, deflated: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", struct.pack("<f", 1.0))
    return file.getvalue()


def _legacy(program: bytes, place: int = 3) -> bytes:
    magic = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    parts = [pickle.dumps(one, 2) for one in magic]
    parts.insert(place, program)
    return (
        b"".join(parts[: max(4, place + 1)])
        + pickle.dumps(["0"], 2)
        + struct.pack("<q", 1)
        + struct.pack("<f", 1)
    )


def formats(opcodes: bytes) -> dict[str, bytes]:
    """Returns name -> file with a pickle of these opcodes."""
    program = b"\x80\x02" + opcodes + b"."
    return {
        "zip": _zip(program),
        "legacy": _legacy(program),
        "in place of the magic number": _legacy(program, 0),
        "among the system's": _legacy(program, 2),
        "a pickle": program,
        "protocol 4": b"\x80\x04" + opcodes + b".",
    }


def variants(marker: str) -> dict[str, bytes]:
    """Returns name -> file, of every payload in every carrier, in one place and format after the other."""
    found = {}
    for number, (what, (function, arguments)) in enumerate(payloads(marker).items()):
        for other, (how, opcodes) in enumerate(carriers(marker, function, arguments).items()):
            places = list(product(nests(opcodes).items(), ("zip", "legacy") * 2 + tuple(formats(b""))))
            (where, nested), form = places[(number * 7 + other * 5) % len(places)]
            found[f"{what}, {how}, {where}, {form}"] = formats(nested)[form]
    return found


def _doubled(start: bytes, combine: bytes, times: int) -> bytes:
    """Returns opcodes that hold ten of what was before, again and again, through the memo."""
    made = start + b"q\x00"
    for number in range(times):
        made += (
            b"("
            + b"h"
            + bytes([number])
            + (b"h" + bytes([number])) * 9
            + combine
            + b"q"
            + bytes([number + 1])
        )
    return made


def _tensor(size: tuple[int, ...], stride: tuple[int, ...], held: int = 1) -> bytes:
    storage = (
        b"("
        + _text("storage")
        + _global("torch:FloatStorage")
        + _text("0")
        + _text("cpu")
        + _plain(held)
        + b"tQ"
    )
    return _call(_global("torch._utils:_rebuild_tensor_v2"), storage, 0, size, stride, False, {})


def bombs() -> dict[str, bytes]:
    """Returns name -> opcodes of something that asks for memory or time without end."""
    many = 2**40
    expanded = [_text(str(number)) + _tensor((1 << 24,), (0,)) + b"s" for number in range(64)]
    return {
        "lists of lists": _doubled(b"]", b"l", 30),
        "tuples of tuples": _doubled(b")", b"t", 30),
        "tuples as a key": b"}" + _doubled(b")", b"t", 30) + b"K\x01s",
        "tuples in a set": _call(_global("builtins:set"), b"](" + _doubled(b")", b"t", 30) + b"e"),
        "dicts of dicts": _doubled(b"}", b"l", 30),
        "deep lists": b"]" * 100_000 + b"a" * 99_999,
        "deep tuples": b")" + b"\x85" * 100_000,
        "a deep key": b"}" + b")" + b"\x85" * 100_000 + b"K\x01s",
        "marks": b"(" * 200_000,
        "itself": b"]q\x00h\x00a",
        "a dict of itself": b"}q\x00" + _text("w") + b"h\x00s",
        "long text": b"\x8d" + struct.pack("<Q", many),
        "long bytes": b"\x8e" + struct.pack("<Q", many),
        "a long array": b"\x96" + struct.pack("<Q", many),
        "short text": b"X" + struct.pack("<I", 2**32 - 1) + b"x",
        "a long number": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1",
        "a negative length": b"\x8b" + struct.pack("<i", -1),
        "digits": b"I" + b"9" * 1_000_000 + b"\n",
        "more digits": b"L" + b"9" * 1_000_000 + b"L\n",
        "a large key": b"}\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b"K\x01s",
        "a frame": b"\x95" + struct.pack("<Q", many),
        "a memo": b"]r" + struct.pack("<I", 2**32 - 1),
        "nothing to pop": b"00000",
        "no memo": b"h\x07",
        "an expanded tensor": b"}" + _text("w") + _tensor((many,), (0,)) + b"s",
        "expanded tensors": b"}" + b"".join(expanded),
        "a tensor beyond its storage": b"}" + _text("w") + _tensor((many,), (1,)) + b"s",
        "a storage beyond the file": b"}" + _text("w") + _tensor((many,), (1,), many) + b"s",
        "no elements": b"}" + _text("w") + _tensor((0, many, many), (1, 1, 1)) + b"s",
        "a negative size": b"}" + _text("w") + _tensor((-1,), (1,)) + b"s",
        "many axes": b"}" + _text("w") + _tensor((1,) * 1000, (1,) * 1000) + b"s",
        "an empty tensor of torch": b"}" + _text("w") + _call(_global("torch:empty"), many) + b"s",
        "zeros of torch": b"}" + _text("w") + _call(_global("torch._utils:_rebuild_meta_tensor_no_storage"),
            _global("torch:float32"), (many,), (1,), False) + b"s",
        "bytearray": _call(_global("builtins:bytearray"), many),
        "a counter": _call(_global("collections:Counter"), "x" * 1000),
    }  # fmt: skip


def inflated() -> bytes:
    """Returns a small zip whose pickle becomes large when it is read."""
    return _zip(
        b"\x80\x02}" + _text("w") + b"\x8e" + struct.pack("<Q", 1 << 29) + bytes(1 << 29) + b"s.", True
    )


_inflated: list[bytes] = []


def warm(folder: Path) -> None:
    """Makes once what takes long to make."""
    fuzz_torch.quiet()
    _inflated[:] = [inflated()]


def opened(path: Path) -> tuple[Callable[[], Any], ...]:
    """Returns the ways in which a user may let us read a file."""

    def weights() -> None:
        model, optimizer = fuzz_torch.trained("sftorch sgd", 0, 1)
        Checkpoints(path.parent / "run").restore(model, optimizer, resume=f"weights:{path}")

    return lambda: inspection.inspect(path), weights


def a_pickle(draw: random.Random, folder: Path) -> Reading:
    """Writes a file that would make another one, or eat what there is."""
    marker = folder / "executed"
    if draw.random() < 0.7:
        content = draw.choice(list(variants(str(marker)).values()))
    elif draw.random() < 0.05:
        content = _inflated[0]
    else:
        content = draw.choice(list(formats(draw.choice(list(bombs().values()))).values()))
    path = folder / draw.choice(["model.pt", "pytorch_model.bin", "optimizer.pt"])
    path.write_bytes(content)
    read = draw.choice(opened(path))

    def reading() -> None:
        try:
            read()
        finally:
            if marker.exists():
                raise AssertionError("it was executed")

    return reading


CASES: dict[str, Case] = {"pickles": a_pickle}
