"""InfoNCE on the CPU: an online softmax over chunks of the queue, each used for both products.

Products are float32 whatever the inputs. Measured on two cores at N=256, C=128, K=65536 (float32):
oneDNN's matrix product takes 11 ms for one pass over the queue where `torch.mm` (MKL) takes 21 ms
on AMD; ATen's flash attention, which calls MKL, takes 45 ms without the ranks, which need the
logits again (28 ms). Hence oneDNN chunk by chunk. Exponentials are base 2: `torch.exp` calls
MKL too and takes five times as long as `torch.exp2` there. The symbols are those of info_nce.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.reference import TIE_MARGIN

LOG2E = 1.4426950408889634

# Logits held at a time, 2 MiB: enough to pay for the barriers of six parallel passes. With 4 MiB
# the allocator maps fresh pages for every chunk: 92 ms instead of 55 at one thread.
CHUNK_LOGITS = 2**19
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
    n = q.shape[0]
    rows = min(max(CHUNK_LOGITS // n, CHUNK_ROWS[0]), CHUNK_ROWS[1], len(queue))
    q, k = q.float(), k.float()
    scaled = q * (LOG2E / temperature)  # logits in units of log 2
    positive = (scaled * k).sum(1, keepdim=True)
    tie = positive - TIE_MARGIN * (scaled * k).abs().sum(1, keepdim=True)

    shift = positive.clone()  # running maximum; the positive is the first logit of the softmax
    negatives = torch.zeros_like(shift)
    weighted = torch.zeros_like(k)
    rank = torch.zeros(n, dtype=torch.int64)
    for chunk in torch.split(queue, rows):
        values = chunk.float()
        logits = _times_transposed(scaled, values)
        top = logits.amax(1, keepdim=True)
        # Most positives of a trained encoder beat a whole chunk: only the others need counting.
        beaten = (~(top < tie)).squeeze(1).nonzero().squeeze(1)
        if len(beaten):
            rivals = logits if len(beaten) == n else logits[beaten]
            rank[beaten] += len(chunk) - (rivals < tie[beaten]).sum(1)
        new_shift = torch.maximum(shift, top)
        rescale = torch.exp2(shift - new_shift)
        shift = new_shift
        p = logits.sub_(shift).exp2_()
        negatives.mul_(rescale).add_(p.sum(1, keepdim=True))
        weighted.mul_(rescale).add_(_times_transposed(p, values.T))

    # p_0 k - k is written as -(p_1 + p_2 + ...) k: no cancellation where the positive dominates.
    own = torch.exp2(positive - shift)
    total = own + negatives
    dq = weighted.sub_(negatives * k).div_(total * (temperature * n))
    # log1p keeps the digits of small losses; where `own` underflows the loss is large anyway.
    large = (shift + total.log2() - positive) / LOG2E
    losses = torch.where(own > 1e-30, torch.log1p(negatives / own), large).squeeze(1)
    # An infinite queue entry can leave the loss finite (its logit is -inf) but never the gradient.
    return losses + 0.0 * dq.sum(1), rank, dq
