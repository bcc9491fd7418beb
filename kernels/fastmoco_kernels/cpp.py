"""A C++ source of this package as a library compiled for this machine, or why there is none."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastmoco_kernels import processor

# -fopenmp without linking: the library must share the threads of torch, whose OpenMP is loaded.
COMPILE = ["-O3", "-std=c++17", "-fPIC", "-fopenmp"]
COMPILE += ["-fno-math-errno", "-fno-trapping-math"]


def _processor() -> str:
    """What -march=native depends on: folders in a shared home serve other processors too."""
    known = ("flags", "Features", "model name", "CPU part")
    told = {line for line in processor.lines() if line.startswith(known)}
    return "".join([platform.machine(), *sorted(told)])


def _compiled(source: Path, compiler: str) -> Path:
    """The shared library for this source, compiler and processor; compiled unless cached."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    flags = [*processor.march(), *COMPILE]
    parts = [source.read_text(), *headers, version.stdout, _processor(), *flags]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoco"
    library = root / f"{source.stem}_{name}.so"
    if not library.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            code, linked = Path(folder) / "code.o", Path(folder) / "linked.so"
            for command in (
                [compiler, *flags, "-c", str(source), "-o", str(code)],
                [compiler, "-shared", str(code), "-o", str(linked)],
            ):
                subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(linked, library)  # atomic: other ranks compile the same at the same time
    return library


def load(
    source: Path, arguments: type[ctypes.Structure], functions: Sequence[str]
) -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None and the reason in words. Compiling takes about two seconds.

    Each of `functions` takes a pointer to `arguments` and returns nothing.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler (g++ or clang++) is installed"
    try:
        library = ctypes.CDLL(str(_compiled(source, compiler)))
    except subprocess.CalledProcessError as error:
        return None, f"the compiler {compiler} failed: {(error.stderr or '').strip()[:200]}"
    except (OSError, RuntimeError) as error:  # no such compiler, no home, or an unknown symbol
        return None, f"the compiler's work cannot be used: {error}"
    for name in functions:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.POINTER(arguments)], None
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
