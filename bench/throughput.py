"""Images per second, where they go, and who is faster: `python -m bench.throughput --config FILE`.

Takes the options of `fastmoco.train`. In one run and in turns it times the step on images that are
on the device already, the bare encoder (supervised forward and backward plus one forward: the
ceiling of the step) and the published step, on the CPU also with our allocator setting, which is
worth much to it; then the loader alone, and the step fed by the loader. Every window ends with a
device synchronization; p20, p50 and p80 are over windows. Nothing but the device that torch finds
differs between CPU and CUDA.

    --quick            few short windows, no row: a first look in a minute or two
    --windows N        timed windows of each contestant (20)
    --window-steps N   steps of a window (1 on the CPU, 10 on CUDA)
    --limit-s S        begin no further window after that many seconds
    --only A,B         some of: loader, step, end_to_end, encoder, official, official_kept
    --profile          then write a trace, the costliest operations and shares to runs/profile
    --publish          append rows to bench/results/throughput.jsonl; refused for a dirty tree
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import profiling
from bench.measure import nvml, product, terminal
from bench.measure.case import case_of, device_of, origin
from bench.measure.contest import Contestant, Result, contest
from bench.measure.harness import RESULTS, percentiles, write_rows
from bench.pages import tables
from fastmoco.config import Config, ConfigError, check, dump, flatten, parse
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.machine.environment import LIBGOMP_SPIN_COUNT

ROWS = RESULTS / "throughput.jsonl"
PROFILE = Path("runs/profile")

FACTORIES = {
    "loader": "bench.steps.contestants:loader_alone",
    "step": "bench.steps.contestants:our_step",
    "end_to_end": "bench.steps.contestants:end_to_end",
    "encoder": "bench.steps.contestants:bare_encoder",
    "official": "bench.steps.contestants:official_step",
    "official_kept": "bench.steps.contestants:official_step_with_kept_memory",
}

# The published code leaves libgomp's waiting as it is; `fastmoco` does not.
PUBLISHED = {"GOMP_SPINCOUNT": LIBGOMP_SPIN_COUNT}
ENVIRONMENTS = {"official": PUBLISHED, "official_kept": PUBLISHED}

FED = ("loader", "end_to_end")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    only: tuple[str, ...]
    windows: int
    window_steps: int
    limit_s: float
    quick: bool
    publish: bool
    profile: bool


def options(arguments: Sequence[str]) -> tuple[Plan, Config]:
    """The benchmark's own options and, from the rest, the configuration of the run.

    Raises `ConfigError` as `fastmoco.config.parse` does, and for unknown contestants.
    """
    parser = argparse.ArgumentParser("bench.throughput", description=__doc__, add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--windows", type=int, default=0)
    parser.add_argument("--window-steps", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=math.inf)
    parser.add_argument("--only", default="")
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--profile", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    config = parse(rest)
    check(config, 1)
    cuda = device_of(config).type == "cuda"
    # Who is not named must make sense here: CUDA tensors do not come from malloc.
    sensible = [name for name in FACTORIES if not (cuda and name == "official_kept")]
    only = tuple(own.only.split(",")) if own.only else tuple(sensible)
    if config.data.source == "synthetic":
        only = tuple(name for name in only if name not in FED)
    unknown = sorted(set(only) - set(FACTORIES))
    if unknown:
        raise ConfigError(f"--only knows {', '.join(FACTORIES)}, not {', '.join(unknown)}.")
    if not only:
        raise ConfigError(f"--only {own.only}: synthetic data has no loader; set data.source.")
    plan = Plan(
        only=only,
        windows=own.windows or (5 if own.quick else 20),
        window_steps=own.window_steps or (10 if cuda else 1),
        limit_s=min(own.limit_s, 90.0) if own.quick else own.limit_s,
        quick=own.quick,
        publish=own.publish,
        profile=own.profile,
    )
    return plan, config


def summary(result: Result, images: int) -> dict[str, Any]:
    """Percentiles and facts of one contestant, as they stand in a row."""
    speeds = result.images_per_second(images)
    p20, p50, p80 = percentiles(speeds, 3)
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
        **nvml.summary([w.gpu for w in result.windows if w.gpu], seconds, steps * images),
        **result.facts,
    }


def ratio(results: dict[str, Result], mine: str, other: str) -> list[float] | None:
    """p20, p50, p80 over turns of the speed of `mine` relative to `other`, or None.

    Windows of one turn ran right after each other, so their ratio is steadier than either speed.
    """
    if mine not in results or other not in results:
        return None
    turns = zip(results[mine].windows, results[other].windows, strict=True)
    return percentiles([(b.seconds / b.steps) / (a.seconds / a.steps) for a, b in turns])


def measure(
    plan: Plan,
    config: Config,
    meter: nvml.Meter | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Result]:
    """Run the contest of `plan`; `meter` reads the GPU meanwhile, `between` follows each turn."""
    text = dump(config if config.data.source == "synthetic" else resolve_folders(config))
    contestants = [
        Contestant(name, FACTORIES[name], {"config": text}, ENVIRONMENTS.get(name, {}))
        for name in plan.only
    ]

    def progress(done: int) -> None:
        terminal.progress(done, plan.windows)

    def turned(done: int) -> None:
        between()
        progress(done)

    limits: dict[str, Any] = {
        "windows": plan.windows,
        "steps": plan.window_steps,
        "warmup": max(2, plan.window_steps),
        "limit_s": plan.limit_s,
        "meter": meter,
        "progress": turned,
    }
    results = contest([c for c in contestants if c.name not in FED], **limits)
    # A loader works ahead while others have their turn, so whoever it feeds runs by itself.
    for contestant in contestants:
        if contestant.name in FED:
            warmup = plan.window_steps + config.data.prefetch + 2
            ahead = limits | {"warmup": warmup, "progress": progress}
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


@terminal.command("throughput")
def main(arguments: Sequence[str]) -> None:
    """Print the table and whatever else was asked for."""
    plan, config = options(arguments)
    device = device_of(config)
    where = origin(device, plan.publish)
    meter = nvml.build_meter(device, partial(terminal.complain, "throughput"))
    rate = product.Rate()
    results = measure(plan, config, meter, rate.measure if device.type == "cpu" else rate.skip)
    rows = rows_of(config, results, where, rate)
    terminal.show(tables.caption(rows), *tables.cells(rows), tables.sentence(rows))
    if plan.publish:
        write_rows(ROWS, rows)
        print(f"{len(rows)} rows appended to {ROWS.name}")
    if plan.profile:
        profiling.report(profiling.profile_step(config, PROFILE, plan.window_steps + 1), PROFILE)


def rows_of(
    config: Config, results: dict[str, Result], where: dict[str, Any], rate: product.Rate
) -> list[dict[str, Any]]:
    """One row per contestant; rows of one contest share environment, ratios and product rate."""
    shared = {
        "benchmark": "throughput",
        "case": case_of(config),
        "ratios": ratios_of(results),
        "config": flatten(config),
        "environment": where,
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
