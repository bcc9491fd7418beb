"""The step of `fastmoco.train` while a host synchronization is an error: its time, and that it is.

Takes the options of `fastmoco.train`. On CUDA the first steps compile; the others run under
`torch.cuda.set_sync_debug_mode("error")`. The CPU has no such mode, so there only the rest is real.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.measure.contest import Contestant
from bench.measure.program import Options, command, compete, parser
from bench.measure.rows import Row, case_of, spread
from bench.steps.contestants import Bench, our_step
from fastmoco.config import ConfigError, dump

WARMUP = 3


def silent_step(config: str) -> Bench:
    """Our step after `WARMUP` steps that may wait. Raises `ConfigError` naming a call that does."""
    machine = our_step(config)
    machine.run(WARMUP)
    run = machine.step

    def silent() -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            raise ConfigError(f"A step makes the host wait for the device: {error}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return replace(machine, step=silent) if machine.device.type == "cuda" else machine


@command(parser("silent_step", __doc__, only=False))
def main(own: Options) -> Iterator[list[Row]]:
    """One row: milliseconds of a step, and what is known of it."""
    step = Contestant("step", "bench.on_gpu.silent_step:silent_step", {"config": dump(own.config)})
    found = compete(own, [step])["step"]
    times = [1e3 * window.seconds / window.steps for window in found.windows]
    shared = {"benchmark": "silent_step", "case": case_of(own.config), "contestant": "step"}
    yield [{**shared, **spread(times, unit="ms"), **found.facts}]


if __name__ == "__main__":
    sys.exit(main())
