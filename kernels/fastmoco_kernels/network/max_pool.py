"""Max pooling in channels-last memory that keeps one byte per output and has no atomics.

    y[n, p, q, c] = max over taps i, j of x[n, S p - P + i, S q - P + j, c]

The forward also returns which tap won, i * kernel + j, as a byte: ATen's indices have eight. The
backward gathers: every input asks the few windows that hold it whether it won there and sums their
gradients in float32 in a fixed order, so bits repeat. torch.compile of ATen's operation (torch
2.14) writes a scatter with float32 atomics instead, whose bits change from run to run. As in ATen,
the first of equal values wins, and of several NaN the last.
N batch, C channels, H W of the input, P Q of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels import launch, reference
from fastmoco_kernels.launch import Launch, jit, tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Window = tuple[int, int, int]
"""Kernel, stride and padding, the same for both directions."""


@jit
def _float32(value):  # type: ignore[no-untyped-def]
    # Of an ordinary cast the compiler knows that it keeps the order, so it compares bfloat16 one
    # by one: 744 instead of 448 instructions for eight outputs (sm_90, triton 3.8).
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,  # (N, H, W, C)
    y,  # (N, P, Q, C)
    index,  # (N, P, Q, C) uint8
    BLOCKS: tl.constexpr,  # programs per image
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    lane = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    row, channel = lane // C, lane % C
    top, left = (row // Q) * STRIDE - PADDING, (row % Q) * STRIDE - PADDING
    inside = lane < P * Q * C
    corner = x + image * (H * W * C) + ((top * W + left) * C + channel)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    # What wins among nothing but -inf: the first tap that is not padding.
    won = tl.maximum(-top, 0) * KERNEL + tl.maximum(-left, 0)
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            h, w = top + i, left + j
            there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            value = _float32(tl.load(corner + (i * W + j) * C, there, float("-inf")))
            take = (value > best) | (value != value)
            best = tl.where(take, value, best)
            won = tl.where(take, i * KERNEL + j, won)
    tl.store(y + image * (P * Q * C) + lane, best.to(y.dtype.element_ty), inside)
    tl.store(index + image * (P * Q * C) + lane, won.to(tl.uint8), inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy,  # (N, P, Q, C)
    index,  # (N, P, Q, C) uint8
    dx,  # (N, H, W, C)
    BLOCKS: tl.constexpr,  # programs per image
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A lane has one channel of STRIDE x STRIDE inputs: with the padding they begin at a multiple
    # of STRIDE, so which tap of which window each of them is does not depend on the lane.
    COLUMNS: tl.constexpr = (W - 1 + PADDING) // STRIDE + 1
    ROWS: tl.constexpr = (H - 1 + PADDING) // STRIDE + 1
    image = (tl.program_id(0) // BLOCKS).to(tl.int64)
    lane = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    tile, channel = lane // C, lane % C
    u, v = tile // COLUMNS, tile % COLUMNS
    inside = lane < ROWS * COLUMNS * C
    last = (u * Q + v) * C + channel
    last_dy, last_index = dy + image * (P * Q * C) + last, index + image * (P * Q * C) + last
    top, left = u * STRIDE - PADDING, v * STRIDE - PADDING
    corner = dx + image * (H * W * C) + ((top * W + left) * C + channel)
    for a in tl.static_range(STRIDE):
        for b in tl.static_range(STRIDE):
            total = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(a, KERNEL, STRIDE):
                for j in tl.static_range(b, KERNEL, STRIDE):
                    p, q = u - i // STRIDE, v - j // STRIDE
                    there = inside & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
                    back = ((i // STRIDE) * Q + j // STRIDE) * C
                    won = tl.load(last_index - back, there, 255)
                    value = tl.load(last_dy - back, there, 0.0).to(tl.float32)
                    total += tl.where(won == i * KERNEL + j, value, 0.0)
            h, w = top + a, left + b
            there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            tl.store(corner + (a * W + b) * C, total.to(dx.dtype.element_ty), there)


def _launch(
    kernel: object, tensors: dict[str, Tensor], x: Tensor, y: Tensor, lanes: int, window: Window
) -> Launch:
    """One program per 1,024 lanes of an image; four warps, 16 bytes per access.

    Sizes are constants of the compiled kernel: divisions by them are multiplications then.
    """
    block = 1024
    blocks = triton.cdiv(lanes, block)
    arguments = {
        **tensors,
        **{"H": x.shape[2], "W": x.shape[3], "P": y.shape[2], "Q": y.shape[3]},
        **{"BLOCKS": blocks, "C": x.shape[1], "BLOCK": block},
        **dict(zip(("KERNEL", "STRIDE", "PADDING"), window, strict=True)),
    }
    return Launch(kernel, (x.shape[0] * blocks,), arguments, num_warps=4)


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Windows along one side."""
    return (size + 2 * padding - kernel) // stride + 1


