"""Bytes and modelled time of the collectives of one step, by strategy, for 1 to 1024 ranks.

    python -m bench.scaling

Bytes of our strategies are counted from the calls that `fastmoco.method.shuffle_bn` makes in a
process group of W ranks of which one exists; tests compare them and the formulas of the published
scheme with counts on 2 and 4 gloo ranks. Times are a model, not a measurement: see `LINKS`.

N local batch, W ranks, S image side, C feature dimension, K queue length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.measure.program import command, markdown, parser
from bench.measure.rows import Row, append_rows, origin
from bench.measure.wire import Wire
from fastmoco.config import ShuffleBN
from fastmoco.machine.ranks import World
from fastmoco.method.shuffle_bn import build_shuffle

OURS: tuple[ShuffleBN, ...] = ("all_to_all", "loader", "split", "none")
RANKS = [2**i for i in range(11)]
UINT8, FLOAT = 1, 4


@dataclass(frozen=True)
class Size:
    """What a rank works on in a step: by default the ResNet-50 recipe, 32 images per rank."""

    local: int = 32
    side: int = 224
    dim: int = 128
    queue: int = 65536
    parameters: int = 27_966_656
    """Parameters of one encoder, all of which are averaged."""
    statistics: int = 53_120
    """Elements of all running means and variances of one encoder."""
    norms: int = 53

    @property
    def pixels(self) -> int:
        """Values in one image."""
        return 3 * self.side * self.side


@dataclass(frozen=True)
class Link:
    """alpha: seconds per message and step of a collective; beta: bytes per second and rank."""

    alpha: float
    beta: float
    assumption: str


LINKS = {
    "nvlink": Link(3e-6, 300e9, "3 us per message, 300 GB/s of 450 GB/s per direction"),
    "infiniband": Link(8e-6, 40e9, "8 us per message, 40 GB/s of one 400 Gb/s port per GPU"),
}


def model(strategy: str, size: Size, ranks: int) -> dict[str, int]:
    """Bytes that rank 0 receives in a step, by purpose, from closed formulas.

    `official` gathers fp32 images, broadcasts the permutation, gathers keys for the unshuffle and
    again for the queue, and broadcasts the buffers of DDP: the queue and both encoders' statistics
    (a rank other than the source receives those).
    """
    others, n = ranks - 1, size.local
    keys = others * n * size.dim * FLOAT
    gradients = 2 * others * size.parameters * FLOAT // ranks
    if strategy != "official":
        leaves = (n - n // ranks) if strategy == "all_to_all" else 0
        images = leaves * size.pixels * UINT8
        return {"images": images, "keys": keys, "state": 0, "gradients": gradients}
    queue = size.queue * size.dim * FLOAT + 8
    statistics = 2 * (size.statistics * FLOAT + 8 * size.norms)
    return {
        "images": others * n * size.pixels * FLOAT,
        "keys": 2 * keys,
        "state": (queue + statistics + 8 * n * ranks) if others else 0,
        "gradients": gradients,
    }


def seconds(received: dict[str, int], strategy: str, ranks: int, link: Link) -> float:
    """Alpha-beta time of a step's collectives, one after another, nothing overlapped.

    all_to_all and all_gather take W - 1 messages, all_reduce and broadcast 2 log2 W and log2 W.
    """
    if ranks == 1:
        return 0.0
    chain, tree = ranks - 1, math.log2(ranks)
    messages = 2 * tree + chain  # gradients, keys
    if strategy == "all_to_all":
        messages += chain
    if strategy == "official":
        messages += 2 * chain + 2 * tree  # images, keys again; permutation, buffers
    return messages * link.alpha + sum(received.values()) / link.beta


def count(strategy: ShuffleBN, size: Size, world: World) -> dict[str, int]:
    """Bytes that this rank receives in the key path, by purpose, from the calls made."""
    shuffle = build_shuffle(strategy, world=world, local=size.local, seed=0)
    order = shuffle.indices(0).clone()
    images = torch.zeros(size.local, size.side, size.side, 3, dtype=torch.uint8)

    def encode(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), size.dim, dtype=torch.float32)

    with Wire() as wire:
        keys = shuffle(encode, shuffle.send(images, order), order)
        assert keys.gathered.shape == (size.local * world.size, size.dim)
    return {"images": wire.received["all_to_all"], "keys": wire.received["all_gather"]}


@contextmanager
def imagined(ranks: int) -> Iterator[World]:
    """Rank 0 of a process group whose other ranks do not exist; collectives bring nothing."""
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        backend = "fake" if ranks > 1 else "none"
        yield World(0, 0, ranks, torch.device("cpu"), backend)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def rows(size: Size) -> Iterator[Row]:
    """One row per strategy and number of ranks; raises ValueError if count and model differ."""
    for ranks in RANKS:
        for strategy in (*OURS, "official"):
            received = model(strategy, size, ranks)
            if strategy != "official":
                with imagined(ranks) as world, FakeTensorMode(allow_non_fake_inputs=True):
                    counted = count(strategy, size, world)  # type: ignore[arg-type]
                if any(received[name] != value for name, value in counted.items()):
                    raise ValueError(f"{strategy} on {ranks} ranks: {counted} is not {received}")
            link = "nvlink" if ranks <= 8 else "infiniband"
            time = seconds(received, strategy, ranks, LINKS[link])
            yield {
                "benchmark": "scaling",
                "case": {**asdict(size), "ranks": ranks},
                "contestant": strategy,
                "received_bytes": received,
                "link": link,
                "link_assumption": LINKS[link].assumption,
                "modelled_ms": round(1e3 * time, 4),
            }


@command("scaling")
def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    made = parser("scaling", __doc__, only=False, windows=False, steps=False)
    publish = made.parse_args(arguments).publish
    where = origin(torch.device("cpu"), publish)
    found = list(rows(Size()))
    purposes = list(found[0]["received_bytes"])
    headers = ["ranks, strategy", *(f"{name} MB" for name in purposes), "link", "ms"]
    body = [
        [
            f"{row['case']['ranks']}, {row['contestant']}",
            *(f"{value / 1e6:.3f}" for value in row["received_bytes"].values()),
            row["link"],
            str(row["modelled_ms"]),
        ]
        for row in found
    ]
    print("\n".join(markdown(headers, body)))
    if publish:
        append_rows("scaling", found, where)


if __name__ == "__main__":
    sys.exit(main())
