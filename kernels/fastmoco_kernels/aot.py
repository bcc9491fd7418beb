"""Compile every kernel for sm_80, sm_90 and sm_100 without a GPU and report what the compiler made.

    python -m fastmoco_kernels.aot

Launches are built by the functions that build them for a device, from meta tensors, and compiled as
the just-in-time compiler would: sizes divisible by 16 and aligned pointers are known as such.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmoco_kernels.launch import Launch

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one architecture."""

    arch: int
    registers: int
    spills: int
    """Instructions that load from or store to local memory."""
    shared_bytes: int
    tensor_core: int
    """Matrix instructions: HMMA (sm_80), HGMMA (sm_90), UTC*MMA (sm_100)."""
    operations: Counter[str]
    """Full SASS mnemonics and how often each occurs."""


def _source(launch: Launch) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([BINARIES / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def compile_for(launch: Launch, arch: int) -> Compiled:
    """Compile one launch for sm_`arch`. Compiler errors are raised as they come."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    lines = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)
    operations = Counter(lines)
    stems = Counter(line.split(".")[0] for line in lines)
    return Compiled(
        arch,
        int(re.findall(r"REG:(\d+)", usage)[0]),
        stems["LDL"] + stems["STL"],
        kernel.metadata.shared,
        sum(stems[s] for s in ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")),
        operations,
    )