def _empty_outputs(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], *(output_size(size, *window) for size in x.shape[2:]))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8)


def forward_launch(x: Tensor, window: Window) -> tuple[Launch, Tensor, Tensor]:
    """The launch over x (N, C, H, W) in channels-last memory, and the y and index it fills."""
    y, index = _empty_outputs(x, window)
    tensors = {"x": x, "y": y, "index": index}
    return _launch(_forward_kernel, tensors, x, y, y[0].numel(), window), y, index


def backward_launch(
    dy: Tensor, index: Tensor, height: int, width: int, window: Window
) -> tuple[Launch, Tensor]:
    """The launch over dy and index (N, C, P, Q) in channels-last memory, and the dx it fills."""
    shape = (*dy.shape[:2], height, width)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    tensors = {"dy": dy, "index": index, "dx": dx}
    _, stride, padding = window
    tiles = ((height - 1 + padding) // stride + 1) * ((width - 1 + padding) // stride + 1)
    return _launch(_backward_kernel, tensors, dx, dy, tiles * dx.shape[1], window), dx


@torch.library.custom_op("fastmoco::max_pool", mutates_args=(), device_types="cpu")
def _max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    return reference.max_pool(x, kernel, stride, padding)


@_max_pool.register_kernel("cuda")
def _(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    if "max_pool" in launch.replaced():
        return reference.max_pool(x, kernel, stride, padding)
    work, y, index = forward_launch(x, (kernel, stride, padding))
    work.run()
    return y, index


@_max_pool.register_fake
def _(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x, (kernel, stride, padding))


@torch.library.custom_op("fastmoco::max_pool_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor, index: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    return reference.max_pool_backward(dy, index, height, width, kernel, stride, padding)


@_backward.register_kernel("cuda")
def _(
    dy: Tensor, index: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    if "max_pool" in launch.replaced():
        return reference.max_pool_backward(dy, index, height, width, kernel, stride, padding)
    work, dx = backward_launch(dy, index, height, width, (kernel, stride, padding))
    work.run()
    return dx


@_backward.register_fake
def _(
    dy: Tensor, index: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    return torch.empty(
        (*dy.shape[:2], height, width),
        dtype=dy.dtype,
        device=dy.device,
        memory_format=torch.channels_last,
    )


def _keep_index(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *ctx.window = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1])


def _give_back(ctx, dy, _):  # type: ignore[no-untyped-def]
    (index,) = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)
    return _backward(dy, index, *ctx.size, *ctx.window), None, None, None


_max_pool.register_autograd(_give_back, setup_context=_keep_index)


def max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`torch.nn.functional.max_pool2d` of x (N, C, H, W); the result is in channels-last memory.

    x is float32, float16 or bfloat16; memory in another order is copied first. The kernel is at
    most 15 wide and the padding at most half of it. The gradient can be taken once. Raises
    ValueError naming the shape.
    """
    if x.ndim != 4 or x.dtype not in DTYPES or x.numel() == 0:
        raise ValueError(f"expected a filled floating (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
    if not (1 <= kernel <= 15 and stride >= 1 and 0 <= 2 * padding <= kernel):
        raise ValueError(f"no window: kernel {kernel}, stride {stride}, padding {padding}")
    if min(x.shape[2:]) + 2 * padding < kernel or x[0].numel() >= 2**30:
        raise ValueError(f"a kernel of {kernel} does not pool an input of {tuple(x.shape)}")
    x = x.contiguous(memory_format=torch.channels_last)
    y: Tensor = _max_pool(x, kernel, stride, padding)[0]
    return y
