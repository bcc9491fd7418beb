"""The loader on a bucket against the same shards on a local disk, in turns in one run.

    python -m bench.far_loader --root FOLDER_OF_IMAGES [--delay-ms 20]

The bucket is an S3 server on loopback that answers each request late. `bucket` has a cache that
holds all; `stream` one of a third, so that it fetches all the time (the server takes its share of
the same cores). Images per second of two v2 views with two workers, once started.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench.loader import CASE, configuration, megabytes, ours, rate, write_shards
from bench.measure.contest import in_turns
from bench.measure.far_store import FarStore
from bench.measure.program import Options, chosen, command, parser, progress
from bench.measure.rows import Row, quantiles, spread
from fastmoco.config import Config

WINDOW = 100
# Images of one: the cache of `stream` has to hold eight objects of the largest size.
OBJECT = 10
PARSER = parser("far_loader", __doc__, steps=False)
PARSER.add_argument("--root", required=True)
PARSER.add_argument("--delay-ms", type=float, default=20.0)


def _far(own: Config, root: str) -> Config:
    return replace(own, data=replace(own.data, root=root))


def _small(config: Config, room: int) -> float:
    os.environ["FASTMOCO_REMOTE_GB"] = str(room / 1e9)
    try:
        return rate(partial(ours, config))
    finally:
        del os.environ["FASTMOCO_REMOTE_GB"]


@command(PARSER, trains=False)
def main(own: Options) -> Iterator[list[Row]]:
    """One row each for local shards and for the bucket, with ratios to local by turn."""
    torch.set_num_threads(1)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    with tempfile.TemporaryDirectory() as folder, FarStore(own.delay_ms / 1e3) as store:
        shards, run = Path(folder) / "shards", str(Path(folder) / "run")
        os.environ["FASTMOCO_CACHE"] = str(Path(folder) / "cache")
        shards.mkdir()
        write_shards(configuration(own.root, run, "pil"), shards, OBJECT)
        local = configuration(str(shards), run, "array", "shards")
        local = replace(local, data=replace(local.data, shuffle_window=WINDOW))
        far = _far(local, store.put_folder(shards, "all"))
        copy = _far(local, store.put_folder(shards, "again"))
        room = int(megabytes(str(shards)) * 1e6) // 3
        work = {
            "local": partial(rate, partial(ours, local)),
            "bucket": partial(rate, partial(ours, far)),
            "stream": partial(_small, copy, room),
        }
        work = {name: work[name] for name in chosen(own.only, list(work))}
        for measure in work.values():
            measure()  # and indices are there
        found = in_turns(work, own.windows, after=progress(own.windows))
        case = CASE | {"megabytes": megabytes(str(shards)), "delay_ms": own.delay_ms}
        rows: list[Row] = []
        for name, values in found.items():
            row: Row = {"benchmark": "far_loader", "case": case, "contestant": name}
            against = found.get("local", values)
            ratios = quantiles([a / b for a, b in zip(values, against, strict=True)], 3)
            rows.append({**row, **spread(values, 3), "ratios": ratios})
        yield rows


if __name__ == "__main__":
    sys.exit(main())
