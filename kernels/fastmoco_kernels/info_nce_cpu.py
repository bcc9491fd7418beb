"""InfoNCE on the CPU: an online softmax over chunks of the queue, each used for both products.

Products are float32 whatever the inputs. Measured on two cores at N=256, C=128, K=65536 (float32):
oneDNN's matrix product takes 11 ms for one pass over the queue where `torch.mm` (MKL) takes 21 ms
on AMD; ATen's flash attention, which calls MKL, takes 45 ms without the ranks, which need the
logits again (28 ms). Hence oneDNN chunk by chunk. The symbols are those of info_nce.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.reference import TIE_MARGIN

# Logits held at a time: 4 MiB, so that a chunk stays in the last-level cache between its six passes
# and a parallel region is long enough to pay for its barrier.
CHUNK_LOGITS = 2**20
CHUNK_ROWS = (512, 16384)


def _onednn_is_there() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a (N, I) times the transpose of b (J, I), float32; b may be a transposed view."""
    if _ONEDNN:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T


_ONEDNN = _onednn_is_there()


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) and their mean's gradient dq (N, C), float32, and rank (N,) int64."""
    n, k_total = q.shape[0], queue.shape[0]
    rows = min(max(CHUNK_LOGITS // n, CHUNK_ROWS[0]), CHUNK_ROWS[1], k_total)
    q, k = q.float(), k.float()
    scaled = q / temperature
    positive = (scaled * k).sum(1, keepdim=True)
    tie = positive - TIE_MARGIN * (scaled * k).abs().sum(1, keepdim=True)

    shift = positive.clone()  # running maximum; the positive is the first logit of the softmax
    negatives = torch.zeros_like(shift)
    weighted = torch.zeros_like(k)
    below = torch.zeros(n, dtype=torch.int64)
    less = torch.empty(n, rows, dtype=torch.bool)
    for chunk in torch.split(queue, rows):
        values = chunk.float()
        logits = _times_transposed(scaled, values)
        below += torch.lt(logits, tie, out=less[:, : len(chunk)]).sum(1)
        new_shift = torch.maximum(shift, logits.amax(1, keepdim=True))
        rescale = torch.exp(shift - new_shift)
        shift = new_shift
        p = logits.sub_(shift).exp_()
        negatives.mul_(rescale).add_(p.sum(1, keepdim=True))
        weighted.mul_(rescale).add_(_times_transposed(p, values.T))

    # p_0 k - k is written as -(p_1 + p_2 + ...) k: no cancellation where the positive dominates.
    own = torch.exp(positive - shift)
    total = own + negatives
    dq = weighted.sub_(negatives * k).div_(total * (temperature * n))
    # log1p keeps the digits of small losses; where `own` underflows the loss is large anyway.
    large = shift + total.log() - positive
    losses = torch.where(own > 1e-30, torch.log1p(negatives / own), large).squeeze(1)
    # An infinite queue entry can leave the loss finite (its logit is -inf) but never the gradient.
    return losses + 0.0 * dq.sum(1), k_total - below, dq
