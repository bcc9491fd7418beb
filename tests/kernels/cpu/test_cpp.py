"""Compiling at run time on machines that do not want to: a sentence, never an exception."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fastmoco_kernels import cache, cpp

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled on Windows")
SOURCE = """
struct Arguments { int in, out; };
extern "C" void twice(Arguments* a) { a->out = 2 * a->in; }
"""


class Arguments(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int), ("out", ctypes.c_int))


class Place:
    """A home, a folder for temporary files and compilers of one test."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, monkeypatch
        self.source = root / "twice.cpp"
        self.source.write_text(SOURCE)
        self.temporary = root / "temporary"
        self.temporary.mkdir()
        self.kernels = root / "cache" / f"kernels-{os.getuid()}"

    def compiler(self, script: str) -> None:
        """A compiler that runs `script`; `"$@"` are its arguments."""
        path = self.root / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        self.patch.setenv("CXX", str(path))

    def load(self, *functions: str) -> tuple[ctypes.CDLL | None, str]:
        return cpp.load(self.source, Arguments, functions or ("twice",))

    def works(self) -> bool:
        library, why = self.load()
        if library is None:
            raise AssertionError(why)
        arguments = Arguments(value=21)
        library.twice(arguments)
        return bool(arguments.out == 42)

    def refused(self) -> str:
        library, why = self.load()
        assert library is None
        assert "\n" not in why
        return why

    def libraries(self) -> list[Path]:
        return list(self.kernels.glob("*.so"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    there = Place(tmp_path, monkeypatch)
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(there.temporary))
    monkeypatch.setattr(cpp, "_hanging", [])
    cache.temporary_folder.cache_clear()
    return there


needs_compiler = pytest.mark.skipif(
    not any((Path(folder) / "g++").exists() for folder in os.get_exec_path()), reason="no g++"
)


@needs_compiler
def test_a_source_is_compiled_once(place: Place) -> None:
    place.compiler('echo "$@" >> "$(dirname "$0")/calls"; exec g++ "$@"')
    assert place.works()
    assert place.works()
    calls = (place.root / "calls").read_text().splitlines()
    assert [line for line in calls if line != "--version"][2:] == []  # one compiles, one links
    (library,) = place.libraries()
    assert stat.S_IMODE(library.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.kernels.stat().st_mode) == 0o700
    place.source.write_text(SOURCE + "// another")
    assert place.works()
    assert len(place.libraries()) == 2


@needs_compiler
@pytest.mark.parametrize(
    "damage", ["truncated", "writable by others", "another's", "a link", "a pipe"]
)
def test_a_library_that_may_not_be_ours_is_built_again(place: Place, damage: str) -> None:
    library = cpp._library(place.source)  # not loaded: this process would crash on half of it
    whole = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "writable by others":
        library.chmod(0o666)
    elif damage == "another's":
        if os.getuid() != 0:
            pytest.skip("only the super user can give a file away")
        os.chown(library, 12345, -1)
    elif damage == "a pipe":  # reading it would never end
        library.unlink()
        os.mkfifo(library)
    else:
        library.rename(library.with_suffix(".moved"))
        library.symlink_to(library.with_suffix(".moved"))
    before = library.lstat().st_ctime_ns  # inode numbers are used again
    place.compiler('touch "$(dirname "$0")/called"; exec g++ "$@"')
    place.patch.setattr(cpp, "_name", lambda source, command, name=library.name: name.split(".")[0])
    assert place.works()
    assert (place.root / "called").exists()
    assert cache.belongs_to_user(library)
    assert library.lstat().st_ctime_ns != before
    assert library.read_bytes() == whole


def test_no_compiler(place: Place) -> None:
    place.patch.setenv("PATH", str(place.root))
    assert place.refused() == "no C++ compiler (g++ or clang++) is installed"
    place.patch.setenv("CXX", "nowhere/g++")
    assert "nowhere/g++ cannot be run: No such file" in place.refused()


def test_a_compiler_that_fails(place: Place) -> None:
    place.compiler('[ "$1" = --version ] && exit 0; echo hint; echo "x.cpp: error: no"; exit 1')
    assert place.refused().endswith("compiler failed: x.cpp: error: no")
    assert place.libraries() == []


def test_a_compiler_that_is_killed_leaves_nothing(place: Place) -> None:
    place.compiler('[ "$1" = --version ] && exit 0; touch "$TMPDIR/cc1.s"; kill -9 $$')
    assert "failed: code -9" in place.refused()
    assert list(place.kernels.iterdir()) == []
    assert list(place.temporary.iterdir()) == []


@needs_compiler
def test_folders_of_killed_builds_are_removed_once_they_are_old(place: Place) -> None:
    place.kernels.mkdir(mode=0o700, parents=True)
    old, young = place.kernels / "build-old", place.kernels / "build-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "code.o").write_text("half")
    os.utime(old, (time.time() - 86400,) * 2)
    assert place.works()
    assert not old.exists()
    assert young.exists()  # perhaps another rank is at it


def test_a_hanging_compiler_is_ended_and_waited_for_once(place: Place) -> None:
    """Its children hold the output open: they are ended too, and nothing waits for them."""
    place.compiler('sleep 1000 & echo $! > "$(dirname "$0")/child"; wait')
    place.patch.setattr(cpp, "TIMEOUT_S", 3.0)
    assert "did not end within 3 seconds" in place.refused()
    child = int((place.root / "child").read_text())
    while True:  # until the system has taken it away
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                break
            os.kill(child, 0)
        except (OSError, ProcessLookupError):
            break
        time.sleep(0.01)
    place.compiler(f"kill -{signal.SIGUSR1.value} {os.getpid()}")  # would end the tests
    assert "did not end within 3 seconds" in place.refused()


@needs_compiler
def test_openmp_under_its_other_name(place: Place) -> None:
    place.compiler(
        'case "$*" in *"-Xpreprocessor -fopenmp"*) ;; *-fopenmp*) exit 1 ;; esac; exec g++ "$@"'
    )
    assert "failed" in place.refused()
    place.patch.setattr(cpp, "OPENMP", [["-fopenmp"], ["-Xpreprocessor", "-fopenmp"]])
    assert place.works()


@needs_compiler
def test_no_home_leads_to_a_private_temporary_folder(place: Place) -> None:
    place.patch.delenv("FASTMOCO_CACHE")
    place.patch.delenv("XDG_CACHE_HOME", raising=False)
    place.patch.setenv("HOME", "/proc/nowhere")  # not even the super user can make this
    assert place.works()
    folder = place.temporary / f"fastmoco-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.rglob("*.so"))) == 1


@needs_compiler
def test_a_temporary_folder_that_others_may_change_is_not_used(place: Place) -> None:
    place.patch.setenv("FASTMOCO_CACHE", "/proc/nowhere")
    trap = place.temporary / f"fastmoco-{os.getuid()}"
    trap.mkdir()
    trap.chmod(0o777)
    assert place.works()
    assert list(trap.iterdir()) == []


def test_nowhere_to_write(place: Place) -> None:
    place.patch.setenv("FASTMOCO_CACHE", "/proc/nowhere")
    place.patch.setattr(tempfile, "tempdir", "/proc/nowhere")
    place.compiler("exit 0")
    assert "cannot be used" in place.refused()


@needs_compiler
def test_full_disk(place: Place) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place.patch.setattr(os, "replace", full)
    assert "No space left" in place.refused()
    assert list(place.kernels.iterdir()) == []


@needs_compiler
def test_a_library_without_the_function(place: Place) -> None:
    library, why = place.load("absent")
    assert library is None
    assert "absent" in why


def test_one_folder_by_one_variable(place: Place) -> None:
    from fastmoco.data.sources import demo
    from fastmoco.machine import cache as caches

    assert cache.cache_folder() == caches.cache_folder() == demo.demo_folder().parent
    assert cache.cache_folder() == place.root / "cache"
    place.patch.delenv("FASTMOCO_CACHE")
    place.patch.setenv("XDG_CACHE_HOME", str(place.root / "xdg"))
    assert cache.cache_folder() == caches.cache_folder() == place.root / "xdg" / "fastmoco"
    place.patch.delenv("XDG_CACHE_HOME")
    place.patch.setenv("HOME", str(place.root / "home"))
    assert cache.cache_folder() == place.root / "home" / ".cache" / "fastmoco"
    place.patch.setattr(sys, "platform", "win32")
    place.patch.setenv("LOCALAPPDATA", str(place.root / "local"))
    assert demo.demo_folder().parent == place.root / "local" / "fastmoco"
