"""Op by op: the fused ops beside the official formulation, torch.compile of it and other libraries.

    python -m bench.kernels [--device cuda] [--only ema] [--threads 2] [--publish] [--profile DIR]

`official` is what the published MoCo code does: einsum, cat, division, cross entropy on a clone of
the queue, backward; a loop over parameters that allocates each new one; torch.optim.SGD. It takes
no top-5, which the official step does and the fused op includes. The layers of the encoder are in
`bench.races.layers` and `norm`. N local batch, C dimension, K queue length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.measure.contest import Race, Way, race
from bench.measure.program import chosen, command, parser
from bench.measure.rows import append_rows, origin
from bench.races.layers import batch_norm_race, cpu_races
from bench.races.loss import enqueue_race, loss_race
from bench.races.max_pool import max_pool_race
from bench.races.norm import CASES, group_batch_norm_race
from bench.races.updates import ema_race, sgd_ema_race
from fastmoco_kernels.launch import HAS_TRITON, triton


def races(device: torch.device) -> dict[str, list[Callable[[], Race]]]:
    """All cases by op, built when they are run."""
    f32, bf16 = torch.float32, torch.bfloat16
    on_cuda = device.type == "cuda"
    return {
        "info_nce": [
            lambda: loss_race(256, 128, 65536, f32, device),
            lambda: loss_race(256, 128, 65536, bf16, device),
            lambda: loss_race(32, 128, 65536, f32, device),
        ],
        "info_nce_enqueue": [lambda: enqueue_race(256, 128, 65536, device)],
        "ema": [lambda: ema_race(device)],
        "sgd_ema": [lambda: sgd_ema_race(device)],
        "batch_norm": [partial(group_batch_norm_race, *case, device) for case in CASES]
        if device.type == "cuda"
        else [
            lambda: batch_norm_race(32, 64, 112, False, device),
            lambda: batch_norm_race(32, 256, 56, True, device),
            lambda: batch_norm_race(32, 256, 14, False, device),
            lambda: batch_norm_race(32, 1024, 14, True, device),
        ],
        **({"max_pool": [lambda: max_pool_race(256, 64, 112, device)]} if on_cuda else {}),
        **cpu_races(device),
    }


def profile(ways: Sequence[Way], folder: Path, name: str, device: torch.device) -> None:
    """A trace of each way for chrome://tracing; its ten costliest operations on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    key = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    for way in ways:
        way.run()
        with torch.profiler.profile(profile_memory=True) as profiler:  # of every device there is
            way.run()
        profiler.export_chrome_trace(str(folder / f"{name}-{way.name.split(':')[0]}.json"))
        print(f"\n{name}: {way.name}")
        print(profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40))


def table(timings: dict[str, dict[str, Any]], least_bytes: int = 0) -> str:
    """The timings as text, with the speed-up of the medians over the first way.

    `least_bytes`, where a case knows what must be moved at least, adds that rate at the median.
    """
    base = next(iter(timings.values()))["p50_ms"]
    lines = [f"{'':24s} {'p20':>9s} {'p50':>9s} {'p80':>9s} ms   speed-up  extra MiB"]
    for name, found in timings.items():
        times = " ".join(f"{found[f'p{p}_ms']:9.3f}" for p in (20, 50, 80))
        gain, extra = base / found["p50_ms"], found["peak_extra_bytes"] / 2**20
        rate = f"  {least_bytes / found['p50_ms'] / 1e6:8.1f} GB/s" if least_bytes else ""
        lines.append(f"{name:24s} {times}      {gain:8.2f}  {extra:9.2f}{rate}")
    return "\n".join(lines)


@command("kernels")
def main(arguments: Sequence[str]) -> None:
    """Race what was asked for and print a table per case."""
    options = parser("kernels", __doc__, steps=False)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--profile", type=Path, metavar="DIR", help="write traces, time nothing")
    own = options.parse_args(arguments)
    device = torch.device(own.device)
    known = races(device)
    builders = [build for op in chosen(own.only, list(known)) for build in known[op]]
    torch.set_num_threads(own.threads)
    where = origin(device, own.publish)
    for build in builders:
        name, case, ways = build()
        if own.profile:
            profile(ways, own.profile, name, device)
            continue
        timings = race(ways, device, own.windows)
        least = case.get("least_bytes", 0)
        print(f"\n{name} {case}\n{table(timings, least)}", flush=True)
        if least and device.type == "cuda" and HAS_TRITON:
            peak = triton.testing.get_dram_gbps(device.index or 0)
            print(f"modelled bound at {peak:.0f} GB/s: {least / peak / 1e6:.3f} ms", flush=True)
        if own.publish:
            shared = {"benchmark": name, "case": case}
            rows = ({**shared, "contestant": way, **found} for way, found in timings.items())
            append_rows("kernels", rows, where)


if __name__ == "__main__":
    sys.exit(main())
