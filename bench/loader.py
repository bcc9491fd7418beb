"""Loader throughput against torchvision's pipeline on the same table, in turns in one run.

    python -m bench.loader --root FOLDER_OF_IMAGES

Three parts: `pipeline` is images per second of two v2 views with two worker processes (or two DALI
threads), consumed as fast as they come; `reader` is encoded bytes and table rows per second of one
reader process, without decoding; `stage` is CPU milliseconds per image on one core. Everything is
measured on the folder and on tar shards of the same files. Before timing, the views of every
contender are checked against the reference.

    --rounds N     windows of each contender (20); the first round is not counted
    --only A,B     some of: torchvision, pil folder, array folder, array shards, dali folder
    --publish      append rows to bench/results/loader.jsonl; refused for a dirty tree
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from bench.measure import terminal
from bench.measure.case import origin
from bench.measure.harness import RESULTS, percentiles, spread, write_rows
from fastmoco.config import Config, DataConfig, OptimConfig, RunConfig
from fastmoco.data.backends.array import Canvas, crop, decode_tensor
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.backends.pil import crop as crop_by_pil
from fastmoco.data.backends.pil import execute
from fastmoco.data.decode import decode
from fastmoco.data.loader import build_loader, make_plan
from fastmoco.data.reader import Reader, read_work
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.table import ViewTable

ROWS = RESULTS / "loader.jsonl"
CPU = torch.device("cpu")
F: Any = functional  # its annotations name tensors only
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 50
PROCESSES = 2
LEAD, COUNTED = 2, 6
"""Batches of a window before the clock starts, when all workers are busy, and those it counts."""
STAGE_IMAGES = 100
Samples = dict[str, list[float]]


class OfficialViews(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What the official pipeline does to position i: PIL views, to_tensor, normalize."""

    def __init__(self, config: Config) -> None:
        self.config = config
        source = open_source(config)
        self.reader = Reader(source, config.run.seed, config.data.max_pixels)
        self.plan = make_plan(config, source, len(source.sizes))

    def __len__(self) -> int:
        return 2**30  # as long as our batches: a pipeline near its end has idle workers

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        micro_step, row = divmod(position, BATCH)
        one = slice(row, row + 1)
        augment = self.config.augment
        work = read_work(self.reader, self.plan, augment, micro_step, one)
        image = decode(work.queries[0].data, self.config.data.max_pixels)
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


def configuration(root: str, backend: str, source: str = "folder") -> Config:
    """MoCo v2 at 224 pixels, two workers or threads, 50 images per batch."""
    readers = 1 if backend == "dali" else PROCESSES
    config = Config(
        run=RunConfig(dir=_run_folder()),
        data=DataConfig(
            source=source,  # type: ignore[arg-type]
            root=root,
            backend=backend,  # type: ignore[arg-type]
            workers=readers,
            threads=PROCESSES,
        ),
        optim=OptimConfig(global_batch_size=BATCH),
    )
    return resolve_folders(config)


