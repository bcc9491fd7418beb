"""Images per second, where they go, and who is faster: `python -m bench.throughput --config FILE`.

Takes the options of `fastmoco.train`. In one run and in turns it times the step on images that are
on the device already, the bare encoder (supervised forward and backward plus one forward: the
ceiling of the step) and the published step, on the CPU also with our allocator setting, which is
worth much to it; then the loader alone, and the step fed by the loader. Every window ends with a
device synchronization; p20, p50 and p80 are over windows. Nothing but the device that torch finds
differs between CPU and CUDA.

--only takes some of loader, step, end_to_end, encoder, official, official_kept.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import profiling
from bench.measure import nvml, product
from bench.measure.contest import Contestant, Result, contest
from bench.measure.program import (
    chosen,
    command,
    complain,
    configured,
    parser,
    progress,
    show,
    steps_of,
)
from bench.measure.rows import Row, append_rows, case_of, device_of, origin, quantiles
from bench.pages.tables import caption, cell, figure
from fastmoco.config import Config, ConfigError, dump, flatten
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.machine.environment import LIBGOMP_SPIN_COUNT

PROFILE = Path("runs/profile")

# The published code leaves libgomp's waiting as it is; `fastmoco` does not.
PUBLISHED = {"GOMP_SPINCOUNT": LIBGOMP_SPIN_COUNT}
STEPS = "bench.steps.contestants"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("loader", f"{STEPS}:loader_alone"),
        Contestant("step", f"{STEPS}:our_step"),
        Contestant("end_to_end", f"{STEPS}:end_to_end"),
        Contestant("encoder", f"{STEPS}:bare_encoder"),
        Contestant("official", f"{STEPS}:official_step", {}, PUBLISHED),
        Contestant("official_kept", f"{STEPS}:official_step", {"kept_memory": True}, PUBLISHED),
    )
}
FED = ("loader", "end_to_end")


# Header of a column and what stands in it; a row without the field has a dash.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "images/s p50": lambda row: figure(row["p50_images_per_second"]),
    "p20 - p80": lambda row: " - ".join(figure(row[f"p{p}_images_per_second"]) for p in (20, 80)),
    "share of the fp32 product rate": lambda row: f"{row['product_share_percent']:.0f} %",
    "CPU s per step": lambda row: f"{row['cpu_s_per_step']:.3f}",
    "peak memory": lambda row: f"{row['peak_memory_gib']:.2f} GiB",
    "host syncs per step": lambda row: str(row["host_syncs"]),
    "kernel launches per step": lambda row: str(row["kernel_launches"]),
    "power": lambda row: f"{row['power_w']:.0f} W",
    "SM clock": lambda row: f"{row['sm_clock_mhz']:.0f} MHz",
    "kWh per million images": lambda row: f"{row['kwh_per_million_images']:.3g}",
}
TITLES = {
    "loader": "loader alone",
    "step": "our step",
    "end_to_end": "our step, fed by the loader",
    "encoder": "bare encoder: forward, backward, one more forward",
    "official": "published step",
    "official_kept": "published step, freed memory kept as in ours",
}


def options(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The benchmark's own options, `only` as a list, and the configuration of the run.

    Raises `ConfigError` for a configuration that cannot run and for unknown contestants.
    """
    made = parser("throughput", __doc__)
    made.add_argument("--quick", action="store_true", help="5 windows, 90 s of turns at most")
    made.add_argument("--limit-s", type=float, default=math.inf, help="then begin no window")
    made.add_argument(
        "--profile", action="store_true", help=f"then write a trace and shares to {PROFILE}"
    )
    own, config, _ = configured(made, arguments)
    device = device_of(config)
    # Who is not named must make sense here: CUDA tensors do not come from malloc.
    pointless = {"official_kept"} if device.type == "cuda" and not own.only else set()
    synthetic = set(FED) if config.data.source == "synthetic" else set()
    named = chosen(own.only, list(CONTESTANTS))
    only = [name for name in named if name not in pointless | synthetic]
    if not only:
        raise ConfigError(f"--only {own.only}: synthetic data has no loader; set data.source.")
    own.only, own.steps = only, steps_of(own.steps, device)
    if own.quick:
        own.windows, own.limit_s = min(own.windows, 5), min(own.limit_s, 90.0)
    return own, config


def summary(result: Result, images: int) -> Row:
    """Percentiles and facts of one contestant, as they stand in a row."""
    speeds = result.images_per_second(images)
    p20, p50, p80 = quantiles(speeds, 3)
    seconds = sum(w.seconds for w in result.windows)
    steps = sum(w.steps for w in result.windows)
    return {
        "p20_images_per_second": p20,
        "p50_images_per_second": p50,
        "p80_images_per_second": p80,
        "n": len(speeds),
        "steps": steps,
        "cpu_s_per_step": round(sum(w.cpu_seconds for w in result.windows) / steps, 4),
        "page_faults_per_step": round(sum(w.page_faults for w in result.windows) / steps),
        "data_wait_percent": round(100 * sum(w.wait_s for w in result.windows) / seconds, 2),
        **nvml.summary([s for w in result.windows for s in w.gpu], seconds, steps * images),
        **result.facts,
    }


