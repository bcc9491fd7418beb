"""Which gradients travel together."""

from __future__ import annotations

import torch

from fastmoco.machine.collectives import buckets

FULL = 25 * 2**20 // 4
"""Elements of float32 in 25 MiB."""


def cut(*elements: int) -> list[range]:
    return buckets([torch.empty(n, device="meta") for n in elements])


def test_buckets_are_filled_from_the_end_and_every_tensor_is_in_one() -> None:
    assert cut(1, FULL, 10, FULL - 10) == [range(2, 4), range(1, 2), range(0, 1)]
    assert cut(5, 10, FULL - 11) == [range(0, 3)]
    assert cut(5, 2 * FULL) == [range(1, 2), range(0, 1)]
    assert cut() == []


def test_a_gradient_in_bf16_counts_as_the_float32_that_is_sent() -> None:
    halves = [torch.empty(FULL, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    assert buckets(halves) == [range(1, 2), range(0, 1)]
