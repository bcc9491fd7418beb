"""Steps whose loss or gradient is not finite: found on the device, and left out where asked.

The host learns of them where it waits anyway. Every rank finds the same ones, because gradients are
averaged over ranks before they are looked at.

B rows of the queue, or of the memory bank, that a step writes; C feature dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.machine.collectives import all_reduce_mean_
from fastmoco.machine.ranks import World
from fastmoco.method.moco import MoCo
from fastmoco.method.optim.update import SGDWithEMA


@torch.library.custom_op("fastmoco::any_not_finite", mutates_args=())
def _any_not_finite(tensors: list[Tensor]) -> Tensor:
    # One op for the compiler, which would stack the norms by a launch for each of them.
    return ~torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all()


@_any_not_finite.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.bool)


def any_not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """() bool on the device: whether the tensors hold a value that is NaN or infinite.

    The largest absolute value of each tells, for NaN passes through it; they are only read.
    """
    found: Tensor = _any_not_finite(list(tensors))
    return found


def telling(loss: Tensor) -> Tensor:
    """The loss for the backward: where it is not finite, every gradient of every rank is NaN."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class Kept(NamedTuple):
    """What a step changes besides the weights, as it was before; nothing unless it may be undone.

    Weights and momenta as well where the optimizer cannot leave out a step by itself.
    """

    flats: list[Tensor]
    """Of each list of `Guard._state`, one after another."""
    rows: Tensor | None = None
    """(B,) int64: what is written of the queue or the bank."""
    values: Tensor | None = None
    """(B, C)."""


class Guard:
    """Looks at every step and, with `skip`, leaves nothing of a bad one.

    Not undone is the scale of a gradient scaler (fp16), which has sunk. `keys` are enqueued in each
    step.
    """

    def __init__(
        self,
        moco: MoCo,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        world: World,
        *,
        keys: int,
        skip: bool,
    ) -> None:
        self._moco, self._optimizer, self._scaler, self._world = moco, optimizer, scaler, world
        self._keys, self.skip = keys, skip
        buffers = [t for name, t in moco.named_buffers() if name not in ("queue", "bank")]
        counts = [t for t in buffers if t.dtype == torch.int64]  # and the cursor of the queue
        self._buffers = [counts, [t for t in buffers if t.dtype != torch.int64]]

    def keep(self, seen: Tensor | None = None) -> Kept:
        """Call it before the forward. seen: int64 (B,), the rows of the memory bank."""
        if not self.skip:
            return Kept([])
        moco, flats = self._moco, [_flat(tensors) for tensors in self._state()]
        if seen is not None:
            return Kept(flats, seen, moco.bank[seen])
        if not len(moco.queue):
            return Kept(flats)
        rows = moco.queue_ptr + torch.arange(self._keys, device=moco.queue.device)
        rows = rows % len(moco.queue)
        return Kept(flats, rows, moco.queue[rows])

    def look(self, loss: Tensor, grads: Sequence[Tensor]) -> Tensor:
        """() bool: whether this step is bad, on every rank alike.

        loss: () of this rank; grads: averaged over ranks. The optimizer is told.
        """
        if self._scaler.is_enabled():
            # Scaled gradients overflow now and then in a healthy run, which the scaler sees to.
            mean = loss.detach().clone()
            all_reduce_mean_([mean], self._world)
            bad = ~mean.isfinite()
        else:
            bad = any_not_finite(grads)
        if self.skip and isinstance(self._optimizer, SGDWithEMA):
            self._optimizer.left_out = bad
        return bad

    @torch.no_grad()
    def put_back(self, kept: Kept, bad: Tensor) -> None:
        """Where the step is bad, everything is again what it was when it was kept."""
        for tensors, before in zip(self._state() if kept.flats else [], kept.flats, strict=True):
            now = torch.where(bad, before, _flat(tensors)).split([t.numel() for t in tensors])
            pieces = [piece.view(t.shape) for piece, t in zip(now, tensors, strict=True)]
            torch._foreach_copy_(tensors, pieces)
        if kept.rows is not None and kept.values is not None:
            memory = self._moco.queue if len(self._moco.queue) else self._moco.bank
            memory[kept.rows] = torch.where(bad, kept.values, memory[kept.rows])

    def _state(self) -> list[list[Tensor]]:
        """Tensors of one type each: statistics of BN, counts, and weights where need be."""
        if isinstance(self._optimizer, SGDWithEMA):  # leaves them out by itself
            return self._buffers
        params: list[Tensor] = self._optimizer.param_groups[0]["params"]
        states = [self._optimizer.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)  # as good as none
        momenta: list[Tensor] = [state["momentum_buffer"] for state in states]
        weights = [p.detach() for p in self._moco.parameters()]  # of both encoders, or the one
        return [*self._buffers, [*weights, *momenta]]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All values one after another: copies of many small tensors by few operations."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])
