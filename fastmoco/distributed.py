"""Ranks and collectives; the only importer of torch.distributed.

Collectives of the training step are functional (they return new tensors), so that torch.compile
traces them without a graph break. One rank is the identity of each and needs no process group.
"""

from __future__ import annotations

import inspect
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmoco.host import choose_threads
from fastmoco_kernels import processor

# Torch 2.14 renamed all_gather_tensor; 2.11 knows only the old name.
_all_gather: Callable[..., Tensor] = getattr(
    functional, "all_gather_single", functional.all_gather_tensor
)

# What DDP takes by default.
_BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str
    """`nccl`, `gloo`, or `none` for a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def start(device: str, timeout_s: float) -> World:
    """Join the process group that torchrun describes; without torchrun the world is one rank.

    `device` is `cuda`, `cpu` or `auto`. Raises `ValueError` for CUDA where there is none, or fewer
    CUDA devices than local ranks, and for a `FASTMOCO_CPU` that means nothing.
    """
    processor.cap()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError(
            "run.device is cuda, but torch finds no CUDA device here: install a driver, or use "
            "--run.device cpu."
        )
    if device == "cpu" or not cuda:
        chosen, backend = torch.device("cpu"), "gloo"
        choose_threads()
    else:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"Local rank {local_rank} has no GPU of its own: start torchrun with "
                f"--nproc_per_node of at most {torch.cuda.device_count()} on this machine."
            )
        chosen, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(rank=0, local_rank=0, size=1, device=chosen, backend="none")
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=timeout_s),
        device_id=chosen if chosen.type == "cuda" else None,
        **_meeting_place(rank, size, timeout_s),
    )
    return World(rank, local_rank, size, chosen, backend)


def _meeting_place(rank: int, size: int, timeout_s: float) -> dict[str, Any]:
    """Where the ranks exchange addresses, as arguments of `init_process_group`.

    torchrun lends its own store, and keeps it when it restarts the ranks: they would find the
    addresses of dead ones there and fail again. So each start uses keys of its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    c10d = cast(Any, dist)  # its stores lack annotations
    store = c10d.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
    )
    prefix = agree_on_start(store, rank, size, timeout_s)
    return {"store": c10d.PrefixStore(prefix, store), "rank": rank, "world_size": size}


def agree_on_start(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """A name that the `size` ranks of this start share, whatever earlier starts left in `store`.

    Every rank announces a name that was never used before. Rank 0 publishes those that it finds,
    and its own, until every rank has found itself in the list and signed it. Restart counts would
    not do: on several nodes each agent counts its own. Raises `TimeoutError` after `timeout_s`.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    store.set(f"start/name/{rank}", name)
    while time.monotonic() < deadline:
        if rank == 0:
            others = [read(f"start/name/{r}") or "-" for r in range(1, size)]
            store.set("start/list", " ".join([name, *others]))
            if all(read(f"start/signed/{r}") == name for r in range(1, size)):
                return name
        else:
            names = read("start/list").split()
            if len(names) == size and names[rank] == name:
                store.set(f"start/signed/{rank}", names[0])
                return names[0]
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank} of {size} did not meet the others within {timeout_s:g} s")


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class CollectiveError(RuntimeError):
    """A collective failed, because a rank died or hangs. The message is one sentence."""


@contextmanager
def naming_failures(world: World, steps_done: Callable[[], int]) -> Iterator[None]:
    """Turn the failure of a collective inside into a `CollectiveError` with step and operation.

    gloo fails here. NCCL's watchdog ends the process by itself and prints operation and sequence
    number; the step is the one after the last that was logged, or a little later.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and "gloo" not in reason:
            raise
        raise CollectiveError(
            f"rank {world.rank} of {world.size}, step {steps_done() + 1}: {_operation(error)} "
            f"failed, because another rank died or hangs ({reason[:160]}); the same command "
            "resumes from the last checkpoint."
        ) from error


def _operation(error: RuntimeError) -> str:
    """The collective that the traceback of `error` passes through, innermost first."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    for code in reversed(codes):
        if code.co_filename == __file__ and code.co_name != naming_failures.__name__:
            return code.co_name.strip("_")
    if any(code.co_filename == functional.__file__ for code in codes):
        return all_to_all.__name__  # the only one that callers wait for, by using its result
    if any(code.co_name == "backward" for code in codes):
        return "the average of gradients in the backward"
    return "a collective"


def all_gather(x: Tensor, world: World) -> Tensor:
    """(N, ...) on each rank to (size * N, ...) in rank order on every rank."""
    if world.size == 1:
        return x
    gathered: Tensor = functional.wait_tensor(_all_gather(x.contiguous(), 0, _group()))
    return gathered


def all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], world: World) -> Tensor:
    """Send the first send[0] rows to rank 0, the next send[1] to rank 1, and so on.

    Returns (sum(receive), ...): receive[r] rows from each rank r, in rank order. In eager mode the
    exchange runs on while the caller computes, and the first use of the result waits for it.
    """
    if world.size == 1:
        return x
    moved: Tensor = functional.all_to_all_single(
        x.contiguous(), list(receive), list(send), _group()
    )
    return moved


def mean_over_ranks(tensors: Sequence[Tensor], world: World) -> list[Tensor]:
    """The mean of each tensor over ranks, for a traced step; DDP does this in eager mode.

    Last tensors first, because the backward finishes with them first, and in several collectives,
    so that a scheduler can begin to send before the backward ends.
    """
    if world.size == 1:
        return list(tensors)
    means: list[Tensor] = []
    bucket: list[Tensor] = []
    held = 0
    for index in reversed(range(len(tensors))):
        bucket.append(tensors[index])
        held += tensors[index].numel() * tensors[index].element_size()
        if held >= _BUCKET_BYTES or index == 0:
            summed = functional.all_reduce_coalesced(bucket, "sum", _group())  # gloo has no mean
            means += [total / world.size for total in summed]
            bucket, held = [], 0
    return means[::-1]


def all_reduce_mean_(tensors: Sequence[Tensor], world: World) -> None:
    """Replace fp32 tensors by their mean over ranks, in one collective."""
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= world.size
    for target, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        target.copy_(mean.view_as(target))


def gather_rows(x: Tensor, world: World) -> Tensor:
    """(n, D) with an n of its own on each rank to all rows in rank order, on every rank."""
    if world.size == 1:
        return x
    device = x.device
    x = x.to(world.device)
    counts = all_gather(torch.tensor([len(x)], device=world.device), world).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = all_gather(padded, world).split(max(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(device)


def any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is set on at least one rank."""
    if world.size == 1:
        return flag
    total = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return bool(total.item())


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier(device_ids=[world.local_rank] if world.backend == "nccl" else None)


def average_gradients(module: nn.Module, world: World) -> nn.Module:
    """The module wrapped so that its backward averages gradients over ranks.

    Buffers are not broadcast: BN statistics belong to a rank, and the queue is equal by
    construction.
    """
    if world.size == 1:
        return module
    # Torch 2.14 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    devices = [world.local_rank] if world.backend == "nccl" else None
    options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, name: False}
    return DistributedDataParallel(module, **options)


def gradient_sync(module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Context of a backward that averages gradients over ranks, or, disabled, only adds them up.

    With several backwards in a step only the last one is to average.
    """
    if enabled or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[None], module.no_sync())


def _group() -> Any:
    return cast(Any, dist.group.WORLD)
