"""Loader throughput against torchvision's pipeline on the same table, interleaved in one run.

    python -m bench.loader --root FOLDER_OF_IMAGES [--rounds 3] [--out bench/results/loader.jsonl]

Three parts: `pipeline` is images per second of two v2 views with two worker processes (or two DALI
threads), consumed as fast as they come; `reader` is encoded bytes and table rows per second of one
reader process, without decoding; `stage` is CPU milliseconds per image on one core. Everything is
measured on the folder and on tar shards of the same files. Rows hold p20, p50 and p80 over the
rounds. Before timing, the views of every contender are checked against the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from fastmoco.config import Config, DataConfig, OptimConfig, RunConfig
from fastmoco.data.arrays import Canvas, crop, decode_tensor
from fastmoco.data.augment import ViewTable
from fastmoco.data.header import decode
from fastmoco.data.loader import build_loader, has_dali, make_plan
from fastmoco.data.reader import Reader, read_work
from fastmoco.data.reference import crop as crop_by_pil
from fastmoco.data.reference import execute
from fastmoco.data.sources import open_source

CPU = torch.device("cpu")
F: Any = functional  # its annotations name tensors only
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 50
PROCESSES = 2


class OfficialViews(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What the official pipeline does to position i: PIL views, to_tensor, normalize."""

    def __init__(self, config: Config, images: int) -> None:
        self.config, self.images = config, images
        source = open_source(config)
        self.reader = Reader(source, config.run.seed, config.data.max_pixels)
        self.plan = make_plan(config, source, len(source.sizes))

    def __len__(self) -> int:
        return self.images

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


def official(config: Config, images: int) -> Iterator[Any]:
    """Batches of torchvision's pipeline from a DataLoader with two workers."""
    dataset = OfficialViews(config, images)
    yield from DataLoader(dataset, batch_size=BATCH, num_workers=PROCESSES)


def ours(config: Config, images: int) -> Iterator[Any]:
    """Batches of a backend of the loader."""
    with build_loader(config, device=CPU) as loader:
        yield from loader.batches(0, images // BATCH)


def configuration(root: str, backend: str, source: str = "folder") -> Config:
    """MoCo v2 at 224 pixels, two workers or threads, 50 images per batch."""
    readers = 1 if backend == "dali" else PROCESSES
    return Config(
        run=RunConfig(dir=tempfile.mkdtemp()),
        data=DataConfig(
            source=source,  # type: ignore[arg-type]
            root=root,
            backend=backend,  # type: ignore[arg-type]
            workers=readers,
            threads=PROCESSES,
        ),
        optim=OptimConfig(global_batch_size=BATCH),
    )


def contenders(root: str, shards: str) -> dict[str, Callable[[int], Iterator[Any]]]:
    """Name and how to start: number of images to batches."""
    backends = ["pil", "array", *(["dali"] if has_dali() else [])]
    found: dict[str, Callable[[int], Iterator[Any]]] = {
        "torchvision": partial(official, configuration(root, "pil"))
    }
    for backend in backends:
        for source, place in (("folder", root), ("shards", shards)):
            if source == "shards" and backend != "array":
                continue
            config = configuration(place, backend, source)
            found[f"{backend} {source}"] = partial(ours, config)
    return found


def pipeline_rate(batches: Iterator[Any], images: int) -> float:
    """Images per second after the first four batches, which were made ahead of time."""
    lead = 4
    for _ in range(lead):
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return (images - lead * BATCH) / (time.perf_counter() - began)


def reader_rate(config: Config, images: int) -> float:
    """Samples per second of encoded bytes and table rows in one process, warm page cache."""
    source = open_source(config)
    config = replace(config, optim=OptimConfig(global_batch_size=250))
    plan = make_plan(config, source, len(source.sizes))
    reader = Reader(source, 0, config.data.max_pixels)
    read_work(reader, plan, config.augment, 0)
    began = time.perf_counter()
    steps = max(1, images // 250)
    for micro_step in range(steps):
        read_work(reader, plan, config.augment, micro_step)
    return 250 * steps / (time.perf_counter() - began)


def stage_times(root: str, images: int) -> dict[str, float]:
    """CPU milliseconds per image of one core, cumulative: decode, + two crops, full two views."""
    config = configuration(root, "pil")
    source = open_source(config)
    plan = make_plan(config, source, len(source.sizes))
    reader = Reader(source, 0, config.data.max_pixels)
    works = [read_work(reader, plan, config.augment, m) for m in range(images // BATCH)]
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
    torch.set_num_threads(1)
    for name, task in work_of.items():
        began = time.process_time()
        task()
        times[name] = (time.process_time() - began) / len(items) * 1e3
    return times


def check(root: str) -> dict[str, float]:
    """Mean difference in levels of each backend's first batch from the reference's."""
    batches = {
        backend: next(ours(configuration(root, backend), 10 * BATCH))
        for backend in ["pil", "array", *(["dali"] if has_dali() else [])]
    }
    truth = batches.pop("pil")
    errors = {
        name: float((batch.im_q.float() - truth.im_q.float()).abs().mean())
        for name, batch in batches.items()
    }
    assert all(error < 1.0 for error in errors.values()), errors
    return errors


def environment() -> dict[str, Any]:
    """Where the numbers come from."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    names = ("torch", "torchvision", "pillow", "numpy", "nvidia-dali-cuda130")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
    }


def write_shards(config: Config, folder: Path) -> str:
    """The images of the source as tar shards of 100, in the same order."""
    source = open_source(config)
    for first in range(0, len(source.sizes), 100):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for sample in range(first, min(first + 100, len(source.sizes))):
                tar.add(source.name(sample), f"{sample:08d}.jpg")
    return str(folder)


def rows_of(part: str, unit: str, samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per contender: percentiles over the rounds."""
    rows = []
    for name, values in samples.items():
        low, mid, high = (round(float(x), 3) for x in np.percentile(values, (20, 50, 80)))
        row: dict[str, Any] = {"bench": "loader", "part": part, "name": name, "unit": unit}
        rows.append(row | {"p20": low, "p50": mid, "p80": high, "n": len(values)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--root", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    where = environment() | {"images": options.images, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ")}
    errors = check(options.root)
    rates: dict[str, list[float]] = {}
    readers: dict[str, list[float]] = {}
    stages: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(configuration(options.root, "pil"), Path(folder))
        racing = contenders(options.root, shards)
        for _ in range(options.rounds):  # A, B, C, A, B, C: noise of the machine hits all alike
            for name, start in racing.items():
                rate = pipeline_rate(start(options.images), options.images)
                rates.setdefault(name, []).append(rate)
            for source, root in (("folder", options.root), ("shards", shards)):
                config = configuration(root, "pil", source)
                readers.setdefault(source, []).append(reader_rate(config, options.images))
            for name, value in stage_times(options.root, min(200, options.images)).items():
                stages.setdefault(name, []).append(value)
    rows = rows_of("pipeline", "images/s", rates) + rows_of("reader", "samples/s", readers)
    rows += rows_of("stage", "CPU ms/image", stages)
    for row in rows:
        print(f"{row['part']:9} {row['name']:22} {row['p50']:9.2f} {row['unit']}")
    print("mean difference from the reference in levels:", errors)
    if options.out:
        with open(options.out, "a") as file:
            file.writelines(json.dumps(row | {"errors": errors} | where) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
