"""How the InfoNCE kernels of info_nce_triton.py are launched: shapes to tiles, slices and buffers.

N local batch, C feature dimension, K queue length, M gathered keys, S slices of the queue.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels import info_nce_triton as kernels
from fastmoco_kernels.launch import Launch, architecture
from fastmoco_kernels.reference import TIE_MARGIN

LOG2E = 1.4426950408889634
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# 2^(-2/T log2 e) is the least term under the constant shift; at this T it is 1e-29, far from the
# least float32, while half of it would vanish.
LEAST_CONSTANT_SHIFT_TEMPERATURE = 0.03
MAX_SLICES = 256


class Configuration(NamedTuple):
    """Tiles and pipeline of the partial kernel, and how the queue is cut."""

    block_n: int
    block_k: int
    block_c: int
    rows_per_slice: int
    slices: int
    num_warps: int
    num_stages: int


def _power_of_two(value: int) -> int:
    """The least power of two that is not less than value."""
    return 1 << (value - 1).bit_length()


def exact_shift(dtype: torch.dtype, temperature: float) -> bool:
    """Whether the constant shift would lose terms: small T, or weights that float16 cannot hold."""
    return dtype == torch.float16 or temperature < LEAST_CONSTANT_SHIFT_TEMPERATURE


def precision(dtype: torch.dtype, block_c: int) -> str:
    """How a product is taken: three TF32 products make up a float32 one.

    Wide float32 rows do not fit the registers twice (thousands of spills when compiled): they go to
    the ordinary float32 units, which is right, slow, and not what any recipe uses.
    """
    return "tf32x3" if dtype == torch.float32 and block_c <= 128 else "ieee"


def launch_configuration(
    n: int, k: int, c: int, dtype: torch.dtype, arch: int, multiprocessors: int | None = None
) -> Configuration:
    """Tiles for q (n, c) of dtype against a queue of k rows, on sm_`arch`. One wave of programs."""
    block_c = max(64, _power_of_two(c))
    narrow = block_c <= 128
    if dtype == torch.float32:
        block_n, block_k, warps, stages = (32, 32, 8, 2) if narrow else (16, 16, 8, 2)
    elif n <= 32 and block_c <= 256:
        block_n, block_k, warps, stages = (32, 64, 4, 3) if narrow else (32, 32, 4, 3)
    elif narrow:
        block_n, block_k, warps, stages = 128, 64, 8, 3
    elif block_c <= 256 and arch < 100:
        block_n, block_k, warps, stages = 64, 32, 8, 2
    elif block_c <= 256:  # the tile above spills four registers on sm_100
        block_n, block_k, warps, stages = 32, 32, 4, 3
    else:
        block_n, block_k, warps, stages = 32, 32, 8, 2
    groups = -(-n // block_n)
    programs = multiprocessors or MULTIPROCESSORS.get(arch, 108)
    slices = max(1, min(programs // groups, MAX_SLICES, -(-k // block_k)))
    rows = -(-k // (slices * block_k)) * block_k
    return Configuration(block_n, block_k, block_c, rows, -(-k // rows), warps, stages)


class Plan(NamedTuple):
    """The two launches and their outputs."""

    partial: Launch
    reduce: Launch
    losses: Tensor
    rank: Tensor
    dq: Tensor


def _configure(q: Tensor, queue: Tensor, arch: int) -> Configuration:
    processors = None
    if q.device.type == "cuda":
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    k, c = queue.shape
    return launch_configuration(len(q), k, c, q.dtype, arch, processors)


def _partial(
    q: Tensor, temperature: float, configuration: Configuration, shared: dict[str, object]
) -> Launch:
    arguments = shared | {
        "rows_per_slice": configuration.rows_per_slice,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": configuration.block_k,
        "EXACT": exact_shift(q.dtype, temperature),
        "MARGIN": TIE_MARGIN,
        "PRECISION": precision(q.dtype, configuration.block_c),
    }
    grid = (-(-q.shape[0] // configuration.block_n), configuration.slices)
    warps, stages = configuration.num_warps, configuration.num_stages
    return Launch(kernels.partial_kernel, grid, arguments, warps, stages)


def plan(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    keys: Tensor | None = None,
    queue_ptr: Tensor | None = None,
    arch: int = 90,
    configuration: Configuration | None = None,
) -> Plan:
    """Launches for q, k (N, C), queue (K, C) and, to enqueue, keys (M, C) and queue_ptr (1,) int64.

    All contiguous on one device (meta tensors too, for compiling without a device).
    """
    n, c = q.shape
    configuration = configuration or _configure(q, queue, arch)
    slices, enqueue = configuration.slices, keys is not None
    new_rows = 0 if keys is None else keys.shape[0]
    shared: dict[str, object] = {
        "q_ptr": q,
        "k_ptr": k,
        "queue": queue,
        "queue_ptr": queue_ptr,
        "cursor_ptr": q.new_empty(1, dtype=torch.int64) if enqueue else None,
        "shift_ptr": q.new_empty(n, slices, dtype=torch.float32),
        "total_ptr": q.new_empty(n, slices, dtype=torch.float32),
        "above_ptr": q.new_empty(n, slices, dtype=torch.int32),
        "weighted_ptr": q.new_empty(slices, n, c, dtype=torch.float32),
        "N": n,
        "K": queue.shape[0],
        "C": c,
        "scale": LOG2E / temperature,
        "BLOCK_C": configuration.block_c,
        "ENQUEUE": enqueue,
    }
    losses = q.new_empty(n, dtype=torch.float32)
    rank = q.new_empty(n, dtype=torch.int64)
    dq = q.new_empty(n, c, dtype=torch.float32)
    chunk = 4096 // configuration.block_c  # rows of a 16 KiB tile in the reduce kernel
    arguments = shared | {
        "losses_ptr": losses,
        "rank_ptr": rank,
        "dq_ptr": dq,
        "keys_ptr": keys,
        "S": slices,
        "M": new_rows,
        "gradient_scale": 1.0 / (temperature * n),
        "BLOCK_S": _power_of_two(slices),
        "CHUNK": chunk,
    }
    grid = (n + -(-new_rows // chunk),)
    reduce = Launch(kernels.reduce_kernel, grid, arguments, num_warps=4)
    if precision(q.dtype, configuration.block_c) == "ieee" and q.dtype == torch.float32:
        # Widening a wide tile inside the kernel spills a thousand registers; a copy does not.
        shared["queue"] = queue.float()
    return Plan(_partial(q, temperature, configuration, shared), reduce, losses, rank, dq)


def info_nce_triton(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    keys: Tensor | None = None,
    queue_ptr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, rank and dq by the Triton kernels: on CUDA, or on the CPU under the interpreter."""
    steps = plan(q, k, queue, temperature, keys, queue_ptr, architecture(q.device))
    steps.partial.run()
    steps.reduce.run()
    return steps.losses, steps.rank, steps.dq
