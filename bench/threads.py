"""Which threads and which waiting suit the CPU step: `python -m bench.threads --config FILE`.

OpenMP threads that wait actively burn the cores that others want; threads that sleep take a moment
to wake. Every setting is a process of its own, and they take turns:

    --neighbours N     the step on images at hand, beside N processes that compute all the time (1)
    --fed              the step fed by its loader, with all threads and with one less
    --publish          append rows to bench/results/threads.jsonl; refused for a dirty tree
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from typing import Any

import torch

from bench.ablation import EVERYTHING, relative
from bench.measure import terminal
from bench.measure.case import case_of, device_of, origin
from bench.measure.contest import Contestant, Result, contest
from bench.measure.harness import RESULTS, write_rows
from bench.throughput import summary
from fastmoco.config import Config, check, dump, parse
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.machine.environment import LIBGOMP_SPIN_COUNT, SPIN_COUNT

ROWS = RESULTS / "threads.jsonl"


def settings(fed: bool, threads: int) -> dict[str, dict[str, str]]:
    """Variables that are set before torch is loaded, by what they are; the first is ours."""
    fewer = {f"{n} thread{'s' * (n > 1)}": str(n) for n in sorted({1, threads - 1}) if n}
    chosen: dict[str, dict[str, str]] = {EVERYTHING: {}}
    if not fed:
        chosen["OMP_WAIT_POLICY=passive"] = {"OMP_WAIT_POLICY": "passive"}
        for spins in ("1000", "100000", LIBGOMP_SPIN_COUNT):
            chosen[f"GOMP_SPINCOUNT={spins}"] = {"GOMP_SPINCOUNT": spins}
    chosen |= {name: {"OMP_NUM_THREADS": number} for name, number in fewer.items()}
    ours = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPIN_COUNT}
    return {name: {**ours, **more} for name, more in chosen.items()}


def compute_for_ever() -> None:
    """A neighbour that wants a core."""
    total = 0
    while True:
        total += sum(range(10_000))


def run(
    config: Config, fed: bool, neighbours: int, threads: int, windows: int, steps: int
) -> dict[str, Result]:
    """The contest of the settings, beside so many neighbours."""
    text = dump(resolve_folders(config) if fed else config)
    factory = "bench.steps.contestants:end_to_end" if fed else "bench.steps.contestants:our_step"
    contestants = [
        Contestant(name, factory, {"config": text}, variables)
        for name, variables in settings(fed, threads).items()
    ]
    spawn = get_context("spawn")
    busy = [spawn.Process(target=compute_for_ever, daemon=True) for _ in range(neighbours)]
    for neighbour in busy:
        neighbour.start()
    try:
        lead = config.data.prefetch + 2 if fed else 0
        return contest(contestants, windows=windows, steps=steps, warmup=2, lead=lead)
    finally:
        for neighbour in busy:
            neighbour.terminate()


def rows_of(results: Mapping[str, Result], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per setting, relative to the default."""
    rows = []
    for name, result in results.items():
        times, busy = relative(results, name)
        row = {**shared, "contestant": name, "relative": times, "relative_cpu": busy}
        rows.append(row | summary(result, shared["case"]["batch"]))
    return rows


@terminal.command("threads")
def main(arguments: Sequence[str]) -> None:
    """Print a line per setting; with --publish also append the rows."""
    parser = argparse.ArgumentParser("bench.threads", description=__doc__, add_help=False)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window-steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--neighbours", type=int, default=1)
    parser.add_argument("--fed", action="store_true")
    parser.add_argument("--publish", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    config = parse(rest)
    check(config, 1)
    where = origin(device_of(config), own.publish) | {"threads": own.threads}
    neighbours = 0 if own.fed else own.neighbours
    results = run(config, own.fed, neighbours, own.threads, own.windows, own.window_steps)
    beside = "loader" if own.fed else neighbours
    shared = {"benchmark": "threads", "case": case_of(config) | {"beside": beside}}
    rows = rows_of(results, shared)
    for row in rows:
        p20, p50, p80 = row["relative"]
        print(
            f"{row['contestant']:28s} step {p50:.2f} ({p20:.2f} - {p80:.2f}), "
            f"{row['p50_images_per_second']:.1f} images/s, CPU {row['relative_cpu']:.2f}, "
            f"{row['page_faults_per_step']} page faults, waiting {row['data_wait_percent']:.1f} %"
        )
    if own.publish:
        write_rows(ROWS, ({**row, "environment": where} for row in rows))


if __name__ == "__main__":
    sys.exit(main())
