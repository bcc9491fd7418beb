"""The memory bank against a float64 one written by hand, and its parts against sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmoco.config import Config, ConfigError
from fastmoco.machine.ranks import World
from fastmoco.method.agreement import DisagreementError, require_agreement
from fastmoco.method.memory_bank import allocate_bank, outside, renew_
from tests.support.oracles.oracle import OracleMemoryBank
from tests.support.ranks import Ranks
from tests.support.tiny import (
    BATCH,
    CONFIG,
    LR,
    ONE,
    SAMPLES,
    STEPS,
    Outcome,
    build_tiny,
    consecutive,
    images,
    run_ours,
)

pytestmark = pytest.mark.processor


def memory_bank(accumulate: int = 1, queue_size: int = 20) -> Config:
    moco = replace(CONFIG.moco, mechanism="memory_bank", queue_size=queue_size, bank_momentum=0.4)
    optim = replace(CONFIG.optim, name="sgd", accumulate=accumulate)
    return replace(CONFIG, moco=moco, optim=optim)


def check_against_oracle(config: Config, ours: list[Outcome]) -> None:
    """Loss, gradients, weights and every entry of every rank."""
    moco = build_tiny(config, 0)
    allocate_bank(config, moco, SAMPLES)
    oracle = OracleMemoryBank(
        moco.encoder_q,
        moco.bank,
        momentum=config.moco.bank_momentum,
        temperature=config.moco.temperature,
        sgd_momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
    )
    seen: set[int] = set()
    for number in range(STEPS):
        batch = images(number)
        samples = batch.replaced[:, 1].tolist()
        others = [sample for sample in range(SAMPLES) if sample not in samples]
        generator = np.random.Generator(
            np.random.Philox(key=config.run.seed, counter=[0, 0, number, 0xBA])
        )
        drawn = generator.choice(
            SAMPLES - BATCH, config.moco.queue_size, replace=False, shuffle=False
        )
        negatives = [others[i] for i in drawn]
        groups = consecutive(list(range(BATCH)))
        loss = oracle.step_on(batch.im_q, samples, negatives, groups, LR)
        assert np.mean([rank.losses[number] for rank in ours]) == pytest.approx(loss, rel=2e-5)
        seen.update(samples)
    unseen = sorted(set(range(SAMPLES)) - seen)
    assert len(unseen) > 5
    for rank in ours:
        assert rank.bank is not None
        assert ours[0].bank is not None
        assert torch.equal(rank.bank, ours[0].bank)
        torch.testing.assert_close(rank.bank.double(), oracle.queue, rtol=0, atol=2e-5)
        assert torch.equal(rank.bank[unseen], moco.bank[unseen])
        for mine, truth in zip(rank.grads, oracle.grads, strict=True):
            assert (mine - truth).abs().max() <= 2e-4 * truth.abs().max().clamp_min(1e-3)
        for name, weight in oracle.q.named_parameters():
            assert (rank.q[name] - weight).abs().max() <= 5e-5 * weight.abs().max().clamp_min(1e-3)


def test_one_rank_equals_oracle() -> None:
    check_against_oracle(memory_bank(), [run_ours(ONE, memory_bank(), STEPS)])


def test_two_ranks_equal_oracle(two_ranks: Ranks) -> None:
    check_against_oracle(memory_bank(), two_ranks.run(run_ours, memory_bank(), STEPS))


def disagrees(world: World) -> str:
    """What rank 1 causes by one entry that differs in its last bit."""
    config = memory_bank()
    moco = build_tiny(config, 0)
    allocate_bank(config, moco, SAMPLES)
    if world.rank == 1:
        moco.bank[-1, -1] = torch.nextafter(moco.bank[-1, -1], torch.tensor(10.0))
    try:
        require_agreement(moco, world, 3)
    except DisagreementError as error:
        return str(error)
    return ""


def test_ranks_with_unequal_banks_stop(two_ranks: Ranks) -> None:
    assert all("another state than the rest, in bank:" in s for s in two_ranks.run(disagrees))


def test_all_parts_of_an_accumulated_batch_meet_the_old_bank() -> None:
    config = memory_bank(accumulate=2)
    check_against_oracle(config, [run_ours(ONE, config, STEPS)])


def test_negatives_are_every_sample_outside_of_the_batch_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, batch in ((9, 4), (20, 1), (20, 19), (300, 64)):
        inside = torch.randperm(size, generator=generator)[:batch]
        found = outside(torch.arange(size - batch), inside).tolist()
        assert found == sorted(set(range(size)) - set(inside.tolist()))
    twice = torch.tensor([7, 3, 3, 0, 3])
    assert outside(torch.arange(10 - 5), twice).tolist() == [1, 2, 4, 5, 6]


def test_a_renewed_entry_is_the_normalized_mean_and_the_first_of_a_double_counts() -> None:
    bank = F.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    before = bank.clone()
    features = torch.eye(3)
    renew_(bank, torch.tensor([4, 1, 4]), features, 0.5)
    for sample, row in ((4, 0), (1, 1)):
        torch.testing.assert_close(bank[sample], F.normalize(before[sample] + features[row], dim=0))
    untouched = [0, 2, 3, 5]
    assert torch.equal(bank[untouched], before[untouched])


def test_more_negatives_than_there_are_is_one_sentence() -> None:
    config = memory_bank(queue_size=SAMPLES - BATCH)
    allocate_bank(config, build_tiny(config, 0), SAMPLES)
    with pytest.raises(ConfigError, match=r"44 negatives .* only 43 of the 59 images"):
        allocate_bank(config, build_tiny(config, 0), SAMPLES - 1)


def test_the_bank_depends_on_the_seed_only() -> None:
    banks = []
    for seed in (1, 1, 2):
        torch.rand(3)  # whatever else has drawn
        config = replace(memory_bank(), run=replace(CONFIG.run, seed=seed))
        moco = build_tiny(config, 0)
        torch.rand(seed)
        allocate_bank(config, moco, SAMPLES)
        banks.append(moco.bank)
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])
    torch.testing.assert_close(banks[0].norm(dim=1), torch.ones(SAMPLES))
