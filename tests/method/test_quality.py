"""Quality of features without labels, against float64 numpy on the features themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastmoco.config import Config
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.quality import PAIRED_ROWS, FeatureSums, quality
from fastmoco.method.step import StepResult
from fastmoco.run.metrics import Metrics
from tests.support.gpu.fake_cuda import Watch
from tests.support.ranks import Ranks
from tests.support.tiny import BATCH, CONFIG, ONE, build_tiny, images

Parts = list[tuple[NDArray[Any], NDArray[Any]]]
"""Queries and keys of each part, (N, C) float64 each."""

COUNTS = torch.tensor(True)


def oracle(parts: Parts) -> dict[str, float]:
    """By definition: an SVD of the stacked features, and every pair by itself."""
    queries = np.concatenate([q for q, _ in parts])
    keys = np.concatenate([k for _, k in parts])
    found = {
        "features": len(queries),
        "std_even": queries.shape[1] ** -0.5,
        "alignment": float(np.mean(np.sum((queries - keys) ** 2, axis=1))),
    }
    for which, stacked in (("q", queries), ("k", keys)):
        singular = np.linalg.svd(stacked, compute_uv=False)
        p = singular / singular.sum() + 1e-7
        found[f"std_{which}"] = float(stacked.std(axis=0).mean())
        found[f"effective_rank_{which}"] = float(np.exp(-np.sum(p * np.log(p))))
        pairs = [
            np.exp(-2 * np.sum((x - y) ** 2))
            for part in parts
            for i, x in enumerate(part[which == "k"][:PAIRED_ROWS])
            for j, y in enumerate(part[which == "k"][:PAIRED_ROWS])
            if i < j
        ]
        found[f"uniformity_{which}"] = float(np.log(np.mean(pairs)))
    return found


def features(seed: int, shape: tuple[int, ...], spread: float) -> Tensor:
    """Unit vectors about one direction; the narrower the smaller `spread`."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, shape[-1])
    return F.normalize(
        torch.ones(shape) + spread * torch.randn(shape, generator=generator) * scale, dim=-1
    )


def doubles(q: Tensor, k: Tensor) -> Parts:
    return [(a.double().numpy(), b.double().numpy()) for a, b in zip(q, k, strict=True)]


@pytest.mark.parametrize("spread", [3.0, 0.3, 1e-3])
def test_sums_equal_an_svd_and_a_loop_over_pairs(spread: float) -> None:
    """Several steps of several parts; at the smallest spread fp32 sums would lose the rank."""
    sums, parts = FeatureSums(8, torch.device("cpu")), []
    for step in range(3):
        q, k = features(step, (2, 10, 8), spread), features(9 + step, (2, 10, 8), spread)
        sums.add(q, k, COUNTS)
        parts += doubles(q, k)
    found, truth = quality(sums.flat), oracle(parts)
    for name in ("uniformity_q", "uniformity_k"):  # lengths of one up to rounding
        assert found.pop(name) == pytest.approx(truth.pop(name), rel=1e-5, abs=1e-6)
    assert found == pytest.approx(truth, rel=1e-5)


def test_of_a_large_part_the_first_rows_are_paired() -> None:
    q, k = features(0, (1, PAIRED_ROWS + 30, 4), 1.0), features(1, (1, PAIRED_ROWS + 30, 4), 1.0)
    sums = FeatureSums(4, torch.device("cpu"))
    sums.add(q, k, COUNTS)
    assert quality(sums.flat) == pytest.approx(oracle(doubles(q, k)), rel=1e-5)


def test_extremes_are_those_of_the_papers() -> None:
    """Features that are all the same, and one on each axis and its opposite."""
    same, even = FeatureSums(4, torch.device("cpu")), FeatureSums(4, torch.device("cpu"))
    one = F.normalize(torch.tensor([1.0, 2.0, 3.0, 4.0]), dim=0).expand(1, 50, 4)
    same.add(one, one, COUNTS)
    collapsed = quality(same.flat)
    assert collapsed["effective_rank_q"] == pytest.approx(1, abs=1e-6)
    assert collapsed["std_k"] == pytest.approx(0, abs=1e-6)
    assert collapsed["uniformity_q"] == pytest.approx(0, abs=1e-6)
    axes = torch.cat([torch.eye(4), -torch.eye(4)])[None]
    even.add(axes, -axes, COUNTS)
    spread = quality(even.flat)
    assert spread["effective_rank_k"] == pytest.approx(4)
    assert spread["std_q"] == pytest.approx(spread["std_even"]) == pytest.approx(0.5)
    assert spread["alignment"] == pytest.approx(4)  # opposite


