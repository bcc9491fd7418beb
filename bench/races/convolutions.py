"""The products of a convolution in C++ beside oneDNN's, in channels-last memory.

In bf16 only weight gradients are ours.
N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bench.races.race import Outputs, Race
from fastmoco_kernels.convolution import convolution_cpu
from fastmoco_kernels.convolution import direct_convolution_cpu as direct
from fastmoco_kernels.convolution import winograd_cpu as winograd

# Layers of ResNet-50 at 224 pixels: N, C, side of the input, O, K, stride.
RESNET50 = (
    (32, 64, 56, 64, 3, 1),
    (32, 64, 56, 256, 1, 1),
    (32, 128, 28, 128, 3, 1),
    (32, 1024, 14, 256, 1, 1),
    (32, 512, 14, 512, 3, 2),
    (32, 512, 7, 2048, 1, 1),
    (32, 512, 7, 512, 3, 1),
)
# And of ResNet-18 at 32, 64 and 96 pixels.
RESNET18 = (
    (64, 64, 8, 64, 3, 1),
    (64, 128, 4, 256, 3, 2),
    (64, 512, 1, 512, 3, 1),
    (64, 256, 4, 256, 3, 1),
    (64, 512, 2, 512, 3, 1),
    (64, 64, 24, 64, 3, 1),
    (64, 512, 3, 512, 3, 1),
)
LAYERS = (*RESNET50, *RESNET18)
PARTS = ("forward", "input gradient", "weight gradient")
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of the input, the upstream gradient and the weight."""


class Layer(NamedTuple):
    """Sizes of a convolution that is padded by half its kernel."""

    n: int
    c: int
    side: int
    o: int
    k: int
    stride: int

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """Input (N, C, H, W), upstream gradient (N, O, H', W') and weight (O, C, K, K)."""
        generator = torch.Generator().manual_seed(0)
        out = -(-self.side // self.stride)
        shapes = (
            (self.n, self.c, self.side, self.side),
            (self.n, self.o, out, out),
            (self.o, self.c, self.k, self.k),
        )
        made = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        return [t.to(memory_format=torch.channels_last) for t in made]

    def aten(self, part: str, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """One of `PARTS` as torch computes it."""
        step, edge = [self.stride] * 2, [self.k // 2] * 2
        if part == "forward":
            return conv2d(x, weight, None, step, edge)
        mask = [part == "input gradient", part == "weight gradient", False]
        both: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            dy, x, weight, None, step, edge, [1, 1], False, [0, 0], 1, mask
        )
        return both[mask.index(True)]

    def ours(self, part: str, dtype: torch.dtype) -> dict[str, Product]:
        """Our ways of a part that can do this layer."""
        where = self.stride, self.k // 2
        if dtype == torch.bfloat16:
            gradient = convolution_cpu.weight_gradient
            return {"fastmoco": lambda x, dy, w: gradient(x, dy, w.shape, *where)}
        products: dict[str, Product] = {
            "forward": lambda x, dy, w: direct.forward(x, w, *where),
            "input gradient": lambda x, dy, w: direct.input_gradient(dy, w, x.shape, *where),
            "weight gradient": lambda x, dy, w: direct.weight_gradient(x, dy, w.shape, *where),
        }
        tiles: dict[str, Product] = {
            "forward": lambda x, dy, w: winograd.forward(x, w),
            "input gradient": lambda x, dy, w: winograd.input_gradient(dy, w),
            "weight gradient": lambda x, dy, w: winograd.weight_gradient(x, dy),
        }
        fits = self.k == 3 and self.stride == 1
        return {"direct": products[part]} | ({"winograd": tiles[part]} if fits else {})


def convolution_race(part: str, dtype: torch.dtype, *sizes: int) -> Race:
    """One of `PARTS` of a convolution against float64.

    Of a weight gradient in bf16 oneDNN's time includes its conversion to the fp32 that autograd
    makes of it for an fp32 parameter.
    """
    layer, half = Layer(*sizes), dtype == torch.bfloat16
    tensors = layer.tensors(dtype)

    def official(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        return layer.aten(part, x, dy, weight).float()

    def way(product: Product) -> Callable[..., Outputs]:
        return lambda x, dy, weight: [product(x, dy, weight)]

    ways = {"official": way(official)}
    ways |= {name: way(product) for name, product in layer.ours(part, dtype).items()}
    case = layer._asdict() | ({} if half else {"part": part})
    truth = [layer.aten(part, *(t.double() for t in tensors))]
    op = "weight_gradient" if half else "convolution"
    return Race(op, case, ways, truth, 5e-3 if half else 1e-5, tensors)
