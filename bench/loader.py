"""Loader throughput against torchvision's pipeline on the same table, in turns in one run.

    python -m bench.loader --root FOLDER_OF_IMAGES

Images per second of two v2 views with two worker processes (or two DALI threads), consumed as fast
as they come, from the folder and from tar shards of the same files. --only takes some of:
torchvision, array folder, array shards, pil folder, dali folder; with --packed DIR, which
`fastmoco pack` has made of the same images, array packed.

With --delay-ms 20 other contestants race: `local` shards; `bucket`, the same on an S3 server on
loopback that answers each request late, with a cache that holds all; `stream` with one of a third,
so that it fetches all the time (the server takes its share of the same cores).
"""

from __future__ import annotations

import logging
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from bench.measure.contest import in_turns
from bench.measure.program import Options, chosen, command, parser
from bench.measure.rows import Row, quantiles, spread
from fastmoco.config import Config, DataConfig, OptimConfig, RunConfig
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.backends.pil import execute
from fastmoco.data.decode import decode
from fastmoco.data.loader import build_loader, make_plan
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import Reader, read_work
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.table import ViewTable
from tests.support.data.far_store import FarStore

CPU = torch.device("cpu")
F: Any = functional  # its annotations name tensors only
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH, PROCESSES = 50, 2
LEAD, COUNTED = 2, 6
"""Batches of a window before the clock starts, when all workers are busy, and those it counts."""
SHARD = 100
"""Images of a shard; in the bucket a tenth, for a cache has to hold eight objects of the largest
size."""
CASE = {"part": "pipeline", "unit": "images/s", "image_size": 224, "recipe": "v2"}
COMPARED_WITH = ("torchvision", "local")
Start = Callable[[], Iterator[Any]]


