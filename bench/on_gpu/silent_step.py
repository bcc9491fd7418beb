"""The step of `fastmoco.train` while a host synchronization is an error: its time, and that it is.

Takes the options of `fastmoco.train`. On CUDA the first steps compile; the others run under
`torch.cuda.set_sync_debug_mode("error")`, launched by the host and, raced with it, as a CUDA graph.
The CPU has neither, so there only the rest is real.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch

from bench.measure.contest import Contestant, Result
from bench.measure.program import Options, command, compete, parser
from bench.measure.rows import Row, case_of, spread
from bench.steps.contestants import Bench, our_step
from fastmoco.config import Config, ConfigError, dump
from fastmoco.method.cuda_graph import GIVES_UP

WARMUP = 3


def silent_step(config: str) -> Bench:
    """Our step after `WARMUP` steps that may wait.

    Raises `ConfigError` naming a call that does, and where the step gives up its CUDA graph.
    """
    machine = our_step(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", GIVES_UP)
        try:
            machine.run(WARMUP)
        except RuntimeWarning as refused:
            raise ConfigError(str(refused)) from refused
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


def ways(config: Config, device: torch.device) -> list[Contestant]:
    """The step that the host launches, and on CUDA the one that is a CUDA graph."""
    names = ("step", "captured step") if device.type == "cuda" else ("step",)
    made = []
    for name in names:
        mode: Literal["on", "off"] = "on" if name == "captured step" else "off"
        text = dump(replace(config, run=replace(config.run, cuda_graph=mode)))
        made.append(Contestant(name, "bench.on_gpu.silent_step:silent_step", {"config": text}))
    return made


@command(parser("silent_step", __doc__, only=False))
def main(own: Options) -> Iterator[list[Row]]:
    """A row for each way to launch the step: milliseconds, and what is known of it."""
    shared = {"benchmark": "silent_step", "case": case_of(own.config)}
    yield [
        {**shared, "contestant": name, **spread(milliseconds(found), unit="ms"), **found.facts}
        for name, found in compete(own, ways(own.config, own.device)).items()
    ]


def milliseconds(found: Result) -> list[float]:
    """Of a step, in each window."""
    return [1e3 * window.seconds / window.steps for window in found.windows]


if __name__ == "__main__":
    sys.exit(main())
