"""Loader throughput against torchvision's pipeline on the same table, in turns in one run.

    python -m bench.loader --root FOLDER_OF_IMAGES

Images per second of two v2 views with two worker processes (or two DALI threads), consumed as fast
as they come, from the folder and from tar shards of the same files. --only takes some of:
torchvision, array folder, array shards, pil folder, dali folder; with --packed DIR, which
`fastmoco pack` has made of the same images, array packed.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from bench.measure.contest import in_turns
from bench.measure.program import Options, chosen, command, parser, progress
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

CPU = torch.device("cpu")
F: Any = functional  # its annotations name tensors only
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 50
PROCESSES = 2
LEAD, COUNTED = 2, 6
"""Batches of a window before the clock starts, when all workers are busy, and those it counts."""
CASE = {"part": "pipeline", "unit": "images/s", "image_size": 224, "recipe": "v2"}
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
        one = slice(row, row + 1)
        augment = self.config.augment
        work = read_work(self.reader, self.plan, augment, micro_step, one)
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
    readers = 1 if backend == "dali" else PROCESSES
    data = DataConfig(
        source=source,  # type: ignore[arg-type]
        root=root,
        backend=backend,  # type: ignore[arg-type]
        workers=readers,
        threads=PROCESSES,
    )
    optim = OptimConfig(global_batch_size=BATCH)
    return resolve_folders(Config(run=RunConfig(dir=run), data=data, optim=optim))


def contestants(root: str, shards: str, packed: str, run: str) -> dict[str, Start]:
    """Name of each pipeline and how to start it."""
    found: dict[str, Start] = {
        "torchvision": partial(official, configuration(root, run, "pil")),
        "array folder": partial(ours, configuration(root, run, "array")),
        "array shards": partial(ours, configuration(shards, run, "array", "shards")),
        "pil folder": partial(ours, configuration(root, run, "pil")),
    }
    if packed:
        found["array packed"] = partial(ours, configuration(packed, run, "array", "shards"))
    if has_dali():
        found["dali folder"] = partial(ours, configuration(root, run, "dali"))
    return found


def rate(start: Start) -> float:
    """Images per second between the arrivals of batch LEAD and batch LEAD + COUNTED."""
    batches = start()
    list(islice(batches, LEAD))
    began = time.perf_counter()
    list(islice(batches, COUNTED))
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]  # a generator: ends its workers
    return COUNTED * BATCH / seconds


def write_shards(config: Config, folder: Path, each: int = 100) -> None:
    """The images of the source as tar shards of `each`, in the same order."""
    source = open_source(config)
    for first in range(0, len(source.sizes), each):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for sample in range(first, min(first + each, len(source.sizes))):
                tar.add(source.name(sample), f"{sample:08d}.jpg")


def megabytes(folder: str) -> float:
    """Millions of bytes in the files of a folder."""
    return round(
        sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6, 1
    )


def megapixels(root: str) -> float:
    """Mean size of the images of a folder."""
    sizes = open_source(configuration(root, "", "pil")).sizes
    return float(sizes.astype(float).prod(axis=1).mean()) / 1e6


def rows_of(found: Mapping[str, Sequence[float]], case: Row) -> list[Row]:
    """One row per pipeline, with its ratios to torchvision's by turn."""
    base, rows = found.get("torchvision"), []
    for name, values in found.items():
        row: Row = {"benchmark": "loader", "case": case, "contestant": name, **spread(values, 3)}
        if base:
            row["ratios"] = quantiles([a / b for a, b in zip(values, base, strict=True)], 3)
        rows.append(row)
    return rows


PARSER = parser("loader", __doc__, steps=False)
PARSER.add_argument("--root", required=True)
PARSER.add_argument("--packed", default="", help="shards of the same images by fastmoco pack")


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """One row per pipeline."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as shards, tempfile.TemporaryDirectory() as run:
        write_shards(configuration(own.root, run, "pil"), Path(shards))
        racing = contestants(own.root, shards, own.packed, run)
        names = chosen(own.only, list(racing))
        for name in names:
            rate(racing[name])  # and caches are warm
        work = {name: partial(rate, racing[name]) for name in names}
        case = CASE | {
            "megapixels": round(megapixels(own.root), 2),
            "megabytes": megabytes(own.root),
        }
        case |= {"packed_megabytes": megabytes(own.packed)} if own.packed else {}
        yield rows_of(in_turns(work, own.windows, after=progress(own.windows)), case)


if __name__ == "__main__":
    sys.exit(main())
