"""This process among the ranks of a run: joining the process group and leaving it."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from fastmoco.machine.host import choose_threads
from fastmoco_kernels import processor


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
    CUDA devices than local ranks, for a `FASTMOCO_CPU` that means nothing, and for a time that is
    none.
    """
    if not 0 < timeout_s < timedelta.max.total_seconds():
        raise ValueError(f"run.timeout_s is {timeout_s:g}, but must be finite seconds above 0.")
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
