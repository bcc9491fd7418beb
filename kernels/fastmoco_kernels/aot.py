"""Compile every kernel for sm_80, sm_90 and sm_100 without a GPU and report what the compiler made.

    python -m fastmoco_kernels.aot

The functions that build launches for a device build them here from meta tensors. They are compiled
as the just-in-time compiler would: sizes divisible by 16 and aligned pointers are marked as such.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.ema import ema_launch
from fastmoco_kernels.ema import launch_configuration as ema_configuration
from fastmoco_kernels.info_nce_launch import plan
from fastmoco_kernels.launch import HAS_TRITON, Launch, triton
from fastmoco_kernels.multi_tensor import Table
from fastmoco_kernels.network.max_pool import backward_launch, forward_launch
from fastmoco_kernels.network.recipe_launches import layer_launches
from fastmoco_kernels.sgd_ema import launch_configuration as sgd_configuration
from fastmoco_kernels.sgd_ema import sgd_ema_launch
from fastmoco_kernels.views.recipe_launches import view_launches

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that a program may ask for; the compiler does not check it.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# Data sheets of A100-80, H100 and B200: bytes per second, and dense operations per second of the
# matrix units in bfloat16 and in TF32.
BANDWIDTH = {80: 2.04e12, 90: 3.35e12, 100: 8.0e12}
MATRIX_BF16 = {80: 312e12, 90: 989e12, 100: 2250e12}
MATRIX_TF32 = {80: 156e12, 90: 494e12, 100: 1100e12}
RESNET50_PARAMETERS, RESNET50_TENSORS = 27_966_656, 163  # MoCo v2, with its MLP head
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
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


@dataclass(frozen=True)
class Case:
    """A launch of a recipe, with the least bytes and operations that it needs."""

    name: str
    launch: Launch
    bytes: int
    operations: int = 0
    """Multiplications and additions of the matrix products, 0 where there are none."""

    def roofline(self, arch: int) -> float:
        """Modelled, not measured, seconds on sm_`arch`: the longer of memory and matrix time."""
        single = any(
            isinstance(v, Tensor) and v.dtype == torch.float32 and name == "q_ptr"
            for name, v in self.launch.arguments.items()
        )
        peak = MATRIX_TF32[arch] / 3 if single else MATRIX_BF16[arch]
        return max(self.bytes / BANDWIDTH[arch], self.operations / peak)


def _size(*tensors: object) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def info_nce_cases(
    n: int,
    c: int,
    k: int,
    dtype: torch.dtype,
    queue_dtype: torch.dtype,
    arch: int,
    temperature: float = 0.2,
) -> list[Case]:
    """Both launches of `info_nce_enqueue` for q (n, c) of dtype, queue (k, c), n new keys."""

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    q, queue, cursor = meta(n, c), meta(k, c, of=queue_dtype), meta(1, of=torch.int64)
    steps = plan(q, meta(n, c), queue, temperature, meta(n, c), cursor, arch)
    a = steps.partial.arguments
    partials = _size(*(a[x] for x in ("shift_ptr", "total_ptr", "above_ptr", "weighted_ptr")))
    name = f"N={n} C={c} K={k} {str(dtype)[6:]} queue {str(queue_dtype)[6:]}"
    read = _size(q, q, queue)
    written = _size(steps.losses, steps.rank, steps.dq) + n * c * queue.element_size()
    return [
        Case(f"info_nce partial {name}", steps.partial, read + partials, 4 * n * c * k),
        Case(f"info_nce reduce {name}", steps.reduce, _size(q, q, q) + partials + written),
    ]


def update_cases(arch: int, parameters: int = RESNET50_PARAMETERS) -> list[Case]:
    """`ema_`, with and without shadows, and `sgd_ema_` over the parameters of ResNet-50."""

    def pointers(lists: int, block: int) -> Table:
        rows = torch.empty(RESNET50_TENSORS, lists + 2, dtype=torch.int64, device="meta")
        programs = parameters // block + RESNET50_TENSORS
        return Table(rows, torch.empty(programs, dtype=torch.int32, device="meta"), True)

    block, sgd_block = ema_configuration(arch)[0], sgd_configuration(arch)[0]
    lr = torch.empty((), device="meta")
    return [
        Case("ema", ema_launch(pointers(2, block), 0.999, None, arch), 12 * parameters),
        Case(
            "ema with bfloat16 shadow",
            ema_launch(pointers(3, block), 0.999, torch.bfloat16, arch),
            14 * parameters,
        ),
        Case(
            "sgd_ema",
            sgd_ema_launch(pointers(4, sgd_block), lr, 0.9, 1e-4, 0.999, arch),
            28 * parameters,
        ),
    ]


def max_pool_cases(n: int) -> list[Case]:
    """Forward and backward behind the stem of ResNet-50, for n images of 224 pixels."""
    x = torch.empty(n, 64, 112, 112, dtype=torch.bfloat16, device="meta")
    forward, y, index = forward_launch(x, (3, 2, 1))
    backward, _ = backward_launch(y, index, 112, 112, (3, 2, 1))
    moved = _size(x, y, index)
    return [Case("max_pool", forward, moved), Case("max_pool backward", backward, moved)]


def recipe_cases(arch: int) -> list[Case]:
    """What the recipes launch: 256 images on one device, or 32 on each of eight."""
    f32, bf16 = torch.float32, torch.bfloat16
    cases = update_cases(arch) + max_pool_cases(256)
    cases += [Case(*each) for each in (*layer_launches(arch), *view_launches(512, 224))]
    for n, dtype, queue_dtype in ((256, bf16, f32), (256, bf16, bf16), (32, bf16, f32)):
        cases += info_nce_cases(n, 128, 65536, dtype, queue_dtype, arch)
    return cases + info_nce_cases(256, 128, 65536, f32, f32, arch)


def _of_enqueue(
    q: Tensor, k: Tensor, keys: Tensor, queue: Tensor, queue_ptr: Tensor, temperature: float
) -> list[Case]:
    n, c = q.shape
    return info_nce_cases(n, c, len(queue), q.dtype, queue.dtype, 90, temperature)


CALLS: dict[str, Callable[..., list[Case]]] = {"info_nce_enqueue": _of_enqueue}
"""Launches of a call on sm_90, by op, for the arguments of the op. An op that is not here is one
launch that reads every operand once and writes every result once."""


def _source(launch: Launch) -> Any:
    """The kernel with the types and properties of its arguments, for `triton.compile`."""
    from triton.compiler import ASTSource

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
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = subprocess.run([binaries / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def compile_for(launch: Launch, arch: int) -> Compiled:
    """Compile one launch for sm_`arch`. Compiler errors are raised as they come."""
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(_source(launch), GPUTarget("cuda", arch, 32), launch.options)
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


def main() -> int:
    """Print one line per kernel and architecture; exit code 2 where there is no triton."""
    if not HAS_TRITON:
        print("triton is not installed, so there is nothing to compile with.", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}, triton {triton.__version__}; compiled, not run")
    print("  regs spills  smem KiB  matrix   MB moved   GFLOP  roofline us  kernel")
    for arch in ARCHITECTURES:
        print(f"sm_{arch}")
        for case in recipe_cases(arch):
            made = compile_for(case.launch, arch)
            print(
                f"  {made.registers:4d} {made.spills:6d} {made.shared_bytes / 1024:9.1f} "
                f"{made.tensor_core:7d} {case.bytes / 1e6:10.1f} {case.operations / 1e9:7.2f} "
                f"{case.roofline(arch) * 1e6:12.1f}  {case.name}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
