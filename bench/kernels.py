"""Op by op: the fused ops beside the official formulation, torch.compile of it and other libraries.

    python -m bench.kernels [--device cuda] [--only ema] [--rounds 20] [--threads 2] [--save]
                            [--profile DIR]

Prints a table per case; --save appends rows to bench/results/kernels.jsonl and is refused for a
dirty tree. `official` is what the published MoCo code does: einsum, cat, division, cross entropy on
a clone of the queue, backward; a loop over parameters that allocates each new one; torch.optim.SGD.
It takes no top-5, which the official step does and the fused op includes. The layers of the
encoder are in `bench.races.layers`. N local batch, C dimension, K queue length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.measure import terminal
from bench.measure.case import origin
from bench.measure.harness import RESULTS, Contender, Race, append_rows, race, table
from bench.races.layers import batch_norm_race, cpu_races
from bench.races.loss import enqueue_race, loss_race
from bench.races.updates import ema_race, sgd_ema_race


def races(device: torch.device) -> dict[str, list[Callable[[], Race]]]:
    """All cases by op, built when they are run."""
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "info_nce": [
            lambda: loss_race(256, 128, 65536, f32, device),
            lambda: loss_race(256, 128, 65536, bf16, device),
            lambda: loss_race(32, 128, 65536, f32, device),
        ],
        "info_nce_enqueue": [lambda: enqueue_race(256, 128, 65536, device)],
        "ema": [lambda: ema_race(device)],
        "sgd_ema": [lambda: sgd_ema_race(device)],
        "batch_norm": [
            lambda: batch_norm_race(32, 64, 112, False, device),
            lambda: batch_norm_race(32, 256, 56, True, device),
            lambda: batch_norm_race(32, 256, 14, False, device),
            lambda: batch_norm_race(32, 1024, 14, True, device),
        ],
        **cpu_races(device),
    }


def profile(contenders: list[Contender], folder: Path, name: str, device: torch.device) -> None:
    """A trace per contender for chrome://tracing; its ten costliest operations on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for contender in contenders:
        contender.run()
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            contender.run()
        profiler.export_chrome_trace(str(folder / f"{name}-{contender.name.split(':')[0]}.json"))
        print(f"\n{name}: {contender.name}")
        print(profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40))


@terminal.command("kernels")
def main(arguments: Sequence[str]) -> None:
    """Race what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", metavar="OP")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--profile", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    known = races(device)
    if options.only not in (None, *known):
        parser.error(f"--only knows {', '.join(known)} here, not {options.only}")
    torch.set_num_threads(options.threads)
    where = origin(device, options.save)
    for op, builders in known.items():
        if options.only not in (None, op):
            continue
        for build in builders:
            name, case, contenders = build()
            if options.profile:
                profile(contenders, options.profile, name, device)
                continue
            timings = race(contenders, device, options.rounds)
            print(f"\n{name} {case}\n{table(timings, 'official')}", flush=True)
            if options.save:
                append_rows(RESULTS / "kernels.jsonl", name, case, timings, where)


if __name__ == "__main__":
    sys.exit(main())
