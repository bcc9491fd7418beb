"""Any source of images as tar shards whose images are no larger than training needs.

    fastmoco pack --data.root DIR --out DIR --short-side 400 --quality 90

Images whose shorter side is longer become JPEGs of that side; all others keep their bytes. They
stand in the shards in a random order, so that `data.shuffle_window` reads neighbours and still
mixes. The same command goes on after an interruption, to the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from fastmoco.config import Config, ConfigError, parse
from fastmoco.config.command import CommandParser
from fastmoco.config.paths import matching
from fastmoco.data.order import permute, stream_key
from fastmoco.data.pack.shard import Line, Shard
from fastmoco.data.pack.shrink import Packed, Size, shrink_chunk
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.sources.fingerprint import fingerprint
from fastmoco.data.sources.image_list import read_list
from fastmoco.data.sources.listing import read_file
from fastmoco.data.sources.measure import in_order, in_parallel, progress
from fastmoco.data.sources.remote.store import is_remote
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.tables.labels import is_table, labels_in
from fastmoco.machine import durable, owner
from fastmoco.machine.stopping import exit_code

NOTE = "pack.json"
SHARD_SAMPLES = 5000
CHUNK = 16
# The order of every pack; a seed of training permutes what stands in it.
_ORDER = stream_key(0x7061636B)
# Threads start at once; processes are faster from here on.
_PROCESSES_FROM = 500


def _noted(note: Path) -> dict[str, Any]:
    """What a pack that was begun says of itself. Raises `ConfigError` where it says nothing."""
    found: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_file(str(note)))
    if not isinstance(found, dict):
        raise ConfigError(
            f"{note} is damaged, so that nobody knows which pack was begun there: choose another "
            "folder for --out, or delete this one."
        )
    return found


def _of_a_claim(path: Path) -> bool:
    """Whether a pack leaves it that is killed before it has written its note."""
    return path.name == owner.NAME or durable.is_left(path)


class Pack:
    """A pack in a folder: what it is made of, and the shards that are there already."""

    def __init__(self, config: Config, out: Path, size: Size, shard_samples: int) -> None:
        _require_apart(config, out)
        self.source, self.out, self.size = open_source(config), out, size
        self.rule = PixelRule.of(config.data)
        self.describe = _describer(config, self.source)
        order = permute(np.arange(len(self.source.sizes)), len(self.source.sizes), _ORDER)
        self.parts = [order[at : at + shard_samples] for at in range(0, len(order), shard_samples)]
        self._note: dict[str, Any] = {
            "pack": 2,  # 2: times of folders do not count, as --out may lie in one
            **asdict(self.size),
            "shard_samples": shard_samples,
            "images": len(self.source.sizes),
            "source_fingerprint": fingerprint(self.source).digest,
            "max_pixels": self.rule.max_pixels,
            "pillow": PIL.__version__,
        }
        self._root = config.data.root

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder is this pack's and this process's; what killed ones left in it is gone."""
        self._begun()
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(owner.Owner(self.out))
            except owner.OwnedError as error:
                raise ConfigError(str(error).replace("run.dir", "--out")) from error
            durable.sweep(self.out)
            if not self._begun():  # asked again: another may have come between
                text = json.dumps({**self._note, "source": self._root}, indent=1) + "\n"
                durable.replace(self.out / NOTE, lambda partial: partial.write_text(text))
            yield

    def _begun(self) -> bool:
        """Whether the folder holds this pack already. Raises `ConfigError` if it holds others."""
        note, mine = self.out / NOTE, self._note
        if note.exists():
            found = _noted(note)
            other = [name for name in mine if found.get(name) != mine[name]]
            if other:
                told = ", ".join(f"{n} {found.get(n)} there, {mine[n]} here" for n in other)
                raise ConfigError(f"--out {self.out} holds another pack ({told}): choose another.")
            return True
        there = self.out.iterdir() if self.out.is_dir() else []
        if self.out.exists() and not (self.out.is_dir() and all(map(_of_a_claim, there))):
            raise ConfigError(f"--out {self.out} is not an empty folder: choose another.")
        return False

    def complete(self) -> Counter[str]:
        """Write every shard that is missing, with a progress bar; what all of them hold."""
        shards = [Shard(self.out, number) for number in range(len(self.parts))]
        missing = [n for n, shard in enumerate(shards) if shard.counts() is None]
        total = sum(len(self.parts[number]) for number in missing)
        with in_parallel(many=total >= _PROCESSES_FROM) as pool:
            images = progress(self._images(pool, missing), lambda image: 1, "pack", total)
            for number in missing:
                self._room(shards[number])
                part = ((int(sample), next(images)) for sample in self.parts[number])
                shards[number].write(part, self.describe, self.rule.max_pixels)
        found: Counter[str] = Counter()
        for shard in shards:
            found.update(shard.counts() or {})
        return found

    def _images(self, pool: Executor, missing: Sequence[int]) -> Iterator[Packed]:
        """The images of the missing shards in their order, made by all cores."""
        work = partial(shrink_chunk, source=self.source, size=self.size, rule=self.rule)
        samples = [int(sample) for number in missing for sample in self.parts[number]]
        chunks = (samples[at : at + CHUNK] for at in range(0, len(samples), CHUNK))
        for packed in in_order(pool, work, chunks):
            yield from packed

    def _room(self, shard: Shard) -> None:
        """Raises `ConfigError` where the disk has no room for a shard as large as the largest."""
        sizes = [path.stat().st_size for path in self.out.glob("*.tar")]
        free = shutil.disk_usage(self.out).free
        if sizes and free < max(sizes):
            raise ConfigError(
                f"{self.out} has {free >> 20:,} MiB left, and a shard takes up to "
                f"{max(sizes) >> 20:,}: make room, and the same command goes on with "
                f"{shard.tar.name}."
            )


