"""The training step against a float64 MoCo written by hand, for every way to place BN groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import Config, ShuffleBN
from fastmoco.method.build import build_step
from tests.support.oracles.oracle import MEAN, STD, OracleEndToEnd, OracleMoCo, plain_double
from tests.support.ranks import Ranks
from tests.support.tiny import (
    BATCH,
    CONFIG,
    GROUP,
    LR,
    ONE,
    STEPS,
    Outcome,
    build_tiny,
    consecutive,
    images,
    run_ours,
    with_strategy,
)

pytestmark = pytest.mark.processor

ORACLES = {"queue": OracleMoCo, "end_to_end": OracleEndToEnd}


def check_against_oracle(config: Config, ours: list[Outcome], steps: int) -> None:
    """Every rank's queue, gradients and weights; the mean of their losses and BN statistics."""
    moco = build_tiny(config, 0)
    oracle = ORACLES[config.moco.mechanism](
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
        assert rank.queue.shape == oracle.queue.shape
        if config.moco.mechanism == "queue":
            close(rank.queue, oracle.queue, 5e-5)
        for mine, truth in zip(rank.grads, oracle.grads, strict=True):
            close(mine, truth, 2e-4)
    for encoder, states in ((oracle.q, [r.q for r in ours]), (oracle.k, [r.k for r in ours])):
        for name, truth in encoder.named_parameters():
            for state in states:
                close(state[name], truth, 5e-5)
        if config.optim.accumulate > 1:
            continue  # running statistics move once per micro-batch, the oracle's once per step
        for name, truth in encoder.named_buffers():
            if truth.is_floating_point():  # each rank has seen its own groups
                close(torch.stack([state[name] for state in states]).mean(0), truth, 5e-5)


def close(mine: Tensor, truth: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest value: fp32 rounding of a small network."""
    error = (mine.double() - truth.detach()).abs().max()
    assert error <= tolerance * truth.abs().max().clamp_min(1e-3), float(error)


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


@pytest.mark.parametrize("name", ["sgd", "sgd_ema"])
def test_accumulation_keeps_the_queue_until_the_step_ends(name: Literal["sgd", "sgd_ema"]) -> None:
    """Two micro-batches of 8 equal one batch of 16 whose BN groups are those of the parts."""
    config = with_strategy("split", accumulate=2)
    config = replace(config, optim=replace(config.optim, name=name))
    check_against_oracle(config, [run_ours(ONE, config, STEPS)], STEPS)


def test_accumulation_on_two_ranks_averages_gradients_once(two_ranks: Ranks) -> None:
    config = with_strategy("all_to_all", accumulate=2)
    check_against_oracle(config, two_ranks.run(run_ours, config, STEPS), STEPS)


def end_to_end(strategy: ShuffleBN) -> Config:
    config = with_strategy(strategy)
    return replace(
        config,
        moco=replace(config.moco, mechanism="end_to_end"),
        optim=replace(config.optim, name="sgd"),
    )


@pytest.mark.parametrize("strategy", ["split", "none", "loader"])
def test_end_to_end_on_one_rank_equals_oracle(strategy: ShuffleBN) -> None:
    config = end_to_end(strategy)
    check_against_oracle(config, [run_ours(ONE, config, STEPS)], STEPS)


@pytest.mark.parametrize("strategy", ["all_to_all", "loader", "split", "none"])
def test_end_to_end_on_two_ranks_equals_oracle(two_ranks: Ranks, strategy: ShuffleBN) -> None:
    """Also the gradient through keys that another rank encoded."""
    config = end_to_end(strategy)
    check_against_oracle(config, two_ranks.run(run_ours, config, STEPS), STEPS)


def test_symmetric_loss_contrasts_both_views_and_enqueues_both_keys() -> None:
    config = with_strategy("none")
    config = replace(config, moco=replace(config.moco, symmetric=True))
    moco = build_tiny(config, GROUP)
    q, k = plain_double(moco.encoder_q), plain_double(moco.encoder_k)
    queue = moco.queue.double()
    views = images(0)
    result = build_step(config, moco, ONE, compile_encoders=False)([views], 0)

    def embed(encoder: nn.Module, pixels: Tensor) -> Tensor:
        x = ((pixels.double() / 255 - MEAN) / STD).permute(0, 3, 1, 2)
        out = torch.cat([encoder(group) for group in x.split(GROUP)])
        return F.normalize(out, dim=1)

    keys = {"k": embed(k, views.im_k).detach(), "q": embed(k, views.im_q).detach()}
    losses = []
    for images_, positives in ((views.im_q, keys["k"]), (views.im_k, keys["q"])):
        features = embed(q, images_)
        positive = (features * positives).sum(1, keepdim=True)
        logits = torch.cat([positive, features @ queue.T], 1) / config.moco.temperature
        losses.append(-torch.log_softmax(logits, 1)[:, 0].mean())
    loss = torch.stack(losses).mean()
    assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    close(moco.queue[: 2 * BATCH], torch.cat([keys["k"], keys["q"]]), 1e-5)
    assert int(moco.queue_ptr) == 2 * BATCH
    assert result.rank.shape == (2 * BATCH,)


def test_encoder_k_starts_as_a_copy_and_never_gets_a_gradient() -> None:
    moco = build_tiny(CONFIG, GROUP)
    for pq, pk in zip(*moco.parameter_pairs(), strict=True):
        assert torch.equal(pq, pk)
        assert not pk.requires_grad
    norms = moco.queue.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


def test_sync_bn_with_shuffle_is_refused() -> None:
    moco = build_tiny(CONFIG, 0)
    moco.encoder_q = nn.SyncBatchNorm.convert_sync_batchnorm(moco.encoder_q)
    with pytest.raises(ValueError, match="SyncBN"):
        build_step(with_strategy("split"), moco, ONE, compile_encoders=False)
    build_step(with_strategy("none"), moco, ONE, compile_encoders=False)


@pytest.mark.parametrize("name", ["sgd_ema", "sgd"])
def test_after_an_overflow_encoder_k_still_follows_encoder_q(
    name: Literal["sgd_ema", "sgd"],
) -> None:
    """Equation 2 knows no gradients: what skips a step of encoder_q is no reason to skip it."""
    config = replace(CONFIG, optim=replace(CONFIG.optim, name=name))
    moco = build_tiny(config, GROUP)
    with torch.no_grad():
        for q, _ in zip(*moco.parameter_pairs(), strict=True):
            q.mul_(1.5)
    before = [[t.clone() for t in tensors] for tensors in moco.parameter_pairs()]
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    step = replace(build_step(config, moco, ONE, compile_encoders=False), scaler=scaler)
    step([images(0)], 0)
    for q, k, q0, k0 in zip(*moco.parameter_pairs(), *before, strict=True):
        assert torch.equal(q, q0)
        torch.testing.assert_close(k, 0.9 * k0 + 0.1 * q0)
