"""Start, memory and first batch of every source as the number of images grows.

    python -m bench.data_scale --scratch FOLDER [--samples 10000,100000,1000000] [--only shards]

Pictures are 64 JPEGs of 32 pixels (1 kB) again and again, as hard links, list, shards of 10,000,
Parquet (row groups of 1,000) and Arrow. Each start is a process of its own; `second` finds the
index of the first. Memory is what opening and the first batch of 256 add to the main process.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bench.measure.program import Options, chosen, command, parser
from bench.measure.rows import Row

START = """
import json, os, sys, time
import torch
from fastmoco.config import AugmentConfig, Config, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.choose import open_source
source, root, run = sys.argv[1:]
pages = lambda: int(open('/proc/self/statm').read().split()[1])
used = lambda: pages() * os.sysconf('SC_PAGESIZE') / 2**20
before, began = used(), time.perf_counter()
data = DataConfig(source=source, root=root, workers=2, backend="array")
optim, augment = OptimConfig(global_batch_size=256), AugmentConfig(image_size=32)
config = Config(run=RunConfig(dir=run), data=data, augment=augment, optim=optim)
opened = open_source(config)
start = time.perf_counter() - began
with build_loader(config, opened, device=torch.device("cpu")) as loader:
    next(iter(loader.batches(0, 1)))
    first = time.perf_counter() - began - start
    print(json.dumps({"start_s": start, "first_batch_s": first, "memory_mb": used() - before}))
"""
DIFFERENT, PART = 64, 10_000
"""Pictures that differ, and samples of a shard or table."""


def pictures() -> list[bytes]:
    """Small JPEGs."""
    found = []
    for seed in range(DIFFERENT):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def write(source: str, samples: int, place: Path) -> Path:
    """A data set of so many samples. Returns its root."""
    place.mkdir(parents=True)
    if source in ("folder", "list"):
        return _write_files(source, samples, place)
    images = pictures()
    for first in range(0, samples, PART):
        numbers = range(first, min(first + PART, samples))
        path = place / f"{first:08d}.{source}"
        if source == "shards":
            with tarfile.open(path.with_suffix(".tar"), "w", format=tarfile.USTAR_FORMAT) as tar:
                for number in numbers:
                    data = images[number % DIFFERENT]
                    member = tarfile.TarInfo(f"{number:08d}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        else:
            _write_table(source, path, [images[number % DIFFERENT] for number in numbers])
    return place


def _write_files(source: str, samples: int, place: Path) -> Path:
    names = [f"{number // 1000:05d}/{number:08d}.jpg" for number in range(samples)]
    images = pictures()
    for number, name in enumerate(names):
        (place / name).parent.mkdir(exist_ok=True)
        if number < DIFFERENT:
            (place / name).write_bytes(images[number])
        else:
            os.link(place / names[number % DIFFERENT], place / name)
    if source == "folder":
        return place
    listed = place / "images.txt"
    listed.write_text("\n".join(names))
    return listed


def _write_table(source: str, path: Path, images: list[bytes]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": pa.array(images)})
    if source == "parquet":
        parquet.write_table(table, path, row_group_size=1000)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=1000)


def started(*arguments: str) -> Row:
    """What `START` says, in a process of its own."""
    command = [sys.executable, "-c", START, *arguments]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(said.stdout.splitlines()[-1])
    return {name: round(value, 3) for name, value in found.items()}


PARSER = parser("data_scale", __doc__, windows=False, steps=False)
PARSER.add_argument("--scratch", type=Path, required=True, help="up to 5 GB; emptied afterwards")
PARSER.add_argument("--samples", default="10000,100000,1000000")


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """Two rows per source and number of samples: the first and the second start."""
    os.environ["FASTMOCO_CACHE"] = str(own.scratch / "cache")
    for samples in map(int, own.samples.split(",")):
        for source in chosen(own.only, ("folder", "list", "shards", "parquet", "arrow")):
            root = write(source, samples, own.scratch / "set")
            case = {"source": source, "samples": samples, "image_size": 32}
            shared = {"benchmark": "data_scale", "case": case}
            run = str(own.scratch / "run")
            yield [
                {**shared, "contestant": which, **started(source, str(root), run)}
                for which in ("first", "second")
            ]
            for folder in ("set", "cache", "run"):
                shutil.rmtree(own.scratch / folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
