"""The loss and its enqueue, beside the published formulation.

N local batch, C dimension, K queue length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench.measure.contest import Race, Way
from fastmoco_kernels import info_nce, info_nce_enqueue


def official_loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """The loss of the published code on a clone of the queue (K, C), which it stores transposed."""
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", [q, queue.clone().detach()])
    logits = torch.cat([positive, negative], dim=1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def _oracle(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[float, Tensor]:
    """Loss and gradient in float64, a few rows at a time."""
    losses, gradients = [], []
    for a, b in zip(q.split(16), k.split(16), strict=True):
        rows = a.double().requires_grad_(True)
        loss = official_loss(rows, b.double(), queue.double(), temperature) * len(a) / len(q)
        gradients.append(torch.autograd.grad(loss, rows)[0])
        losses.append(loss.item())
    return sum(losses), torch.cat(gradients)


def loss_race(n: int, c: int, k: int, dtype: torch.dtype, device: torch.device) -> Race:
    """Forward and backward of the loss, T = 0.2; the queue is float32, as the trainer keeps it."""
    generator = torch.Generator().manual_seed(0)
    q, key, queue = (
        normalize(torch.randn(rows, c, generator=generator), dim=1).to(device) for rows in (n, n, k)
    )
    q, key = q.to(dtype), normalize(q + 0.7 * key, dim=1).to(dtype)
    loss, gradient = _oracle(q, key, queue, 0.2)

    def step(function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            leaf = q.detach().requires_grad_(True)
            value = function(leaf, key, queue.to(dtype) if function is not fused else queue, 0.2)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return run

    def fused(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
        return info_nce(q, k, queue, temperature).loss

    def error(output: tuple[Tensor, Tensor]) -> float:
        far = (output[1].double() - gradient).norm() / gradient.norm()
        return max(abs(float(output[0]) - loss) / loss, float(far))

    allowed = 1e-5 if dtype == torch.float32 else 5e-2
    functions = {
        "official": official_loss,
        "official compiled": torch.compile(official_loss),
        "fastmoco": fused,
    }
    ways = [Way(name, step(f), error, allowed) for name, f in functions.items()]
    case = {"N": n, "C": c, "K": k, "dtype": str(dtype)[6:], "device": device.type}
    return "info_nce", case, ways


def enqueue_race(n: int, c: int, k: int, device: torch.device) -> Race:
    """Loss, backward and enqueue, float32; the official enqueue reads the pointer on the host."""
    generator = torch.Generator().manual_seed(1)
    q, queue = (normalize(torch.randn(r, c, generator=generator), dim=1).to(device) for r in (n, k))
    pointer = torch.zeros(1, dtype=torch.int64, device=device)

    def official(leaf: Tensor, ring: Tensor) -> Tensor:
        loss, at = official_loss(leaf, q, ring, 0.2), int(pointer)
        ring[at : at + n] = q
        return loss

    def fused(leaf: Tensor, ring: Tensor) -> Tensor:
        return info_nce_enqueue(leaf, q, q, ring, pointer, 0.2).loss

    def way(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Way:
        ring = queue.clone()

        def run() -> Tensor:
            leaf = q.detach().requires_grad_(True)
            pointer.zero_()
            torch.autograd.grad(function(leaf, ring), leaf)
            return ring

        return Way(name, run, lambda ring: float((ring[:n] - q).abs().max()), 0.0)

    case = {"N": n, "C": c, "K": k, "dtype": "float32", "device": device.type}
    return "info_nce_enqueue", case, [way("official", official), way("fastmoco", fused)]
