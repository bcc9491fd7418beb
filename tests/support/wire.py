"""Counts what collectives bring to a rank, from the calls themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Wire(TorchDispatchMode):
    """Bytes received by this rank inside the context, by operation.

    all_to_all: the rows of other ranks. all_gather: the shares of other ranks. all_reduce: those of
    a ring, 2 (W - 1) / W of the tensor. broadcast: the tensor, on every rank but the source.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.received: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, name = str(func).split(".")[:2]
        if namespace in ("c10d", "_c10d_functional"):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        if name == "all_to_all_single":
            x, receive, _, _ = args
            row = x.numel() // len(x) * x.element_size()
            self.received["all_to_all"] += (sum(receive) - receive[rank]) * row
        elif name == "all_gather_into_tensor":
            self.received["all_gather"] += (ranks - 1) * _bytes([args[0]])
        elif name == "allgather_":
            self.received["all_gather"] += (ranks - 1) * _bytes(args[1])
        elif name in ("all_reduce", "all_reduce_coalesced", "allreduce_"):
            tensors = [args[0]] if isinstance(args[0], Tensor) else args[0]
            self.received["all_reduce"] += 2 * (ranks - 1) * _bytes(tensors) // ranks
        elif name == "broadcast_":
            self.received["broadcast"] += _bytes(args[0]) * (rank != args[2])
        elif name not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise ValueError(f"a collective that nobody counts: {name}")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
