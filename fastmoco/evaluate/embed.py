"""Features of every image of a source, with file names, in a file.

    fastmoco embed CHECKPOINT --data.root DIR --out FILE

FILE ends in .npz, .parquet or .csv. The features are what the trunk puts out, fp32, not normalized:
those of linear classification, and divided by their length those of kNN, to the bit.

Ranks compute parts of the source and write each to the folder `FILE.parts` when it is done. The
same command goes on after an interruption with the parts that are missing; the last act joins them.

n images, D feature dimension.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fastmoco.config import ConfigError
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.sources.fingerprint import fingerprint
from fastmoco.data.sources.source import Source
from fastmoco.evaluate.features import stream_features
from fastmoco.evaluate.labelled_images import ImageSet
from fastmoco.evaluate.options import Evaluation, command, evaluation_parser
from fastmoco.machine.collectives import any_rank, barrier
from fastmoco.machine.ranks import World
from fastmoco.machine.stopping import exit_code
from fastmoco.weights import files

PART_BATCHES = 16
"""Batches of a part: what an interruption costs at most."""
PART_OF = "of.json"


def identity(evaluation: Evaluation, source: Source, batch_size: int) -> str:
    """Equal exactly where parts may be joined.

    It tells weights, images, view, statistics of pixels, precision and batch size apart. Times of
    folders do not count, as the parts may lie in one.
    """
    digest = hashlib.sha256(fingerprint(source).digest.encode())
    for name, tensor in sorted(evaluation.weights.trunk.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    view = [evaluation.view.resize, evaluation.view.image_size, evaluation.precision, batch_size]
    seen = f"{json.dumps(view)} {evaluation.view.rule} {evaluation.trunk.statistics}"
    digest.update(seen.encode())
    return digest.hexdigest()


class Part(NamedTuple):
    """Neighbouring rows of a table."""

    names: list[str]
    features: np.ndarray
    """fp32 (len(names), D)."""


Parts = Iterable[Part]
"""May be gone through several times."""


def write_npz(path: Path, parts: Parts, width: int) -> int:
    """`names` (n,) text and `features` fp32 (n, D), as `numpy.load` reads them; returns n."""
    lengths = [(len(part.names), max(map(len, part.names), default=1)) for part in parts]
    n, longest = sum(count for count, _ in lengths), max((size for _, size in lengths), default=1)
    names = np.dtype(f"<U{max(longest, 1)}")
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("names.npy", "w", force_zip64=True) as file:
            _header(file, names, (n,))
            for part in parts:
                file.write(np.array(part.names, names).tobytes())
        with archive.open("features.npy", "w", force_zip64=True) as file:
            _header(file, np.dtype("<f4"), (n, width))
            for part in parts:
                file.write(np.ascontiguousarray(part.features, "<f4").tobytes())
    return n


def _header(file: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


def write_csv(path: Path, parts: Parts, width: int) -> int:
    """A line per image: `name`, then D numbers with the nine digits that fix an fp32; returns n."""
    n = 0
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["name", *(f"feature_{i}" for i in range(width))])
        for names, features in parts:
            n += len(names)
            for name, row in zip(names, features, strict=True):
                rows.writerow([name, *(f"{value:.9g}" for value in row)])
    return n


def write_parquet(path: Path, parts: Parts, width: int) -> int:
    """Columns `name` and `features`, a list of D fp32; a row group per part; returns n."""
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("name", pa.string()), ("features", kind)])
    n = 0
    with parquet.ParquetWriter(path, schema) as file:
        for names, features in parts:
            n += len(names)
            flat = pa.array(features.reshape(-1), pa.float32())
            lists = pa.FixedSizeListArray.from_arrays(flat, width)
            file.write_table(pa.table([pa.array(names, pa.string()), lists], schema))
    return n


WRITERS: dict[str, Callable[[Path, Parts, int], int]] = {
    ".npz": write_npz,
    ".parquet": write_parquet,
    ".csv": write_csv,
}


def writer_of(path: Path) -> Callable[[Path, Parts, int], int]:
    """The writer by suffix. Raises `ConfigError` for others, or without pyarrow for .parquet."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ConfigError(f"--out {path} must end in {', '.join(WRITERS)}.")
    if writer is write_parquet and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"--out {path} needs pyarrow: pip install 'fastmoco[parquet]'.")
    return writer


