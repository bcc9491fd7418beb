"""Op by op, the layers of a ResNet: batch norm, convolutions.

`bench.kernels` runs these. `official` is what torchvision's network does. Tensors are
channels-last and come from memory as in a step, and freed memory is kept as in training: otherwise
mapping it would be half of what is timed.
N batch, C channels, O outputs, H W spatial, K side of the kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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
PARTS = ("forward", "input gradient", "weight gradient")
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def in_turns(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Copies of the tensors in turns for ever, so many of the first that no cache holds it."""
    copies = max(2, -(-COLD_BYTES // tensors[0].nbytes))
    return itertools.cycle([[t.clone() for t in tensors] for _ in range(copies)])


def _normal(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=generator).to(dtype)
    return values.to(memory_format=torch.channels_last)


def batch_norm_race(n: int, c: int, side: int, added: bool, device: torch.device) -> Race:
    """Forward and backward of batch norm, addition and ReLU in bf16."""
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (n, c, side, side), torch.bfloat16
    x, residual, upstream = (_normal(generator, shape, dtype) for _ in range(3))
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
        return [_normal(generator, shape, dtype) for shape in shapes]

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


def _ours(layer: Layer, part: str, dtype: torch.dtype) -> dict[str, Product]:
    """Our ways of a part of a layer that can do it, as functions of input, upstream and weight."""
    where = layer.stride, layer.k // 2
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
    fits = layer.k == 3 and layer.stride == 1
    return {"direct": products[part]} | ({"winograd": tiles[part]} if fits else {})


def convolution_race(part: str, dtype: torch.dtype, *sizes: int) -> Race:
    """One of `PARTS` of a convolution; the error is relative to float64.

    `official` is oneDNN's, of a weight gradient with its conversion to the fp32 that autograd
    makes of it for an fp32 parameter. In bf16 only weight gradients are ours.
    """
    keep_freed_memory()
    layer = Layer(*sizes)
    tensors = layer.tensors(dtype)
    turn, truth = in_turns(*tensors), layer.aten(part, *(t.double() for t in tensors))

    def official(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        return layer.aten(part, x, dy, weight).float()

    def error(got: Tensor) -> float:
        return float((got.double() - truth).norm() / truth.norm())

    def way(name: str, product: Product, allowed: float) -> Way:
        return Way(name, lambda: product(*next(turn)), error, allowed)

    half = dtype == torch.bfloat16
    ways = [way("official", official, 5e-3 if half else 1e-5)]
    ways += [way(name, product, 1e-5) for name, product in _ours(layer, part, dtype).items()]
    case = layer._asdict() | {"device": "cpu"}
    return (
        ("weight_gradient", case, ways) if half else ("convolution", {"part": part, **case}, ways)
    )


def cpu_races(device: torch.device) -> dict[str, list[Callable[[], Race]]]:
    """The races of the kernels in C++ that work on this device; batch norm is not among them."""
    found: dict[str, list[Callable[[], Race]]] = {}
    cases = (*RESNET50, *RESNET18)
    if device.type == "cpu" and not convolution_cpu.reason():
        bf16 = partial(convolution_race, "weight gradient", torch.bfloat16)
        wide = [sizes for sizes in cases if sizes[2] > 1]
        found["weight_gradient"] = [partial(bf16, *sizes) for sizes in wide]
    if device.type == "cpu" and not convolution_fp32_cpu.reason():
        found["convolution"] = [
            partial(convolution_race, part, torch.float32, *sizes)
            for sizes in cases
            for part in PARTS
        ]
    return found
