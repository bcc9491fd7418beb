"""The end-to-end mechanism: keys are the batch's own, and gradients reach both sides.

Figure 2a and section 3.1 of arXiv 1911.05722. One encoder; the dictionary of a query is the keys
of the global batch, its own positive and B - 1 negatives. Keys pass BN shuffled (section 3.3).

N local batch, W ranks, B = N * W global batch, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.data.batch import Batch
from fastmoco.machine.collectives import gradient_sync
from fastmoco.machine.ranks import World
from fastmoco.method.nonfinite import telling
from fastmoco.method.shuffle_bn import Keys
from fastmoco.method.step import Step, StepResult, merge
from fastmoco_kernels import InfoNCE
from fastmoco_kernels.reference import TIE_MARGIN


@dataclass
class EndToEndStep(Step):
    """The step of Figure 2a. `embed_k` holds the same encoder as `embed_q`, outside of DDP.

    DDP averages what both have added to a parameter's gradient.
    """

    world: World

    def __call__(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Advance the encoder by one step; what it returns: see `Step`."""
        contrasts, kept = self._contrasts(micro_batches, step), self.guard.keep()
        results, queries, positives = [], [], []
        for index, (im_q, im_k, order) in enumerate(contrasts):
            with gradient_sync(self.embed_q, index == len(contrasts) - 1):
                sent = self.shuffle.send(im_k, order)
                q = self.embed_q(im_q)
                k = self.shuffle(self.embed_k, sent, order)
                # The positives' place among the gathered keys: rank r owns rows r N .. r N + N - 1.
                result = contrast(q, k, self.world.rank * len(q), self.temperature)
                self.scaler.scale(telling(result.loss) / len(contrasts)).backward()
            queries.append(q.detach())
            positives.append(k.local.detach())
            results.append(result)
        return merge(results, queries, positives, self._advance(results, kept))


def contrast(q: Tensor, k: Keys, first: int, temperature: float) -> InfoNCE:
    """InfoNCE of q (N, C) over k.gathered (B, C), with gradients to both.

    The positive of query i is row first + i.
    """
    logits = q @ k.gathered.T / temperature
    positive = torch.arange(first, first + len(q), device=q.device)
    losses = F.cross_entropy(logits, positive, reduction="none")
    with torch.no_grad():
        threshold = logits.gather(1, positive[:, None]) - TIE_MARGIN / temperature
        rank = (~(logits < threshold)).sum(1) - 1  # all that are not less, but for itself
    return InfoNCE(losses.mean(), rank, losses.detach())
