"""The momentum update of the key encoder over all its parameters, in one pass and one launch.

    theta_k <- m theta_k + (1 - m) theta_q                          (equation 2 of arXiv 1911.05722)

targets, sources: L float32 tensors each; shadows: optional bfloat16 or float16 copies of the
updated targets, for encoders that run in low precision. No gradient. It replaces the official
per-parameter loop, which allocates two temporaries and a new parameter each time: 12 bytes move per
parameter instead of 28 and more. Computed as theta_k + (1 - m) (theta_q - theta_k), which
leaves equal parameters exactly equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels import launch, reference
from fastmoco_kernels.launch import Launch, architecture, jit, tl
from fastmoco_kernels.multi_tensor import Table, address, check_lists, like, locate, table

SHADOW_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@jit
def _ema_kernel(  # type: ignore[no-untyped-def]
    rows,  # (L, COLUMNS) int64
    owner,  # (B,) int32
    weight,  # 1 - momentum
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHADOW: tl.constexpr,
):
    row, start, size = locate(rows, owner, COLUMNS, BLOCK)
    lane = tl.arange(0, BLOCK)
    target = address(row, 0, tl.float32, ALIGNED) + start + lane
    source = address(row, 1, tl.float32, ALIGNED) + start + lane
    # A ragged mask forbids vector accesses, so only the last program of a tensor has one.
    if start + BLOCK <= size:
        theta = tl.load(target)
        theta += weight * (tl.load(source) - theta)
        tl.store(target, theta)
        if SHADOW is not None:
            shadow = address(row, 2, SHADOW, ALIGNED) + start + lane
            tl.store(shadow, theta.to(SHADOW))
    else:
        inside = lane < size - start
        theta = tl.load(target, mask=inside)
        theta += weight * (tl.load(source, mask=inside) - theta)
        tl.store(target, theta, mask=inside)
        if SHADOW is not None:
            shadow = address(row, 2, SHADOW, ALIGNED) + start + lane
            tl.store(shadow, theta.to(SHADOW), mask=inside)


def launch_configuration(arch: int) -> tuple[int, int]:
    """Elements per program and warps. Bandwidth-bound: 8 vector loads per thread in flight."""
    return 2048, 4


def ema_launch(pointers: Table, momentum: float, shadow: torch.dtype | None, arch: int) -> Launch:
    """The one launch of `ema_` over a table of targets, sources and, where given, shadows."""
    block, warps = launch_configuration(arch)
    arguments = {
        "rows": pointers.rows,
        "owner": pointers.owner,
        "weight": 1.0 - momentum,
        "COLUMNS": pointers.rows.shape[1],
        "BLOCK": block,
        "ALIGNED": pointers.aligned,
        "SHADOW": SHADOW_DTYPES[shadow] if shadow is not None else None,
    }
    return Launch(_ema_kernel, (pointers.owner.shape[0],), arguments, warps)


def ema_triton(
    targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor]
) -> None:
    """`ema_` by the Triton kernel: on CUDA, or on the CPU under the interpreter."""
    arch = architecture(targets[0].device)
    lists = [targets, like(sources, targets), *([shadows] if shadows else [])]
    pointers = table(lists, launch_configuration(arch)[0])
    ema_launch(pointers, momentum, shadows[0].dtype if shadows else None, arch).run()


@torch.library.custom_op("fastmoco::ema_", mutates_args=("targets", "shadows"), device_types="cpu")
def _ema(
    targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor]
) -> None:
    # ResNet-50, two cores: 3 ms; _foreach_mul_ and _foreach_add_ 12 ms, the official loop 26 ms.
    torch._foreach_lerp_(targets, sources, 1.0 - momentum)
    for shadow, target in zip(shadows, targets, strict=False):
        shadow.copy_(target)


@_ema.register_kernel("cuda")
def _(targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor]) -> None:
    implementation = reference.ema_ if "ema_" in launch.replaced() else ema_triton
    implementation(targets, sources, momentum, shadows)


@_ema.register_fake
def _(targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor]) -> None:
    return None


def constants(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as autograd does not see them."""
    return [t.detach() if t.requires_grad else t for t in tensors]


def ema_(
    targets: list[Tensor],
    sources: list[Tensor],
    momentum: float,
    shadows: Sequence[Tensor] = (),
) -> None:
    """targets[i] <- momentum * targets[i] + (1 - momentum) * sources[i] in place, for all i.

    targets, sources: float32 of equal shapes on one device. shadows: none, or one bfloat16 or
    float16 tensor per target, which receives a copy. Raises ValueError naming what is wrong.
    """
    written = {"targets": targets, **({"shadows": list(shadows)} if shadows else {})}
    check_lists(written, {"sources": sources})
    if any(s.dtype not in SHADOW_DTYPES or s.dtype != shadows[0].dtype for s in shadows):
        raise ValueError(f"expected bfloat16 or float16, got shadows {[s.dtype for s in shadows]}")
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"expected a momentum from 0 to 1, got {momentum}")
    with torch.no_grad():
        _ema(constants(targets), constants(sources), momentum, list(shadows))
