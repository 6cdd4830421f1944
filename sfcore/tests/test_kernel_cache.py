"""The kept kernel: whatever lies in its folder, steps get one that is whole, or a reason; and a log line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfcore.native import build

SOURCE = Path(build.__file__)

# Without what imports it, which takes seconds.
FIND = """
import importlib.util, logging, sys
logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.FLAGS = [flag for flag in build.FLAGS if flag != "-O3"]  # sooner done
build.SECONDS = float(sys.argv[2])
found = build.find()
print("reason: " + found if isinstance(found, str) else "kernel: " + found._name)
"""


@pytest.fixture
def around(tmp_path, monkeypatch):
    """Returns an environment in which all folders are under tmp_path."""
    for name in ("home", "cache", "tmp"):
        (tmp_path / name).mkdir()
    kept = {
        name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    return kept | {
        "HOME": str(tmp_path / "home"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
    }


def start(around, seconds=60.0):
    command = [sys.executable, "-c", FIND, str(SOURCE), str(seconds)]
    return subprocess.Popen(
        command, env=around, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def find(around, seconds=60.0) -> tuple[str, list[str]]:
    """Returns what a new process finds, and what it logs."""
    process = start(around, seconds)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    logged = [line.removeprefix("LOG ") for line in err.splitlines() if line.startswith("LOG ")]
    assert len(logged) == len(err.splitlines()), err  # nothing else was said
    return out.strip(), logged


def folder(around) -> Path:
    return Path(around["XDG_CACHE_HOME"], "schedulefree-twin")


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_kernel_is_built_once_and_lies_where_nobody_else_can_write(around):
    first, logged = find(around)
    (kept,) = folder(around).iterdir()
    assert (first, logged) == (f"kernel: {kept}", [])
    assert [path.stat().st_mode & 0o777 for path in (folder(around), kept)] == [0o700, 0o700]
    assert find(around | {"CC": "/nowhere"}) == (first, [])  # it needs no compiler now


def halve(kept: Path) -> None:
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])


def zero(kept: Path) -> None:
    half = kept.stat().st_size // 2
    kept.write_bytes(kept.read_bytes()[:half] + bytes(half))


def empty(kept: Path) -> None:
    kept.write_bytes(b"")


def change_a_bit(kept: Path) -> None:
    whole = bytearray(kept.read_bytes())
    whole[len(whole) // 3] ^= 1
    kept.write_bytes(whole)


def let_all_write(kept: Path) -> None:
    kept.chmod(0o777)


def put_a_link(kept: Path) -> None:
    os.replace(kept, kept.parent.parent / "elsewhere.so")
    kept.symlink_to(kept.parent.parent / "elsewhere.so")


def put_another_library(kept: Path) -> None:
    """Whole, of the right name, and without our function."""
    source = kept.parent.parent / "other.c"
    source.write_text("int other(void) { return 1; }\n")
    made = kept.parent.parent / "other.so"
    subprocess.run([shutil.which("cc"), "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    key = kept.name.split(".")[0]
    kept.unlink()
    os.replace(made, kept.parent / build._name(key, made.read_bytes()))


DAMAGES = [halve, zero, empty, change_a_bit, let_all_write, put_a_link, put_another_library]


@pytest.mark.parametrize(
    "damage",
    [pytest.param(damage, marks=[] if damage is halve else pytest.mark.slow) for damage in DAMAGES],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_kernel_is_built_anew_with_one_line(damage, around):
    find(around)
    (kept,) = folder(around).iterdir()
    damage(kept)
    found, logged = find(around)
    assert found.startswith(f"kernel: {folder(around)}/")
    assert len(logged) == 1
    assert "cannot be used and is built anew: " in logged[0]
    assert find(around) == (found, [])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_nothing_of_another_owner_is_loaded(around):
    first, _ = find(around)
    (kept,) = folder(around).iterdir()
    os.chown(kept, 12345, 12345)
    found, logged = find(around)
    assert found == first
    assert "it must belong to the user 0, got 12345" in logged[0]
    assert len(logged) == 1
    os.chown(folder(around), 12345, 12345)
    found, logged = find(around)
    assert found.startswith(f"kernel: {around['HOME']}/.cache/schedulefree-twin/")
    assert len(logged) == 1
    assert f"is kept in {around['HOME']}/.cache/schedulefree-twin, because others cannot: " in logged[0]
    assert find(around) == (found, [])


@pytest.mark.slow
def test_where_no_folder_can_be_made_the_next_one_keeps_it(around, tmp_path):
    (tmp_path / "file").touch()
    blocked = around | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    found, logged = find(blocked)
    assert found.startswith(f"kernel: {around['HOME']}/.cache/schedulefree-twin/")
    assert len(logged) == 1
    blocked["HOME"] = str(tmp_path / "file")
    found, logged = find(blocked)
    assert found.startswith(f"kernel: {around['TMPDIR']}/schedulefree-twin-")
    assert len(logged) == 1
    assert find(blocked) == (found, [])
    found, logged = find(blocked | {"TMPDIR": str(tmp_path / "file"), "CC": "/nowhere"})
    assert (found.startswith("reason: "), logged) == (True, [])


def test_a_relative_cache_folder_is_not_used(around, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, logged = find(around | {"XDG_CACHE_HOME": "cache"})
    assert found.startswith(f"kernel: {around['HOME']}/.cache/")
    assert not any((tmp_path / "cache").iterdir())
    assert logged == []


def test_without_a_home_the_temporary_folder_keeps_it(around):
    bare = {name: value for name, value in around.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    nowhere = (
        "import pathlib\n@classmethod\ndef home(cls):\n    raise RuntimeError\npathlib.Path.home = home\n"
    )
    Path(around["TMPDIR"], "sitecustomize.py").write_text(nowhere)
    bare["PYTHONPATH"] = os.pathsep.join([around["TMPDIR"], *filter(None, [bare.get("PYTHONPATH")])])
    found, logged = find(bare)
    assert found.startswith(f"kernel: {around['TMPDIR']}/schedulefree-twin-")
    assert logged == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
def test_where_nothing_may_run_the_next_folder_keeps_it(around):
    mount = ["mount", "-t", "tmpfs", "-o", "noexec", "none", around["XDG_CACHE_HOME"]]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nothing be mounted")
    try:
        found, logged = find(around)
        assert found.startswith(f"kernel: {around['HOME']}/.cache/schedulefree-twin/")
        assert len(logged) == 1
        assert "the compiled kernel must load, got " in logged[0]
        assert find(around) == (found, [])
    finally:
        subprocess.run(["umount", around["XDG_CACHE_HOME"]], check=True)


BROKEN = {
    "fails": ("echo internal error >&2; exit 1", "must compile"),
    "speaks latin-1": (r"printf 'erreur \351\n' >&2; exit 1", "erreur \ufffd"),
    "makes nothing": ("exit 0", "No such file"),
    "makes something else": ('while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', "must load"),
    "makes half": (
        'cc "$@"; while [ "$1" != -o ]; do shift; done; head -c 9000 "$2" > "$2.h"; mv "$2.h" "$2"',
        "must load, got ",
    ),
    "never ends": ("exec sleep 60", "timed out"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_with_a_broken_compiler_there_is_a_reason(how, around, tmp_path):
    text, reason = BROKEN[how]
    seconds = 2.0 if how == "never ends" else 60.0  # a busy machine compiles for longer than 2
    found, logged = find(around | {"CC": program(tmp_path / "cc", text)}, seconds)
    assert found.startswith("reason: ")
    assert reason in found
    assert logged == []
    assert list(folder(around).iterdir()) == []  # nothing half made is left


def test_a_command_of_odd_quotes_is_a_reason(around):
    found, _ = find(around | {"CC": "gcc '"})
    assert found == 'reason: CC must be a command, got "gcc \'": No closing quotation'


def test_builds_at_the_same_time_all_end_with_a_kernel(around):
    processes = [start(around) for _ in range(4)]
    said = [process.communicate(timeout=120) for process in processes]
    assert all(out.startswith("kernel: ") and err == "" for out, err in said), said
    assert all(path.suffix == ".so" for path in folder(around).iterdir())


@pytest.mark.slow
def test_what_killed_builds_leave_is_removed_by_the_next(around, tmp_path):
    process = start(around | {"CC": program(tmp_path / "cc", "exec sleep 5")})
    end = time.monotonic() + 60
    while not (folder(around).is_dir() and list(folder(around).iterdir())):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (left,) = folder(around).iterdir()
    found, logged = find(around)
    assert found.startswith("kernel: ")
    assert logged == []
    assert left.exists()
    os.utime(left, (time.time() - 3600,) * 2)
    next(folder(around).glob("*.so")).unlink()
    assert find(around)[0].startswith("kernel: ")
    assert not left.exists()
