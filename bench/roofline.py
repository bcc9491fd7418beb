"""A roofline model of the compiled step, from rows of `bench.ledger`.

Divides what was counted in the generated code (FLOPs, bytes, launches) by rates from data sheets.
A kernel takes the longest of its arithmetic, its traffic and its launch; times add up and nothing
overlaps. Every time is *modelled*, none is measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.measure.rows import Row

Made = tuple[list[str], list[list[str]]]
"""The headers and the lines of a table."""


@dataclass(frozen=True)
class Gpu:
    """Data sheet: dense bf16 FLOP/s, memory bytes/s, NVLink bytes/s in one direction."""

    name: str
    flops: float
    bandwidth: float
    link: float


GPUS = (
    Gpu("A100 SXM 80 GB", 312e12, 2.039e12, 300e9),
    Gpu("H100 SXM", 989e12, 3.35e12, 450e9),
    Gpu("B200", 2250e12, 8.0e12, 900e9),
)
H100 = GPUS[1]
# What a good kernel reaches of these rates. Of an H100: 593 TFLOP/s, 2.9 TB/s, 300 GB/s.
MATRIX_SHARE, MEMORY_SHARE, LINK_SHARE = 0.60, 0.866, 2 / 3
LAUNCH_S = 4e-6


PARTS = ("convolutions", "pointwise", "reductions", "our ops", "collectives", "copies")
"""Convolutions and matrix products by libraries; generated pointwise kernels and reductions; ours;
collectives; copies and whatever else a library does."""


@dataclass(frozen=True)
class Kernel:
    """An operation of the compiled step, all its calls of one size together."""

    part: str
    calls: int
    launches: int
    """Of one call, as are the other figures."""
    bytes: int
    """Read and written in memory."""
    flops: int = 0
    atomics: int = 0
    """Atomic instructions in the source."""

    def seconds(self, gpu: Gpu) -> float:
        """Modelled time of all calls."""
        # A collective sends over the link about what it reads and writes.
        link = gpu.link * LINK_SHARE
        rate = link if self.part == "collectives" else gpu.bandwidth * MEMORY_SHARE
        arithmetic = self.flops / (gpu.flops * MATRIX_SHARE)
        return self.calls * max(arithmetic, self.bytes / rate, self.launches * LAUNCH_S)


def by_part(kernels: Iterable[Kernel], gpu: Gpu) -> dict[str, float]:
    """Modelled milliseconds of every part."""
    total = dict.fromkeys(PARTS, 0.0)
    for kernel in kernels:
        total[kernel.part] += 1e3 * kernel.seconds(gpu)
    return total


def kernels_of(row: Row) -> list[Kernel]:
    """The kernels of a row of `bench.ledger`."""
    return [Kernel(*fields) for fields in row["kernels"]]


def about(row: Row) -> str:
    """What a row of `bench.ledger` is about, as a table names it."""
    case = row["case"]
    return f"{case['batch']} images on each of {case['ranks']}"


def operations(row: Row) -> list[str]:
    """Our ops in a step, the forward and backward halves of an operation once."""
    halves = re.compile("_(apply|backward|statistics)$")
    return list(dict.fromkeys(halves.sub("", name) for name in row["case"]["ops"]))


def counts(runs: Sequence[Mapping[str, Row]]) -> Made:
    """What was counted: the first and the last count of each batch, a line each."""
    names = ("launches", "gb_moved", "atomics", "generated_kernels")
    of_batch: dict[str, list[Row]] = {}
    for row in (row for run in runs for row in run.values()):
        of_batch.setdefault(about(row), []).append(row)
    body = [
        [f"{about(row)}: {', '.join(operations(row))}", *(f"{row[n]:g}" for n in names)]
        for rows in of_batch.values()
        for row in (rows[0], *rows[1:][-1:])
    ]
    return ["step: our ops in it", "launches", "GB moved", "atomics", "generated kernels"], body


def times(runs: Sequence[Mapping[str, Row]]) -> Made:
    """Modelled times of the step as it was counted last: a line per batch and GPU."""
    body = []
    for row in {about(row): row for run in runs for row in run.values()}.values():
        for gpu in GPUS:
            parts = by_part(kernels_of(row), gpu)
            total = sum(parts.values())
            rate = 1e3 * row["case"]["batch"] * row["case"]["ranks"] / total
            figures = [*(f"{ms:.1f}" for ms in parts.values()), f"{total:.1f}", f"{rate:.0f}"]
            body.append([f"{gpu.name}, {about(row)}", *figures])
    return ["*modelled* ms", *PARTS, "step", "pairs/s"], body
