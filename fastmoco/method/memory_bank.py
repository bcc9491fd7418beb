"""The memory bank: the dictionary is one stored feature per sample, renewed when it is seen.

Figure 2b and section 3.1 of arXiv 1911.05722, after Wu et al. (arXiv 1805.01978). One encoder. The
positive of a query is the entry of its own sample, and its K negatives are drawn from the entries
of samples outside of the global batch.

n samples, N local micro-batch, B global batch, C feature dimension, K negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.config import Config, ConfigError
from fastmoco.data.batch import Batch
from fastmoco.machine.collectives import all_gather, gradient_sync
from fastmoco.machine.ranks import World
from fastmoco.method.moco import MoCo
from fastmoco.method.nonfinite import telling
from fastmoco.method.step import Step, StepResult, merge, upload
from fastmoco_kernels import info_nce


@dataclass
class MemoryBankStep(Step):
    """The step of Figure 2b on `moco.bank`, which `allocate_bank` makes."""

    world: World
    seed: int
    negatives: int
    bank_momentum: float

    def __call__(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Advance the encoder and the batch's entries by one step; what it returns: see `Step`.

        All parts of the batch meet the bank as it stands before the step and the same negatives.
        """
        bank = self.moco.bank
        seen = [self._sample_numbers(batch) for batch in micro_batches]
        everyone = all_gather(torch.cat(seen), self.world)
        kept, negatives = self.guard.keep(everyone), bank[self._draw(everyone, step)]
        results, queries, positives = [], [], []
        for index, (batch, samples) in enumerate(zip(micro_batches, seen, strict=True)):
            with gradient_sync(self.embed_q, index == len(seen) - 1):
                q = self.embed_q(batch.im_q)
                positive = bank[samples]
                result = info_nce(q, positive, negatives, self.temperature)
                self.scaler.scale(telling(result.loss) / len(seen)).backward()
            queries.append(q.detach())
            positives.append(positive)
            results.append(result)
        renew_(bank, everyone, all_gather(torch.cat(queries), self.world), self.bank_momentum)
        return merge(results, queries, positives, self._advance(results, kept))

    def _sample_numbers(self, batch: Batch) -> Tensor:
        """(N,) int64: of the samples whose images these are, also where one replaces another."""
        numbers = torch.from_numpy(np.ascontiguousarray(batch.replaced[:, 1]))
        return upload(numbers, self.moco.bank.device)

    def _draw(self, batch: Tensor, step: int) -> Tensor:
        """(K,) int64 entries, the same on every rank: a function of seed, step and the batch."""
        # The last counter word separates these draws from those of shuffle-BN.
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, step, 0xBA]))
        others = len(self.moco.bank) - len(batch)
        drawn = generator.choice(others, self.negatives, replace=False, shuffle=False)
        return outside(upload(torch.from_numpy(drawn), batch.device), batch)


def outside(numbers: Tensor, batch: Tensor) -> Tensor:
    """The samples with these `numbers` among those that are not in `batch`, counted in order.

    numbers: int64 (K,) from 0 to n - B - 1; batch: int64 (B,). Returns int64 (K,), distinct where
    `numbers` are. A sample that stands twice in the batch leaves one more outside than can be
    numbered so; the last ones are then not drawn in this step.
    """
    ordered = batch.sort().values
    again = F.pad(ordered[1:] == ordered[:-1], (1, 0))
    # Of every sample of the batch: how many outside are smaller.
    smaller = ordered - torch.arange(len(ordered), device=batch.device) + again.cumsum(0)
    smaller = smaller.masked_fill(again, torch.iinfo(torch.int64).max).sort().values
    return numbers + torch.searchsorted(smaller, numbers, right=True)


@torch.no_grad()
def renew_(bank: Tensor, samples: Tensor, features: Tensor, momentum: float) -> None:
    """entry <- normalize(momentum * entry + (1 - momentum) * feature), for these samples only.

    bank: fp32 (n, C); samples: int64 (B,); features: fp32 (B, C). Of a sample that is there twice
    the first feature counts, so that the result depends on no order of writing.
    """
    ordered, place = samples.sort(stable=True)
    first = place[torch.searchsorted(ordered, samples)]
    bank[samples] = F.normalize(bank[samples].lerp(features[first], 1 - momentum), dim=1)


def allocate_bank(config: Config, moco: MoCo, num_samples: int) -> None:
    """Give `moco` the bank that `moco.mechanism` memory_bank needs: random unit vectors by seed.

    Raises `ConfigError` where K negatives are not to be had outside of a batch.
    """
    if config.moco.mechanism != "memory_bank":
        return
    others = num_samples - config.optim.global_batch_size
    if config.moco.queue_size > others:
        raise ConfigError(
            f"moco.queue_size asks for {config.moco.queue_size} negatives of the memory bank, but "
            f"only {others} of the {num_samples} images are outside of a global batch: lower "
            "moco.queue_size or optim.global_batch_size."
        )
    generator = torch.Generator().manual_seed(config.run.seed)
    bank = torch.randn(num_samples, config.model.dim, generator=generator)
    moco.register_buffer("bank", F.normalize(bank, dim=1).to(moco.queue.device))
