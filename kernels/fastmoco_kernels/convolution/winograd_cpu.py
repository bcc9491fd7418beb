"""3x3 convolution with stride 1 and padding 1 in fp32 on the CPU by Winograd's F(2x2, 3x3).

Four pixels take 16 multiplications, where a direct sum takes 36 (Lavin and Gray, arXiv 1509.09308).
The transforms contain only 0, 1 and 1/2, so no digits are lost: results are about as far from
float64 as a direct sum. F(4x4, 3x3) would take 9 multiplications, and lose a digit.

N batch, C channels, O outputs, H W spatial.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastmoco_kernels import cpp

SOURCE = Path(__file__).with_name("winograd_cpu.cpp")
# Tiles times channels of a block: their transforms, 4 MiB, stay in a cache.
CHUNK = 1 << 16
CHANNELS_LAST = torch.channels_last


class Arguments(ctypes.Structure):
    """The struct of the same name in winograd_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "dy", "to", "work", "tiles")),
        *((name, ctypes.c_int64) for name in ("n", "height", "width", "channels", "outputs")),
        ("chunk", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


@cache
def loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    return cpp.available(SOURCE, Arguments, ("forward", "input_gradient", "weight_gradient"))


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """`conv2d` of x (N, C, H, W) and weight (O, C, 3, 3): (N, O, H, W), all fp32 channels-last.

    C and O are multiples of 16; nothing is checked.
    """
    n, _, height, width = x.shape
    outputs = weight.shape[0]
    return _call("forward", x.shape, outputs, (n, outputs, height, width), x=x, w=weight)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the input (N, C, H, W) from dy (N, O, H, W) and weight (O, C, 3, 3)."""
    n, outputs, height, width = dy.shape
    shape = (n, weight.shape[1], height, width)
    return _call("input_gradient", shape, outputs, shape, dy=dy, w=weight)


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """Gradient of the weight (O, C, 3, 3) from x (N, C, H, W) and dy (N, O, H, W)."""
    channels, outputs = x.shape[1], dy.shape[1]
    chunk = max(64, CHUNK // max(channels, outputs))
    shape = (outputs, channels, 3, 3)
    return _call("weight_gradient", x.shape, outputs, shape, chunk, x=x, dy=dy)


def _call(
    function: str,
    image: tuple[int, ...],
    outputs: int,
    result: tuple[int, ...],
    chunk: int = 0,
    **tensors: Tensor,
) -> Tensor:
    """The result of `function`, of that shape, for an input of shape `image` (N, C, H, W).

    `tensors` are fields of `Arguments`.
    """
    n, channels, height, width = image
    to = torch.empty(result, dtype=torch.float32, device="cpu", memory_format=CHANNELS_LAST)
    work = to.new_empty(16 * channels * outputs)
    tiles = to.new_empty(16 * chunk * (channels + outputs))
    arguments = Arguments(
        n=n,
        height=height,
        width=width,
        channels=channels,
        outputs=outputs,
        chunk=chunk,
        threads=torch.get_num_threads(),
        to=to.data_ptr(),
        work=work.data_ptr(),
        tiles=tiles.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    getattr(loaded()[0], function)(arguments)
    return to
