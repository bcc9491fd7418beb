"""Where the time of a step goes: `python -m bench.profiling --config FILE`.

Runs the step fed by its loader under torch.profiler. Into --out (runs/profile) go `trace.json` for
Perfetto or chrome://tracing, `operations.txt`, the costliest operations, and `host.txt`, the Python
functions that keep the host longest in as many steps more. Printed are the shares of convolution,
batch norm, elementwise, loss, update and data. Phases are ranges with stable names:
`fastmoco.data`, `fastmoco.keys`, `fastmoco.queries`, `fastmoco.loss`, `fastmoco.update`, and
`fastmoco.graph` for all but the first where the step is one compiled graph.
For Nsight there is `nsys profile --pytorch=autograd-nvtx python -m bench.profiling --config FILE`.
"""

from __future__ import annotations

import cProfile
import pstats
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import get_num_threads
from torch.profiler import ProfilerActivity, profile, record_function

from bench.measure.contest import timed
from bench.measure.program import Options, command, parser
from bench.measure.rows import Row, case_of
from bench.steps.contestants import fed_step
from fastmoco.config import Config, dump
from fastmoco.data.batch import Batch
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.method.compiled_step import WholeStep
from fastmoco.method.step import Step
from fastmoco_kernels import info_nce_enqueue

DATA = "fastmoco.data"
# The first part with a word in an operation's name, or in that of a range around it, owns its time.
PARTS = {
    "data": (DATA,),
    "loss": ("fastmoco.loss", "info_nce", "mean_with_gradient"),
    "update": ("fastmoco.update", "Optimizer.step", "sgd_ema", "fastmoco::ema_"),
    # Inductor names a kernel after all that it fuses, convolutions beside it included.
    "batch norm": ("batch_norm", "BatchNorm", "var_mean"),
    "convolution": ("convolution", "conv2d", "cudnn_conv", "Convolution"),
    "matrix products": ("aten::mm", "addmm", "linear"),
    "pooling": ("pool", "Pool"),
}
ELEMENTWISE = "elementwise and copies"
ranged: Any = record_function  # decorates, too
LAUNCHES = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)")
PHASES = ("fastmoco.keys", "fastmoco.queries", "fastmoco.loss", "fastmoco.update")


def ranged_batches(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; waiting for one is a range."""
    take = ranged(DATA)(lambda: next(batches))
    while True:
        yield take()


def with_ranges(step: Step, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with the phases of the step named; the step itself stays free of profiling."""
    if isinstance(step, WholeStep):  # one graph: no range fits inside
        step.run_graph = ranged("fastmoco.graph")(step.run_graph)  # type: ignore[method-assign]
        return run
    step.embed_q.forward = ranged("fastmoco.queries")(step.embed_q.forward)
    step.optimizer.step = ranged("fastmoco.update")(step.optimizer.step)  # type: ignore[method-assign]
    if step.ema is not None:
        step.ema = ranged("fastmoco.update")(step.ema)
    keys = type(step.shuffle)  # a call is looked up in the class
    places = {
        f"{type(step).__module__}.info_nce_enqueue": ranged("fastmoco.loss")(info_nce_enqueue),
        f"{keys.__module__}.{keys.__name__}.__call__": ranged("fastmoco.keys")(keys.__call__),
    }

    def named() -> None:
        with ExitStack() as patches:
            for place, function in places.items():
                patches.enter_context(mock.patch(place, function))
            run()

    return named


def part_of(event: Any) -> str:
    """Which part an event's own time belongs to: the nearest name that says so."""
    while event is not None:
        for part, words in PARTS.items():
            if any(word in event.name for word in words):
                return part
        event = event.cpu_parent
    return ELEMENTWISE


def shares(events: Sequence[Any], cuda: bool) -> dict[str, float]:
    """Percent of the profiled time by part, the largest first.

    On the CPU that is the time of the host, in which waiting for data is a part. On CUDA it is the
    time of kernels, each charged to the operation that launched it.
    """
    total: Counter[str] = Counter()
    for event in events:
        if event.device_type.name == "CPU":
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            total[part_of(event)] += own
    if cuda:  # kernels without a known operation, as those of a replayed graph
        everything = sum(
            event.self_device_time_total
            for event in events
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        )
        total["unknown"] = max(everything - total.total(), 0.0)
    whole = total.total() or 1.0
    return {part: 100 * value / whole for part, value in total.most_common() if value}


def launches(averages: Iterable[Any]) -> int:
    """Calls of the CUDA runtime and driver that launch a kernel, or a graph of them."""
    return sum(a.count for a in averages if LAUNCHES.match(a.key))


def profile_step(config: Config, out: Path, number: int) -> Row:
    """Profile `number` steps after three, write what is seen into `out`, return a row's fields.

    `shares` in percent, `step_ms` of wall time under the profiler, `data_wait_percent` of it.
    """
    # Of a CUDA graph's kernels nobody knows which operation launched them.
    launched = replace(config, run=replace(config.run, cuda_graph="off"))
    step, machine = fed_step(dump(launched), ranged_batches)
    cuda = machine.device.type == "cuda"
    machine.step = with_ranges(step, machine.step)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with closing(machine):
        timed(machine, 3)
        with profile(activities=activities) as profiler:
            window = timed(machine, number)
        host = cProfile.Profile()
        host.runcall(timed, machine, number)
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / "trace.json"))
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=48)
    (out / "operations.txt").write_text(table)
    with (out / "host.txt").open("w") as file:
        pstats.Stats(host, stream=file).sort_stats("tottime").print_stats(40)
    found = shares(profiler.events() or [], cuda)
    return {
        "shares": {part: round(percent, 2) for part, percent in found.items()},
        "step_ms": round(1e3 * window.seconds / number, 2),
        "data_wait_percent": round(100 * window.wait_s / window.seconds, 2),
        "launches_per_step": launches(profiler.key_averages()) / number,
        "steps": number,
        "threads": get_num_threads(),
    }


PARSER = parser("profiling", __doc__, only=False, windows=False, steps=False)
PARSER.add_argument("--steps", type=int, default=5)
PARSER.add_argument("--out", type=Path, default=Path("runs/profile"))


@command(PARSER)
def main(own: Options) -> Iterator[list[Row]]:
    """One row: the shares of the parts."""
    config = own.config if own.config.data.source == "synthetic" else resolve_folders(own.config)
    row = profile_step(config, own.out, own.steps)
    yield [{"benchmark": "profile", "case": case_of(config), **row}]


if __name__ == "__main__":
    sys.exit(main())
