"""Start, memory and first batch of every source as the number of images grows.

    python -m bench.data_scale --scratch FOLDER [--samples 10000,100000,1000000] [--only shards]
        [--inspect 3]

Pictures are 64 JPEGs of 32 pixels (1 kB) again and again, as hard links, list, shards of 10,000,
Parquet (row groups of 1,000) and Arrow. Each start is a process of its own; `second` finds the
index of the first. Memory is what opening and the first batch of 256 add to the main process.
With --inspect so many turns of the first index and of the whole command `fastmoco inspect`, imports
and page included, each without an index; `ratios` are those of a turn.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from bench.measure.program import Options, chosen, command, parser
from bench.measure.rows import Row, quantiles

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


def pictures() -> list[bytes]:
    """64 small JPEGs."""
    found = []
    for seed in range(64):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def write(source: str, samples: int, place: Path) -> Path:
    """A data set of so many samples. Returns its root."""
    images, at = pictures(), range(0, samples, 10_000)
    place.mkdir(parents=True)
    for first in at:
        part = [images[n % 64] for n in range(first, min(first + 10_000, samples))]
        if source == "shards":
            with tarfile.open(place / f"{first:08d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for number, data in enumerate(part):
                    member = tarfile.TarInfo(f"{first + number:08d}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        elif source in ("parquet", "arrow"):
            _table(source, place / f"{first:08d}.{source}", part)
        else:
            for number, data in enumerate(part):
                path = place / f"{(first + number) // 1000:05d}" / f"{first + number:08d}.jpg"
                path.parent.mkdir(exist_ok=True)
                if first + number < 64:
                    path.write_bytes(data)
                else:
                    kept = place / "00000" / f"{(first + number) % 64:08d}.jpg"
                    os.link(kept, path)
    if source == "list":
        names = (f"{n // 1000:05d}/{n:08d}.jpg\n" for n in range(samples))
        (place / "images.txt").write_text("".join(names))
        return place / "images.txt"
    return place


def _table(source: str, path: Path, images: list[bytes]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": pa.array(images)})
    if source == "parquet":
        parquet.write_table(table, path, row_group_size=1000)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=1000)


PARSER = parser("data_scale", __doc__, windows=False, steps=False)
PARSER.add_argument("--scratch", type=Path, required=True, help="up to 5 GB; emptied afterwards")
PARSER.add_argument("--samples", default="10000,100000,1000000")
PARSER.add_argument("--inspect", type=int, default=0, metavar="TURNS")


def _inspected(own: Options, source: str, root: Path, started: Callable[[], Row]) -> Row:
    """The first index and `fastmoco inspect` in turns, in seconds."""
    page = str(own.scratch / "page.html")
    command = ["-m", "fastmoco", "inspect", str(root), "--data.source", source, "--html", page]
    index_s, inspect_s = [], []
    for _ in range(own.inspect):
        shutil.rmtree(own.scratch / "cache", ignore_errors=True)
        index_s.append(float(started()["start_s"]))
        shutil.rmtree(own.scratch / "cache", ignore_errors=True)
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        inspect_s.append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(inspect_s, index_s, strict=True)]
    return {
        "contestant": "inspect",
        "index_s": quantiles(index_s, 2),
        "inspect_s": quantiles(inspect_s, 2),
        "ratios": quantiles(ratios, 3),
        "n": own.inspect,
    }


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """Two rows per source and number of samples, first and second start, and one of inspect."""
    os.environ["FASTMOCO_CACHE"] = str(own.scratch / "cache")
    for samples in map(int, own.samples.split(",")):
        for source in chosen(own.only, ("folder", "list", "shards", "parquet", "arrow")):
            root = write(source, samples, own.scratch / "set")
            started = partial(_started, [source, str(root), str(own.scratch / "run")])
            found = [{"contestant": which, **started()} for which in ("first", "second")]
            if own.inspect:
                found.append(_inspected(own, source, root, started))
            case = {"source": source, "samples": samples, "image_size": 32}
            yield [{"benchmark": "data_scale", "case": case, **row} for row in found]
            for folder in ("set", "cache", "run"):
                shutil.rmtree(own.scratch / folder, ignore_errors=True)


def _started(arguments: list[str]) -> Row:
    """What `START` says, in a process of its own."""
    command = [sys.executable, "-c", START, *arguments]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(said.stdout.splitlines()[-1])
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    sys.exit(main())