def ratio(results: dict[str, Result], mine: str, other: str) -> list[float] | None:
    """p20, p50, p80 over turns of the speed of `mine` relative to `other`, or None.

    Windows of one turn ran right after each other, so their ratio is steadier than either speed.
    """
    if mine not in results or other not in results:
        return None
    turns = zip(results[mine].windows, results[other].windows, strict=True)
    return quantiles([(b.seconds / b.steps) / (a.seconds / a.steps) for a, b in turns])


def measure(
    plan: argparse.Namespace,
    config: Config,
    meter: nvml.Meter | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Result]:
    """Run the contest of `plan`; `meter` reads the GPU meanwhile, `between` follows each turn."""
    text = dump(config if config.data.source == "synthetic" else resolve_folders(config))
    named = [CONTESTANTS[name] for name in plan.only]
    contestants = [replace(one, arguments={**one.arguments, "config": text}) for one in named]
    shown = progress(plan.windows)

    def turned(done: int) -> None:
        between()
        shown(done)

    limits: dict[str, Any] = {
        "windows": plan.windows,
        "steps": plan.steps,
        "warmup": max(2, plan.steps),
        "limit_s": plan.limit_s,
        "meter": meter,
        "progress": turned,
    }
    results = contest([c for c in contestants if c.name not in FED], **limits)
    # A loader works ahead while others have their turn, so whoever it feeds runs by itself.
    for contestant in contestants:
        if contestant.name in FED:
            warmup = plan.steps + config.data.prefetch + 2
            ahead = limits | {"warmup": warmup, "progress": shown}
            results |= contest([contestant], **ahead)
    return {name: results[name] for name in plan.only}


def ratios_of(results: dict[str, Result]) -> dict[str, list[float]]:
    """Every ratio that the contestants allow, by what it says."""
    wanted = {
        "our step / published step": ("step", "official"),
        "our step / published step, freed memory kept": ("step", "official_kept"),
        "our step / bare encoder": ("step", "encoder"),
    }
    found = {title: ratio(results, *pair) for title, pair in wanted.items()}
    return {title: value for title, value in found.items() if value}


def cells(run: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers, the first empty, and one line per contestant; columns that nobody fills are out."""
    lines = [[_or_dash(make, row) for make in COLUMNS.values()] for row in run]
    filled = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in lines)]
    titles = [TITLES[row["contestant"]] for row in run]
    body = [[title, *(line[i] for i in filled)] for title, line in zip(titles, lines, strict=True)]
    return ["", *(list(COLUMNS)[i] for i in filled)], body


def _or_dash(make: Callable[[Row], str], row: Row) -> str:
    try:
        return make(row)
    except KeyError:
        return "-"


def sentence(run: Sequence[Row]) -> str:
    """The ratios of a contest and how it was run."""
    ratios = run[0]["ratios"]
    found = [f"{title}: **{cell(values, run[0]['n'])}**" for title, values in ratios.items()]
    waits = [row["data_wait_percent"] for row in run if row["contestant"] == "end_to_end"]
    found += [f"waiting for data, end to end: **{wait:.1f} %**" for wait in waits]
    if "product_gflops" in run[0]:
        found += [f"a product of fp32 matrices: **{run[0]['product_gflops'][1]:.0f} GFLOP/s**"]
    how = f"{run[0]['n']} windows of each, in turns; what the loader feeds ran apart."
    return f"{'; '.join(found)}. {how}" if found else how


@command("throughput")
def main(arguments: Sequence[str]) -> None:
    """Print the table and whatever else was asked for."""
    plan, config = options(arguments)
    device = device_of(config)
    where = origin(device, plan.publish)
    meter = nvml.build_meter(device, partial(complain, "throughput"))
    rate = product.Rate()
    results = measure(plan, config, meter, rate.measure if device.type == "cpu" else rate.skip)
    rows = rows_of(config, results, rate)
    show(f"{caption({**rows[0], 'environment': where})}:", *cells(rows), sentence(rows))
    if plan.publish:
        append_rows("throughput", rows, where)
    if plan.profile:
        profiling.report(profiling.profile_step(config, PROFILE, plan.steps + 1), PROFILE)


def rows_of(config: Config, results: dict[str, Result], rate: product.Rate) -> list[Row]:
    """One row per contestant; rows of one contest share ratios and product rate."""
    shared = {
        "benchmark": "throughput",
        "case": case_of(config),
        "ratios": ratios_of(results),
        "config": flatten(config),
        **rate.summary(),
    }
    images = config.optim.global_batch_size
    rows = [
        {**shared, "contestant": name, **summary(result, images)}
        for name, result in results.items()
    ]
    return [row | rate.share(row, images) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
