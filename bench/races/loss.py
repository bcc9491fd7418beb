"""The loss and its enqueue, beside the published formulation.

N local batch, C dimension, K queue length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench.races.race import Outputs, Race, forward_backward
from fastmoco_kernels import info_nce, info_nce_enqueue, reference

TEMPERATURE = 0.2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys and the queue (K, C)."""


def official_loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """The loss of the published code on a clone of the queue, which it stores transposed."""
    positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", [q, queue.to(q.dtype).clone().detach()])
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def fused_loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """Ours, which takes the queue as it is."""
    return info_nce(q, k, queue, TEMPERATURE).loss


def loss_and_gradient(loss: Loss, q: Tensor, k: Tensor, queue: Tensor) -> Outputs:
    """The loss and its gradient by the queries."""
    return forward_backward(lambda q: loss(q, k, queue), [q])


def loss_race(n: int, c: int, k: int, dtype: torch.dtype, device: torch.device) -> Race:
    """Forward and backward of the loss; the queue is float32, as the trainer keeps it."""
    generator = torch.Generator().manual_seed(0)
    q, key, queue = (
        normalize(torch.randn(rows, c, generator=generator), dim=1).to(device) for rows in (n, n, k)
    )
    q, key = q.to(dtype), normalize(q + 0.7 * key, dim=1).to(dtype)
    losses = {
        "official": official_loss,
        "official compiled": torch.compile(official_loss),
        "fastmoco": fused_loss,
    }
    ways = {name: partial(loss_and_gradient, loss) for name, loss in losses.items()}
    exact = q.double(), key.double(), queue.double()
    each, _, gradient = reference.info_nce(*exact, TEMPERATURE)
    allowed = 1e-5 if dtype == torch.float32 else 5e-2
    case = {"N": n, "C": c, "K": k, "dtype": str(dtype)[6:]}
    return Race("info_nce", case, ways, [each.mean(), gradient], allowed, [q, key, queue])


def enqueue_race(n: int, c: int, k: int, device: torch.device) -> Race:
    """Loss, backward and enqueue, float32; the official enqueue reads the pointer on the host."""
    generator = torch.Generator().manual_seed(1)
    q, queue = (normalize(torch.randn(r, c, generator=generator), dim=1).to(device) for r in (n, k))
    pointer = torch.zeros(1, dtype=torch.int64, device=device)

    def official(leaf: Tensor, keys: Tensor, ring: Tensor) -> Tensor:
        loss, at = official_loss(leaf, keys, ring), int(pointer)
        ring[at : at + n] = keys
        return loss

    def fused(leaf: Tensor, keys: Tensor, ring: Tensor) -> Tensor:
        return info_nce_enqueue(leaf, keys, keys, ring, pointer, TEMPERATURE).loss

    def way(loss: Loss) -> Callable[[], Outputs]:
        ring = queue.clone()

        def call() -> Outputs:
            pointer.zero_()
            loss_and_gradient(loss, q, q, ring)
            return [ring[:n]]

        return call

    case = {"N": n, "C": c, "K": k, "dtype": "float32"}
    ways = {"official": way(official), "fastmoco": way(fused)}
    return Race("info_nce_enqueue", case, ways, [q], 0.0)
