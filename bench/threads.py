"""Which threads and which waiting suit the CPU step: `python -m bench.threads --config FILE`.

OpenMP threads that wait actively burn the cores that loader workers want; threads that sleep take
a moment to wake. Every setting is a process of its own, and they take turns with a busy neighbour,
one process that computes all the time as a loader's worker does, or without (`--alone`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from multiprocessing import get_context

import torch

from bench.ablation import EVERYTHING, relative
from bench.contest import Contestant, contest
from bench.harness import RESULTS, environment
from bench.throughput import case_of, summary
from fastmoco.config import check, dump, parse

ROWS = RESULTS / "threads.jsonl"
SETTINGS: dict[str, dict[str, str]] = {
    EVERYTHING: {},  # as libgomp comes
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def compute_for_ever() -> None:
    """A neighbour that wants a core."""
    total = 0
    while True:
        total += sum(range(10_000))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0."""
    parser = argparse.ArgumentParser("bench.threads", description=__doc__, add_help=False)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--publish", action="store_true")
    own, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    config = parse(rest)
    check(config, 1)
    where = environment(torch.device("cpu"))
    if own.publish and where["dirty"]:
        print("threads: the tree differs from its commit: commit first", file=sys.stderr)
        return 2
    contestants = [
        Contestant(
            name,
            "bench.machines:our_step",
            {"config": dump(config)},
            {"OMP_NUM_THREADS": str(own.threads), **variables},
        )
        for name, variables in SETTINGS.items()
    ]
    neighbour = get_context("spawn").Process(target=compute_for_ever, daemon=True)
    if not own.alone:
        neighbour.start()
    try:
        results = contest(contestants, windows=own.windows, steps=1, warmup=2)
    finally:
        if neighbour.pid:
            neighbour.terminate()
    rows = []
    for name, result in results.items():
        times, busy = relative(results, name)
        row = {"relative": times, "relative_cpu": busy, "alone": own.alone}
        row |= summary(result, config.optim.global_batch_size)
        rows.append({"benchmark": "threads", "case": case_of(config), "contestant": name, **row})
        print(f"{name:28s} step {times[1]:.2f} ({times[0]:.2f} - {times[2]:.2f}), CPU {busy:.2f}")
    if own.publish:
        with ROWS.open("a") as file:
            file.writelines(json.dumps({**row, "environment": where}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
