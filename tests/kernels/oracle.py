"""Float64 oracles, written from the papers: the official formulation through autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def official_info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and gradient of their mean to q (N, C), float64: einsum, cat, cross_entropy."""
    q64 = q.detach().double().requires_grad_(True)
    positive = torch.einsum("nc,nc->n", q64, k.double()).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", q64, queue.double())
    logits = torch.cat([positive, negative], dim=1) / temperature
    labels = torch.zeros(len(q), dtype=torch.long)
    losses = cross_entropy(logits, labels, reduction="none")
    (dq,) = torch.autograd.grad(losses.mean(), q64)
    return losses.detach(), dq


def features(
    n: int, c: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows q (n, c), k (n, c) close to q, and queue (k, c)."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return normalize(torch.randn(rows, c, generator=generator), dim=1)

    q = unit(n)
    return q.to(dtype), normalize(q + 0.7 * unit(n), dim=1).to(dtype), unit(k).to(dtype)
