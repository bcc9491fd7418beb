"""What safety costs a step: `python -m bench.saving --config FILE --steps 100 [dotted overrides]`.

Training with a checkpoint per window, written by a thread as the trainer does, and without one take
turns, as do steps that look for what is not finite and leave it out.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.ablation import rows_of as turns_of
from bench.measure.contest import Contestant
from bench.measure.program import Options, command, compete, parser
from bench.measure.rows import Row, case_of
from bench.steps.contestants import Bench, numbered_step
from fastmoco.config import dump, parse, parse_text
from fastmoco.run.checkpoint import Saver

WITHOUT = "nothing"  # as `bench.ablation` calls what the others are compared with


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


@command(parser("saving", __doc__, only=False))
def main(own: Options) -> Iterator[list[Row]]:
    """Rows on checkpoints and on left-out steps, beside neither."""
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


if __name__ == "__main__":
    sys.exit(main())