def _require_apart(config: Config, out: Path) -> None:
    """Raises `ConfigError` where the same command, once more, would pack its own shards."""
    if config.data.source == "shards" and not is_remote(config.data.root):
        for place in matching(config.data.root):
            if out.resolve().is_relative_to(Path(place).resolve()):
                raise ConfigError(
                    f"--out {out} lies in {place}, whose shards are packed, so that its own would "
                    "count as well: name a folder outside."
                )


def _describer(config: Config, source: Source) -> Callable[[int], Line]:
    """What the manifest says of the origin of an image: its name, and its label if it has one."""
    root = Path(config.data.root).resolve()
    listed = root.is_file() and config.data.source == "list"
    labels = read_list(root).labels if listed else None
    if config.data.source in ("parquet", "arrow") and is_table(config.data.root):
        with contextlib.suppress(ConfigError):  # no column of labels
            numbers, names = labels_in(config.data.root, len(source.sizes))
            labels = [names[number] for number in numbers]
    inside = root if root.is_dir() else root.parent

    def describe(sample: int) -> Line:
        name = source.name(sample)
        if Path(name).is_relative_to(inside):
            name = os.path.relpath(name, inside)
        label = labels[sample] if labels else ""
        if config.data.source == "folder" and len(Path(name).parts) > 1:
            label = Path(name).parts[0]
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return {"source": shown, **({"label": label} if label else {})}

    return describe


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="fastmoco pack",
        description="Lay the images of any source into tar shards, no larger than needed.",
        epilog="Every option data.* of fastmoco train is one of this as well.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the shards, new or of the same command")
    add("--short-side", type=int, default=400, help="pixels of the shorter side at most (400)")
    add("--quality", type=int, default=90, help="of the JPEGs that are written, 1 to 95 (90)")
    add("--shard-samples", type=int, default=SHARD_SAMPLES, help="images per shard (5000)")
    return parser


def _pack(given: argparse.Namespace, rest: Sequence[str]) -> None:
    config = parse(rest)
    config = resolve_folders(replace(config, knn=replace(config.knn, every=0)))
    size = Size(given.short_side, given.quality)
    pack = Pack(config, given.out, size, given.shard_samples)
    with pack.claimed():
        for sentence in pack.source.warnings:
            print(f"WARNING: {sentence}", file=sys.stderr)
        found = pack.complete()
    if not found["images"]:
        raise ConfigError(
            f"data.root {config.data.root} holds {found['bad']:,} images and none can be read; "
            f"the reasons are in {given.out}."
        )
    print(
        f"{found['images']:,} images, {found['kept']:,} of them with their own bytes, "
        f"{found['bytes'] / 1e6:,.1f} MB in {len(pack.parts):,} shards"
    )
    if found["bad"]:
        print(
            f"WARNING: {found['bad']:,} images cannot be read and are left out; `bad` in "
            f"{given.out}/*.jsonl says why.",
            file=sys.stderr,
        )
    print(f"to train on it: --data.source shards --data.root {given.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 with one sentence for what cannot be packed."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if given.short_side < 1 or not 1 <= given.quality <= 95 or given.shard_samples < 1:
        parser.error("--short-side and --shard-samples must be at least 1, --quality 1 to 95")
    try:
        _pack(given, rest)
    except ConfigError as error:
        print(f"fastmoco: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or given.out
        print(
            f"fastmoco: {where} cannot be written: {error.strerror}; complete shards stay, and the "
            "same command goes on.",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
