"""What safety costs a step: `python -m bench.saving --config FILE --steps 100 [dotted overrides]`.

Training with a checkpoint per window, written by a thread as the trainer does, and without one take
turns, as do steps that look for what is not finite and leave it out. The flag by which ranks agree
to stop is timed between two processes on this machine, with no step to hide behind.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.ablation import rows_of as turns_of
from bench.measure.contest import Contestant
from bench.measure.program import Options, command, compete, parser
from bench.measure.rows import Row, case_of, spread
from bench.steps.contestants import Bench, numbered_step
from fastmoco.config import dump, parse, parse_text
from fastmoco.machine.collectives import SharedRequest
from fastmoco.machine.ranks import World
from fastmoco.run.checkpoint import Saver

WITHOUT = "nothing"  # as `bench.ablation` calls what the others are compared with
POLLS = 500


@dataclass
class Saving(Bench):
    """A contestant whose checkpoints are waited for at its end."""

    saver: Saver | None = None

    def close(self) -> None:
        """Wait, and end as the others do."""
        if self.saver:
            with self.saver:
                pass
            shutil.rmtree(self.saver.folder)
        super().close()


def step(config: str, every: int = 0) -> Saving:
    """A contestant whose run saves after every so many steps; 0 never."""
    parsed = parse_text(config)
    parsed = replace(parsed, run=replace(parsed.run, dir=tempfile.mkdtemp(prefix="saving-")))
    built, run, world = numbered_step(config)
    saver = Saver(built, parsed, world, 10**9)
    done = 0

    def next_step() -> None:
        nonlocal done
        run()
        done += 1
        if every and done % every == 0 and (sentence := saver.save_if_due(done, overdue=True)):
            raise RuntimeError(sentence)

    return Saving(world.device, next_step, saver=saver)


def polls(rank: int, store: str, windows: int, told: str) -> None:
    """Microseconds of a poll of two ranks in each window, into the file `told`."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    request = SharedRequest(World(rank, rank, 2, torch.device("cpu"), "gloo"))
    found = []
    for _ in range(windows + 1):  # the first warms up
        began = time.perf_counter()
        for _ in range(POLLS):
            request.poll(0)
        found.append(1e6 * (time.perf_counter() - began) / POLLS)
    request.settle()
    if rank == 0:
        Path(told).write_text(" ".join(map(str, found[1:])))
    dist.destroy_process_group()


def flag_row(own: Options) -> Row:
    """A row on the stop flag."""
    with tempfile.TemporaryDirectory() as folder:
        told = os.path.join(folder, "told")
        start_processes: Any = mp.start_processes  # type: ignore[attr-defined]
        start_processes(polls, (os.path.join(folder, "store"), own.windows, told), nprocs=2)
        found = [float(word) for word in Path(told).read_text().split()]
    case = {"part": "stop flag", "ranks": 2, "polls": POLLS}
    row = {"benchmark": "saving", "case": case, "contestant": "gloo"}
    return {**row, **spread(found, unit="us_per_step")}


@command(parser("saving", __doc__, only=False))
def main(own: Options) -> Iterator[list[Row]]:
    """Rows on checkpoints and on left-out steps beside neither, and one on the stop flag."""
    whole = dump(own.config)
    skip = dump(parse([*own.rest, "--run.nonfinite", "skip"]))
    here = "bench.saving:step"
    contestants = [
        Contestant(WITHOUT, here, {"config": whole}),
        Contestant("a checkpoint per window", here, {"config": whole, "every": own.steps}),
        Contestant("run.nonfinite skip", here, {"config": skip}),
    ]
    results = compete(own, contestants, warmup=2)
    load = {"load_average": round(os.getloadavg()[0], 1)}
    rows = turns_of(results, case_of(own.config))
    yield [{**row, "benchmark": "saving", **load} for row in rows]
    yield [{**flag_row(own), **load}]


if __name__ == "__main__":
    sys.exit(main())
