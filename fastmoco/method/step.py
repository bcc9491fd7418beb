"""One training step: algorithm 1 of arXiv 1911.05722 on this rank.

N local batch, W ranks, S image side, C feature dimension, K queue length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.data.batch import Batch
from fastmoco.machine.collectives import gradient_sync
from fastmoco.machine.precision import Precision
from fastmoco.method.moco import MoCo
from fastmoco.method.nonfinite import Guard, Kept, telling
from fastmoco.method.shuffle_bn import Shuffle
from fastmoco_kernels import InfoNCE, info_nce, info_nce_enqueue


class StepResult(NamedTuple):
    """What one step leaves for the metrics, detached.

    P parts are contrasted one after another: the micro-batches, in both directions where the loss
    is symmetric.
    """

    loss: Tensor
    """() float32, mean over the parts."""
    rank: Tensor
    """(P * N,) int64: see `InfoNCE`."""
    losses: Tensor
    """(P * N,) float32 per query."""
    q: Tensor
    """(P, N, C) float32: the queries."""
    k: Tensor
    """(P, N, C) float32: their positives."""
    not_finite: Tensor
    """() bool: whether a loss or gradient of any rank was not; see `fastmoco.method.nonfinite`."""


@dataclass
class Step:
    """Everything that one step touches, built once; `step(views, number)` runs it."""

    moco: MoCo
    embed_q: nn.Module
    embed_k: nn.Module
    shuffle: Shuffle
    optimizer: torch.optim.Optimizer
    ema: Callable[[], None] | None
    """Moves encoder_k, where the optimizer does not do that itself."""
    scaler: torch.amp.GradScaler
    guard: Guard
    temperature: float
    symmetric: bool
    precision: Precision

    def __call__(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Advance both encoders, the queue and the cursor by one step.

        `micro_batches` are the parts of this rank's batch. They are all contrasted with the queue
        as it stands before the step; gradients add up, and queue and encoders move once.
        """
        contrasts, kept = self._contrasts(micro_batches, step), self.guard.keep()
        results, keys, queries, positives = [], [], [], []
        for index, (im_q, im_k, order) in enumerate(contrasts):
            is_last = index == len(contrasts) - 1
            with gradient_sync(self.embed_q, is_last):
                sent = self.shuffle.send(im_k, order)  # arrives while the queries are encoded
                q = self.embed_q(im_q)
                with torch.no_grad():
                    k = self.shuffle(self.embed_k, sent, order)
                keys.append(k.gathered)
                queue, ptr = self.moco.queue, self.moco.queue_ptr
                if is_last:
                    result = info_nce_enqueue(
                        q, k.local, torch.cat(keys), queue, ptr, self.temperature
                    )
                else:
                    result = info_nce(q, k.local, queue, self.temperature)
                self.scaler.scale(telling(result.loss) / len(contrasts)).backward()
            results.append(result)
            queries.append(q.detach())
            positives.append(k.local)
        return merge(results, queries, positives, self._advance(results, kept))

    def _advance(self, results: Sequence[InfoNCE], kept: Kept) -> Tensor:
        """Move the encoders by the gradients that have added up; whether the step was bad."""
        grads = [p.grad for p in self.moco.encoder_q.parameters() if p.grad is not None]
        bad = self.guard.look(torch.stack([r.loss.detach() for r in results]).mean(), grads)
        self.scaler.step(self.optimizer)  # in fp16 perhaps skipped
        self.scaler.update()
        if self.ema is not None:
            self.ema()
        self.moco.encoder_q.zero_grad(set_to_none=True)  # some of apex's optimizers take no options
        self.guard.put_back(kept, bad)
        return bad

    def _contrasts(
        self, micro_batches: Sequence[Batch], step: int
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(queries' images, keys' images, shuffle indices) of every contrast of the step."""
        contrasts = []
        for micro, batch in enumerate(micro_batches):
            order = self.shuffle.indices(step * len(micro_batches) + micro)
            order = upload(order, batch.im_q.device)
            contrasts.append((batch.im_q, batch.im_k, order))
            if self.symmetric:
                contrasts.append((batch.im_k, batch.im_q, order))
        return contrasts


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory the copy does not stall the host."""
    if device.type != "cuda":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def merge(
    results: list[InfoNCE], q: list[Tensor], k: list[Tensor], not_finite: Tensor
) -> StepResult:
    """One result for the step, from its parts: results, detached queries, detached positives."""
    return StepResult(
        torch.stack([r.loss.detach() for r in results]).mean(),
        torch.cat([r.rank for r in results]),
        torch.cat([r.losses for r in results]),
        torch.stack(q),
        torch.stack(k),
        not_finite,
    )
