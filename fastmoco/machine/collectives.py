"""Collectives between ranks; only this file and `ranks.py` import torch.distributed.

Collectives of the training step are functional (they return new tensors), so that torch.compile
traces them without a graph break. One rank is the identity of each and needs no process group.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmoco.machine.ranks import World

# Torch 2.14 renamed all_gather_tensor; 2.11 knows only the old name.
_all_gather: Callable[..., Tensor] = getattr(
    functional, "all_gather_single", functional.all_gather_tensor
)


T = TypeVar("T")


# What DDP takes by default.
_BUCKET_BYTES = 25 << 20


class CollectiveError(RuntimeError):
    """A collective failed, because a rank died or hangs. The message is one sentence."""


@contextmanager
def naming_failures(
    world: World | None = None, steps_done: Callable[[], int] | None = None
) -> Iterator[None]:
    """Turn the failure of a collective inside into a `CollectiveError` with step and operation.

    Without arguments it is for the start, in which the ranks find each other.

    gloo fails here. NCCL's watchdog ends the process by itself and prints operation and sequence
    number; the step is the one after the last that was logged, or a little later.
    """
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and "gloo" not in reason:
            raise
        told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        rank, size = (world.rank, world.size) if world else told
        when = f"step {steps_done() + 1}" if steps_done else "at the start"
        raise CollectiveError(
            f"rank {rank} of {size}, {when}: {_operation(error)} "
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
    """(N, ...) on each rank to (size * N, ...) in rank order on every rank.

    A gradient flows back to the rank that `x` came from: the sum of those of all ranks.
    """
    if world.size == 1:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        with_gradient: Tensor = _GatherWithGradient.apply(x, world)
        return with_gradient
    gathered: Tensor = functional.wait_tensor(_all_gather(x.contiguous(), 0, _group()))
    return gathered


class _GatherWithGradient(torch.autograd.Function):
    """`all_gather`, whose backward hands every rank the summed gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, len(x)
        return all_gather(x.detach(), world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # (size * N, C) floats are few beside the gradients of an encoder; gloo sums everywhere.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        first = ctx.world.rank * ctx.rows
        return total[first : first + ctx.rows], None


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


def buckets(tensors: Sequence[Tensor]) -> list[range]:
    """Runs of about 25 MiB of fp32, last tensors first: the backward finishes with those first."""
    found: list[range] = []
    end, held = len(tensors), 0
    for index in reversed(range(len(tensors))):
        held += 4 * tensors[index].numel()
        if held >= _BUCKET_BYTES or index == 0:
            found.append(range(index, end))
            end, held = index, 0
    return found


def sum_over_ranks(tensors: Sequence[Tensor], world: World) -> list[Tensor]:
    """The sum of each tensor over ranks, for a traced step; in eager mode DDP averages.

    Who reads the sums divides: a division of each would be a launch of its own. One collective for
    each bucket, so that a scheduler can begin to send before the backward ends.
    """
    if world.size == 1:
        return list(tensors)
    sums: list[Tensor] = []
    for bucket in buckets(tensors):
        mine = [tensors[index] for index in bucket]
        # gloo has no mean
        sums = [*functional.all_reduce_coalesced(mine, "sum", _group()), *sums]
    return sums


def all_reduce_mean_(tensors: Sequence[Tensor], world: World) -> None:
    """Replace tensors of one floating-point type by their mean over ranks, in one collective."""
    if world.size == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    flat /= world.size
    for target, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        target.copy_(mean.view_as(target))


@contextmanager
def averaged(tensors: Sequence[Tensor], world: World) -> Iterator[None]:
    """Inside, fp32 tensors hold their mean over ranks; afterwards each rank has its own again."""
    own = [t.clone() for t in tensors] if world.size > 1 else []
    all_reduce_mean_(tensors, world)
    try:
        yield
    finally:
        for target, value in zip(tensors, own, strict=False):
            target.copy_(value)


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


def gather_objects(value: T, world: World) -> list[T]:
    """The value of every rank in rank order, on every rank; pickled, so for small ones."""
    if world.size == 1:
        return [value]
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is set on at least one rank."""
    if world.size == 1:
        return flag
    total = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return bool(total.item())


class SharedRequest:
    """The most urgent request of any rank, known to all of them after the same step.

    Requests travel by gloo beside the step: no rank waits for its device, and each learns at step
    n what was asked for until step n - 1. Level 1 asks for something once; what ranks ask for in
    the step in which they learn of it is the same request. Higher levels last.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._level = torch.zeros((), dtype=torch.int64)
        self._sent: Any = None

    def poll(self, level: int) -> int:
        """Tell the others `level`; the highest one that anybody told. Call it once per step."""
        if self._group is None:
            return level
        asked = self.settle()
        highest = max(level, asked)
        self._level.fill_(highest if highest > 1 or not asked else 0)
        self._sent = dist.all_reduce(self._level, dist.ReduceOp.MAX, self._group, async_op=True)
        return asked

    def settle(self) -> int:
        """Wait for what is on its way; 0 where nothing is."""
        if self._sent is None:
            return 0
        self._sent.wait()
        self._sent = None
        return int(self._level)


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
