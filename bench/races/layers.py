"""Op by op, the layers of a ResNet: batch norm, convolutions.

`bench.kernels` runs these. `official` is what torchvision's network does. Tensors are
channels-last and come from memory as in a step, and freed memory is kept as in training: otherwise
mapping it would be half of what is timed.
N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, relu

from bench.measure.contest import Race, Way
from fastmoco.machine.host import keep_freed_memory
from fastmoco_kernels import convolution_cpu, convolution_fp32_cpu, reference
from fastmoco_kernels import direct_convolution_cpu as direct
from fastmoco_kernels import winograd_cpu as winograd
from fastmoco_kernels.batch_norm_cpu import batch_norm_act, supports

COLD_BYTES = 400 << 20
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
CONVOLUTIONS = (
    *RESNET50,
    (32, 256, 56, 128, 1, 1),
    (32, 512, 28, 128, 1, 1),
    (32, 256, 14, 256, 3, 1),
    (64, 64, 16, 64, 3, 1),
    (64, 512, 2, 512, 3, 1),
)
# In fp32 also those of ResNet-18 at 32, 64 and 96 pixels.
FP32_CONVOLUTIONS = (
    (64, 64, 8, 64, 3, 1),
    (64, 128, 4, 256, 3, 2),
    (64, 256, 2, 256, 3, 1),
    (64, 512, 1, 512, 3, 1),
    (64, 128, 8, 256, 3, 2),
    (64, 256, 4, 256, 3, 1),
    (64, 512, 2, 512, 3, 1),
    (64, 64, 24, 64, 3, 1),
    (64, 128, 12, 256, 3, 2),
    (64, 512, 3, 512, 3, 1),
    *RESNET50,
)
PARTS = ("forward", "input gradient", "weight gradient")


def in_turns(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Copies of the tensors in turns for ever, so many of the first that no cache holds it."""
    copies = max(2, -(-COLD_BYTES // tensors[0].nbytes))
    return itertools.cycle([[t.clone() for t in tensors] for _ in range(copies)])


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=generator).bfloat16()
    return values.to(memory_format=torch.channels_last)


def batch_norm_race(n: int, c: int, side: int, added: bool, device: torch.device) -> Race:
    """Forward and backward of batch norm, addition and ReLU in bf16."""
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    x, residual, upstream = (_normal(generator, n, c, side, side) for _ in range(3))
    weight, bias, mean, var = (torch.linspace(0.5, 1.5, c, device=device) for _ in range(4))
    tensors = tuple(t.to(device) for t in (x, residual, upstream))
    turn = in_turns(*tensors)

    def official(x: Tensor, residual: Tensor | None) -> Tensor:
        y = batch_norm(x, mean, var, weight, bias, True)
        return relu(y if residual is None else y.add_(residual), inplace=True)

    def fused(x: Tensor, residual: Tensor | None) -> Tensor:
        return batch_norm_act(x, residual, weight, bias, mean, var, True, 0.1, 1e-5, 1, True)

    def step(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            a, b, dy = next(turn)
            leaves = [t.detach().requires_grad_() for t in ((a, b) if added else (a,))]
            y = function(leaves[0], leaves[1] if added else None)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        return run

    def error(got: tuple[Tensor, ...]) -> float:
        # On average: beside the kink of the ReLU single gradients are right either way.
        pairs = zip(got, truth, strict=True)
        return max(float((g.double() - w).abs().mean() / w.abs().mean()) for g, w in pairs)

    leaves = [t.double().requires_grad_() for t in ((x, residual) if added else (x,))]
    w, b, m, v = (t.double().cpu() for t in (weight, bias, mean, var))
    y = reference.batch_norm_act(
        leaves[0], leaves[1] if added else None, w, b, m, v, True, 0.1, 1e-5, 1, True
    )
    truth = [t.to(device) for t in (y.detach(), *torch.autograd.grad(y, leaves, upstream.double()))]
    ways = [Way("official", step(official), error, 2e-2)]
    ways += [Way("compiled", step(torch.compile(official)), error, 2e-2)]
    if supports(tensors[0], tensors[1], (weight, bias, mean, var), 1):
        ways.append(Way("fastmoco", step(fused), error, 2e-2))
    case = {"n": n, "c": c, "side": side, "residual": added, "device": device.type}
    return "batch_norm", case, ways


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
        return [
            torch.randn(shape, generator=generator).to(dtype).to(memory_format=torch.channels_last)
            for shape in shapes
        ]

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


def weight_gradient_race(*sizes: int) -> Race:
    """The fp32 gradient of a weight from bf16 tensors; the error is on average, to float64.

    `official` is oneDNN's, in bf16, and its conversion: what autograd does for an fp32 parameter.
    """
    keep_freed_memory()
    layer = Layer(*sizes)
    x, dy, weight = layer.tensors(torch.bfloat16)
    truth = layer.aten("weight gradient", x.double(), dy.double(), weight.double())
    turn = in_turns(x, dy)

    def official() -> Tensor:
        x, dy = next(turn)
        return layer.aten("weight gradient", x, dy, weight).float()

    def fused() -> Tensor:
        x, dy = next(turn)
        stride, padding = layer.stride, layer.k // 2
        return convolution_cpu.weight_gradient(x, dy, weight.shape, stride, padding)

    def error(dw: Tensor) -> float:
        return float((dw.double() - truth).abs().mean() / truth.abs().mean())

    ways = [Way("official", official, error, 5e-3), Way("fastmoco", fused, error, 1e-5)]
    return "weight_gradient", layer._asdict() | {"device": "cpu"}, ways


def convolution_race(part: str, *sizes: int) -> Race:
    """One of `PARTS` of an fp32 convolution, by oneDNN and by each of our ways that can do it."""
    keep_freed_memory()
    layer = Layer(*sizes)
    x, dy, weight = layer.tensors(torch.float32)
    turn, where = in_turns(x, dy, weight), (layer.stride, layer.k // 2)
    truth = layer.aten(part, x.double(), dy.double(), weight.double())
    products: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "forward": lambda x, dy, w: direct.forward(x, w, *where),
        "input gradient": lambda x, dy, w: direct.input_gradient(dy, w, x.shape, *where),
        "weight gradient": lambda x, dy, w: direct.weight_gradient(x, dy, w.shape, *where),
    }
    tiles: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "forward": lambda x, dy, w: winograd.forward(x, w),
        "input gradient": lambda x, dy, w: winograd.input_gradient(dy, w),
        "weight gradient": lambda x, dy, w: winograd.weight_gradient(x, dy),
    }
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    found |= {"official": partial(layer.aten, part), "direct": products[part]}
    if layer.k == 3 and layer.stride == 1:
        found["winograd"] = tiles[part]

    def error(got: Tensor) -> float:
        return float((got.double() - truth).norm() / truth.norm())

    def run(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: way(*next(turn))

    ways = [Way(name, run(way), error, 1e-5) for name, way in found.items()]
    return "convolution", {"part": part, **layer._asdict(), "device": "cpu"}, ways


def cpu_races(device: torch.device) -> dict[str, list[Callable[[], Race]]]:
    """The races of the kernels in C++ that work on this device; batch norm is not among them."""
    found: dict[str, list[Callable[[], Race]]] = {}
    if device.type == "cpu" and not convolution_cpu.reason():
        found["weight_gradient"] = [partial(weight_gradient_race, *case) for case in CONVOLUTIONS]
    if device.type == "cpu" and not convolution_fp32_cpu.reason():
        found["convolution"] = [
            partial(convolution_race, part, *case) for case in FP32_CONVOLUTIONS for part in PARTS
        ]
    return found
