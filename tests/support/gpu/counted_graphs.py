"""Small graphs counted by `bench.ledger` for an absent H100; prints the kernels of each as JSON.

    python -m tests.support.gpu.counted_graphs

In a process of its own, because the faked GPU replaces functions of torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ledger import count, count_step
from fastmoco.config import ModelConfig
from fastmoco.method.moco import build_moco
from tests.support.gpu.fake_cuda import absent_gpus
from tests.support.tiny import CONFIG, tiny_encoder

BUILD_ENCODER = "fastmoco.method.moco.build_encoder"


def pool_gradients(images: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients through a convolution and an overlapping max pooling."""
    pooled = F.max_pool2d(F.conv2d(images, weight, padding=1), 3, 2, 1)
    return torch.autograd.grad(pooled.square().sum(), [images, weight])


def graphs() -> dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]]:
    """Functions and what they are called with, by name."""
    square = torch.empty(1000, 1000, device="cuda")
    rows = torch.empty(512, 4096, dtype=torch.bfloat16, device="cuda")
    images = torch.empty(4, 8, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    weight = torch.empty(8, 8, 3, 3, device="cuda")
    return {
        "add and relu": (lambda x, y: (x + y).relu(), (square, torch.empty_like(square))),
        "sum of rows": (lambda x: x.sum(1), (rows,)),
        "pool": (lambda x: F.max_pool2d(x, 3, 2, 1), (images.clone(),)),
        "gradients of a pool": (pool_gradients, (images.requires_grad_(), weight.requires_grad_())),
    }


def main() -> None:
    found: dict[str, object] = {}
    with absent_gpus(1):
        for name, (function, inputs) in graphs().items():
            compiled = torch.compile(function, fullgraph=True)
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                ledger = count(lambda c=compiled, i=inputs: c(*i))  # type: ignore[misc]
            found[name] = [asdict(kernel) for kernel in ledger.kernels]
    config = replace(CONFIG, run=replace(CONFIG.run, compile="on"), model=ModelConfig(dim=8))
    with mock.patch(BUILD_ENCODER, tiny_encoder):
        moco = build_moco(config, 4, torch.device("cpu"))
        ledger = count_step(config, 2)
    found["step of two ranks"] = [asdict(kernel) for kernel in ledger.kernels]
    found["ops"] = ledger.ops
    found["parameters"] = sum(p.numel() for p in moco.encoder_q.parameters())
    print(json.dumps(found), flush=True)
    os._exit(0)  # an ordinary exit gives back what the absent driver never gave, and may crash


if __name__ == "__main__":
    main()
