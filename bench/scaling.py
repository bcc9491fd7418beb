"""Bytes and modelled time of the collectives of one step, by strategy, for 1 to 1024 ranks.

    python -m bench.scaling

Bytes come from formulas. Tests compare them with the calls that `fastmoco.method.shuffle_bn` and
the published scheme make on 2 and 4 gloo ranks, and ours for up to 1024 ranks of which one exists.
Times are a model, not a measurement: see `LINKS`.

N local batch, W ranks, S image side, C feature dimension, K queue length.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from bench.measure.program import Options, command, parser
from bench.measure.rows import Row
from fastmoco.config import ShuffleBN

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


def rows(size: Size) -> Iterator[Row]:
    """One row per strategy and number of ranks."""
    for ranks in RANKS:
        link = "nvlink" if ranks <= 8 else "infiniband"
        for strategy in (*OURS, "official"):
            received = model(strategy, size, ranks)
            yield {
                "benchmark": "scaling",
                "case": {**asdict(size), "ranks": ranks},
                "contestant": strategy,
                "received_bytes": received,
                "link": link,
                "link_assumption": LINKS[link].assumption,
                "modelled_ms": round(1e3 * seconds(received, strategy, ranks, LINKS[link]), 4),
            }


@command(parser("scaling", __doc__, only=False, windows=False, steps=False), trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """All rows."""
    yield list(rows(Size()))


if __name__ == "__main__":
    sys.exit(main())
