"""Shared memory that workers fill with micro-batches and the trainer takes them from.

A worker writes its views where they belong in a whole micro-batch, so nobody joins parts, and the
same pages serve for ever: fresh ones cost the trainer more than their pixels. For a GPU they are
pinned, so that a copy to it needs no other memory and does not wait.

n local batch, S side of a view.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def slot_of(slots: Tensor, micro_step: int) -> Tensor:
    """(views of a sample, n, S, S, channels) of a micro-batch: number m has slot m % slots."""
    found: Tensor = slots[micro_step % len(slots)]
    return found


class Ring:
    """The trainer's end of the ring; workers have its `slots` only."""

    def __init__(self, slots: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.slots = torch.empty(slots, *shape, dtype=dtype).share_memory_()
        """(slots, views of a sample, n, S, S, channels)."""
        self._copies: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def pin(self, device: torch.device) -> None:
        """Pin the memory for copies to a GPU; where the driver refuses, copies are slower."""
        runtime = torch.cuda.cudart()
        address = self.slots.data_ptr()
        with torch.cuda.device(device):
            if int(runtime.cudaHostRegister(address, self.slots.nbytes, 0)) == 0:
                # Before the memory is freed; at the end of the process the driver does it.
                weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False
        self._copies = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event()

    def taken(self, micro_step: int, device: torch.device) -> Tensor:
        """A copy of a micro-batch on the device, ordered before what its current stream does next.

        The slot may be filled again after `settle`.
        """
        slot = slot_of(self.slots, micro_step)
        views: Tensor
        if self._copies is None or self._copied is None:
            return slot.clone()
        with torch.cuda.stream(self._copies):
            views = slot.to(device, non_blocking=True)
            self._copied.record(self._copies)
        current = torch.cuda.current_stream(device)
        current.wait_stream(self._copies)
        views.record_stream(current)
        return views

    def settle(self) -> None:
        """Wait for the last copy, which has run beside a whole step and is done by then."""
        if self._copied is not None:
            self._copied.synchronize()
