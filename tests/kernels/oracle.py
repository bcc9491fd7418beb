"""Float64 oracles, written from the papers: the official formulation through autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def official_info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and gradient of their mean to q (N, C) in dtype: einsum, cat, cross_entropy."""
    q = q.detach().to(dtype, copy=True).requires_grad_(True)
    positive = torch.einsum("nc,nc->n", q, k.to(dtype)).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", q, queue.to(dtype))
    logits = torch.cat([positive, negative], dim=1) / temperature
    labels = torch.zeros(len(q), dtype=torch.long)
    losses = cross_entropy(logits, labels, reduction="none")
    (dq,) = torch.autograd.grad(losses.mean(), q)
    return losses.detach(), dq


def official_rank(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """Queue rows at least as similar to q as k is (N,), in float64, where copies tie exactly."""
    q64, k64 = q.double(), k.double()
    similarity = (q64[:, None, :] * queue.double()[None, :, :]).sum(2)
    return (similarity >= (q64 * k64).sum(1, keepdim=True)).sum(1)


def rounding(temperature: float, k: int) -> float:
    """What float32 must cost: logits of size 1/T and a logarithm of size ln(1+K), rounded."""
    return 2.0**-22 * (1.0 / temperature + math.log1p(k))


def worst(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference."""
    return float((got.double() - want.double()).abs().max())


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def features(
    n: int, c: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows q (n, c), k (n, c) close to q, and queue (k, c)."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return normalize(torch.randn(rows, c, generator=generator), dim=1)

    q = unit(n)
    return q.to(dtype), normalize(q + 0.7 * unit(n), dim=1).to(dtype), unit(k).to(dtype)
