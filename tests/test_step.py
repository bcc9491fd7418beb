"""The training step against a float64 MoCo written by hand, for every way to place BN groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.batchnorm import SplitBatchNorm2d
from fastmoco.config import Config, MocoConfig, ModelConfig, OptimConfig, RunConfig, ShuffleBN
from fastmoco.distributed import World
from fastmoco.moco import MoCo, build_moco
from fastmoco.optim import set_lr
from fastmoco.shuffle import AllToAllShuffle, LoaderShuffle
from fastmoco.step import Step, build_step
from tests.oracle import Groups, OracleMoCo
from tests.ranks import Ranks

BATCH, GROUP, STEPS, SIDE = 16, 4, 4, 12
LR = 0.05

CONFIG = Config(
    run=RunConfig(precision="fp32", seed=3),
    model=ModelConfig(dim=8),
    # 40 is no multiple of 16: the third step wraps around the end of the ring.
    moco=MocoConfig(queue_size=40, momentum=0.9, temperature=0.2, bn_group_size=GROUP),
    optim=OptimConfig(global_batch_size=BATCH, lr=LR, weight_decay=1e-3),
)


def tiny_encoder(config: ModelConfig, bn_group_size: int = 0) -> nn.Module:
    """Two convolutions with BN. Smooth, for at the kink of a ReLU rounding flips gradients."""

    def norm(width: int) -> nn.BatchNorm2d:
        return SplitBatchNorm2d(width, bn_group_size) if bn_group_size else nn.BatchNorm2d(width)

    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.SiLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, bias=False), norm(16), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, config.dim)),
    ).to(memory_format=torch.channels_last)


def build_tiny(config: Config, bn_group_size: int) -> MoCo:
    with mock.patch("fastmoco.moco.build_encoder", tiny_encoder):
        return build_moco(config, bn_group_size, torch.device("cpu"))


@dataclass(frozen=True)
class Views:
    im_q: Tensor
    im_k: Tensor


def images(step: int) -> Views:
    """The global batch of a step: noise of another colour for each sample."""
    generator = torch.Generator().manual_seed(step)
    shape = (BATCH, SIDE, SIDE, 3)
    base = torch.randint(0, 128, (BATCH, 1, 1, 3), generator=generator)
    noise = [torch.randint(0, 128, shape, generator=generator) for _ in range(2)]
    im_q, im_k = ((base + n).to(torch.uint8) for n in noise)
    return Views(im_q, im_k)


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


def consecutive(rows: list[int]) -> Groups:
    return [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]


def key_order(step: Step, micro_step: int, world_size: int) -> list[int]:
    """Rows of the global batch in the order in which the strategy encodes their keys."""
    shuffle = step.shuffle
    if isinstance(shuffle, AllToAllShuffle):
        return [int(row) for row in shuffle.arrangement(micro_step)]
    if isinstance(shuffle, LoaderShuffle):
        return [int(row) for row in shuffle.key_rows(micro_step)]
    local, order = BATCH // world_size, []
    for rank in range(world_size):
        here = replace(step.shuffle.world, rank=rank)  # type: ignore[attr-defined]
        indices = replace(shuffle, world=here).indices(micro_step)[:local]  # type: ignore[type-var]
        rows = indices.tolist() or range(local)
        order += [rank * local + row for row in rows]
    return order


def run_ours(world: World, config: Config, steps: int) -> Outcome:
    """Train on this rank for some steps."""
    moco = build_tiny(config, config.bn_group_size(world.size))
    step = build_step(config, moco, world, compile_encoders=False)
    local = BATCH // world.size
    losses, orders = [], []
    grads: list[Tensor] = []

    def remember(*_: object) -> None:
        grads[:] = [p.grad.clone() for p in moco.encoder_q.parameters() if p.grad is not None]

    step.optimizer.register_step_pre_hook(remember)
    for number in range(steps):
        set_lr(step.optimizer, LR)
        views = images(number)
        rows = slice(world.rank * local, (world.rank + 1) * local)
        key_rows = np.arange(BATCH)
        if step.shuffle.key_rows is not None:
            key_rows = step.shuffle.key_rows(number)
        im_k = views.im_k[torch.from_numpy(key_rows)][rows]
        result = step([Views(views.im_q[rows], im_k)], number)
        losses.append(float(result.loss))
        orders.append(key_order(step, number, world.size))
    return Outcome(
        losses,
        orders,
        grads,
        q={n: t.clone() for n, t in moco.encoder_q.state_dict().items()},
        k={n: t.clone() for n, t in moco.encoder_k.state_dict().items()},
        queue=moco.queue.clone(),
        ptr=int(moco.queue_ptr),
    )


def check_against_oracle(config: Config, ours: list[Outcome], steps: int) -> None:
    """Every rank's queue, gradients and weights; the mean of their losses and BN statistics."""
    moco = build_tiny(config, 0)
    oracle = OracleMoCo(
        moco.encoder_q,
        moco.queue,
        momentum=config.moco.momentum,
        temperature=config.moco.temperature,
        sgd_momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
    )
    everyone = consecutive(list(range(BATCH)))
    for number in range(steps):
        views = images(number)
        key_groups = consecutive(ours[0].orders[number])
        loss = oracle.step(views.im_q, views.im_k, everyone, key_groups, LR)
        assert np.mean([rank.losses[number] for rank in ours]) == pytest.approx(loss, rel=2e-5)
    oracle.update_k()
    for rank in ours:
        assert rank.ptr == oracle.ptr
        close(rank.queue, oracle.queue, 5e-5)
        for mine, truth in zip(rank.grads, oracle.grads, strict=True):
            close(mine, truth, 2e-4)
    for encoder, states in ((oracle.q, [r.q for r in ours]), (oracle.k, [r.k for r in ours])):
        for name, truth in encoder.named_parameters():
            for state in states:
                close(state[name], truth, 5e-5)
        for name, truth in encoder.named_buffers():
            if truth.is_floating_point():  # each rank has seen its own groups
                close(torch.stack([state[name] for state in states]).mean(0), truth, 5e-5)


def close(mine: Tensor, truth: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest value: fp32 rounding of a small network."""
    error = (mine.double() - truth.detach()).abs().max()
    assert error <= tolerance * truth.abs().max().clamp_min(1e-3), float(error)


def with_strategy(strategy: ShuffleBN) -> Config:
    return replace(CONFIG, moco=replace(CONFIG.moco, shuffle_bn=strategy))


ONE = World(0, 0, 1, torch.device("cpu"), "none")


@pytest.mark.parametrize("strategy", ["split", "none", "loader"])
def test_one_rank_equals_oracle(strategy: ShuffleBN) -> None:
    config = with_strategy(strategy)
    check_against_oracle(config, [run_ours(ONE, config, STEPS)], STEPS)


@pytest.mark.parametrize("strategy", ["all_to_all", "loader", "split", "none"])
def test_two_ranks_equal_oracle(two_ranks: Ranks, strategy: ShuffleBN) -> None:
    config = with_strategy(strategy)
    check_against_oracle(config, two_ranks.run(run_ours, config, STEPS), STEPS)


@pytest.mark.parametrize("strategy", ["all_to_all", "loader"])
def test_four_ranks_equal_oracle(four_ranks: Ranks, strategy: ShuffleBN) -> None:
    config = with_strategy(strategy)
    check_against_oracle(config, four_ranks.run(run_ours, config, STEPS), STEPS)