class OfficialViews(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What the official pipeline does to position i: PIL views, to_tensor, normalize."""

    def __init__(self, config: Config) -> None:
        self.config = config
        source = open_source(config)
        self.reader = Reader(source, config.run.seed, PixelRule.of(config.data))
        self.plan = make_plan(config, source, len(source.sizes))

    def __len__(self) -> int:
        return 2**30  # as long as our batches: a pipeline near its end has idle workers

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        micro_step, row = divmod(position, BATCH)
        augment = self.config.augment
        work = read_work(self.reader, self.plan, augment, micro_step, slice(row, row + 1))
        image = decode(work.queries[0].data, self.reader.rule)
        views = [
            execute(image, ViewTable.unpack(rows), 0, augment.image_size, augment.recipe)
            for rows in (work.rows_q, work.rows_k)
        ]
        q, k = (F.normalize(F.to_tensor(view.copy()), MEAN, STD) for view in views)
        return q, k


def official(config: Config) -> Iterator[Any]:
    """Batches of torchvision's pipeline from a DataLoader with two workers."""
    yield from DataLoader(OfficialViews(config), batch_size=BATCH, num_workers=PROCESSES)


def ours(config: Config) -> Iterator[Any]:
    """Batches of a backend of the loader."""
    with build_loader(config, device=CPU) as loader:
        yield from loader.batches(0, 2**30)


def configuration(root: str, run: str, backend: str, source: str = "folder") -> Config:
    """MoCo v2 at 224 pixels, two workers or threads, 50 images per batch.

    Bad samples are reported below the folder `run`.
    """
    data = DataConfig(
        source=source,  # type: ignore[arg-type]
        root=root,
        backend=backend,  # type: ignore[arg-type]
        workers=1 if backend == "dali" else PROCESSES,
        threads=PROCESSES,
    )
    optim = OptimConfig(global_batch_size=BATCH)
    return resolve_folders(Config(run=RunConfig(dir=run), data=data, optim=optim))


@contextmanager
def pipelines(own: Options, shards: Path, run: str) -> Iterator[dict[str, Start]]:
    """Name of each pipeline that reads from this machine, and how to start it."""
    found: dict[str, Start] = {
        "torchvision": partial(official, configuration(own.root, run, "pil")),
        "array folder": partial(ours, configuration(own.root, run, "array")),
        "array shards": partial(ours, configuration(str(shards), run, "array", "shards")),
        "pil folder": partial(ours, configuration(own.root, run, "pil")),
    }
    if own.packed:
        found["array packed"] = partial(ours, configuration(own.packed, run, "array", "shards"))
    if has_dali():
        found["dali folder"] = partial(ours, configuration(own.root, run, "dali"))
    yield found


@contextmanager
def far_pipelines(own: Options, shards: Path, run: str) -> Iterator[dict[str, Start]]:
    """The same of a bucket beside local shards, shuffled in a window."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    variables = {"FASTMOCO_CACHE": str(Path(run) / "cache")}
    with mock.patch.dict(os.environ, variables), FarStore(own.delay_ms / 1e3) as store:
        local = configuration(str(shards), run, "array", "shards")

        def start(root: str, **variables: str) -> Iterator[Any]:
            data = replace(local.data, root=root, shuffle_window=100)
            with mock.patch.dict(os.environ, variables):
                yield from ours(replace(local, data=data))

        third = str(megabytes(shards) / 3e3)
        yield {
            "local": partial(start, str(shards)),
            "bucket": partial(start, store.put_folder(shards, "all")),
            "stream": partial(start, store.put_folder(shards, "again"), FASTMOCO_REMOTE_GB=third),
        }


def rate(start: Start) -> float:
    """Images per second between the arrivals of batch LEAD and batch LEAD + COUNTED."""
    batches = start()
    list(islice(batches, LEAD))
    began = perf_counter()
    list(islice(batches, COUNTED))
    seconds = perf_counter() - began
    batches.close()  # type: ignore[attr-defined]  # a generator: ends its workers
    return COUNTED * BATCH / seconds


def write_shards(config: Config, folder: Path, each: int) -> None:
    """The images of the source as tar shards of `each`, in the same order."""
    source = open_source(config)
    for first in range(0, len(source.sizes), each):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for sample in range(first, min(first + each, len(source.sizes))):
                tar.add(source.name(sample), f"{sample:08d}.jpg")


def megabytes(folder: str | Path) -> float:
    """Millions of bytes in the files of a folder."""
    sizes = (path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return round(sum(sizes) / 1e6, 1)


def about(own: Options) -> Row:
    """The case of the rows."""
    sizes = open_source(configuration(own.root, "", "pil")).sizes
    pixels = round(float(sizes.astype(float).prod(axis=1).mean()) / 1e6, 2)
    case = CASE | {"megapixels": pixels, "megabytes": megabytes(own.root)}
    case |= {"packed_megabytes": megabytes(own.packed)} if own.packed else {}
    return case | ({"part": "bucket", "delay_ms": own.delay_ms} if own.delay_ms else {})


PARSER = parser("loader", __doc__, steps=False)
PARSER.add_argument("--root", required=True)
PARSER.add_argument("--packed", default="", help="shards of the same images by fastmoco pack")
PARSER.add_argument("--delay-ms", type=float, default=0.0, help="race a bucket so far away")


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """One row per pipeline, with its ratios by turn to what it is compared with."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, TemporaryDirectory() as run:
        shards, kinds = Path(folder), far_pipelines if own.delay_ms else pipelines
        each = SHARD // 10 if own.delay_ms else SHARD
        write_shards(configuration(own.root, run, "pil"), shards, each)
        with kinds(own, shards, run) as known:
            work = {name: partial(rate, known[name]) for name in chosen(own.only, list(known))}
            for measure in work.values():
                measure()  # and caches are warm
            found = in_turns(work, own.windows)
        base = next((found[name] for name in COMPARED_WITH if name in found), None)
        rows, case = [], about(own)
        for name, rates in found.items():
            row: Row = {"benchmark": "loader", "case": case, "contestant": name, **spread(rates, 3)}
            if base:
                row["ratios"] = quantiles([a / b for a, b in zip(rates, base, strict=True)], 3)
            rows.append(row)
        yield rows


if __name__ == "__main__":
    sys.exit(main())
