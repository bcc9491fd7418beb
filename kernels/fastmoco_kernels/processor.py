"""Which instruction sets this machine's processor has, and how to use fewer of them.

`FASTMOCO_CPU=avx2` hides every instruction set after AVX2, so that a machine with AVX-512 can test
what others run. It changes the answers of this module and the flags of our C++ sources;
`fastmoco.machine.environment` passes it on to ATen, oneDNN and MKL.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import torch

CAP = "FASTMOCO_CPU"
CAPS = ("avx2",)
# Beginnings of the flags that come after AVX2 in Linux's list.
_AFTER_AVX2 = ("avx512", "amx", "avx_", "avx10")


def cap() -> str:
    """The value of `FASTMOCO_CPU`, empty where there is no cap.

    Raises `ValueError` for an unknown value, because a misspelt one would cap nothing.
    """
    value = os.environ.get(CAP, "")
    if value and value not in CAPS:
        raise ValueError(f"{CAP} is {value!r}; it may be unset or {', '.join(CAPS)}.")
    return value


def lines(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What Linux tells of each core; empty on other systems."""
    try:
        return cpuinfo.read_text().splitlines()
    except OSError:
        return []


def flags() -> frozenset[str]:
    """Instruction sets by their Linux names, such as `avx2` or `avx512_bf16`, under the cap."""
    return _under(cap(), _found())


@cache
def _found() -> frozenset[str]:
    for line in lines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    known = {  # not Linux, so no AMX: torch 2.11 asks for it only there
        "avx2": torch.cpu._is_avx2_supported(),
        "avx512f": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }
    return frozenset(name for name, has in known.items() if has)


def _under(limit: str, found: frozenset[str]) -> frozenset[str]:
    if limit != "avx2":
        return found
    return frozenset(name for name in found if not name.startswith(_AFTER_AVX2))


def multiplies_bf16() -> bool:
    """Whether matrix products in bfloat16 are instructions and not emulated by float32 ones."""
    return bool({"avx512_bf16", "amx_bf16"} & flags())


def best() -> str:
    """The widest vector extension, for people: `amx_bf16`, `avx512_bf16`, ..., `avx2`."""
    wanted = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")
    found = flags()
    name = next((name for name in wanted if name in found), "no known vector extension")
    return f"{name} ({CAP}={cap()})" if cap() else name


def march() -> list[str]:
    """The compiler's flags for this processor, under the cap where it takes something away."""
    if flags() == _found():
        arm = platform.machine() in ("arm64", "aarch64")
        return ["-mcpu=native" if arm else "-march=native"]
    return ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