@cache
def _run_folder() -> str:
    """Where loaders report bad samples; it goes when this process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


Start = Callable[[], Iterator[Any]]


def contenders(root: str, shards: str) -> dict[str, Start]:
    """Name of each pipeline and how to start it."""
    found: dict[str, Start] = {
        "torchvision": partial(official, configuration(root, "pil")),
        "array folder": partial(ours, configuration(root, "array")),
        "array shards": partial(ours, configuration(shards, "array", "shards")),
        "pil folder": partial(ours, configuration(root, "pil")),
    }
    if has_dali():
        found["dali folder"] = partial(ours, configuration(root, "dali"))
    return found


def pipeline_rate(start: Start) -> float:
    """Images per second between the arrivals of batch LEAD and batch LEAD + COUNTED."""
    batches = start()
    list(itertools.islice(batches, LEAD))
    began = time.perf_counter()
    list(itertools.islice(batches, COUNTED))
    seconds = time.perf_counter() - began
    batches.close()  # type: ignore[attr-defined]  # a generator: ends its workers
    return COUNTED * BATCH / seconds


def reader_rate(config: Config) -> float:
    """Samples per second of encoded bytes and table rows in one process, warm page cache."""
    source = open_source(config)
    config = replace(config, optim=OptimConfig(global_batch_size=250))
    plan = make_plan(config, source, len(source.sizes))
    reader = Reader(source, 0, config.data.max_pixels)
    read_work(reader, plan, config.augment, 0)
    began = time.perf_counter()
    steps = 4
    for micro_step in range(steps):
        read_work(reader, plan, config.augment, micro_step)
    return 250 * steps / (time.perf_counter() - began)


def stage_times(root: str) -> dict[str, float]:
    """CPU milliseconds per image of one core, cumulative: decode, + two crops, full two views."""
    config = configuration(root, "pil")
    source = open_source(config)
    plan = make_plan(config, source, len(source.sizes))
    reader = Reader(source, 0, config.data.max_pixels)
    works = [read_work(reader, plan, config.augment, m) for m in range(STAGE_IMAGES // BATCH)]
    items = [
        (one, [ViewTable.unpack(rows) for rows in (work.rows_q, work.rows_k)], row)
        for work in works
        for row, one in enumerate(work.queries)
    ]
    side, canvas = config.augment.image_size, Canvas(config.augment.image_size, "v2")
    limit = config.data.max_pixels

    def by_pil(full: bool) -> None:
        for one, tables, row in items:
            image = decode(one.data, limit)
            for table in tables:
                if full:
                    execute(image, table, row, side, "v2")
                else:
                    crop_by_pil(image, table, row, side)

    def by_arrays(full: bool) -> None:
        for one, tables, row in items:
            pixels = decode_tensor(one.data, limit)
            for table in tables:
                if full:
                    canvas.execute(pixels, table, row)
                else:
                    crop(pixels, table, row, side)

    def only_decode(by: Callable[[bytes, int], Any]) -> None:
        for one, _, _ in items:
            by(one.data, limit)

    work_of: dict[str, Callable[[], None]] = {
        "decode, pil": partial(only_decode, decode),
        "decode, array": partial(only_decode, decode_tensor),
        "decode + crop, pil": partial(by_pil, False),
        "decode + crop, array": partial(by_arrays, False),
        "two views, pil": partial(by_pil, True),
        "two views, array": partial(by_arrays, True),
    }
    times = {}
    for name, task in work_of.items():
        began = time.process_time()
        task()
        times[name] = (time.process_time() - began) / len(items) * 1e3
    return times


def check(root: str) -> dict[str, float]:
    """Mean difference in levels of each backend's first batch from the reference's."""
    batches = {
        backend: next(ours(configuration(root, backend)))
        for backend in ["pil", "array", *(["dali"] if has_dali() else [])]
    }
    truth = batches.pop("pil")
    errors = {
        name: float((batch.im_q.float() - truth.im_q.float()).abs().mean())
        for name, batch in batches.items()
    }
    assert all(error < 1.0 for error in errors.values()), errors
    return errors


def write_shards(config: Config, folder: Path) -> str:
    """The images of the source as tar shards of 100, in the same order."""
    source = open_source(config)
    for first in range(0, len(source.sizes), 100):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for sample in range(first, min(first + 100, len(source.sizes))):
                tar.add(source.name(sample), f"{sample:08d}.jpg")
    return str(folder)


def measure(root: str, shards: str, only: Sequence[str], rounds: int) -> dict[str, Samples]:
    """Samples of every part by contender: rates, and CPU milliseconds of the stages."""
    racing = list(contenders(root, shards).items())
    racing = [(name, start) for name, start in racing if not only or name in only]
    found: dict[str, Samples] = {"pipeline": {}, "reader": {}, "stage": {}}

    def take(part: str, name: str, value: float) -> None:
        found[part].setdefault(name, []).append(value)

    for turn in range(rounds + 1):
        if turn == 1:
            found = {part: {} for part in found}  # the first round warmed caches up
        shift = turn % len(racing)  # nobody always runs in the wake of the same one
        for name, start in [*racing[shift:], *racing[:shift]]:
            take("pipeline", name, pipeline_rate(start))
        take("reader", "folder", reader_rate(configuration(root, "pil")))
        take("reader", "shards", reader_rate(configuration(shards, "pil", "shards")))
        for name, value in stage_times(root).items():
            take("stage", name, value)
    return found


UNITS = {"pipeline": "images/s", "reader": "samples/s", "stage": "CPU ms/image"}


def rows_of(
    found: Mapping[str, Samples], errors: Mapping[str, float], where: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per part and contender; a pipeline also has its ratios to torchvision's, by turn."""
    rows = []
    base = found["pipeline"].get("torchvision")
    for part, samples in found.items():
        case = {"part": part, "unit": UNITS[part], "image_size": 224, "recipe": "v2"}
        for name, values in samples.items():
            row = {"benchmark": "loader", "case": case, "contender": name, **spread(values, 3)}
            if part == "pipeline" and base:
                ratios = [a / b for a, b in zip(values, base, strict=True)]
                row["ratios"] = percentiles(ratios, 3)
            error = errors.get(name.split()[0])
            rows.append({**row, "error_levels": error, "environment": dict(where)})
    return rows


@terminal.command("loader")
def main(arguments: Sequence[str]) -> None:
    """Print the percentiles; with --publish also append the rows."""
    parser = argparse.ArgumentParser("bench.loader", description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="")
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    where = origin(CPU, options.publish)
    errors = check(options.root)
    only = options.only.split(",") if options.only else []
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(configuration(options.root, "pil"), Path(folder))
        found = measure(options.root, shards, only, options.rounds)
    rows = rows_of(found, errors, where)
    for row in rows:
        ratio = f"{row['ratios'][1]:6.2f} x torchvision" if "ratios" in row else ""
        case = row["case"]
        print(f"{case['part']:9} {row['contender']:22} {row['p50']:9.2f} {case['unit']} {ratio}")
    print("mean difference from the reference in levels:", errors)
    if options.publish:
        write_rows(ROWS, rows)


if __name__ == "__main__":
    sys.exit(main())
