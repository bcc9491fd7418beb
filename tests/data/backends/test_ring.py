"""The ring on a GPU: pinned, without a host synchronization, freed. On the CPU: test_workers.py."""

from __future__ import annotations

import gc

import pytest
import torch

from fastmoco.data.backends.ring import Ring, slot_of

pytestmark = pytest.mark.gpu


def test_batches_arrive_while_their_slots_are_filled_again() -> None:
    device = torch.device("cuda")
    ring = Ring(2, (2, 64, 224, 224, 3), torch.uint8)
    ring.pin(device)
    assert ring.slots.is_pinned()
    taken = []
    for micro_step in range(6):
        slot_of(ring.slots, micro_step).fill_(micro_step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            taken.append(ring.taken(micro_step, device))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ring.settle()
    for micro_step, views in enumerate(taken):
        assert bool((views == micro_step).all())


def test_memory_is_unpinned_before_it_is_freed() -> None:
    """Else the driver refuses the next ring that gets the same addresses."""
    for _ in range(4):
        ring = Ring(2, (1, 1024, 1024), torch.uint8)
        ring.pin(torch.device("cuda"))
        assert ring.slots.is_pinned()
        del ring
        gc.collect()
