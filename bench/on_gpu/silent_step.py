"""The step of `fastmoco.train` while a host synchronization is an error: its time, and that it is.

Takes the options of `fastmoco.train`. On CUDA the first steps compile; the others run under
`torch.cuda.set_sync_debug_mode("error")`. The CPU has no such mode, so there only the rest is real.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from bench.measure.contest import synchronize
from bench.measure.program import command, configured, parser, steps_of
from bench.measure.rows import Row, append_rows, case_of, device_of, origin, spread
from bench.steps.contestants import numbered_step
from bench.steps.switches import Run
from fastmoco.config import ConfigError, dump
from fastmoco.run.metrics import peak_memory_gib

WARMUP = 3


def window(run: Run, steps: int, device: torch.device) -> float:
    """Milliseconds per step of steps that must not make the host wait.

    Raises `ConfigError` naming the call that waits.
    """
    synchronize(device)
    began = time.perf_counter()
    _forbid_waiting(device, "error")
    try:
        for _ in range(steps):
            run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise ConfigError(f"A step makes the host wait for the device: {error}") from error
    finally:
        _forbid_waiting(device, "default")
    synchronize(device)
    return 1e3 * (time.perf_counter() - began) / steps


def _forbid_waiting(device: torch.device, mode: str) -> None:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


@command("silent_step")
def main(arguments: Sequence[str]) -> None:
    """Print the median and the seconds that the first step took."""
    own, config, _ = configured(parser("silent_step", __doc__, only=False), arguments)
    where = origin(device_of(config), own.publish)
    _, run, device = numbered_step(dump(config))
    began = time.perf_counter()
    run()
    synchronize(device)
    first_s = time.perf_counter() - began
    for _ in range(WARMUP - 1):
        run()
    times = [window(run, steps_of(own.steps, device), device) for _ in range(own.windows)]
    found = {f"{name}_ms" if name != "n" else name: value for name, value in spread(times).items()}
    row: Row = {
        "benchmark": "silent_step",
        "case": case_of(config),
        "contestant": "step",
        **found,
        "first_step_s": round(first_s, 1),
        "peak_memory_gib": peak_memory_gib(device),
    }
    print(f"{row['p50_ms']:.2f} ms per step, the first took {row['first_step_s']} s")
    if own.publish:
        append_rows("silent_step", [row], where)


if __name__ == "__main__":
    sys.exit(main())
