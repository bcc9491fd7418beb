"""What a folder of a million images costs before the first batch: `python -m bench.index`.

Writes that many small JPEGs below a temporary folder and times, each time in a new process: the
first start, which lists the folders and reads every header; a start on the cached index; a start
after a file was added; and the first batch on a cached index. Also what the index weighs: bytes on
disk, and memory that a process gains by reading all of it.

    --files N      images (1,000,000), in 1,000 folders
    --place DIR    where to write them; 4 GiB per million (the system's temporary folder)
    --rounds N     starts on the cached index (11); others are timed a third as often
    --publish      append rows to bench/results/index.jsonl; refused for a dirty tree

The files were just written, so their headers come from memory: what a disk or a network adds to
the first start is its time for one read per file.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.measure import terminal
from bench.measure.case import origin
from bench.measure.harness import RESULTS, spread, write_rows
from fastmoco.config import Config, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.folder import open_folder
from fastmoco.data.sources.measure import in_order, in_parallel, progress

ROWS = RESULTS / "index.jsonl"
FOLDERS = 1000
BATCH = 256
MAX_PIXELS = 10**8


def write_folder(root: Path, folder: int, files: int) -> int:
    """One class folder of JPEGs named as ImageNet's; every file is a picture of its own."""
    rng = np.random.default_rng(folder)
    noise = rng.integers(0, 256, (3, 3, 3), np.uint8)
    width = int(rng.integers(32, 96))
    picture = Image.fromarray(noise).resize((width, 40), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = buffer.getvalue()
    name = f"n{folder:08d}"
    (root / name).mkdir(parents=True)
    for number in range(files):
        comment = b"\xff\xfe\0\x0a%08d" % number  # so that no two files are the same
        (root / name / f"{name}_{number}.JPEG").write_bytes(data[:2] + comment + data[2:])
    return files


def write_files(root: Path, files: int) -> None:
    """`files` JPEGs in FOLDERS folders, with a progress bar."""
    counts = [len(part) for part in np.array_split(np.arange(files), FOLDERS)]
    with in_parallel(many=True) as pool:
        written = in_order(pool, partial(_write, root), enumerate(counts))
        for _ in progress(written, int, "write", files):
            pass


def _write(root: Path, folder: tuple[int, int]) -> int:
    return write_folder(root, *folder)


def resident_bytes(field: str) -> int:
    """A memory field of this process in /proc/self/status, such as VmRSS, VmHWM or RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(f"{field}:"))


def start(root: str) -> dict[str, Any]:
    """Opens the source as training does. Returns seconds, and what it costs this process."""
    fields = ("VmRSS", "RssAnon", "VmHWM")
    before = {field: resident_bytes(field) for field in fields}
    began = time.perf_counter()
    source = open_folder(root, MAX_PIXELS)
    seconds = time.perf_counter() - began
    peak = resident_bytes("VmHWM") - before["VmRSS"]
    source.fingerprint()  # reads every page of the index
    gained = {field: resident_bytes(field) - before[field] for field in fields}
    return {
        "seconds": seconds,
        "files": len(source.sizes),
        "peak_bytes": peak,
        "gained_bytes": gained["VmRSS"],
        "own_bytes": gained["RssAnon"],
        "index_bytes": Path(source.index.path).stat().st_size,
    }


def first_batch(root: str) -> dict[str, Any]:
    """Seconds from the configuration to the first batch, and images per second after it."""
    with tempfile.TemporaryDirectory() as run:
        config = Config(
            run=RunConfig(dir=run),
            data=DataConfig(root=root, backend="array", workers=2, max_pixels=MAX_PIXELS),
            optim=OptimConfig(global_batch_size=BATCH),
        )
        return _first_batch(config)


def _first_batch(config: Config) -> dict[str, Any]:
    steps = 9
    began = time.perf_counter()
    with build_loader(config, device=torch.device("cpu")) as loader:
        batches = loader.batches(0, steps)
        next(batches)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        for _ in batches:
            pass
        rate = (steps - 1) * BATCH / (time.perf_counter() - began)
    return {"seconds": seconds, "images_per_second": rate}


def in_new_process(work: Callable[[str], dict[str, Any]], root: str) -> dict[str, Any]:
    """The result of `work` in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, root).result()


def measure(root: Path, cache: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Every measurement of every kind of start."""
    few = max(1, rounds // 3)
    found: dict[str, list[dict[str, Any]]] = {}

    def take(name: str, work: Callable[[str], dict[str, Any]]) -> None:
        found.setdefault(name, []).append(in_new_process(work, str(root)))

    for _ in range(few):
        shutil.rmtree(cache, ignore_errors=True)
        take("first start", start)
    for _ in range(rounds):
        take("start on the cached index", start)
    for _ in range(few):
        take("first batch on the cached index", first_batch)
    files = found["first start"][0]["files"]
    for number in range(few):
        shutil.copy(next(root.glob("*/*")), root / f"added_{number}.jpg")
        take("start after a file was added", start)
        assert found["start after a file was added"][-1]["files"] == files + number + 1
    return found


def rows_of(
    found: Mapping[str, Sequence[Mapping[str, Any]]], files: int, where: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per kind of start: seconds, and the medians of all else."""
    rows = []
    for name, samples in found.items():
        facts = {
            key: round(float(np.median([sample[key] for sample in samples])), 1)
            for key in samples[0]
            if key not in ("seconds", "files")
        }
        row = {"benchmark": "index", "case": {"files": files, "folders": FOLDERS}}
        seconds = spread([sample["seconds"] for sample in samples])
        about = {"contender": name, "unit": "s", **seconds, **facts}
        rows.append({**row, **about, "environment": dict(where)})
    return rows


@terminal.command("index")
def main(arguments: Sequence[str]) -> None:
    """Print the percentiles; with --publish also append the rows."""
    parser = argparse.ArgumentParser("bench.index", description=__doc__)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--place", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--publish", action="store_true")
    chosen = parser.parse_args(arguments)
    where = origin(torch.device("cpu"), chosen.publish)
    with tempfile.TemporaryDirectory(dir=chosen.place, prefix="fastmoco-index-") as place:
        os.environ["FASTMOCO_CACHE"] = str(Path(place) / "cache")
        write_files(Path(place) / "images", chosen.files)
        found = measure(Path(place) / "images", Path(place) / "cache", chosen.rounds)
    rows = rows_of(found, chosen.files, where)
    for row in rows:
        gained = f"{row.get('gained_bytes', 0) / chosen.files:8.1f} bytes per image gained"
        print(
            f"{row['contender']:34} {row['p50']:8.3f} s {gained if 'gained_bytes' in row else ''}"
        )
    if chosen.publish:
        write_rows(ROWS, rows)


if __name__ == "__main__":
    sys.exit(main())
