"""Loader throughput against torchvision's pipeline on the same table, in turns in one run.

    python -m bench.loader --root FOLDER_OF_IMAGES

Images per second of two v2 views with two worker processes (or two DALI threads), consumed as fast
as they come, from the folder and from tar shards of the same files. Before timing, the views of
every backend are compared with the reference. --only takes some of: torchvision, array folder,
array shards, pil folder, dali folder. --against CHECKOUT measures `array folder` alone, of that
other checkout (`before`) and of this one (`now`), in turns.
"""

from __future__ import annotations

import os
import subprocess
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
from bench.measure.program import chosen, command, parser, progress
from bench.measure.rows import ROOT, Row, append_rows, origin, quantiles, spread
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


def contestants(root: str, shards: str, run: str) -> dict[str, Start]:
    """Name of each pipeline and how to start it."""
    found: dict[str, Start] = {
        "torchvision": partial(official, configuration(root, run, "pil")),
        "array folder": partial(ours, configuration(root, run, "array")),
        "array shards": partial(ours, configuration(shards, run, "array", "shards")),
        "pil folder": partial(ours, configuration(root, run, "pil")),
    }
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


def rate_of(checkout: Path, root: str) -> float:
    """The rate of `array folder` in a process on the code of a checkout."""
    script = (
        "import sys, tempfile, torch; from functools import partial; from bench import loader;"
        "torch.set_num_threads(1); run = tempfile.mkdtemp();"
        "config = loader.configuration(sys.argv[1], run, 'array');"
        "print(loader.rate(partial(loader.ours, config)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(root).absolute())],
        cwd=checkout,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "kernels")]),
        },
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def against(before: Path, root: str, windows: int) -> list[Row]:
    """Two rows: another checkout's rate, and this one's with its ratio to that by turn."""
    found = in_turns(
        {"before": partial(rate_of, before.resolve(), root), "now": partial(rate_of, ROOT, root)},
        windows,
        after=progress(windows),
    )
    commit = ["git", "-C", str(before), "rev-parse", "HEAD"]
    ratios = [a / b for a, b in zip(found["now"], found["before"], strict=True)]
    more: dict[str, Row] = {
        "before": {"measured_commit": subprocess.check_output(commit, text=True).strip()},
        "now": {"ratios": quantiles(ratios, 3)},
    }
    case = CASE | {"part": "array folder of two checkouts"}
    return [
        {"benchmark": "loader", "case": case, "contestant": name, **spread(values, 3), **more[name]}
        for name, values in found.items()
    ]


def error_levels(racing: Mapping[str, Start]) -> dict[str, float]:
    """Mean difference in levels (0..255) of each of our first batches from the reference's.

    Raises `AssertionError` for one level or more.
    """
    first = {
        name: next(start()).im_q.float() for name, start in racing.items() if name != "torchvision"
    }
    truth = first["pil folder"]
    errors = {name: float((images - truth).abs().mean()) for name, images in first.items()}
    assert all(error < 1.0 for error in errors.values()), errors
    return errors


def write_shards(config: Config, folder: Path) -> None:
    """The images of the source as tar shards of 100, in the same order."""
    source = open_source(config)
    for first in range(0, len(source.sizes), 100):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as tar:
            for sample in range(first, min(first + 100, len(source.sizes))):
                tar.add(source.name(sample), f"{sample:08d}.jpg")


def rows_of(found: Mapping[str, Sequence[float]], errors: Mapping[str, float]) -> list[Row]:
    """One row per pipeline, with its ratios to torchvision's by turn."""
    base, rows = found.get("torchvision"), []
    for name, values in found.items():
        row: Row = {"benchmark": "loader", "case": CASE, "contestant": name, **spread(values, 3)}
        if base:
            row["ratios"] = quantiles([a / b for a, b in zip(values, base, strict=True)], 3)
        rows.append(row | {"error_levels": errors.get(name)})
    return rows


@command("loader")
def main(arguments: Sequence[str]) -> None:
    """Print the medians."""
    made = parser("loader", __doc__, steps=False)
    made.add_argument("--root", required=True)
    made.add_argument("--against", type=Path, help="another checkout")
    own = made.parse_args(arguments)
    torch.set_num_threads(1)
    where = origin(CPU, own.publish)
    if own.against:
        rows = against(own.against, own.root, own.windows)
        for row in rows:
            print(f"{row['contestant']:16} {row['p50']:9.2f} images/s {row.get('ratios', '')}")
        if own.publish:
            append_rows("loader", rows, where)
        return
    with tempfile.TemporaryDirectory() as shards, tempfile.TemporaryDirectory() as run:
        write_shards(configuration(own.root, run, "pil"), Path(shards))
        racing = contestants(own.root, shards, run)
        names = chosen(own.only, list(racing))
        errors = error_levels(racing)  # and caches are warm
        work = {name: partial(rate, racing[name]) for name in names}
        found = in_turns(work, own.windows, after=progress(own.windows))
    for row in (rows := rows_of(found, errors)):
        ratio = f"{row['ratios'][1]:6.2f} x torchvision" if "ratios" in row else ""
        print(f"{row['contestant']:16} {row['p50']:9.2f} images/s {ratio}")
    print("mean difference from the reference in levels:", errors)
    if own.publish:
        append_rows("loader", rows, where)


if __name__ == "__main__":
    sys.exit(main())
