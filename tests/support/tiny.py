"""A MoCo small enough to be compared with an oracle, and what its steps are to get right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fastmoco.config import Config, MocoConfig, ModelConfig, OptimConfig, RunConfig, ShuffleBN
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.memory_bank import allocate_bank
from fastmoco.method.moco import MoCo, build_moco
from fastmoco.method.optim.update import set_lr
from fastmoco.method.shuffle_bn import AllToAllShuffle, LoaderShuffle, Shuffle
from fastmoco.method.step import Step
from fastmoco.network.batchnorm import SplitBatchNorm2d
from tests.support.oracles.oracle import Groups

ONE = World(0, 0, 1, torch.device("cpu"), "none")

BATCH, GROUP, STEPS, SIDE, SAMPLES = 16, 4, 4, 12, 60
LR = 0.05

CONFIG = Config(
    run=RunConfig(precision="fp32", seed=3),
    model=ModelConfig(dim=8),
    # 40 is no multiple of 16: the third step wraps around the end of the ring.
    moco=MocoConfig(queue_size=40, momentum=0.9, temperature=0.2, bn_group_size=GROUP),
    optim=OptimConfig(global_batch_size=BATCH, lr=LR, weight_decay=1e-3),
)


def tiny_encoder(config: ModelConfig, bn_group_size: int = 0, channels: int = 3) -> nn.Module:
    """Two convolutions with BN. Smooth, for at the kink of a ReLU rounding flips gradients."""

    def norm(width: int) -> nn.BatchNorm2d:
        return SplitBatchNorm2d(width, bn_group_size) if bn_group_size else nn.BatchNorm2d(width)

    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, bias=False), norm(8), nn.SiLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, bias=False), norm(16), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, config.dim)),
    ).to(memory_format=torch.channels_last)


def build_tiny(config: Config, bn_group_size: int) -> MoCo:
    with mock.patch("fastmoco.method.moco.build_encoder", tiny_encoder):
        return build_moco(config, bn_group_size, torch.device("cpu"))


def images(step: int) -> Batch:
    """The global batch of a step: noise of another colour for each sample.

    In every third step the last sample stands twice in it, once for another that could not be read.
    """
    generator = torch.Generator().manual_seed(step)
    shape = (BATCH, SIDE, SIDE, 3)
    base = torch.randint(0, 128, (BATCH, 1, 1, 3), generator=generator)
    noise = [torch.randint(0, 128, shape, generator=generator) for _ in range(2)]
    im_q, im_k = ((base + n).to(torch.uint8) for n in noise)
    asked = torch.randperm(SAMPLES, generator=generator)[:BATCH].numpy()
    delivered = asked.copy()
    if step % 3 == 2:
        delivered[2] = delivered[-1]
    return Batch(im_q, im_k, np.stack([asked, delivered], axis=1))


@dataclass(frozen=True)
class Outcome:
    """All that the steps of one rank are to get right."""

    losses: list[float]
    orders: list[list[int]]
    grads: list[Tensor]
    q: dict[str, Tensor]
    k: dict[str, Tensor]
    queue: Tensor
    ptr: int
    bank: Tensor | None


def consecutive(rows: list[int]) -> Groups:
    return [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]


def key_order(step: Step, micro_step: int, local: int, world_size: int) -> list[int]:
    """Rows of the micro-batch in the order in which the strategy encodes their keys."""
    shuffle = step.shuffle
    if isinstance(shuffle, AllToAllShuffle):
        return [int(row) for row in shuffle.arrangement(micro_step)]
    if isinstance(shuffle, LoaderShuffle):
        return [int(row) for row in shuffle.key_rows(micro_step)]
    order: list[int] = []
    for rank in range(world_size):
        here = replace(step.shuffle.world, rank=rank)  # type: ignore[attr-defined]
        indices = replace(shuffle, world=here).indices(micro_step)[:local]  # type: ignore[type-var]
        rows = indices.tolist() or range(local)
        order += [rank * local + row for row in rows]
    return order


def run_ours(world: World, config: Config, steps: int, shuffle: Shuffle | None = None) -> Outcome:
    """Train on this rank for some steps; `shuffle` takes the place of the configured strategy."""
    moco = build_tiny(config, config.bn_group_size(world.size))
    allocate_bank(config, moco, SAMPLES)
    step = build_step(config, moco, world, compile_encoders=False)
    step.shuffle = shuffle or step.shuffle
    local, micro_batches = config.local_batch_size(world.size), config.optim.accumulate
    losses, orders = [], []
    grads: list[Tensor] = []

    def remember(*_: object) -> None:
        grads[:] = [p.grad.clone() for p in moco.encoder_q.parameters() if p.grad is not None]

    step.optimizer.register_step_pre_hook(remember)
    for number in range(steps):
        set_lr(step.optimizer, LR)
        views, parts, order = images(number), [], []
        for micro in range(micro_batches):
            micro_step, first = number * micro_batches + micro, micro * local * world.size
            rows = first + np.arange(local) + world.rank * local
            key_rows = rows
            if step.shuffle.key_rows is not None:
                key_rows = first + step.shuffle.key_rows(micro_step)[rows - first]
            parts.append(Batch(views.im_q[rows], views.im_k[key_rows], views.replaced[rows]))
            order += [first + r for r in key_order(step, micro_step, local, world.size)]
        losses.append(float(step(parts, number).loss))
        orders.append(order)
    return Outcome(
        losses,
        orders,
        grads,
        q={n: t.clone() for n, t in moco.encoder_q.state_dict().items()},
        k={n: t.clone() for n, t in moco.encoder_k.state_dict().items()},
        queue=moco.queue.clone(),
        ptr=int(moco.queue_ptr),
        bank=moco.bank.clone() if config.moco.mechanism == "memory_bank" else None,
    )


def with_strategy(strategy: ShuffleBN, accumulate: int = 1) -> Config:
    return replace(
        CONFIG,
        moco=replace(CONFIG.moco, shuffle_bn=strategy),
        optim=replace(CONFIG.optim, accumulate=accumulate),
    )
