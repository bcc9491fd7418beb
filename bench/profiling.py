"""Where the time of a step goes: `python -m bench.profiling --config FILE [--out DIR]`.

Writes a torch.profiler trace for chrome://tracing or Perfetto and prints the costliest operations
and the share of every part. Ranges carry stable names (`fastmoco.keys`, `fastmoco.queries`,
`fastmoco.loss`, `fastmoco.update`); with `--nvtx` they are emitted for Nsight instead:

    nsys profile -c cudaProfilerApi python -m bench.profiling --config FILE --nvtx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.machines import numbered_step
from fastmoco import step as steps
from fastmoco.config import ConfigError, check, dump, parse
from fastmoco.shuffle import Shuffle
from fastmoco.step import Step
from fastmoco_kernels import info_nce_enqueue

# The first part with a word in an operation's name, or in that of a range around it, owns its time.
PARTS = {
    "loss": ("fastmoco.loss", "info_nce", "mean_with_gradient"),
    "update": ("fastmoco.update", "Optimizer.step"),
    "convolution": ("convolution", "conv2d", "cudnn_conv", "Convolution"),
    "batch norm": ("batch_norm", "BatchNorm"),
    "matrix products": ("aten::mm", "addmm", "linear"),
    "pooling": ("pool",),
    "elementwise and copies": ("",),
}
PHASES = ("fastmoco.keys", "fastmoco.queries", "fastmoco.loss", "fastmoco.update")


def ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a range of that name."""

    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return call


def with_ranges(step: Step, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with the phases of the step named; the step itself stays free of profiling."""
    step.shuffle = cast(Shuffle, _Keys(step.shuffle))
    step.embed_q.forward = ranged("fastmoco.queries", step.embed_q.forward)
    step.optimizer.step = ranged("fastmoco.update", step.optimizer.step)  # type: ignore[method-assign]
    loss = ranged("fastmoco.loss", info_nce_enqueue)

    def named() -> None:
        with mock.patch.object(steps, "info_nce_enqueue", loss):
            run()

    return named


class _Keys:
    """A shuffle whose call is a range."""

    def __init__(self, shuffle: Any) -> None:
        self._shuffle = shuffle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shuffle, name)

    def __call__(self, *arguments: Any) -> Any:
        with record_function("fastmoco.keys"):
            return self._shuffle(*arguments)


def part_of(event: Any) -> str:
    """Which part an event's own time belongs to: the nearest name that says so."""
    while event is not None:
        for part, words in PARTS.items():
            if words != ("",) and any(word in event.name for word in words):
                return part
        event = event.cpu_parent
    return "elementwise and copies"


def shares(events: Sequence[Any], cuda: bool) -> dict[str, float]:
    """Percent of the profiled time by part."""
    total: dict[str, float] = {}
    for event in events:
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        part = part_of(event)
        total[part] = total.get(part, 0.0) + own
    everything = sum(total.values()) or 1.0
    found = sorted(total.items(), key=lambda item: -item[1])
    return {part: 100 * value / everything for part, value in found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a configuration that cannot run."""
    parser = argparse.ArgumentParser("bench.profiling", description=__doc__, add_help=False)
    parser.add_argument("--out", type=Path, default=Path("runs/profile"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--nvtx", action="store_true")
    own, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    try:
        config = parse(rest)
        check(config, 1)
    except ConfigError as error:
        print(f"profiling: {error}", file=sys.stderr)
        return 2
    step, run, device = numbered_step(dump(config))
    run = with_ranges(step, run)
    for _ in range(3):
        run()
    cuda = device.type == "cuda"
    if own.nvtx:
        with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx():
            for _ in range(own.steps):
                run()
            torch.cuda.synchronize()
        return 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(own.steps):
            run()
        if cuda:
            torch.cuda.synchronize()
    own.out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(own.out / "trace.json"))
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=48)
    (own.out / "operations.txt").write_text(table)
    print(table)
    for part, percent in shares(profiler.events() or [], cuda).items():
        print(f"{part:26s}{percent:6.1f} %")
    print(f"trace and table in {own.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
