"""A C++ source of this package as a library compiled for this machine, or why there is none.

An error is returned as a sentence and not raised, because ATen can compute the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fastmoco_kernels import processor
from fastmoco_kernels.cache import (
    belongs_to_user,
    cache_folder,
    private,
    temporary_folder,
    user_suffix,
)

# -fopenmp without linking: the library must share the threads of torch, whose OpenMP is loaded.
COMPILE = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
# Apple's clang takes the option on its way to the preprocessor only.
OPENMP = [["-fopenmp"]] + [["-Xpreprocessor", "-fopenmp"]] * (sys.platform == "darwin")
# The largest source takes three seconds on a slow core; beyond this a compiler counts as hanging.
TIMEOUT_S = 120.0
BUILDS = "build-"
# Set to a sentence after a compiler hung, so that no other source waits for it again.
_hanging: list[str] = []


class CompilerError(Exception):
    """The compiler did not do its work. The message is a clause for the start lines."""


def _processor() -> str:
    """What `march` depends on: folders in a shared home serve other processors too."""
    known = ("flags", "Features", "model name", "CPU part")
    told = {line for line in processor.lines() if line.startswith(known)}
    return "".join([platform.machine(), platform.processor(), *sorted(told)])


def _run(command: Sequence[str], scratch: Path) -> str:
    """What the command prints. Raises `CompilerError` where it fails or does not end.

    Temporary files go to `scratch`. A compiler is several processes: all of them are ended, also
    after Ctrl-C. Its output goes to a file, because a process left over would keep a pipe open.
    """
    name = command[0]
    with tempfile.TemporaryFile(dir=scratch) as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(scratch), "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            raise CompilerError(f"the compiler {name} cannot be run: {error.strerror}") from error
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            _hanging.append(f"the compiler {name} did not end within {TIMEOUT_S:g} seconds")
            raise CompilerError(_hanging[0]) from error
        finally:
            if process.poll() is None:
                _kill(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if code:
        raise CompilerError(f"the compiler {name} failed: {_complaint(text) or f'code {code}'}")
    return text


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _complaint(text: str) -> str:
    """The first line about an error, else the first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), "".join(lines[:1]))[:200]


def _compiler() -> list[str]:
    """The command of the compiler. Raises `CompilerError` where there is none."""
    if sys.platform == "win32":
        raise CompilerError("on Windows none is compiled")
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        raise CompilerError("no C++ compiler (g++ or clang++) is installed")
    return [found]


def _flags() -> list[list[str]]:
    """Sets of flags to try in turn."""
    # Not every clang for ARM knows how to ask the processor.
    wanted = processor.march()
    native = [wanted, []] if "-mcpu=native" in wanted else [wanted]
    return [[*COMPILE, *one, *openmp] for one in native for openmp in OPENMP]


def _name(source: Path, command: list[str]) -> str:
    """The library's name without its digest: source, compiler, flags and processor decide it."""
    with tempfile.TemporaryDirectory(prefix="fastmoco-") as scratch:
        version = _run([*command, "--version"], Path(scratch))
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    parts = [source.read_text(), *headers, *command, version, _processor(), str(_flags())]
    return f"{source.stem}_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}"


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def _kept(folder: Path, name: str) -> Path | None:
    """The library of that name if it is whole and this user's own; others are deleted."""
    for library in folder.glob(f"{name}.*.so"):
        with contextlib.suppress(OSError):
            # A pipe of that name would never give its end.
            usable = library.is_file() and belongs_to_user(library)
            if usable and library.name == f"{name}.{_digest(library)}.so":
                return library
            library.unlink()
    return None


def _build(source: Path, command: list[str], folder: Path, name: str) -> Path:
    """Compile the source into the folder. Raises `CompilerError`, or `OSError` about the folder."""
    for left in folder.glob(f"{BUILDS}*"):  # by processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 10 * TIMEOUT_S:
                shutil.rmtree(left, ignore_errors=True)
    shared = ["-shared", *(["-undefined", "dynamic_lookup"] * (sys.platform == "darwin"))]
    with tempfile.TemporaryDirectory(prefix=BUILDS, dir=folder, ignore_cleanup_errors=True) as at:
        scratch = Path(at)
        code, linked = scratch / "code.o", scratch / "linked.so"
        first, *others = _flags()
        try:
            _run([*command, *first, "-c", str(source), "-o", str(code)], scratch)
        except CompilerError:
            for flags in others if not _hanging else []:
                with contextlib.suppress(CompilerError):
                    _run([*command, *flags, "-c", str(source), "-o", str(code)], scratch)
                    break
            else:
                raise
        _run([*command, *shared, str(code), "-o", str(linked)], scratch)
        linked.chmod(0o600)
        library = folder / f"{name}.{_digest(linked)}.so"
        os.replace(linked, library)  # atomic: other ranks compile the same at the same time
    return library


def _library(source: Path) -> Path:
    """The library of this source, compiled unless there is one. Raises as `_build` does."""
    if _hanging:
        raise CompilerError(_hanging[0])
    command = _compiler()
    name = _name(source, command)
    own = f"kernels{user_suffix()}"  # a cache may be shared: each user loads what is theirs
    failure: OSError | None = None
    for place in (cache_folder, temporary_folder):
        try:
            folder = private(place() / own)
            return _kept(folder, name) or _build(source, command, folder, name)
        except OSError as error:
            failure = failure or error
    raise failure or OSError("no folder")


def load(
    source: Path, arguments: type[ctypes.Structure], functions: Sequence[str]
) -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None and the reason in words. Compiling takes about two seconds.

    Each of `functions` takes a pointer to `arguments` and returns nothing.
    """
    try:
        library = ctypes.CDLL(str(_library(source)))
        for name in functions:
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.POINTER(arguments)], None
    except CompilerError as error:
        return None, str(error)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        # Nowhere to write, a full disk, or a library that the loader refuses.
        return None, f"the compiler's work cannot be used: {' '.join(str(error).split())}"
    return library, ""


def available(
    source: Path, arguments: type[ctypes.Structure], functions: Sequence[str]
) -> tuple[ctypes.CDLL | None, str]:
    """The same for a source that cannot serve every processor: its `unavailable` says why not."""
    library, why = load(source, arguments, functions)
    if library is None:
        return None, why
    library.unavailable.restype = ctypes.c_char_p
    why = library.unavailable().decode()
    return (None, why) if why else (library, "")