class Embedding:
    """The parts of one embedding and the folder that they are kept in.

    Raises `ConfigError` where the folder holds the parts of another one.
    """

    def __init__(
        self, evaluation: Evaluation, source: Source, given: argparse.Namespace, world: World
    ) -> None:
        self.evaluation, self.source, self.world = evaluation, source, world
        self.out: Path = given.out
        self.batch_size: int = given.batch_size
        self.folder: Path = self.out.with_name(f"{self.out.name}.parts")
        self.root = Path(given.root).resolve()
        self.root = self.root if self.root.is_dir() else self.root.parent
        self.images = ImageSet(
            len(source.sizes),
            source.read,
            source.name,
            resize=evaluation.view.resize,
            image_size=evaluation.view.image_size,
            known_bad=source.bad,
            rule=evaluation.view.rule,
            cache_bytes=0,
        )
        size = PART_BATCHES * self.batch_size
        n = len(self.images)
        self.parts = [range(at, min(at + size, n)) for at in range(0, n, size)]
        self._claim(identity(evaluation, source, self.batch_size))

    def _claim(self, mine: str) -> None:
        note = self.folder / PART_OF
        if self.world.is_main and not note.exists():
            files.write(note, lambda partial: partial.write_text(mine))
        barrier(self.world)
        if note.read_text() != mine:
            raise ConfigError(
                f"{self.folder} holds parts of other weights, images or options: delete it, or "
                "choose another --out."
            )

    def path(self, part: range) -> Path:
        """Where a part is kept."""
        return self.folder / f"{part.start:012d}.npz"

    def compute(self) -> None:
        """Every missing part of this rank: each rank takes every size-th one."""
        missing = [part for part in self.parts if not self.path(part).exists()]
        barrier(self.world)  # all ranks have looked before one writes
        mine = missing[self.world.rank :: self.world.size]
        done = sum(len(part) for part in self.parts) - sum(len(part) for part in missing)
        quiet = None if self.world.is_main else True  # None: where standard error is a terminal
        total = done + sum(len(part) for part in mine)
        with tqdm(desc="embed", total=total, initial=done, unit="image", disable=quiet) as bar:
            for part in mine:
                self._compute(part, bar)

    def _compute(self, part: range, bar: Any) -> None:
        trunk, device = self.evaluation.trunk, self.world.device
        rows = []
        for features in stream_features(
            trunk, self.images, part, batch_size=self.batch_size, device=device
        ):
            rows.append(features.cpu())
            bar.update(len(features))
        good = self.images.good(part)
        kept = [i for i in part if i not in self.images.bad]
        bad = {i: self.images.bad[i] for i in part if i in self.images.bad}
        found = {
            "features": torch.cat(rows)[good].numpy(),
            "names": np.array([self._name(i) for i in kept], dtype=np.str_),
            "bad": np.array(json.dumps(bad)),
        }
        files.write(self.path(part), lambda partial: _save(partial, found))

    def _name(self, sample: int) -> str:
        """The file relative to the root of the images, as text."""
        name = self.source.name(sample)
        inside = Path(name).is_relative_to(self.root)
        relative = os.path.relpath(name, self.root) if inside else name
        return relative.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def __iter__(self) -> Iterator[Part]:
        """The parts in order, one in memory at a time."""
        for part in self.parts:
            with np.load(self.path(part)) as kept:
                self.images.bad.update({int(i): r for i, r in json.loads(str(kept["bad"])).items()})
                yield Part(kept["names"].tolist(), kept["features"])

    def join(self) -> int:
        """Write the file from all parts and delete these; how many images it holds."""
        write = writer_of(self.out)
        total = 0

        def put(partial: Path) -> None:
            nonlocal total
            total = write(partial, self, self.evaluation.weights.features)

        files.write(self.out, put)
        shutil.rmtree(self.folder)
        return total


def _save(partial: Path, arrays: dict[str, Any]) -> None:
    with open(partial, "wb") as file:  # given a path, numpy would append a suffix
        np.savez(file, **arrays)


def _embed(given: argparse.Namespace, world: World) -> None:
    # Refuse what cannot be written before anything is computed.
    writer_of(given.out)
    files.require_writable(given.out)
    evaluation = Evaluation.of(given, world)
    config = resolve_folders(evaluation.sources(given))
    given.root = config.data.root
    if world.is_main:
        print(evaluation.describe(), flush=True)
    source = open_source(config)
    if world.is_main:
        for sentence in source.warnings:
            print(f"WARNING: {sentence}", file=sys.stderr)
    embedding = Embedding(evaluation, source, given, world)
    embedding.compute()
    barrier(world)
    failed = False
    if world.is_main:
        try:
            total = embedding.join()
            width = evaluation.weights.features
            print(f"{total} images of {given.root}, {width} features each, in {given.out}")
            if embedding.images.bad:
                print(f"WARNING: {embedding.images.bad_sentence('images')}", file=sys.stderr)
        except ConfigError as error:
            failed = True
            print(f"fastmoco: {error}", file=sys.stderr)
    if any_rank(failed, world):
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one sentence for input that cannot be embedded."""
    options = evaluation_parser("fastmoco embed", (__doc__ or "").split("\n")[0], positional=True)
    options.add_argument("--out", type=Path, required=True, help=".npz, .parquet or .csv")
    return command(options, arguments, _embed)


if __name__ == "__main__":
    sys.exit(exit_code(main))