def test_what_cannot_be_told_is_left_out() -> None:
    sums = FeatureSums(4, torch.device("cpu"))
    assert quality(sums.flat) == {}
    one = features(0, (1, 1, 4), 1.0)
    sums.add(one, one, COUNTS)
    alone = quality(sums.flat)
    assert "uniformity_q" not in alone  # a batch of one has no pair
    assert alone["effective_rank_q"] == pytest.approx(1, abs=1e-6)
    before, broken = sums.flat.clone(), torch.full_like(one, torch.nan)
    sums.add(one, broken, ~COUNTS)
    assert torch.equal(sums.flat, before)
    sums.add(one, broken, COUNTS)
    assert quality(sums.flat) == {}


def trained(world: World, config: Config) -> tuple[dict[str, float], Parts]:
    """Two steps of this rank as the loop does them; the metrics and the features they came from."""
    step = build_step(config, build_tiny(config, 4), world, compile_encoders=False)
    metrics = Metrics(world, config.model.dim)
    local, parts = config.local_batch_size(world.size), []
    for number in range(2):
        views, batches = images(number), []
        for micro in range(config.optim.accumulate):
            first = (micro * world.size + world.rank) * local
            rows = slice(first, first + local)
            batches.append(Batch(views.im_q[rows], views.im_k[rows]))
        result = step(batches, number)
        metrics.add(result)
        parts += doubles(result.q, result.k)
    return metrics.flush(), parts


CASES = {
    "plain": CONFIG,
    "accumulated": replace(CONFIG, optim=replace(CONFIG.optim, accumulate=2)),
    "symmetric": replace(CONFIG, moco=replace(CONFIG.moco, symmetric=True)),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_flush_tells_the_quality_of_all_features_of_all_ranks(
    config: Config, two_ranks: Ranks
) -> None:
    views = 2 if config.moco.symmetric else 1
    alone, parts = trained(ONE, config)
    assert len(parts) == 2 * views * config.optim.accumulate
    assert alone == pytest.approx(alone | oracle(parts), rel=1e-5)
    (first, mine), (second, theirs) = two_ranks.run(trained, config)
    assert first == second
    assert first == pytest.approx(first | oracle(mine + theirs), rel=1e-5)
    assert first["features"] == alone["features"] == 2 * BATCH * views


def loss_again(world: World, config: Config) -> tuple[Tensor, Tensor]:
    """The loss of each query again, from the features of the result; and what the step said."""
    moco = build_tiny(config, 4)
    queue, rows = moco.queue.clone(), slice(world.rank * 8, (world.rank + 1) * 8)
    views = Batch(images(0).im_q[rows], images(0).im_k[rows])
    result: StepResult = build_step(config, moco, world, compile_encoders=False)([views], 0)
    assert not result.q.requires_grad
    logits = torch.cat([(result.q * result.k).sum(-1, keepdim=True), result.q @ queue.T], -1)
    losses = -torch.log_softmax(logits / config.moco.temperature, -1)[..., 0]
    return losses.flatten(), result.losses


def test_the_result_holds_the_queries_and_keys_of_this_rank(two_ranks: Ranks) -> None:
    """In both directions of the symmetric loss."""
    for again, said in two_ranks.run(loss_again, CASES["symmetric"]):
        torch.testing.assert_close(again, said, rtol=1e-5, atol=1e-5)


def test_counting_a_step_reads_nothing_back() -> None:
    step = build_step(CONFIG, build_tiny(CONFIG, 4), ONE, compile_encoders=False)
    result, metrics = step([images(0)], 0), Metrics(ONE, CONFIG.model.dim)
    with Watch() as watch:
        metrics.add(result)
    assert watch.host_syncs == []
    assert 5 < sum(watch.counts.values()) < 60
